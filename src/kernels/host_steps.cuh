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

struct AbsentNodes {
  uint64_t bits = 0;  // a bit each
  __device__ bool has(int node) const { return bits != 0 && (bits >> node & 1) != 0; }
};

class HostTalker {
 public:
  __device__ HostTalker(const Operation& op, const HostSteps& steps) : op_(op), steps_(steps) {}

  __device__ void ask_first() const {
    // The last warp, while the first one looks at the answer.
    if (!steps_.asks_first || blockIdx.x != 0 || threadIdx.x != blockDim.x - kWarpThreads) return;
    if (steps_.command != 0) begin_command();
    ask();
  }

  // The first block looks at the host's words, which are on the other side of PCIe, and the others at what it has seen. That all have seen it is
  // noted at the end.
  __device__ bool await() const {
    if (!awaits()) return true;
    bool ok = true;
    if (threadIdx.x == 0) ok = blockIdx.x == 0 ? await_host() : await_first_block();
    return __syncthreads_and(ok ? 1 : 0) != 0;
  }

  // Behind it, under TERN_ON_TIMEOUT_MASK: nodes that nothing has come from. The same for all blocks.
  __device__ AbsentNodes absent_nodes() const { return {op_.exchange.attendance == nullptr ? 0 : steps_.talk->absent_nodes}; }

  // The same together, of a kernel that may fail in between.
  __device__ bool begin() const {
    if (op_.is_poisoned()) return false;
    ask_first();
    return await();
  }
  __device__ void end() const {
    if (!op_.is_poisoned()) finish();
  }

  __device__ void finish() const {
    if (!awaits() && !steps_.asks_last) return;
    __syncthreads();
    if (steps_.asks_last && threadIdx.x == 0) device::fence_sys();
    if (!op_.is_last_block(&steps_.talk->blocks_done) || threadIdx.x != 0) return;
    HostTalk& talk = *steps_.talk;
    if (awaits()) ++talk.num_awaited;
    if (steps_.awaits) ++talk.answered;
    talk.epoch += static_cast<uint64_t>(steps_.takes_epochs);
    if (steps_.asks_last) ask();
  }

 private:
  __device__ bool awaits() const { return steps_.awaits || steps_.takes_epochs > 0; }

  // The command before may not have been read yet, the one before that has: the host grants an epoch when it has begun the one before it.
  __device__ void begin_command() const { steps_.cell->commands[steps_.talk->num_commands++ % 2] = steps_.command; }
  __device__ void ask() const {
    const uint64_t step = ++steps_.talk->asked;
    device::fence_sys();
    device::store_relaxed_sys(&steps_.cell->asked, step);
  }

  // One thread of the first block. False: the exchange has failed.
  __device__ bool await_host() const {
    HostTalk& talk = *steps_.talk;
    const HostCell& cell = *steps_.cell;
    const bool is_grant = steps_.takes_epochs > 0;
    const uint64_t expected = is_grant ? talk.epoch + 1 : talk.answered + 1;
    uint64_t answered = 0;
    const bool has_come = await(
        [&] {
          if (is_grant) return load_acquire_sys(&cell.granted) >= expected;
          answered = load_acquire_sys(&cell.answered);
          return answered != HostCell::kGaveUp && HostCell::step_of(answered) >= expected;
        },
        expected);
    if (!has_come) return false;
    talk.bank = is_grant ? expected % layout::kNumBanks : HostCell::bank_of(answered);
    if (op_.exchange.attendance != nullptr) hear_absences(cell, talk);
    device::store_release_gpu(&talk.seen, talk.num_awaited + 1);
    return true;
  }
  __device__ void hear_absences(const HostCell& cell, HostTalk& talk) const {
    talk.absent_nodes = load_relaxed_sys(&cell.absent_nodes);
    for (uint64_t gone = load_relaxed_sys(&cell.gone_ranks); gone != 0; gone &= gone - 1)
      op_.hear_gone(__ffsll(static_cast<int64_t>(gone)) - 1);
  }
  // Of the others.
  __device__ bool await_first_block() const {
    const uint64_t expected = steps_.talk->num_awaited + 1;
    return await([&] { return device::load_acquire_gpu(&steps_.talk->seen) >= expected; }, expected);
  }

  // Until has_come(). False: the exchange has failed.
  template <typename HasCome>
  __device__ bool await(HasCome has_come, uint64_t expected) const {
    const uint64_t start = device::global_timer_ns();
    while (!has_come()) {
      if (blockIdx.x == 0 && load_acquire_sys(&steps_.cell->answered) == HostCell::kGaveUp) {
        op_.give_up_as(steps_.cell->failure);
        return false;
      }
      if (op_.is_aborted()) {
        op_.report_abort();
        return false;
      }
      if (device::global_timer_ns() - start <= op_.exchange.host_timeout_ns) continue;
      op_.give_up(TERN_TIMEOUT, op_.exchange.rank, expected, expected - 1);
      return false;
    }
    return true;
  }

  const Operation& op_;
  const HostSteps& steps_;
};

}  // namespace tern::kernels
