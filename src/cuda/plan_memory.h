// SPDX-License-Identifier: Apache-2.0
// What kernels use of a plan. It outlives the plan where they have not ended yet: CudaExchange::retire().
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "cuda/buffers.h"
#include "kernels/exchange_view.h"
#include "kernels/rail.h"
#include "kernels/route.h"
#include "plan/device.h"

namespace tern::cuda {

// Where the tables of a plan lie in one piece of memory. Those that routing makes come first: between nodes the host makes them, and they are
// copied to the GPU as one piece.
struct PlacedTables {
  // With nullptr only sizes are right.
  PlacedTables(const PlanShape& shape, std::byte* memory);

  kernels::PlanView plan;
  kernels::RailTables rails;  // of more than one node
  int64_t routed_bytes = 0;
  int64_t total_bytes = 0;
};

// The tables of a routed batch; zeroed.
class PlanTables {
 public:
  PlanTables(const std::shared_ptr<DevicePool>& pool, const PlanShape& shape);
  const kernels::PlanView& view() const { return placed_.plan; }
  const kernels::RailTables& rails() const { return placed_.rails; }
  std::byte* data() const { return memory_.data(); }

 private:
  DeviceBuffer<std::byte> memory_;
  PlacedTables placed_;
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
