// SPDX-License-Identifier: Apache-2.0
// What the host has of a plan between nodes. The GPU numbers and packs what its tokens need of other nodes, and makes the tables; the host moves it
// between the rails, exchanges counts with the ranks of its node, as CPU ranks do, and tells the GPU where everybody's rows begin.
//
// Memory: all is taken at creation. Lifetime: commands that use it keep it, and so does the plan's memory. Threads: commands on the lane's thread,
// one at a time; the caller's reads info when routed() has come to its ticket.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <vector>

#include "cpu/plan.h"
#include "cuda/buffers.h"
#include "cuda/node_lane.h"
#include "cuda/plan_memory.h"
#include "plan/routing_table.h"

namespace tern::cuda {

class NodePlan {
 public:
  // TERN_OUT_OF_MEMORY if the exchange is too small for the shape.
  NodePlan(int device, const PlanShape& shape, NodeLane& any_lane);

  // TERN_OUT_OF_MEMORY if the counts do not fit what goes to another node. In each generation: where slots lie apart that is less.
  void check_room(NodeLane& any_lane) const;

  const PlanShape& shape() const { return table_.shape(); }
  // Counts alone.
  const RoutingTable& table() const { return table_; }
  const cpu::RailTrip& trip() const { return trip_; }
  // In pinned memory: what the GPU is told, PlacedTables::told_bytes, and what it reports.
  const std::byte* told() const { return told_memory_.data(); }
  const kernels::NodeRouteReport& report() const { return placed_report_.report; }

  // Of a route. Ranks that are `unreachable` have no part. What is left out is noted by `note`.
  struct Route {
    uint64_t ticket = 0;  // routed() when it is done
    const std::vector<uint8_t>* unreachable = nullptr;
    std::function<void(tern_status)> note;
  };
  // Commands: take to the rails what the GPU packs, and tell it what comes of it. A route by itself; and a dispatch, or a phase of it, that routes
  // on its way. routes_in_node: within the node with the hosts' help; else the GPUs do it alone, and the host learns no counts.
  void route(NodeLane& lane, const Route& route);
  void dispatch(NodeLane& lane, const cpu::RailTrip& trip, tern_phase phase, const Route& route, bool routes_in_node);
  uint64_t routed() const { return routed_; }

  // Epochs of the rail from a send to its receive; of commands.
  uint64_t dispatch_epoch = 0;
  uint64_t combine_epoch = 0;

 private:
  void set_own_counts();
  void send(NodeLane& lane, const cpu::RailTrip& trip, uint64_t first, int64_t round);
  void take_counts(NodeLane& lane, const cpu::RailTrip& trip, uint64_t epoch);
  void finish(NodeLane& lane, const Route& route, uint64_t epoch);
  void tell();

  RoutingTable table_;
  cpu::PlanScratch scratch_;
  cpu::RailTrip trip_;
  PinnedBuffer<std::byte> told_memory_, report_memory_;
  PlacedTables told_;  // only what the GPU is told is there
  PlacedReport placed_report_;
  std::atomic<uint64_t> routed_ = 0;
};

}  // namespace tern::cuda
