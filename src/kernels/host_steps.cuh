// SPDX-License-Identifier: Apache-2.0
// What a kernel says to its host, and awaits from it, around its work (rail.h). All threads of all blocks:
//
//   const HostTalker host(op, args.steps);
//   host.ask_first();
//   if (!host.await()) return;     // the exchange has failed
//   ... what the answer is about ...
//   host.finish();
//
// What the kernels before have written for the host is published by the question that comes first, what this one writes by the last. What the
// host has written, or the network, can be seen behind the answer.
#pragma once

#include "kernels/operation.cuh"
#include "kernels/rail.h"

namespace tern::kernels {

class HostTalker {
 public:
  __device__ HostTalker(const Operation& op, const HostSteps& steps) : op_(op), steps_(steps) {}

  __device__ void ask_first() const {
    if (steps_.asks_first && blockIdx.x == 0 && threadIdx.x == 0) ask();
  }

  // Every block looks by itself. That all have seen the answer is noted at the end.
  __device__ bool await() const {
    if (!steps_.awaits) return true;
    bool ok = true;
    if (threadIdx.x == 0) {
      ok = await_answer(steps_.talk->answered + 1);
      if (ok) steps_.talk->bank = steps_.cell->bank;
    }
    return __syncthreads_and(ok ? 1 : 0) != 0;
  }

  __device__ void finish() const {
    if (!steps_.awaits && !steps_.asks_last) return;
    __syncthreads();
    if (steps_.asks_last && threadIdx.x == 0) device::fence_sys();
    if (!op_.is_last_block(&steps_.talk->blocks_done) || threadIdx.x != 0) return;
    if (steps_.awaits) ++steps_.talk->answered;
    if (steps_.asks_last) ask();
  }

 private:
  __device__ void ask() const {
    if (steps_.command != 0) steps_.cell->command = steps_.command;
    device::fence_sys();
    store_release_sys(&steps_.cell->asked, ++steps_.talk->asked);
  }

  // Until the host has answered `step`. False: the exchange has failed.
  __device__ bool await_answer(uint64_t step) const {
    constexpr uint64_t kHostShare = 4;  // its waits have deadlines of their own, and it may have several in a step
    const HostCell* const cell = steps_.cell;
    const uint64_t start = device::global_timer_ns();
    for (;;) {
      const uint64_t answered = load_acquire_sys(&cell->answered);
      if (answered == HostCell::kGaveUp) {
        op_.give_up_as(cell->failure);
        return false;
      }
      if (answered >= step) return true;
      if (op_.is_aborted()) {
        op_.report_abort();
        return false;
      }
      if (device::global_timer_ns() - start <= kHostShare * op_.exchange.timeout_ns) continue;
      op_.give_up(TERN_TIMEOUT, op_.exchange.rank, step, answered);
      return false;
    }
  }

  const Operation& op_;
  const HostSteps& steps_;
};

}  // namespace tern::kernels
