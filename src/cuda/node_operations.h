// SPDX-License-Identifier: Apache-2.0
// One dispatch or combine between nodes. Within the node it is that of operations.h, for one batch after the other: this rank's own tokens, and
// what each of its rails sends here. Kernels pack rows for the rails, and sum what these return; in between the lane's thread moves slots
// (node_lane.h). In rounds of the rail, two of which may be under way:
//
//   dispatch   pack 0, pack 1;  for each round: own batch, await the rails, their batches, pack the next but one
//   combine    for each round: all batches into slots, send;  await the rails of the round before, sum the nodes
//
// A send of a dispatch packs, its receive does the rest; a send of a combine fills slots, its receive sums the nodes. Of a small batch one kernel
// takes all batches within the node, when all have come (LatencyBatches).
#pragma once

#include <optional>

#include "cuda/latency.h"
#include "cuda/node_plan.h"
#include "cuda/node_trip.h"
#include "cuda/operations.h"

namespace tern::cuda {

// Calls visit(node), this rank's own first, in the same order on all ranks of the node.
template <typename Visitor>
void for_each_batch(const PlanShape& shape, Visitor visit) {
  for (int32_t i = 0; i < shape.num_nodes; ++i) visit((shape.node() + i) % shape.num_nodes);
}

// A route: the batches are routed one after the other, each as if it were alone, this rank's own while what the others need is on its way.
class NodeRoute {
 public:
  // `trip`: of the route, or of a dispatch that routes on its way. `num_sms`: of a batch's route.
  NodeRoute(const CudaPlan& plan, const tern_routing& routing, const tern_launch& launch, const cpu::RailTrip& trip, int32_t num_sms);
  void enqueue(const NodePlan::Route& route, cudaStream_t stream);

  // Parts of it. This rank's side of a round, into the slots that leave, behind the answer that they are free.
  void give(const NodeSteps& steps, int64_t round, kernels::HostSteps of_kernel);
  // What has come in a round, behind its answer.
  void take(const NodeSteps& steps, int64_t round, kernels::HostSteps of_kernel);
  void route_batch(int32_t node, cudaStream_t stream) const;
  // The batches of the other nodes; then the plan as a whole, when the host has everybody's counts.
  void finish(const NodeSteps& steps) const;

 private:
  void set_slots(int64_t round, const kernels::RailSlots& slots);
  kernels::RouteArgs batch_args(int32_t node) const;

  const CudaPlan& plan_;
  const tern_launch& launch_;
  const cpu::RailTrip trip_;
  const int32_t num_sms_;
  kernels::NodeRouteArgs args_;
};

class NodeDispatch {
 public:
  // Does a batch that is to be routed take one trip of the rail, in which the routing goes with the rows? If it is small, or a phase, and fits.
  // The same answer on every rank.
  static bool can_route_on_its_way(const CudaPlan& plan, const DispatchCall& call, tern_phase phase);

  struct Options {
    int64_t most_tokens = 0;         // of any rank, for all that the host knows
    bool routes_on_its_way = false;  // or the send has, of which this is the receive; then also:
    NodePlan::Route route = {};
    int32_t route_sms = 0;
  };
  NodeDispatch(const CudaPlan& plan, const DispatchCall& call, const tern_launch& launch, const Options& options);
  void check(const Ticket& ticket, int64_t rail_rounds_before) const;
  void enqueue(cudaStream_t stream, Ticket& ticket) const;
  int32_t num_sms() const { return at_once_ ? at_once_->num_sms() : in_node_.num_sms(); }
  bool is_at_once() const { return at_once_.has_value(); }

 private:
  void enqueue_routing(cudaStream_t stream) const;
  void enqueue_at_once(const NodeSteps& steps, uint64_t command) const;
  void pack(const NodeSteps& steps, int32_t round, kernels::HostSteps of_kernel) const;
  void forward(cudaStream_t stream, int32_t node, int32_t round) const;
  void forward_at_once(const NodeSteps& steps, kernels::HostSteps of_kernel) const;  // which routes, if the trip does

  const CudaPlan& plan_;
  const DispatchCall& call_;
  const tern_launch& launch_;
  const tern_launch launch_in_node_;  // a whole operation
  const Options options_;
  const DispatchOperation in_node_;
  NodeTrip trip_;
  std::optional<LatencyDispatch> at_once_;  // within the node
  bool packs_own_;                          // tokens of this rank are packed too
};

class NodeCombine {
 public:
  NodeCombine(const CudaPlan& plan, const CombineCall& call, const tern_launch& launch);
  void check(const Ticket& ticket) const;
  void enqueue(cudaStream_t stream, Ticket& ticket) const;
  int32_t num_sms() const { return at_once_ ? at_once_->num_sms() : in_node_.num_sms(); }
  bool is_at_once() const { return at_once_.has_value(); }

 private:
  bool sends_weights_ahead() const { return launch_.phase != TERN_PHASE_RECEIVE && in_node_.sends_weights_ahead(); }
  void send_weights(cudaStream_t stream) const;
  void pack_weights(const NodeSteps& steps, int32_t round, kernels::HostSteps of_kernel) const;
  void take_weights(const NodeSteps& steps) const;
  void enqueue_at_once(const NodeSteps& steps, uint64_t command) const;
  void fill_slots(cudaStream_t stream, int32_t round) const;
  void sum_nodes(const NodeSteps& steps, int32_t round, kernels::HostSteps of_kernel) const;

  const CudaPlan& plan_;
  const CombineCall& call_;
  const tern_launch& launch_;
  const tern_launch launch_in_node_;
  const CombineOperation in_node_;
  NodeTrip trip_, weights_trip_;
  std::optional<LatencyCombine> at_once_;  // within the node
};

}  // namespace tern::cuda
