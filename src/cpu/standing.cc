// SPDX-License-Identifier: Apache-2.0
#include "cpu/standing.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "cpu/rail.h"
#include "domain/given_up.h"

namespace tern::cpu {
namespace {

constexpr int64_t kTellEveryMs = 20;
constexpr int kRankBits = 32;  // of a late wait; the number is above

}  // namespace

Standing::Standing(const Domain& domain, const RailPlace& place)
    : domain_(domain), place_(place), heard_waits_(static_cast<size_t>(place.layout.banks.num_nodes)) {}

// The network writes to what is read, and reads what is written.
layout::StandingWords Standing::read(int64_t offset) const {
  layout::StandingWords words;
  place_.proxy->while_nothing_moves([&] { std::memcpy(&words, place_.memory->address() + offset, sizeof(words)); });
  return words;
}

void Standing::write(int64_t offset, const layout::StandingWords& words) const {
  place_.proxy->while_nothing_moves([&] { std::memcpy(place_.memory->address() + offset, &words, sizeof(words)); });
}

layout::StandingWords Standing::told_by(int node) const { return read(place_.layout.standing(node)); }

// Calls visit(node, rank) for those whose rank of this rail takes part in the generation.
template <typename Visitor>
void Standing::for_each_other_node(Visitor visit) const {
  for (int node = 0; node < place_.layout.banks.num_nodes; ++node)
    if (node != place_.node && place_.serves[static_cast<size_t>(node)] != 0) visit(node, place_.ranks[static_cast<size_t>(node)]);
}

// Calls visit(r) for the ranks of the node that were not given up.
template <typename Visitor>
void Standing::for_each_mate(Visitor visit) const {
  domain_.for_each_member([&](int r) {
    if (!is_given_up(domain_, domain_.rank_of_group(r))) visit(r);
  });
}

void Standing::show_late_wait(int rank_of_group) {
  const uint64_t number = (late_wait_.load(std::memory_order_relaxed) >> kRankBits) + 1;
  late_wait_.store(number << kRankBits | (static_cast<uint64_t>(rank_of_group) + 1), std::memory_order_relaxed);
}

int Standing::late_wait_of(int node, Deadline::Clock::time_point since) const {
  const HeardWait& heard = heard_waits_[static_cast<size_t>(node)];
  const uint64_t late_wait = heard.late_wait.load(std::memory_order_acquire);
  if (late_wait == 0 || heard.at.load(std::memory_order_relaxed) < since) return -1;
  return static_cast<int>(late_wait & ((uint64_t{1} << kRankBits) - 1)) - 1;
}

bool Standing::has_told(int node, int num_given_up) const {
  const layout::GivenUpCell told = told_by(node).given_up;
  int num_told = 0;
  for (const uint64_t word : told.ranks) num_told += std::popcount(word);
  if (num_told < num_given_up) return false;
  announce_given_up(domain_, told.ranks);
  return true;
}

void Standing::turn() {
  hear();
  const bool is_news = update_own();
  const bool is_time = is_any_given_up(domain_) && next_telling_.passed();
  if (is_news || is_time) tell(is_news);
}

void Standing::begin(uint64_t operation) { store_release(domain_.begun(domain_.rank).begun, operation); }

bool Standing::have_all_begun(uint64_t operation) const {
  bool have_all = true;
  for_each_mate([&](int r) {
    const layout::BegunCell& cell = domain_.begun(r);
    have_all = have_all && load_acquire(cell.begun) >= operation && load_acquire(cell.begun_on_rail) >= operation;
  });
  return have_all;
}

void Standing::hear() {
  uint64_t begun = UINT64_MAX;
  for_each_other_node([&](int node, int rank) {
    const layout::StandingWords told = told_by(node);
    announce_given_up(domain_, told.given_up.ranks);
    HeardWait& heard = heard_waits_[static_cast<size_t>(node)];
    if (told.late_wait != heard.late_wait.load(std::memory_order_relaxed)) {
      heard.at.store(Deadline::Clock::now(), std::memory_order_relaxed);
      heard.late_wait.store(told.late_wait, std::memory_order_release);
    }
    if (!is_given_up(domain_, rank)) begun = std::min(begun, told.begun);
  });
  store_release(domain_.begun(domain_.rank).begun_on_rail, begun);
}

// What is to be told next. True: it has changed.
bool Standing::update_own() {
  layout::StandingWords now = own_;
  const layout::GivenUpCell& given_up = domain_.given_up(domain_.rank);
  std::ranges::transform(given_up.ranks, now.given_up.ranks, [](const uint64_t& word) { return load_acquire(word); });
  now.late_wait = late_wait_.load(std::memory_order_relaxed);
  if (is_any_given_up(domain_)) {
    now.begun = UINT64_MAX;
    for_each_mate([&](int r) { now.begun = std::min(now.begun, load_acquire(domain_.begun(r).begun)); });
  }
  if (std::memcmp(&now, &own_, sizeof(now)) == 0) return false;
  own_ = now;
  write(place_.layout.own_standing(), own_);
  return true;
}

// Those that were given up hear it once, in case they are only late.
void Standing::tell(bool is_news) {
  next_telling_ = Deadline::in_ms(kTellEveryMs);
  for_each_other_node([&](int node, int rank) {
    if (!is_news && is_given_up(domain_, rank)) return;
    place_.proxy->put({.peer = rank,
                       .from = place_.memory,
                       .from_offset = static_cast<size_t>(place_.layout.own_standing()),
                       .to = place_.remote[static_cast<size_t>(node)],
                       .to_offset = static_cast<uint64_t>(place_.layout.standing(place_.node)),
                       .num_bytes = sizeof(layout::StandingWords),
                       .confirmed = false,
                       .counted = false});
  });
}

}  // namespace tern::cpu
