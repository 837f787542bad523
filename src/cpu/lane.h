// SPDX-License-Identifier: Apache-2.0
// One lane of an exchange on a CPU rank: its epochs, its flags, and the round trip that every operation is made of.
//
// A round sends to every rank and receives from every rank, under one epoch:
//
//   send:    wait until each peer has consumed epoch - 2 (its bank is free); fill the banks; headers; then the `arrived` flags
//   receive: wait for each peer's `arrived` flag; use what is in the banks; then say `consumed`
//
// A batch larger than the banks takes several rounds, each under its own epoch. The next round is sent before the previous
// one is received, so that a rank is never idle because of one slow peer.
//
// Memory: what a peer wrote before its `arrived` flag is visible once await_arrived() has returned. Threads: one at a time.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <functional>
#include <string>
#include <vector>

#include "base/deadline.h"
#include "cpu/epochs.h"
#include "domain/domain.h"
#include "domain/doorbell.h"
#include "domain/failure.h"
#include "trace/trace.h"
#include "transport/proxy.h"

namespace tern::cpu {

// How long a lane between nodes looks before it sleeps: meanwhile it moves the network's bytes itself, which it should do for as long as a
// round takes, also where ranks share cores.
inline constexpr std::chrono::microseconds kNetworkSpin{10'000};

struct LaneOptions {
  int64_t timeout_ms = 0;
  std::chrono::nanoseconds spin{0};
  tern_timeout_policy on_timeout = TERN_ON_TIMEOUT_ABORT;
  // Ranks wait for ranks that wait for others: behind the deadline there may be graces, in which another rank may name the one at fault (Patience).
  int64_t grace_ms = 0;
  int num_graces = 0;  // for a rank of which nothing is known: 1 between nodes, where not all can be seen
};

// Of a wait for a rank that waits for another one itself.
inline constexpr int kMostGraces = 3;
inline int64_t grace_ms(int64_t timeout_ms) { return timeout_ms / 4; }

// Read by tern_exchange_get_metrics from any thread.
struct Counters {
  std::atomic<uint64_t> routes{0}, dispatches{0}, combines{0}, rounds{0}, sent_bytes{0}, sent_local_bytes{0}, received_rows{0}, waits{0},
      sleeps{0}, wait_ns{0}, timeouts{0}, network_bytes{0};
};

// What one operation is to its lane.
struct RoundTrip {
  tern_operation operation = TERN_OP_NONE;
  layout::CallShape shape;
  layout::BankLayout bank;
  int64_t num_tokens = 0;        // of this rank's batch
  int64_t tokens_per_round = 0;  // a round carries what belongs to this many of the owners' tokens
  int64_t num_rounds = 1;
};

// "row 16 bytes, ...": for the texts of errors.
std::string shape_text(const layout::CallShape& shape);

struct TokenRange {
  int64_t begin, end;
};
// The owners' tokens of a round, not bounded by any rank's number of tokens.
inline TokenRange tokens_of_round(const RoundTrip& trip, int64_t round) {
  return {round * trip.tokens_per_round, (round + 1) * trip.tokens_per_round};
}

// Waiting for a word of this rank's memory that another rank, or what the network brings from it, lets grow.
struct Awaited {
  int rank;  // of the group
  tern_operation operation;
  uint64_t epoch;
  const uint64_t& word;  // flag or, of CONSUMED and between nodes, epoch that is waited for
  tern_awaited what;
};

class Lane;
class Standing;

// While it lives, the others of the node see for whom this rank waits.
class ShownWait {
 public:
  ShownWait(layout::Doorbell& bell, int rank_of_group) : word_(bell.awaits) {
    store_release(word_, static_cast<uint64_t>(rank_of_group) + 1);
  }
  ~ShownWait() { store_release(word_, 0); }
  ShownWait(const ShownWait&) = delete;
  ShownWait& operator=(const ShownWait&) = delete;

 private:
  uint64_t& word_;
};

// While it lives, what a lane waits for each rank of the group is added to wait_ns[rank], which may be nullptr.
class CountedWaits {
 public:
  CountedWaits(Lane& lane, int64_t* wait_ns);
  ~CountedWaits();
  CountedWaits(const CountedWaits&) = delete;
  CountedWaits& operator=(const CountedWaits&) = delete;

 private:
  Lane& lane_;
};

class Lane {
 public:
  // `spans`: where this lane's timeline goes.
  Lane(const Domain& domain, int index, const LaneOptions& options, SpanLog& spans);

  // Whose bytes to move while waiting, as long as that does not sleep; nullptr: there is no network. And with TERN_ON_TIMEOUT_MASK, how to tell
  // the rails of a wait, and hear of theirs.
  void set_network(Proxy* proxy, Standing* standing) {
    proxy_ = proxy;
    standing_ = standing;
  }

  // Epochs start again; `domain` holds fresh windows.
  void restart();

  // TERN_INVALID_STATE if an earlier send still holds a bank that the next `num_rounds` epochs need.
  void check_room(tern_operation operation, int64_t num_rounds) const { epochs_.check_room(operation, index_, num_rounds); }

  // Takes the next `num_rounds` epochs and returns the first. Checks their room.
  uint64_t begin(tern_operation operation, int64_t num_rounds) {
    check_room(operation, num_rounds);
    return epochs_.take(num_rounds);
  }

  // Whole operation: fill(round, epoch) writes slots, drain(round, epoch) reads them.
  template <typename Fill, typename Drain>
  void run(const RoundTrip& trip, Fill fill, Drain drain) {
    const uint64_t first = begin(trip.operation, trip.num_rounds);
    for (int64_t round = 0; round < trip.num_rounds; ++round) {
      send_round(trip, first + round, [&](uint64_t epoch) { fill(round, epoch); });
      if (round > 0) receive_round(first + round - 1, [&](uint64_t epoch) { drain(round - 1, epoch); });
    }
    receive_round(first + trip.num_rounds - 1, [&](uint64_t epoch) { drain(trip.num_rounds - 1, epoch); });
  }

  template <typename Fill>
  void send_round(const RoundTrip& trip, uint64_t epoch, Fill fill) {
    begin_round(trip, epoch);
    Span span(*spans_, {.kind = TERN_SPAN_SEND, .operation = trip.operation, .epoch = epoch});
    fill(epoch);
    span.set_bytes(publish_round(trip, epoch));
  }

  template <typename Drain>
  void receive_round(uint64_t epoch, Drain drain) {
    drain(epoch);
    finish_epoch(epoch);
  }

  // For fill: the next free slot in this rank's bank at `destination`, as an address in that rank's window.
  // A rank that was given up may still read what it was sent before: its slots are in its own bank here, at which nobody looks any more.
  std::byte* next_slot(const RoundTrip& trip, uint64_t epoch, int destination) {
    const int64_t slot_idx = num_messages_[static_cast<size_t>(destination)]++;
    std::byte* bank = gave_up(destination) ? domain_->bank(domain_->rank, index_, epoch, destination)
                                           : domain_->bank(destination, index_, epoch, domain_->rank);
    return bank + trip.bank.slot_at(slot_idx);
  }

  // Calls visit(r) for each rank to which this one still writes, itself included.
  template <typename Visitor>
  void for_each_peer(Visitor visit) const {
    domain_->for_each_member([&](int r) {
      if (!gave_up(r)) visit(r);
    });
  }

  // For drain: waits until what `source` sends in this epoch is here; its bank, or nullptr if the rank is masked or has just been given up.
  const std::byte* await_arrived(const RoundTrip& trip, uint64_t epoch, int source);

  // The same for one that is looked at by itself: calls use(bank) if there is one.
  template <typename Use>
  void receive_from(const RoundTrip& trip, uint64_t epoch, int source, Use use) {
    const std::byte* bank = await_arrived(trip, epoch, source);
    if (bank == nullptr) return;
    const int64_t num_messages = reinterpret_cast<const layout::MessageHeader*>(bank)->num_messages;
    const Span span(*spans_, {.kind = TERN_SPAN_RECEIVE,
                              .operation = trip.operation,
                              .peer = domain_->rank_of_group(source),
                              .epoch = epoch,
                              .bytes = trip.bank.bytes(num_messages)});
    use(bank);
  }

  // This rank's rows lie at `offset` of its heap and are free to be written (dispatch) or complete (combine).
  void post_ready(uint64_t epoch, tern_operation operation, int64_t offset);
  // Where `peer`'s rows lie, or nullptr if it has been given up.
  std::byte* await_ready(uint64_t epoch, tern_operation operation, int peer);
  // Waits until `peer` has consumed everything up to `epoch`.
  void await_consumed(uint64_t epoch, tern_operation operation, int peer);
  // Between nodes: waits until the word, an epoch, has grown to what is awaited. The lane's doorbell rings when it does. False: the rank has been
  // given up.
  bool await_network(const Awaited& awaited);
  // The same for what else that rank has to say, of which no bell need ring.
  bool await_word_of(const Awaited& from, const std::function<bool()>& has_come);
  // Ranks do not call the same: tells everybody, and throws. Null: the rank has been given up, so what it called does not count; and throws
  // TERN_MASKED_OUT if it is this one that has.
  std::nullptr_t mismatch(const Awaited& awaited, const std::string& details);
  std::nullptr_t mismatch(const Awaited& awaited, int their_operation);
  std::nullptr_t mismatch(const Awaited& awaited, const layout::CallShape& own, const layout::CallShape& theirs);

  const Domain& domain() const { return *domain_; }
  int index() const { return index_; }
  Counters& counters() { return *counters_; }
  const Counters& counters() const { return *counters_; }
  SpanLog& spans() { return *spans_; }
  // Ranks that this lane goes on without, under TERN_ON_TIMEOUT_MASK: it has missed them, or waited for them when others had, or for the sake of
  // what lacks their share already. Others may have been given up elsewhere (domain/given_up.h) of which no operation here knows yet.
  bool gave_up_any() const { return num_given_up_ > 0; }
  int num_given_up() const { return num_given_up_; }
  bool gave_up_rank(int rank_of_group) const { return given_up_[static_cast<size_t>(rank_of_group)] != 0; }
  bool gave_up(int r) const { return gave_up_rank(domain_->rank_of_group(r)); }
  // Goes on without all whom this rank's window knows to be given up.
  void hear_given_up();
  // Says to the rails, with TERN_ON_TIMEOUT_MASK, that a wait for that rank goes on beyond its deadline.
  void show_late_wait(int rank_of_group) const;
  uint64_t next_epoch() const { return epochs_.next(); }
  uint64_t progress() const { return epochs_.progress(); }
  // Is there a send that has not been received? The same answer on every rank at the same call.
  bool has_unreceived() const { return epochs_.any_open(); }

 private:
  friend class CountedWaits;

  void begin_round(const RoundTrip& trip, uint64_t epoch);
  // Returns the bytes of the round, to all ranks.
  int64_t publish_round(const RoundTrip& trip, uint64_t epoch);
  void finish_epoch(uint64_t epoch);
  // True when the awaited word has reached its epoch; false when the rank is given up; throws on failure and deadline.
  template <typename Ready>
  bool wait_until(const Awaited& awaited, Ready ready);
  template <typename Ready>
  bool keep_waiting(const Awaited& awaited, Ready ready);
  bool give_up(const Awaited& awaited);
  int own_rank() const { return domain_->rank_of_group(domain_->rank); }
  bool is_in_domain(int rank_of_group) const {
    return rank_of_group >= domain_->first_rank && rank_of_group < domain_->first_rank + domain_->num_ranks;
  }
  Deadline deadline_of(const Awaited& awaited, Deadline::Clock::time_point now);
  class Patience;
  // For whom the awaited rank waits itself; kNobody: it shows no wait. In group ranks.
  int shown_wait_of(const Awaited& awaited) const;
  void go_on_without(int rank_of_group);
  bool has_lost(const Awaited& awaited);
  bool still_waits(const Awaited& awaited);
  bool still_waits_after_failure(const Awaited& awaited);

  // What all ranks owe at the same time, as their messages of an epoch, and since when somebody waits for it here.
  struct Due {
    bool in_node = false;
    tern_awaited what = TERN_AWAITED_MESSAGES;
    uint64_t epoch = 0;  // 0: nothing
    Deadline::Clock::time_point since;
  };

  const Domain* domain_;
  int index_;
  LaneOptions options_;
  SpanLog* spans_;
  std::unique_ptr<Counters> counters_;
  Epochs epochs_;
  uint64_t consumed_ = 0;              // as published
  std::vector<int32_t> num_messages_;  // [num_ranks] slots filled in the round under way
  std::vector<uint8_t> given_up_;      // [num_ranks of the group]
  int num_given_up_ = 0;
  Due due_;
  int64_t* wait_ns_ = nullptr;  // [num_ranks] of the running operation's caller
  Proxy* proxy_ = nullptr;
  Standing* standing_ = nullptr;
};

inline CountedWaits::CountedWaits(Lane& lane, int64_t* wait_ns) : lane_(lane) { lane.wait_ns_ = wait_ns; }
inline CountedWaits::~CountedWaits() { lane_.wait_ns_ = nullptr; }

}  // namespace tern::cpu
