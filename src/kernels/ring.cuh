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

  __device__ std::byte* stage(int n) const { return stages + n % num_stages * stage_bytes; }
  __device__ uint64_t* arrival(int n) const { return arrivals + n % num_stages; }

  // All threads of the warp, before the first use.
  __device__ void init() const {
    if (device::lane_idx() == 0) {
      for (int n = 0; n < num_stages; ++n) device::init_arrivals(arrivals + n);
      device::fence_arrivals_init();
    }
    __syncwarp();
  }
};

// Moves everything that `flow` offers. All threads of the warp call, and in each of its functions:
//   bool flow.load(n, stage, arrivals)   starts loading the next piece into the stage; false: there is none
//   void flow.store(n, stage)            the piece is there: uses it up, by bulk stores of any thread, or otherwise
// Flow::kPendingStores: so many pieces may still be read by their bulk stores when a load goes on; 0: store() has done with the stage.
template <typename Flow>
__device__ void run_ring(const Ring& ring, Flow& flow) {
  constexpr int kPending = Flow::kPendingStores;
  int num_loaded = 0, num_stored = 0;
  bool more = true;
  const auto load_next = [&] {
    more = more && flow.load(num_loaded, ring.stage(num_loaded), ring.arrival(num_loaded));
    if (more) ++num_loaded;
  };
  while (more && num_loaded < ring.num_stages - kPending) load_next();
  for (; num_stored < num_loaded; ++num_stored) {
    device::await_bytes(ring.arrival(num_stored), static_cast<uint32_t>(num_stored / ring.num_stages) & 1);
    flow.store(num_stored, ring.stage(num_stored));
    if constexpr (kPending > 0) {
      device::close_store_group();
      device::await_read<kPending>();
    }
    __syncwarp();
    load_next();
  }
  if constexpr (kPending > 0) device::await_stored<0>();
}

}  // namespace tern::kernels
