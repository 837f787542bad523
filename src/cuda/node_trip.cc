// SPDX-License-Identifier: Apache-2.0
#include "cuda/node_trip.h"

#include <algorithm>

#include "base/error.h"
#include "cuda/nodes.h"
#include "plan/window_sizing.h"

namespace tern::cuda {
namespace {

// A round of the rail, to each node: what is packed while the last one is on its way.
constexpr int64_t kRailRoundBytes = 8 << 20;

// The banks are free; the GPU fills them; they go.
void send(NodeLane& lane, const RailRounds& rounds, uint64_t first, int32_t round) {
  const uint64_t epoch = first + static_cast<uint64_t>(round);
  const ChunkRange chunks = rounds.trip.chunks(round);
  lane.rail().start_round(rounds.trip.rail, epoch);
  for (int node = 0; node < lane.rail().num_nodes(); ++node) {
    const int32_t* begin = rounds.chunk_begin + node * (layout::kMaxChunks + 1);
    lane.rail().set_num_slots(node, begin[chunks.end] - begin[chunks.begin]);
  }
  if (round == 0)
    lane.grant(epoch);
  else
    lane.answer(epoch);
  lane.await_gpu(rounds.trip.rail.operation);
  lane.rail().send_round(rounds.trip.rail, epoch);
}

// What came is there; the GPU reads it; it is no longer needed.
void receive(NodeLane& lane, const RailRounds& rounds, uint64_t first, int32_t round) {
  const uint64_t epoch = first + static_cast<uint64_t>(round);
  for (int node = 0; node < lane.rail().num_nodes(); ++node)
    if (lane.rail().serves(node)) lane.rail().await_arrived(rounds.trip.rail, epoch, node);
  if (rounds.trip.rail.operation != TERN_OP_COMBINE) lane.meet(rounds.trip.rail);
  lane.answer(epoch);
  lane.await_gpu(rounds.trip.rail.operation);
  lane.rail().finish_round(epoch);
}

}  // namespace

NodeTrip make_node_trip(const CudaPlan& plan, const NodeTripOptions& options) {
  const kernels::PlanView& tables = plan.tables();
  const Nodes& nodes = *plan.exchange().nodes();
  NodeTrip trip{.rail = {.operation = options.operation, .shape = options.shape, .bank = {.num_counts = 0, .slot = options.slot}}};
  const int64_t slots_per_chunk = options.slots_per_token * tables.tokens_per_chunk;
  const int64_t most_chunks = std::max<int64_t>(1, (options.most_tokens + tables.tokens_per_chunk - 1) / tables.tokens_per_chunk);
  const bool in_one = options.phase != TERN_PHASE_WHOLE || plan.exchange().masks_late_ranks();
  const int64_t num_slots = trip.rail.bank.slots_in(nodes.bank_bytes());
  const bool fits_in_one = num_slots >= options.most_tokens * options.slots_per_token;  // the last chunk may be a short one
  const int64_t fitting = fits_in_one ? most_chunks : num_slots / slots_per_chunk;
  if (fitting < (in_one ? most_chunks : 1)) {
    const auto bytes_for = [&](int64_t tokens) {
      return layout::align_up(trip.rail.bank.bytes(tokens * options.slots_per_token), static_cast<int64_t>(layout::kCacheLine));
    };
    const int64_t num_banks = num_rail_banks(plan.exchange().options(), nodes.num_nodes());
    const int64_t needed = in_one ? options.most_tokens : tables.tokens_per_chunk;
    fail(TERN_OUT_OF_MEMORY,
         "{}: {} tokens need {} bytes of a bank for what goes to another node, which has {}; create the exchange with staging_bytes of at "
         "least {}, better {} for {} tokens in one round",
         operation_name(options.operation), needed, bytes_for(needed), nodes.bank_bytes(), num_banks * bytes_for(needed),
         num_banks * bytes_for(tables.max_tokens), tables.max_tokens);
  }
  const int64_t wanted = in_one ? most_chunks : kRailRoundBytes / (slots_per_chunk * options.slot.stride());
  trip.num_chunks = tables.num_chunks;
  trip.chunks_per_round = static_cast<int32_t>(std::clamp<int64_t>(wanted, 1, std::min(fitting, most_chunks)));
  trip.rail.tokens_per_round = int64_t{trip.chunks_per_round} * tables.tokens_per_chunk;
  trip.rail.shape.tokens_per_round = trip.rail.tokens_per_round;
  trip.rail.num_rounds = (most_chunks + trip.chunks_per_round - 1) / trip.chunks_per_round;
  return trip;
}

SlotTable tokens_here(const CudaPlan& plan) { return {plan.rails().here, plan.rails().here_begin, plan.shape().max_tokens}; }
SlotTable tokens_there(const CudaPlan& plan) { return {plan.rails().there, plan.rails().there_begin, plan.shape().max_tokens}; }
SlotTable entries_here(const CudaPlan& plan) {
  return {plan.rails().entries_here, plan.rails().entries_here_begin, plan.shape().max_tokens * plan.shape().num_topk};
}
SlotTable entries_there(const CudaPlan& plan) { return {plan.rails().entries_there, plan.rails().entries_there_begin, 0}; }

kernels::RailSlots slots_of_round(kernels::RailSlots slots, const NodeTrip& trip, const SlotTable& table, int32_t round) {
  slots.slots_at = trip.rail.bank.slots();
  slots.layout = trip.rail.bank.slot;
  slots.slot_of = table.slot_of;
  slots.chunk_begin = table.chunk_begin;
  slots.num_places = table.num_places;
  slots.first_chunk = trip.chunks(round).begin;
  return slots;
}

NodeSteps::NodeSteps(const CudaPlan& plan, const tern_launch& launch, tern_operation operation, cudaStream_t stream)
    : plan_(plan), lane_idx_(launch.lane), operation_(operation), stream_(stream) {}

uint64_t NodeSteps::add(NodeLane::Command command) const {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream_, &status), "asking whether a stream is captured");
  const void* owner = status == cudaStreamCaptureStatusNone ? nullptr : &plan_;
  return plan_.exchange().nodes()->lane(lane_idx_).add(std::move(command), owner);
}

kernels::HostSteps NodeSteps::of_kernel(kernels::HostSteps steps) const {
  const NodeLane& lane = plan_.exchange().nodes()->lane(lane_idx_);
  steps.cell = lane.cell();
  steps.talk = lane.talk();
  return steps;
}

void NodeSteps::talk(kernels::HostSteps steps) const {
  const kernels::TalkArgs args{plan_.exchange().view(lane_idx_), operation_, of_kernel(steps)};
  check(kernels::launch_talk(args, stream_), "launching the kernel that talks with the host");
}

void run_ahead(NodeLane& lane, const RailRounds& rounds, tern_phase phase, uint64_t& epoch) {
  const int32_t num_rounds = rounds.trip.num_rounds();
  if (phase != TERN_PHASE_RECEIVE) {
    epoch = lane.rail().begin(rounds.trip.rail.operation, num_rounds);
    for (int32_t round = 0; round < std::min(layout::kNumBanks, num_rounds); ++round) send(lane, rounds, epoch, round);
  }
  if (phase == TERN_PHASE_SEND) return;
  for (int32_t round = 0; round < num_rounds; ++round) {
    receive(lane, rounds, epoch, round);
    if (round + layout::kNumBanks < num_rounds) send(lane, rounds, epoch, round + layout::kNumBanks);
  }
}

void run_behind(NodeLane& lane, const RailRounds& rounds, tern_phase phase, uint64_t& epoch) {
  const int32_t num_rounds = rounds.trip.num_rounds();
  if (phase != TERN_PHASE_RECEIVE) {
    epoch = lane.rail().begin(rounds.trip.rail.operation, num_rounds);
    for (int32_t round = 0; round < num_rounds; ++round) {
      send(lane, rounds, epoch, round);
      if (phase == TERN_PHASE_WHOLE && round > 0) receive(lane, rounds, epoch, round - 1);
    }
  }
  if (phase != TERN_PHASE_SEND) receive(lane, rounds, epoch, num_rounds - 1);
}

void check_rail(const CudaPlan& plan, const tern_launch& launch, tern_operation operation, int64_t num_rounds) {
  plan.exchange().nodes()->lane(launch.lane).epochs().check_room(operation, launch.lane, num_rounds);
}

void take_rail(const CudaPlan& plan, const tern_launch& launch, int64_t num_rounds, const layout::CallShape& shape, Ticket& ticket) {
  cpu::Epochs& epochs = plan.exchange().nodes()->lane(launch.lane).epochs();
  if (launch.phase == TERN_PHASE_RECEIVE) {
    epochs.close(ticket.epoch);
    ticket = {};
    return;
  }
  const uint64_t first = epochs.take(num_rounds);
  if (launch.phase == TERN_PHASE_WHOLE) return;
  epochs.open(first);
  ticket = {first, launch.lane, plan.exchange().generation(), shape};
}

}  // namespace tern::cuda
