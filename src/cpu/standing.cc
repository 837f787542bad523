// SPDX-License-Identifier: Apache-2.0
#include "cpu/standing.h"

#include <algorithm>
#include <array>
#include <bit>

#include "cpu/rail.h"
#include "domain/given_up.h"

namespace tern::cpu {
namespace {

constexpr int64_t kTellEveryMs = 20;
constexpr int kRankBits = 32;  // of a late wait; the number is above

using Ranks = std::array<uint64_t, layout::kMaxRanks / 64>;

Ranks load(const layout::GivenUpCell& cell) {
  Ranks ranks;
  std::ranges::transform(cell.ranks, ranks.begin(), [](const uint64_t& word) { return load_acquire(word); });
  return ranks;
}

}  // namespace

layout::StandingWords& Standing::words(int64_t offset) const {
  return *reinterpret_cast<layout::StandingWords*>(place_.memory->address() + offset);
}

const layout::RailMemoryLayout& Standing::place_layout() const { return place_.layout; }

void Standing::show_late_wait(int rank_of_group) {
  const uint64_t number = (late_wait_.load(std::memory_order_relaxed) >> kRankBits) + 1;
  late_wait_.store(number << kRankBits | (static_cast<uint64_t>(rank_of_group) + 1), std::memory_order_relaxed);
}

uint64_t Standing::late_wait_of(int node) const { return load_acquire(words_of(node).late_wait); }

bool Standing::is_late_wait_for(uint64_t late_wait, int rank_of_group) {
  return (late_wait & ((uint64_t{1} << kRankBits) - 1)) == static_cast<uint64_t>(rank_of_group) + 1;
}

bool Standing::has_told(int node, int num_given_up) const {
  const Ranks ranks = load(words_of(node).given_up);
  int num_told = 0;
  for (const uint64_t word : ranks) num_told += std::popcount(word);
  if (num_told < num_given_up) return false;
  announce_given_up(domain_, ranks);
  return true;
}

void Standing::turn() {
  hear();
  const bool is_news = update_own();
  const bool is_time = is_any_given_up(domain_) && next_telling_.passed();
  if (is_news || is_time) tell(is_news);
}

void Standing::hear() {
  for (int node = 0; node < place_.layout.num_nodes; ++node)
    if (node != place_.node && place_.serves[static_cast<size_t>(node)] != 0) announce_given_up(domain_, load(words_of(node).given_up));
}

// What is to be told next. True: it has changed.
bool Standing::update_own() {
  bool has_changed = false;
  const auto set = [&](uint64_t& word, uint64_t value) {
    if (load_acquire(word) == value) return;
    store_release(word, value);
    has_changed = true;
  };
  layout::StandingWords& own = words(place_.layout.own_standing());
  const Ranks given_up = load(domain_.given_up(domain_.rank));
  for (size_t i = 0; i < given_up.size(); ++i) set(own.given_up.ranks[i], given_up[i]);
  set(own.late_wait, late_wait_.load(std::memory_order_relaxed));
  return has_changed;
}

// Those that were given up hear it once, in case they are only late.
void Standing::tell(bool is_news) {
  next_telling_ = Deadline::in_ms(kTellEveryMs);
  for (int node = 0; node < place_.layout.num_nodes; ++node) {
    const auto idx = static_cast<size_t>(node);
    const int rank = place_.ranks[idx];
    if (node == place_.node || place_.serves[idx] == 0 || (!is_news && is_given_up(domain_, rank))) continue;
    place_.proxy->put({.peer = rank,
                       .from = place_.memory,
                       .from_offset = static_cast<size_t>(place_.layout.own_standing()),
                       .to = place_.remote[idx],
                       .to_offset = static_cast<uint64_t>(place_.layout.standing(place_.node)),
                       .num_bytes = sizeof(layout::StandingWords),
                       .confirmed = false,
                       .counted = false});
  }
}

}  // namespace tern::cpu
