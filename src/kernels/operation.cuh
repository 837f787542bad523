// SPDX-License-Identifier: Apache-2.0
// What every kernel of an exchange does around its work: takes its epoch, waits with a deadline, tells why it gave up, and ends.
//
//   Operation op(args.exchange, TERN_OP_ROUTE, epoch);
//   if (op.is_poisoned()) return;                       // all threads of the block
//   ... op.await(...) ...
//   if (op.is_last_block()) op.finish(...)
//
// Waits are done by single threads. One that returns false has recorded the failure, or found that somebody has: its caller returns, and what
// waits elsewhere is stopped by the same abort word.
#pragma once

#include "device/order.cuh"
#include "kernels/exchange_view.h"

namespace tern::kernels {

using device::load_acquire_sys;
using device::load_relaxed_sys;
using device::store_release_sys;

inline constexpr int kWarpThreads = 32;

// What happens at most once is not inlined: a kernel that runs for some microseconds fetches each instruction about once, so code that is in the
// way costs time.
__device__ __noinline__ inline void post_failure(const ExchangeView& exchange, const layout::FailureRecord& record) {
  exchange.mailbox->failure = record;
  store_release_sys(&exchange.mailbox->failure_set, 1);
}

// Passes on to the host what another rank has recorded.
__device__ __noinline__ inline void post_abort(const ExchangeView& exchange) {
  const auto* window = exchange.window(exchange.rank);
  const uint64_t waiter = load_acquire_sys(reinterpret_cast<const uint64_t*>(window + exchange.layout.abort()));
  if (waiter == 0 || atomicExch(exchange.failed, 1u) != 0) return;
  post_failure(exchange, *reinterpret_cast<const layout::FailureRecord*>(window + exchange.layout.record(static_cast<int>(waiter) - 1)));
}

// Records why this rank stops, in every window and for the host, unless it has been recorded already. Of the record, what the exchange knows
// is filled in here. Never waits.
__device__ __noinline__ inline void post_give_up(const ExchangeView& exchange, layout::FailureRecord record) {
  if (atomicExch(exchange.failed, 1u) != 0) return;
  record.waiter = exchange.rank;
  record.lane = exchange.lane;
  for (int i = 0; i < exchange.num_ranks; ++i) {
    std::byte* const window = exchange.window((exchange.rank + i) % exchange.num_ranks);
    if (window == nullptr) continue;
    *reinterpret_cast<layout::FailureRecord*>(window + exchange.layout.record(exchange.rank)) = record;
    store_release_sys(reinterpret_cast<uint64_t*>(window + exchange.layout.abort()), static_cast<uint64_t>(exchange.rank) + 1);
  }
  post_failure(exchange, record);
}

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

  // One thread. Waits until *word has reached `expected`; false: the exchange has failed.
  __device__ bool await(const uint64_t* word, uint64_t expected, int peer) const {
    return load_acquire_sys(word) >= expected || await_long(*this, word, expected, peer);
  }

  // One thread. Waits until a word of the latency path is of this epoch, and gives its value; false: the exchange has failed.
  __device__ bool await_word(const uint64_t* word, int peer, uint32_t& value) const {
    uint64_t seen = load_relaxed_sys(word);
    const uint64_t epoch_half = epoch << 32;
    if ((seen & ~uint64_t{0xffffffff}) != epoch_half &&
        !spin(epoch, peer, seen, [=](uint64_t& now) { return ((now = load_relaxed_sys(word)) & ~uint64_t{0xffffffff}) == epoch_half; }))
      return false;
    value = static_cast<uint32_t>(seen);
    return true;
  }
  __device__ void put_word(uint64_t* word, uint32_t value) const { device::store_relaxed_sys(word, epoch << 32 | value); }

  // Has `peer` done with everything of two epochs ago, so that its cells and banks may be written?
  __device__ bool await_bank(int peer) const {
    if (epoch <= layout::kNumBanks) return true;
    return await(&progress(exchange.rank, peer)->consumed, epoch - layout::kNumBanks, peer);
  }

  // Records why this rank stops, in every window and for the host, unless it has been recorded already. Never waits.
  __device__ void give_up(tern_status status, int awaited, uint64_t expected, uint64_t seen) const {
    layout::FailureRecord record;
    record.status = status;
    record.awaited = awaited;
    record.operation = operation;
    record.expected_epoch = expected;
    record.seen_epoch = seen;
    post_give_up(exchange, record);
  }

  // Passes on to the host what another rank has recorded.
  __device__ void report_abort() const { post_abort(exchange); }

  // Something was left out of an operation that otherwise completed.
  __device__ void post_notice(tern_status status) const {
    layout::FailureRecord& notice = exchange.mailbox->notice;
    notice.waiter = notice.awaited = exchange.rank;
    notice.lane = exchange.lane;
    notice.operation = operation;
    notice.expected_epoch = notice.seen_epoch = epoch;
    device::fence_sys();
    *const_cast<volatile int32_t*>(&notice.status) = status;
  }

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

  // All threads of all blocks, `nth` time in this kernel (1, 2, ...): returns when every block has come. All blocks are resident together.
  __device__ bool sync_blocks(uint32_t nth) const {
    __shared__ int synced;
    __syncthreads();
    if (threadIdx.x == 0) synced = await_blocks(nth * gridDim.x) ? 1 : 0;
    __syncthreads();
    return synced != 0;
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
  // Kept out of the way like the above.
  __device__ __noinline__ static bool await_long(const Operation& op, const uint64_t* word, uint64_t expected, int peer) {
    uint64_t seen = 0;
    return op.spin(expected, peer, seen, [=](uint64_t& value) { return (value = load_acquire_sys(word)) >= expected; });
  }

  // Looks until look(seen) says that it is there, or the deadline passes, or the exchange fails otherwise.
  template <typename Look>
  __device__ bool spin(uint64_t expected, int peer, uint64_t& seen, Look look) const {
    const uint64_t start = device::global_timer_ns();
    for (int turn = 0;; ++turn) {
      if (look(seen)) return true;
      if (turn % kSpinsPerLook != 0) continue;
      if (is_aborted()) return false;
      if (device::global_timer_ns() - start > exchange.timeout_ns) {
        give_up(TERN_TIMEOUT, peer, expected, seen);
        return false;
      }
    }
  }

  __device__ bool await_blocks(uint32_t target) const {
    device::add_acq_rel_gpu(&exchange.state->blocks_synced, 1);
    const uint64_t start = device::global_timer_ns();
    for (int turn = 1; device::load_acquire_gpu(&exchange.state->blocks_synced) < target; ++turn) {
      if (turn % kSpinsPerLook != 0) continue;
      if (is_aborted()) return false;
      if (device::global_timer_ns() - start <= exchange.timeout_ns) continue;
      give_up(TERN_TIMEOUT, exchange.rank, epoch, epoch);
      return false;
    }
    return true;
  }
};

}  // namespace tern::kernels
