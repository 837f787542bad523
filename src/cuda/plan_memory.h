// SPDX-License-Identifier: Apache-2.0
// What kernels use of a plan. It outlives the plan where they have not ended yet: CudaExchange::retire().
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "cuda/buffers.h"
#include "kernels/exchange_view.h"
#include "kernels/route.h"
#include "plan/device.h"

namespace tern::cuda {

// The tables of a routed batch; zeroed.
class PlanTables {
 public:
  PlanTables(const std::shared_ptr<DevicePool>& pool, const PlanShape& shape);
  const kernels::PlanView& view() const { return view_; }

 private:
  DeviceBuffer<std::byte> memory_;
  kernels::PlanView view_;
};

struct PlanMemory {
  PlanMemory(const std::shared_ptr<DevicePool>& pool, const PlanShape& shape, int32_t num_lanes);

  // The operations along the plan have run, but for captured ones: whoever replays a graph keeps its plans.
  bool is_idle() const;

  PlanTables tables;
  DeviceBuffer<int32_t> block_counts, workspace;
  PinnedBuffer<int32_t> host_counts;  // [num_ranks, num_counts], then tokens [num_ranks]
  PinnedBuffer<uint64_t> host_ticket;
  std::vector<std::shared_ptr<Event>> ends;  // by lane: behind the last operation along the plan
};

}  // namespace tern::cuda
