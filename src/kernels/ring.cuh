// SPDX-License-Identifier: Apache-2.0
// A warp's ring of shared memory through which rows flow by bulk copies: loads run ahead, stores follow, nobody else is involved.
#pragma once

#include "device/bulk.cuh"
#include "device/order.cuh"

namespace tern::kernels {

struct Ring {
  std::byte* stages;
  uint64_t* arrivals;  // [num_stages]
  int num_stages;      // more than the flow's pending stores
  int stage_bytes;

  // All threads of the warp, before the first use.
  __device__ void init() const {
    if (device::lane_idx() == 0) {
      for (int n = 0; n < num_stages; ++n) device::init_arrivals(arrivals + n);
      device::fence_arrivals_init();
    }
    __syncwarp();
  }
  // After the last use, before the next init().
  __device__ void end() const {
    if (device::lane_idx() == 0)
      for (int n = 0; n < num_stages; ++n) device::end_arrivals(arrivals + n);
    __syncwarp();
  }
};

// Goes round and round a ring.
struct RingCursor {
  const Ring& ring;
  int idx = 0;
  uint32_t phase = 0;  // of the arrivals: changes with every round

  __device__ std::byte* stage() const { return ring.stages + idx * ring.stage_bytes; }
  __device__ uint64_t* arrivals() const { return ring.arrivals + idx; }
  __device__ void await() const { device::await_bytes(arrivals(), phase); }
  __device__ void advance() {
    if (++idx < ring.num_stages) return;
    idx = 0;
    phase ^= 1;
  }
};

enum class RingLoad { kStarted, kNotYet, kNoMore };

// Moves everything that `flow` offers. All threads of the warp call, and in each of its functions:
//   RingLoad flow.load(stage, arrivals, may_wait)   starts loading the next piece into the stage; kNotYet: it would wait, and may not,
//                                                   because pieces are there that can be stored
//   void flow.store(stage)                          the piece is there: uses it up by bulk stores of any thread, and otherwise
// Flow::kPendingStores: so many pieces may still be read by their bulk stores when a load goes on.
template <typename Flow>
__device__ void run_ring(const Ring& ring, Flow& flow) {
  RingCursor loading{ring}, storing{ring};
  int num_ahead = 0;  // loaded and not yet stored
  bool more = true;
  for (;;) {
    while (more && num_ahead < ring.num_stages - Flow::kPendingStores) {
      const RingLoad load = flow.load(loading.stage(), loading.arrivals(), num_ahead == 0);
      more = load != RingLoad::kNoMore;
      if (load != RingLoad::kStarted) break;
      loading.advance();
      ++num_ahead;
    }
    if (num_ahead == 0) break;
    storing.await();
    flow.store(storing.stage());
    device::close_store_group();
    device::await_read<Flow::kPendingStores>();
    __syncwarp();
    storing.advance();
    --num_ahead;
  }
  device::await_stored<0>();
}

}  // namespace tern::kernels
