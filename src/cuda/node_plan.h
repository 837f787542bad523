// SPDX-License-Identifier: Apache-2.0
// A plan's routing between nodes. The host routes: the GPU brings it the caller's top-k indices, the rails of all nodes tell each other which
// tokens come, the ranks of the node what their batches hold, as CPU ranks do; the tables that follow go to the GPU in one piece.
//
// Memory: all is taken at creation. Lifetime: commands that use it keep it. Threads: commands on the lane's thread, one at a time; the caller's
// reads info when routed() has come to its ticket.
#pragma once

#include <atomic>
#include <memory>

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

  const PlanShape& shape() const { return table_.shape(); }
  const RoutingTable& table() const { return table_; }
  int64_t rounds_of_route() const { return rounds_of_route_; }
  // In pinned memory, as they are to be on the GPU.
  const PlacedTables& tables() const { return placed_; }
  std::byte* tables_data() const { return tables_.data(); }

  // Enqueues copies of what is given, and returns it with the addresses of the copies.
  tern_routing bring(const tern_routing& routing, cudaStream_t stream) const;

  // A command: routes what was brought, without ranks that are `unreachable`. What is left out of it is noted by `note`.
  struct Route {
    tern_routing routing;
    uint64_t ticket = 0;  // routed() when it is done
    const std::vector<uint8_t>* unreachable = nullptr;
    std::function<void(tern_status)> note;
  };
  void route(NodeLane& lane, const Route& route);
  uint64_t routed() const { return routed_; }

  // Epochs of the rail from a send to its receive; of commands.
  uint64_t dispatch_epoch = 0;
  uint64_t combine_epoch = 0;

 private:
  int64_t topk_bytes(const tern_routing& routing) const;
  bool drop_invalid(tern_routing& routing) const;
  void tell_messages(cpu::Lane& lane);
  void write_message(const SourceBatch& batch, int64_t token, int32_t rank, const layout::SlotLayout& layout, std::byte* slot) const;
  void place_message(const layout::SlotLayout& layout, const std::byte* slot);
  void write_sources() const;
  void write_batch(int32_t node) const;
  void write_own();

  RoutingTable table_;
  cpu::PlanScratch scratch_;
  PinnedBuffer<std::byte> inputs_, tables_;
  PlacedTables placed_;
  int64_t experts_at_ = 0, num_tokens_at_ = 0;  // in inputs_: tokens of each expert, tokens
  int64_t rounds_of_route_ = 0;
  std::atomic<uint64_t> routed_ = 0;
};

}  // namespace tern::cuda
