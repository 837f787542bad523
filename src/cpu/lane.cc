// SPDX-License-Identifier: Apache-2.0
#include "cpu/lane.h"

#include <sched.h>

#include <algorithm>
#include <thread>

#include "base/error.h"
#include "cpu/standing.h"
#include "domain/given_up.h"
#include "rows/rows.h"

namespace tern::cpu {
namespace {

// Sleeps are cut into pieces of this length, so that a wake-up lost to a dying peer costs no more.
constexpr std::chrono::milliseconds kLongestSleep{100};

constexpr std::chrono::milliseconds kLook{1};  // how often a rank looks for a word that rings no bell

constexpr int kNobody = -1;

}  // namespace

std::string shape_text(const layout::CallShape& s) {
  return fmt::format(
      "row {} bytes, scales {} bytes, max_tokens {}, {} experts, top-{}, row_capacity {}, alignment {}, choices {:#x}, {} tokens a round",
      s.row_bytes, s.scale_bytes, s.max_tokens, s.num_experts, s.num_topk, s.row_capacity, s.alignment, s.choices, s.tokens_per_round);
}

Lane::Lane(const Domain& domain, int index, const LaneOptions& options, SpanLog& spans)
    : domain_(&domain),
      index_(index),
      options_(options),
      spans_(&spans),
      counters_(std::make_unique<Counters>()),
      num_messages_(domain.num_ranks),
      given_up_(domain.topology.num_ranks) {}

void Lane::restart() {
  epochs_.restart();
  consumed_ = 0;
  due_ = {};
  std::fill(given_up_.begin(), given_up_.end(), 0);
  num_given_up_ = 0;
}

void Lane::begin_round(const RoundTrip& trip, uint64_t epoch) {
  std::fill(num_messages_.begin(), num_messages_.end(), 0);
  if (epoch <= layout::kNumBanks) return;
  for_each_peer([&](int peer) { await_consumed(epoch - layout::kNumBanks, trip.operation, peer); });
}

int64_t Lane::publish_round(const RoundTrip& trip, uint64_t epoch) {
  uint64_t sent = 0, sent_local = 0;
  for_each_peer([&](int peer) {
    auto& header = *reinterpret_cast<layout::MessageHeader*>(domain_->bank(peer, index_, epoch, domain_->rank));
    header.shape = trip.shape;
    header.num_given_up = num_given_up_;
    header.num_messages = num_messages_[static_cast<size_t>(peer)];
    const auto bytes = static_cast<uint64_t>(trip.bank.slots() + header.num_messages * trip.bank.slot.stride());
    (peer == domain_->rank ? sent_local : sent) += bytes;
  });
  counters_->sent_local_bytes.fetch_add(sent_local, std::memory_order_relaxed);
  counters_->sent_bytes.fetch_add(sent, std::memory_order_relaxed);
  counters_->rounds.fetch_add(1, std::memory_order_relaxed);
  store_fence();  // publishes the streaming stores of the round, which the release below does not order
  const uint64_t flag = layout::make_flag(epoch, index_, trip.operation);
  for_each_peer([&](int peer) {
    store_release(domain_->cell(peer, index_, domain_->rank).arrived, flag);
    ring(domain_->doorbell(peer, index_));
  });
  epochs_.open(epoch);
  return static_cast<int64_t>(sent + sent_local);
}

void Lane::finish_epoch(uint64_t epoch) {
  store_fence();  // rows streamed into the caller's outputs, which others may read as soon as the operation returns
  epochs_.close(epoch);
  const uint64_t consumed = epochs_.consumed();
  if (consumed == consumed_) return;
  consumed_ = consumed;
  for_each_peer([&](int peer) {
    store_release(domain_->cell(peer, index_, domain_->rank).consumed, consumed);
    ring(domain_->doorbell(peer, index_));
  });
}

const std::byte* Lane::await_arrived(const RoundTrip& trip, uint64_t epoch, int source) {
  if (domain_->is_masked(source)) return nullptr;
  const uint64_t& word = domain_->cell(domain_->rank, index_, source).arrived;
  const Awaited awaited{domain_->rank_of_group(source), trip.operation, epoch, word, TERN_AWAITED_MESSAGES};
  if (!wait_until(awaited, [&] { return layout::flag_epoch(load_acquire(word)) >= epoch; })) return nullptr;
  const uint64_t flag = load_acquire(word);
  if (layout::flag_epoch(flag) == epoch && layout::flag_operation(flag) != trip.operation)
    return mismatch(awaited, layout::flag_operation(flag));
  const layout::MessageHeader& header = domain_->header(index_, epoch, source);
  if (header.shape != trip.shape) return mismatch(awaited, trip.shape, header.shape);
  if (header.num_given_up != 0) hear_given_up();  // what comes from there lacks their share
  if (gave_up(source)) return nullptr;
  return domain_->bank(domain_->rank, index_, epoch, source);
}

void Lane::post_ready(uint64_t epoch, tern_operation operation, int64_t offset) {
  store_fence();  // rows written with streaming stores before a combine
  for_each_peer([&](int peer) {
    layout::FlagCell& cell = domain_->cell(peer, index_, domain_->rank);
    cell.ready_offset[epoch % layout::kNumBanks] = static_cast<uint64_t>(offset);
    store_release(cell.ready, layout::make_flag(epoch, index_, operation));
    ring(domain_->doorbell(peer, index_));
  });
}

std::byte* Lane::await_ready(uint64_t epoch, tern_operation operation, int peer) {
  if (domain_->is_masked(peer)) return nullptr;
  const layout::FlagCell& cell = domain_->cell(domain_->rank, index_, peer);
  const Awaited awaited{domain_->rank_of_group(peer), operation, epoch, cell.ready, TERN_AWAITED_ADDRESS};
  // A peer that does not use window memory goes on without posting: then its data arrive, and no `ready` was there before.
  const auto ready = [&] { return layout::flag_epoch(load_acquire(cell.ready)) >= epoch; };
  const auto passed_by = [&] { return layout::flag_epoch(load_acquire(cell.arrived)) >= epoch && !ready(); };
  if (!wait_until(awaited, [&] { return ready() || passed_by(); })) return nullptr;
  if (!ready()) return mismatch(awaited, fmt::format("rank {} passed rows outside of its window or called something else", awaited.rank));
  const uint64_t flag = load_acquire(cell.ready);
  if (layout::flag_epoch(flag) == epoch && layout::flag_operation(flag) != operation)
    return mismatch(awaited, layout::flag_operation(flag));
  return domain_->heap(peer) + cell.ready_offset[epoch % layout::kNumBanks];
}

void Lane::await_consumed(uint64_t epoch, tern_operation operation, int peer) {
  const uint64_t& word = domain_->cell(domain_->rank, index_, peer).consumed;
  wait_until({domain_->rank_of_group(peer), operation, epoch, word, TERN_AWAITED_CONSUMED}, [&] { return load_acquire(word) >= epoch; });
}

bool Lane::await_network(const Awaited& awaited) {
  return wait_until(awaited, [&] { return load_acquire(awaited.word) >= awaited.epoch; });
}

bool Lane::await_word_of(const Awaited& from, const std::function<bool()>& has_come) {
  due_ = {};
  return wait_until(from, [&] { return has_come(); });
}

// Of several ranks that are missing, one deadline serves for all: who is waited for next has had that time too. It has a grace left, here or
// behind the deadline, unless it is known to be down.
Deadline Lane::deadline_of(const Awaited& awaited, Deadline::Clock::time_point now) {
  const Due due{is_in_domain(awaited.rank), awaited.what, awaited.epoch, now};
  if (due.in_node != due_.in_node || due.what != due_.what || due.epoch != due_.epoch) {
    due_ = due;
    return Deadline::in_ms(options_.timeout_ms);
  }
  const auto waited = std::chrono::duration_cast<std::chrono::milliseconds>(now - due_.since);
  const int64_t left_ms = std::max<int64_t>(options_.timeout_ms - waited.count(), 0);
  if (options_.num_graces > 0 || left_ms >= options_.grace_ms) return Deadline::in_ms(left_ms);
  return Deadline::in_ms(is_known_to_be_down(domain_->topology, awaited.rank) ? left_ms : options_.grace_ms);
}

// How long a wait goes on behind its deadline.
class Lane::Patience {
 public:
  Patience(const Lane& lane, const Awaited& awaited) : lane_(lane), awaited_(awaited) {}

  // Another grace? A rank that has been seen to wait for another one has kMostGraces, and as many again with each further rank that it waits for:
  // it is alive, and on its way here. Between two of its waits nothing shows that, so what was seen before counts.
  bool has_more() {
    if (is_known_to_be_down(lane_.domain_->topology, awaited_.rank)) return false;
    const int other = lane_.shown_wait_of(awaited_);
    if (other != kNobody && other != lane_.own_rank() && other != other_) {
      other_ = other;
      num_graces_ = 0;
    }
    return num_graces_++ < (other_ == kNobody ? lane_.options_.num_graces : kMostGraces);
  }

 private:
  const Lane& lane_;
  const Awaited& awaited_;
  int other_ = kNobody;
  int num_graces_ = 0;
};

// A rank of the node shows each wait; one of another node those that have passed their deadline.
int Lane::shown_wait_of(const Awaited& awaited) const {
  if (is_in_domain(awaited.rank))
    return static_cast<int>(load_acquire(domain_->doorbell(awaited.rank - domain_->first_rank, index_).awaits)) - 1;
  return standing_ == nullptr ? kNobody : standing_->late_wait_of(domain_->topology.node[static_cast<size_t>(awaited.rank)], due_.since);
}

template <typename Ready>
bool Lane::wait_until(const Awaited& awaited, Ready ready) {
  if (gave_up_rank(awaited.rank)) return false;  // also if it comes after all: it counts as absent until the next generation
  if (ready()) return true;
  return with_span(
      *spans_,
      {.kind = TERN_SPAN_WAIT, .operation = awaited.operation, .peer = awaited.rank, .awaited = awaited.what, .epoch = awaited.epoch},
      [&](Span& span) {
        const bool has_come = keep_waiting(awaited, ready);
        if (!has_come) span.set_status(TERN_TIMEOUT);
        return has_come;
      });
}

template <typename Ready>
bool Lane::keep_waiting(const Awaited& awaited, Ready ready) {
  counters_->waits.fetch_add(1, std::memory_order_relaxed);
  const auto start = Deadline::Clock::now();
  Deadline deadline = deadline_of(awaited, start);
  Patience patience(*this, awaited);
  layout::Doorbell& bell = domain_->doorbell(domain_->rank, index_);
  const ShownWait shown(bell, awaited.rank);
  const auto done = [&](bool result) {
    const std::chrono::nanoseconds waited = Deadline::Clock::now() - start;
    counters_->wait_ns.fetch_add(static_cast<uint64_t>(waited.count()), std::memory_order_relaxed);
    if (wait_ns_ != nullptr) wait_ns_[awaited.rank] += waited.count();
    return result;
  };
  while (Deadline::Clock::now() - start < options_.spin && !deadline.passed()) {
    if (ready()) return done(true);
    if (proxy_ != nullptr) proxy_->help();
    ::sched_yield();
  }
  if (proxy_ != nullptr) proxy_->hand_over();
  for (;;) {
    const uint32_t heard = listen(bell);
    if (ready()) {
      stop_listening(bell);
      return done(true);
    }
    if (!still_waits(awaited)) {
      stop_listening(bell);
      return done(false);
    }
    if (deadline.passed()) {
      stop_listening(bell);
      if (patience.has_more()) {
        deadline = Deadline::in_ms(options_.grace_ms);
        show_late_wait(awaited.rank);
        continue;
      }
      // A rank that seems to wait for nobody may just have named another one.
      if (!still_waits(awaited)) return done(false);
      return done(ready() || give_up(awaited));
    }
    counters_->sleeps.fetch_add(1, std::memory_order_relaxed);
    sleep(bell, heard, std::min<std::chrono::nanoseconds>(deadline.remaining(), kLongestSleep));
  }
}

void Lane::show_late_wait(int rank_of_group) const {
  if (standing_ != nullptr) standing_->show_late_wait(rank_of_group);
}

void Lane::go_on_without(int rank_of_group) {
  uint8_t& given_up = given_up_[static_cast<size_t>(rank_of_group)];
  num_given_up_ += given_up == 0 ? 1 : 0;
  given_up = 1;
  announce_given_up(*domain_, rank_of_group);
}

void Lane::hear_given_up() {
  for (int r = 0; r < domain_->topology.num_ranks; ++r)
    if (r != domain_->topology.rank && !gave_up_rank(r) && is_given_up(*domain_, r)) go_on_without(r);
}

// The deadline has passed. Under TERN_ON_TIMEOUT_MASK the operation goes on without the rank: returns false.
bool Lane::give_up(const Awaited& awaited) {
  counters_->timeouts.fetch_add(1, std::memory_order_relaxed);
  const uint64_t word = load_acquire(awaited.word);
  const bool is_flag = awaited.what != TERN_AWAITED_CONSUMED && is_in_domain(awaited.rank);
  const uint64_t seen = is_flag ? layout::flag_epoch(word) : word;
  const tern_failure failure{TERN_TIMEOUT, own_rank(), awaited.rank, index_, awaited.operation, 0, awaited.epoch, seen};
  if (options_.on_timeout == TERN_ON_TIMEOUT_MASK) {
    go_on_without(awaited.rank);
    return false;
  }
  announce_failure(*domain_, failure);
  throw Failure(TERN_TIMEOUT, failure_text(*domain_, failure));
}

// False: go on without the awaited rank, which others have given up.
bool Lane::still_waits(const Awaited& awaited) {
  if (options_.on_timeout == TERN_ON_TIMEOUT_MASK) {
    if (standing_ != nullptr) standing_->hear();
    if (is_given_up(*domain_, own_rank()))
      fail(TERN_MASKED_OUT, "{} on lane {}: the other ranks have given up rank {}, which was missing for too long",
           operation_name(awaited.operation), index_, own_rank());
    if (is_given_up(*domain_, awaited.rank)) {
      go_on_without(awaited.rank);
      return false;
    }
  }
  return still_waits_after_failure(awaited);
}

// Somebody failed. Usually that ends the operation here too; false: go on without the awaited rank.
bool Lane::still_waits_after_failure(const Awaited& awaited) {
  const auto failure = recorded_failure(*domain_);
  if (!failure) return true;
  // Under TERN_ON_TIMEOUT_MASK a rank that has finished this operation calls for a new generation: what this one waits for
  // from the others is on its way or was given up there, so it finishes the operation too. That rank had come to these epochs, of the node and
  // of the rail.
  const uint64_t next_epoch = is_in_domain(awaited.rank) ? failure->expected_epoch : failure->seen_epoch;
  if (failure->operation == TERN_OP_RECOVER && failure->waiter != failure->awaited && awaited.epoch < next_epoch) {
    if (awaited.rank != failure->awaited) return true;
    go_on_without(awaited.rank);
    return false;
  }
  throw_recorded(*domain_, *failure);
}

std::nullptr_t Lane::mismatch(const Awaited& awaited, const std::string& details) {
  if (has_lost(awaited)) return nullptr;
  const tern_failure failure{TERN_MISMATCH, own_rank(), awaited.rank, index_, awaited.operation, 0, awaited.epoch, awaited.epoch};
  announce_failure(*domain_, failure);
  throw Failure(TERN_MISMATCH,
                fmt::format("{} on lane {}, epoch {}: ranks {} and {} disagree: {}. Every rank must make the same calls in the same order",
                            operation_name(awaited.operation), index_, awaited.epoch, own_rank(), awaited.rank, details));
}

std::nullptr_t Lane::mismatch(const Awaited& awaited, int their_operation) {
  return mismatch(awaited, fmt::format("rank {} was in {}", awaited.rank, operation_name(their_operation)));
}

std::nullptr_t Lane::mismatch(const Awaited& awaited, const layout::CallShape& own, const layout::CallShape& theirs) {
  return mismatch(awaited,
                  fmt::format("rank {} has [{}], rank {} has [{}]", own_rank(), shape_text(own), awaited.rank, shape_text(theirs)));
}

// Under TERN_ON_TIMEOUT_MASK: has one of the two ranks been given up? Between nodes the word of that may come behind the last rows.
bool Lane::has_lost(const Awaited& awaited) {
  if (options_.on_timeout != TERN_ON_TIMEOUT_MASK) return false;
  const Deadline deadline = Deadline::in_ms(standing_ != nullptr ? options_.grace_ms : 0);
  while (still_waits(awaited)) {
    if (deadline.passed()) return false;
    proxy_->help();
    std::this_thread::sleep_for(kLook);
  }
  return true;
}

}  // namespace tern::cpu
