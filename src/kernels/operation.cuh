// SPDX-License-Identifier: Apache-2.0
// What every kernel of an exchange does around its work: takes its epoch, waits with a deadline, tells why it gave up, and ends.
//
//   Operation op(args.exchange, TERN_OP_ROUTE, epoch);
//   if (op.is_poisoned()) return;                       // all threads of the block
//   ... op.await(...) ...
//   if (op.is_last_block()) op.finish(...)
//
// Waits are done by single threads. One that returns false has recorded the failure, or found that somebody has: its caller returns, and what
// waits elsewhere is stopped by the same abort word. Under TERN_ON_TIMEOUT_MASK it may also have given up the rank that it waits for.
#pragma once

#include "device/order.cuh"
#include "kernels/exchange_view.h"

namespace tern::kernels {

using device::load_acquire_sys;
using device::load_relaxed_sys;
using device::store_release_sys;

inline constexpr int kWarpThreads = 32;

struct Operation {
  static constexpr int kSpinsPerLook = 64;  // at the abort word and the clock

  const ExchangeView& exchange;
  int operation;
  uint64_t epoch;

  __device__ std::byte* own_window() const { return exchange.window(exchange.rank); }
  __device__ bool is_masked(int rank) const { return exchange.window(rank) == nullptr; }
  template <typename T>
  __device__ T* in_window(int owner, int64_t offset) const {
    return reinterpret_cast<T*>(exchange.window(owner) + offset);
  }
  // What `source` says to `owner`.
  __device__ layout::ProgressCell* progress(int owner, int source) const {
    return in_window<layout::ProgressCell>(owner, exchange.layout.progress(exchange.lane, source));
  }
  __device__ layout::CallCell* call(int owner, int source) const {
    return in_window<layout::CallCell>(owner, exchange.layout.call(exchange.lane, epoch, source));
  }
  __device__ uint64_t* staged_flag(int owner, int source, int chunk) const {
    return in_window<uint64_t>(owner, exchange.layout.staged(exchange.lane, source)) + chunk;
  }

  __device__ uint64_t* abort_word() const { return in_window<uint64_t>(exchange.rank, exchange.layout.abort()); }
  __device__ bool is_aborted() const { return load_relaxed_sys(abort_word()) != 0; }

  // One thread. Waits until *word has reached `expected`; false: the exchange has failed. Adds to *wait_ns how long it took, if that is given.
  // kMasks: under TERN_ON_TIMEOUT_MASK; false also when the rank is given up.
  template <bool kMasks = false>
  __device__ bool await(const uint64_t* word, uint64_t expected, int peer, int64_t* wait_ns = nullptr) const {
    return load_acquire_sys(word) >= expected || await_flag<kMasks>(*this, word, expected, peer, wait_ns);
  }

  // The same until look() says that it is there; what it has `seen` is told if it never does.
  template <bool kMasks, typename Look>
  __device__ bool await_until(uint64_t expected, int peer, const uint64_t& seen, Look look) const {
    return spin<kMasks>(expected, peer, seen, nullptr, look);
  }

  // The same until a word of the latency path is of this epoch, and gives its value.
  template <bool kMasks = false>
  __device__ bool await_word(const uint64_t* word, int peer, uint32_t& value, int64_t* wait_ns = nullptr) const {
    uint64_t seen = load_relaxed_sys(word);
    if (!is_of_epoch(seen) && !await_epoch<kMasks>(*this, word, peer, seen, wait_ns)) return false;
    value = static_cast<uint32_t>(seen);
    return true;
  }
  __device__ bool is_of_epoch(uint64_t word) const { return word >> 32 == (epoch & 0xffffffff); }
  __device__ void put_word(uint64_t* word, uint32_t value) const { device::store_relaxed_sys(word, epoch << 32 | value); }

  // Like await(), for the threads of many warps that look at the same few words while other warps work.
  __device__ bool await_patiently(const uint64_t* word, uint64_t expected, int peer) const {
    return load_acquire_sys(word) >= expected || look_patiently(*this, word, expected, peer);
  }

  // Under TERN_ON_TIMEOUT_MASK: the host knows that the rank has been given up.
  __device__ void hear_gone(int peer) const { set_given_up(peer, 1); }
  // In which epoch the rank has been given up; 0: not.
  __device__ uint64_t given_up_in(int peer) const { return *const_cast<const volatile uint64_t*>(&exchange.attendance->given_up[peer]); }

  // Has `peer` done with everything of two epochs ago, so that its cells and banks may be written?
  template <bool kMasks = false>
  __device__ bool await_bank(int peer) const {
    if (epoch <= layout::kNumBanks) return true;
    return await<kMasks>(&progress(exchange.rank, peer)->consumed, epoch - layout::kNumBanks, peer);
  }

  // Records why this rank stops, in every window and for the host, unless it has been recorded already. Never waits.
  __device__ void give_up(tern_status status, int awaited, uint64_t expected, uint64_t seen) const {
    record_failure(*this, status, awaited, expected, seen);
  }

  // The same for a failure that the host has found.
  __device__ void give_up_as(const layout::FailureRecord& record) const { publish_failure(*this, record); }

  // Passes on to the host what another rank has recorded.
  __device__ void report_abort() const { pass_on_failure(*this); }

  // Something was left out of an operation that otherwise completed.
  __device__ void post_notice(tern_status status) const { record_notice(*this, status); }

  // All threads of the block, at its start: true if the exchange has failed, and nothing is to be done.
  __device__ bool is_poisoned() const {
    __shared__ int poisoned;
    if (threadIdx.x == 0) {
      poisoned = is_aborted() ? 1 : 0;
      if (poisoned != 0) report_abort();
    }
    __syncthreads();
    return poisoned != 0;
  }

  // All threads of the block: true in the block that comes here last, which then sees what all blocks have written.
  __device__ bool is_last_block(uint32_t* counter) const {
    __shared__ int last;
    __syncthreads();
    if (threadIdx.x == 0) {
      last = device::add_acq_rel_gpu(counter, 1) == gridDim.x - 1 ? 1 : 0;
      if (last != 0) *counter = 0;
    }
    __syncthreads();
    return last != 0;
  }

  // One thread for each peer, at the beginning of an operation that sends: what earlier kernels took has been read, since they have ended.
  // `last_epoch` is what the lane has begun before.
  __device__ void post_consumed_before(int peer, uint64_t last_epoch) const {
    device::store_relaxed_sys(&progress(peer, exchange.rank)->consumed, last_epoch - static_cast<uint64_t>(exchange.consumed_lag_before));
  }

  // All threads of the last block, at the end of an operation that receives: nothing of the others' is needed any more.
  __device__ void post_consumed() const {
    const uint64_t begun = exchange.state->epoch;  // on its way while the abort word is
    if (is_aborted()) {
      if (threadIdx.x == 0) report_abort();
      return;
    }
    const uint64_t last_epoch = epoch > begun ? epoch : begun;
    const uint64_t consumed = last_epoch - static_cast<uint64_t>(exchange.consumed_lag);
    for (int peer = static_cast<int>(threadIdx.x); peer < exchange.num_ranks; peer += static_cast<int>(blockDim.x))
      if (!is_masked(peer)) store_release_sys(&progress(peer, exchange.rank)->consumed, consumed);
  }

 private:
  // What is seldom done is not inlined: kernels stay small, and begin sooner.
  template <bool kMasks>
  static __device__ __noinline__ bool await_flag(Operation op, const uint64_t* word, uint64_t expected, int peer, int64_t* wait_ns) {
    uint64_t seen = 0;
    return op.spin<kMasks>(expected, peer, seen, wait_ns, [&] { return (seen = load_acquire_sys(word)) >= expected; });
  }
  template <bool kMasks>
  static __device__ __noinline__ bool await_epoch(Operation op, const uint64_t* word, int peer, uint64_t& word_seen, int64_t* wait_ns) {
    uint64_t epoch_seen = 0;  // its lower half
    return op.spin<kMasks>(op.epoch, peer, epoch_seen, wait_ns, [&] {
      word_seen = load_relaxed_sys(word);
      epoch_seen = word_seen >> 32;
      return op.is_of_epoch(word_seen);
    });
  }

  // Without acquiring before the flag is there, since each acquire empties the SM's cache under the loads of the other warps, and with pauses.
  static __device__ __noinline__ bool look_patiently(Operation op, const uint64_t* word, uint64_t expected, int peer) {
    constexpr uint32_t kPauseNs = 100;
    uint64_t seen = 0;
    const auto look = [&] {
      device::pause(kPauseNs);
      return (seen = load_relaxed_sys(word)) >= expected;
    };
    return op.spin<false>(expected, peer, seen, nullptr, look) && load_acquire_sys(word) >= expected;
  }

  // Looks until look() says that it is there, or the deadline passes, or the exchange fails otherwise.
  template <bool kMasks, typename Look>
  __device__ bool spin(uint64_t expected, int peer, const uint64_t& seen, int64_t* wait_ns, Look look) const {
    const uint64_t start = device::global_timer_ns();
    const auto count_wait = [&] {
      if (wait_ns != nullptr) *wait_ns += static_cast<int64_t>(device::global_timer_ns() - start);
    };
    for (int turn = 0;; ++turn) {
      if (look()) {
        count_wait();  // not behind the loop, where the lanes of a warp meet again
        return true;
      }
      if (turn % kSpinsPerLook != 0) continue;
      if (is_aborted() || (turn > 0 && is_stopped_by_host())) return false;  // the host's word is far away
      const uint64_t waited = device::global_timer_ns() - start;
      if constexpr (!kMasks) {
        if (waited <= exchange.timeout_ns) continue;
        give_up(TERN_TIMEOUT, peer, expected, seen);
        return false;
      } else {
        if (turn > 0 && is_gone_for_host(peer)) hear_gone(peer);
        if (given_up_in(peer) == 0 && (waited <= exchange.timeout_ns || waited <= patience_ns(peer))) continue;
        go_without(peer);
        count_wait();
        return false;
      }
    }
  }

  // Between nodes the host may have heard of a failure that no GPU of this node knows of.
  __device__ bool is_stopped_by_host() const {
    if (exchange.host == nullptr || load_acquire_sys(&exchange.host->answered) != HostCell::kGaveUp) return false;
    give_up_as(exchange.host->failure);
    return true;
  }

  __device__ bool is_gone_for_host(int peer) const {
    return exchange.host != nullptr && (load_relaxed_sys(&exchange.host->gone_ranks) >> peer & 1) != 0;
  }

  // Operations by which `peer` is behind this one, by what it has announced; 0 or less: it has begun this one.
  __device__ int32_t epochs_behind(int peer) const {
    int32_t behind = 0x7fffffff;  // differences are small, whatever the epoch
    for (uint64_t bank = 0; bank < layout::kNumBanks; ++bank) {
      const uint64_t word = load_relaxed_sys(in_window<uint64_t>(exchange.rank, exchange.layout.words(exchange.lane, bank, peer)));
      behind = min(behind, static_cast<int32_t>(static_cast<uint32_t>(epoch) - static_cast<uint32_t>(word >> 32)));
    }
    return behind;
  }
  // How long to wait for a rank that may itself be waiting for another one: until that one would have been given up there. So nobody is given up
  // but who is behind all others.
  __device__ uint64_t patience_ns(int peer) const {
    const int32_t behind = epochs_behind(peer);
    bool is_tied = false;
    for (int other = 0; other < exchange.num_ranks; ++other) {
      if (other == peer || other == exchange.rank || is_masked(other)) continue;
      const uint64_t given_up = given_up_in(other);
      if (given_up != 0 && given_up < epoch) continue;  // one that was given up just now may be what others wait for still
      const int32_t others = epochs_behind(other);
      if (others > behind) return exchange.timeout_ns + exchange.timeout_ns / 2;
      if (others == behind && behind > 0) is_tied = true;
    }
    return exchange.timeout_ns + (is_tied ? exchange.timeout_ns / 4 : 0);
  }
  __device__ void go_without(int peer) const {
    if (set_given_up(peer, epoch)) *const_cast<volatile uint32_t*>(&exchange.mailbox->given_up[peer]) = 1;
  }
  // True: it was not before.
  __device__ bool set_given_up(int peer, uint64_t in_epoch) const {
    using Word = unsigned long long;
    return atomicCAS(reinterpret_cast<Word*>(&exchange.attendance->given_up[peer]), Word{0}, static_cast<Word>(in_epoch)) == 0;
  }

  static __device__ __noinline__ void record_failure(Operation op, tern_status status, int awaited, uint64_t expected, uint64_t seen) {
    layout::FailureRecord record;
    record.status = status;
    record.waiter = op.exchange.first_rank + op.exchange.rank;
    record.awaited = op.exchange.first_rank + awaited;
    record.lane = op.exchange.lane;
    record.operation = op.operation;
    record.expected_epoch = expected;
    record.seen_epoch = seen;
    publish_failure(op, record);
  }

  static __device__ __noinline__ void publish_failure(Operation op, layout::FailureRecord record) {
    const ExchangeView& exchange = op.exchange;
    if (atomicExch(exchange.failed, 1u) != 0) return;
    for (int i = 0; i < exchange.num_ranks; ++i) {
      const int owner = (exchange.rank + i) % exchange.num_ranks;
      if (op.is_masked(owner)) continue;
      if (record.status == TERN_MASKED_OUT && owner != exchange.rank) continue;  // the others go on
      *op.in_window<layout::FailureRecord>(owner, exchange.layout.record(exchange.rank)) = record;
      store_release_sys(op.in_window<uint64_t>(owner, exchange.layout.abort()), static_cast<uint64_t>(exchange.rank) + 1);
    }
    op.post_failure(record);
  }

  static __device__ __noinline__ void pass_on_failure(Operation op) {
    const uint64_t waiter = load_acquire_sys(op.abort_word());
    if (waiter == 0 || atomicExch(op.exchange.failed, 1u) != 0) return;
    op.post_failure(*op.in_window<layout::FailureRecord>(op.exchange.rank, op.exchange.layout.record(static_cast<int>(waiter) - 1)));
  }

  static __device__ __noinline__ void record_notice(Operation op, tern_status status) {
    layout::FailureRecord& notice = op.exchange.mailbox->notice;
    notice.waiter = notice.awaited = op.exchange.first_rank + op.exchange.rank;
    notice.lane = op.exchange.lane;
    notice.operation = op.operation;
    notice.expected_epoch = notice.seen_epoch = op.epoch;
    device::fence_sys();
    *const_cast<volatile int32_t*>(&notice.status) = status;
  }

  __device__ void post_failure(const layout::FailureRecord& record) const {
    exchange.mailbox->failure = record;
    store_release_sys(&exchange.mailbox->failure_set, 1);
  }
};

}  // namespace tern::kernels
