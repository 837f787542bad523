// SPDX-License-Identifier: Apache-2.0
// What an operation between nodes does over its rail: in which rounds, where kernels find the slots of each, and the steps in which the stream and
// the lane's thread (node_lane.h) take turns.
//
//   const NodeSteps steps(plan, launch, TERN_OP_DISPATCH, stream);
//   const uint64_t command = steps.add([=](NodeLane& lane) { run_ahead(lane, rounds, phase, epoch); });
//   steps.talk(trip.begin(phase, command));
//   enqueue_ahead(steps, trip.num_rounds(), phase, pack, forward_own, forward_others);        // the kernels of the same rounds
#pragma once

#include <algorithm>

#include "cpu/rail.h"
#include "cuda/node_lane.h"
#include "cuda/plan.h"
#include "cuda/transfer.h"
#include "kernels/rail.h"

namespace tern::cuda {

// The same of both phases: within the node an operation is whole.
inline tern_launch whole(tern_launch launch) {
  launch.phase = TERN_PHASE_WHOLE;
  return launch;
}

// What goes over the rail: so many chunks of each owner's tokens in a round.
struct NodeTrip {
  cpu::RailTrip rail;
  int32_t num_chunks = 0;
  int32_t chunks_per_round = 0;

  int32_t num_rounds() const { return static_cast<int32_t>(rail.num_rounds); }
  // How an operation, or a phase, begins: its first kernel asks the host to run the command, and awaits the banks that it fills, or what has come.
  kernels::HostSteps begin(tern_phase phase, uint64_t command) const {
    const bool receives = phase == TERN_PHASE_RECEIVE;
    return {.command = command, .asks_first = true, .takes_epochs = receives ? 0 : num_rounds(), .awaits = receives};
  }
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

// Slots of tokens, or of entries, as they follow from the plan: of those that are in this node, or of this rank's own in all nodes.
struct SlotTable {
  const int32_t* slot_of;
  const int32_t* chunk_begin;
  int64_t num_places;  // from node to node
};
SlotTable tokens_here(const CudaPlan& plan);
SlotTable tokens_there(const CudaPlan& plan);
SlotTable entries_here(const CudaPlan& plan);
SlotTable entries_there(const CudaPlan& plan);

// Those of a round, in banks that leave or have come.
kernels::RailSlots slots_of_round(kernels::RailSlots slots, const NodeTrip& trip, const SlotTable& table, int32_t round);

// Steps of one operation on its stream.
class NodeSteps {
 public:
  NodeSteps(const CudaPlan& plan, const tern_launch& launch, tern_operation operation, cudaStream_t stream);

  // The number of a command that the host begins when it is asked for.
  uint64_t add(NodeLane::Command command) const;
  // For a kernel that takes them around its work.
  kernels::HostSteps of_kernel(kernels::HostSteps steps) const;
  // By a kernel of its own.
  void talk(kernels::HostSteps steps) const;
  void ask() const { talk({.asks_first = true}); }
  void await() const { talk({.awaits = true}); }
  void ask_and_await() const { talk({.asks_first = true, .awaits = true}); }
  cudaStream_t stream() const { return stream_; }

 private:
  const CudaPlan& plan_;
  const int32_t lane_idx_;
  const tern_operation operation_;
  const cudaStream_t stream_;
};

// On the stream what run_ahead() does on the host. The first answer has been awaited; pack() asks when it is done.
template <typename Pack, typename ForwardOwn, typename ForwardOthers>
void enqueue_ahead(const NodeSteps& steps, int32_t num_rounds, tern_phase phase, Pack pack, ForwardOwn forward_own,
                   ForwardOthers forward_others) {
  const bool receives_only = phase == TERN_PHASE_RECEIVE;
  for (int32_t round = 0; round < std::min(layout::kNumBanks, num_rounds) && !receives_only; ++round) {
    if (round > 0) steps.await();
    pack(round);
  }
  if (phase == TERN_PHASE_SEND) return;
  for (int32_t round = 0; round < num_rounds; ++round) {
    forward_own(round);
    if (!receives_only) steps.await();
    forward_others(round);
    if (round + layout::kNumBanks >= num_rounds) {
      steps.ask();
      continue;
    }
    steps.ask_and_await();
    pack(round + layout::kNumBanks);
  }
}

// ---- Commands, on the lane's thread.

// `chunk_begin`: by node, of the slots that leave.
struct RailRounds {
  NodeTrip trip;
  const int32_t* chunk_begin;
};
// Sends are two rounds ahead of what is received, or one round. `epoch`: of a send, kept for its receive.
void run_ahead(NodeLane& lane, const RailRounds& rounds, tern_phase phase, uint64_t& epoch);
void run_behind(NodeLane& lane, const RailRounds& rounds, tern_phase phase, uint64_t& epoch);

// ---- Tickets: the epochs of the rail, as the caller's thread counts them.

void check_rail(const CudaPlan& plan, const tern_launch& launch, tern_operation operation, int64_t num_rounds);
void take_rail(const CudaPlan& plan, const tern_launch& launch, int64_t num_rounds, const layout::CallShape& shape, Ticket& ticket);

}  // namespace tern::cuda
