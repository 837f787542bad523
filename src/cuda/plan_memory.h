// SPDX-License-Identifier: Apache-2.0
// What kernels use of a plan. It outlives the plan where they have not ended yet: CudaExchange::retire().
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "cuda/buffers.h"
#include "kernels/exchange_view.h"
#include "kernels/node_route.h"
#include "kernels/rail.h"
#include "kernels/route.h"
#include "plan/device.h"

namespace tern::cuda {

// Where the tables of a plan lie in one piece of memory. Between nodes those that the host tells the GPU come first, and are copied as one piece.
struct PlacedTables {
  // With nullptr only sizes are right.
  PlacedTables(const PlanShape& shape, std::byte* memory);

  kernels::PlanView plan;
  kernels::RailTables rails;  // of more than one node, and what their routes work in
  kernels::NodeRouteTables route;
  int64_t told_bytes = 0;
  int64_t total_bytes = 0;
};

// The same for what a route between nodes tells the host.
struct PlacedReport {
  PlacedReport(const PlanShape& shape, int64_t num_rounds, std::byte* memory);

  kernels::NodeRouteReport report;
  int64_t total_bytes = 0;
};

// The tables of a routed batch; zeroed.
class PlanTables {
 public:
  PlanTables(const std::shared_ptr<DevicePool>& pool, const PlanShape& shape);
  const kernels::PlanView& view() const { return placed_.plan; }
  const kernels::RailTables& rails() const { return placed_.rails; }
  const kernels::NodeRouteTables& route() const { return placed_.route; }
  int64_t told_bytes() const { return placed_.told_bytes; }
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
  DeviceBuffer<int32_t> workspace;           // of a route
  std::shared_ptr<const void> of_host;       // between nodes, in pinned memory
  PinnedBuffer<uint64_t> host_counts;        // HostCountsView
  std::vector<std::shared_ptr<Event>> ends;  // by lane: behind the last operation along the plan
};

}  // namespace tern::cuda
