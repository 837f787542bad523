// SPDX-License-Identifier: Apache-2.0
// One dispatch or combine between nodes. Within the node it is that of operations.h, for one batch after the other: this rank's own tokens, and
// what each of its rails sends here. Kernels pack rows for the rails, and sum what these return; in between the lane's thread moves slots
// (node_lane.h). In rounds of the rail, two of which may be under way:
//
//   dispatch   pack 0, pack 1;  for each round: own batch, await the rails, their batches, pack the next but one
//   combine    for each round: all batches into slots, send;  await the rails of the round before, sum the nodes
//
// A send of a dispatch packs, its receive does the rest; a send of a combine fills slots, its receive sums the nodes.
#pragma once

#include "cpu/rail.h"
#include "cuda/node_plan.h"
#include "cuda/operations.h"

namespace tern::cuda {

// What goes over the rail: so many chunks of each owner's tokens in a round.
struct NodeTrip {
  cpu::RailTrip rail;
  int32_t num_chunks = 0;
  int32_t chunks_per_round = 0;

  int32_t num_rounds() const { return static_cast<int32_t>(rail.num_rounds); }
  ChunkRange chunks(int32_t round) const { return chunks_of_round(num_chunks, chunks_per_round, round); }
};

// How a trip is cut into rounds: TERN_OUT_OF_MEMORY says what staging would be needed if not even a chunk fits, or for a phase not all.
struct NodeTripOptions {
  tern_operation operation;
  tern_phase phase;
  const layout::CallShape& shape;
  layout::RailSlotLayout slot;
  int64_t slots_per_token;
  int64_t most_tokens;
};
NodeTrip make_node_trip(const CudaPlan& plan, const NodeTripOptions& options);

// Steps of one operation on its stream.
class NodeSteps {
 public:
  NodeSteps(const CudaPlan& plan, const tern_launch& launch, tern_operation operation, cudaStream_t stream);

  // The host begins the command; the first answer is awaited.
  void begin(NodeLane::Command command) const;
  void ask() const { talk({.asks = true}); }
  void await() const { talk({.awaits = true}); }
  cudaStream_t stream() const { return stream_; }

 private:
  void talk(kernels::TalkArgs args) const;

  const CudaPlan& plan_;
  const int32_t lane_idx_;
  const tern_operation operation_;
  const cudaStream_t stream_;
};

// A route: the batches are routed one after the other, each as if it were alone, this rank's own while what the others need is on its way.
class NodeRoute {
 public:
  NodeRoute(const CudaPlan& plan, const tern_routing& routing, const tern_launch& launch);
  // `num_sms`: of a batch's route.
  void enqueue(const NodePlan::Route& route, int32_t num_sms, cudaStream_t stream);

 private:
  void pack(int64_t round);
  void unpack(int64_t round);
  kernels::RouteArgs batch_args(int32_t node) const;

  const CudaPlan& plan_;
  const tern_launch& launch_;
  const cpu::RailTrip& trip_;
  kernels::NodeRouteArgs args_;
};

class NodeDispatch {
 public:
  NodeDispatch(const CudaPlan& plan, const DispatchCall& call, const tern_launch& launch, int64_t most_tokens);
  void check(const Ticket& ticket, int64_t rail_rounds_before) const;
  void enqueue(cudaStream_t stream, Ticket& ticket) const;
  int32_t num_sms() const { return in_node_.num_sms(); }

 private:
  void pack(const NodeSteps& steps, int32_t round) const;
  void forward(cudaStream_t stream, int32_t node, int32_t round) const;

  const CudaPlan& plan_;
  const tern_launch& launch_;
  const tern_launch launch_in_node_;  // a whole operation
  const DispatchOperation in_node_;
  NodeTrip trip_;
};

class NodeCombine {
 public:
  NodeCombine(const CudaPlan& plan, const CombineCall& call, const tern_launch& launch);
  void check(const Ticket& ticket) const;
  void enqueue(cudaStream_t stream, Ticket& ticket) const;
  int32_t num_sms() const { return in_node_.num_sms(); }

 private:
  bool sends_weights_ahead() const { return launch_.phase != TERN_PHASE_RECEIVE && in_node_.sends_weights_ahead(); }
  void send_weights(cudaStream_t stream) const;
  void fill_slots(cudaStream_t stream, int32_t round) const;
  void sum_nodes(cudaStream_t stream, int32_t round) const;

  const CudaPlan& plan_;
  const CombineCall& call_;
  const tern_launch& launch_;
  const tern_launch launch_in_node_;
  const CombineOperation in_node_;
  NodeTrip trip_, weights_trip_;
};

}  // namespace tern::cuda
