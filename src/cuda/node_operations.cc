// SPDX-License-Identifier: Apache-2.0
#include "cuda/node_operations.h"

#include <algorithm>

#include "base/error.h"
#include "cuda/nodes.h"
#include "plan/window_sizing.h"

namespace tern::cuda {
namespace {

// A round of the rail, to each node: what is packed while the last one is on its way.
constexpr int64_t kRailRoundBytes = 8 << 20;

tern_launch whole(tern_launch launch) {
  launch.phase = TERN_PHASE_WHOLE;
  return launch;
}

// Slots of tokens, or of entries, as they follow from the plan.
struct SlotTable {
  const int32_t* slot_of;
  const int32_t* chunk_begin;
  int64_t num_places;  // from node to node
};
SlotTable tokens_here(const CudaPlan& plan) { return {plan.rails().here, plan.rails().here_begin, plan.shape().max_tokens}; }
SlotTable tokens_there(const CudaPlan& plan) { return {plan.rails().there, plan.rails().there_begin, plan.shape().max_tokens}; }
SlotTable entries_here(const CudaPlan& plan) {
  return {plan.rails().entries_here, plan.rails().entries_here_begin, plan.shape().max_tokens * plan.shape().num_topk};
}
SlotTable entries_there(const CudaPlan& plan) { return {plan.rails().entries_there, plan.rails().entries_there_begin, 0}; }

kernels::RailSlots with(kernels::RailSlots slots, const NodeTrip& trip, const SlotTable& table, int32_t round) {
  slots.slots_at = trip.rail.bank.slots();
  slots.layout = trip.rail.bank.slot;
  slots.slot_of = table.slot_of;
  slots.chunk_begin = table.chunk_begin;
  slots.num_places = table.num_places;
  slots.first_chunk = trip.chunks(round).begin;
  return slots;
}

// Calls visit(node), this rank's own first, in the same order on all ranks of the node.
template <typename Visitor>
void for_each_batch(const PlanShape& shape, Visitor visit) {
  for (int32_t i = 0; i < shape.num_nodes; ++i) visit((shape.node() + i) % shape.num_nodes);
}

// ---- Commands, on the lane's thread.

// `chunk_begin`: by node, of the slots that leave.
struct RailRounds {
  NodeTrip trip;
  const int32_t* chunk_begin;
};

// The banks are free; the GPU fills them; they go.
void send(NodeLane& lane, const RailRounds& rounds, uint64_t first, int32_t round) {
  const uint64_t epoch = first + static_cast<uint64_t>(round);
  const ChunkRange chunks = rounds.trip.chunks(round);
  lane.rail().start_round(rounds.trip.rail, epoch);
  for (int node = 0; node < lane.rail().num_nodes(); ++node) {
    const int32_t* begin = rounds.chunk_begin + node * (layout::kMaxChunks + 1);
    lane.rail().set_num_slots(node, begin[chunks.end] - begin[chunks.begin]);
  }
  lane.answer(epoch);
  lane.await_gpu(rounds.trip.rail.operation);
  lane.rail().send_round(rounds.trip.rail, epoch);
}

// What came is there; the GPU reads it; it is no longer needed.
void receive(NodeLane& lane, const RailRounds& rounds, uint64_t first, int32_t round) {
  const uint64_t epoch = first + static_cast<uint64_t>(round);
  for (int node = 0; node < lane.rail().num_nodes(); ++node)
    if (lane.rail().serves(node)) lane.rail().await_arrived(rounds.trip.rail, epoch, node);
  lane.answer(epoch);
  lane.await_gpu(rounds.trip.rail.operation);
  lane.rail().finish_round(epoch);
}

// Two rounds ahead. `epoch`: of a send, kept for its receive.
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

// One behind.
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

// ---- Tickets: the epochs of the rail, as the caller's thread counts them.

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

}  // namespace

NodeTrip make_node_trip(const CudaPlan& plan, const NodeTripOptions& options) {
  const kernels::PlanView& tables = plan.tables();
  const Nodes& nodes = *plan.exchange().nodes();
  NodeTrip trip{.rail = {.operation = options.operation, .shape = options.shape, .bank = {.num_counts = 0, .slot = options.slot}}};
  const int64_t slots_per_chunk = options.slots_per_token * tables.tokens_per_chunk;
  const int64_t most_chunks = std::max<int64_t>(1, (options.most_tokens + tables.tokens_per_chunk - 1) / tables.tokens_per_chunk);
  const bool in_one = options.phase != TERN_PHASE_WHOLE;
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

NodeSteps::NodeSteps(const CudaPlan& plan, const tern_launch& launch, tern_operation operation, cudaStream_t stream)
    : plan_(plan), lane_idx_(launch.lane), operation_(operation), stream_(stream) {}

void NodeSteps::begin(NodeLane::Command command) const {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream_, &status), "asking whether a stream is captured");
  const void* owner = status == cudaStreamCaptureStatusNone ? nullptr : &plan_;
  const uint64_t number = plan_.exchange().nodes()->lane(lane_idx_).add(std::move(command), owner);
  talk({.command = number, .asks = true});
}

void NodeSteps::talk(kernels::TalkArgs args) const {
  const NodeLane& lane = plan_.exchange().nodes()->lane(lane_idx_);
  args.exchange = plan_.exchange().view(lane_idx_);
  args.operation = operation_;
  args.cell = lane.cell();
  args.talk = lane.talk();
  check(kernels::launch_talk(args, stream_), "launching the kernel that talks with the host");
}

// ---- Route

NodeRoute::NodeRoute(const CudaPlan& plan, const tern_routing& routing, const tern_launch& launch)
    : plan_(plan), launch_(launch), trip_(plan.node_plan()->trip()) {
  args_.exchange = plan.exchange().view(launch.lane);
  args_.plan = plan.tables();
  args_.rails = plan.rails();
  args_.route = plan.route_tables();
  args_.report = plan.node_plan()->report();
  args_.unreachable = plan.exchange().nodes()->unreachable_on_gpu();
  args_.num_rounds = static_cast<int32_t>(trip_.num_rounds);
  args_.tokens_per_round = trip_.tokens_per_round;
  take_routing(routing, args_);
  args_.counts_at = trip_.bank.counts();
}

void NodeRoute::enqueue(const NodePlan::Route& route, int32_t num_sms, cudaStream_t stream) {
  const NodeSteps steps(plan_, launch_, TERN_OP_ROUTE, stream);
  const auto step = [&](cudaError_t (*launch)(const kernels::NodeRouteArgs&, cudaStream_t)) {
    tern::cuda::check(launch(args_, stream), "launching a kernel of route between nodes");
  };
  const auto route_batch = [&](int32_t node) {
    tern::cuda::check(kernels::launch_route(batch_args(node), num_sms, stream), "launching the kernel of route");
  };
  const auto receive = [&](int64_t round) {
    steps.await();
    unpack(round);
    step(&kernels::launch_unpack_routing);
    steps.ask();
  };
  const PlanShape& shape = plan_.shape();
  const int64_t num_places = shape.num_nodes * shape.max_tokens;
  const auto clear = [&](void* table, int value, int64_t num_bytes) {
    tern::cuda::check(cudaMemsetAsync(table, value, static_cast<size_t>(num_bytes), stream), "clearing the tables of a route");
  };
  if (shape.num_topk > 0)
    clear(args_.rails.experts, 0xff, num_places * shape.num_topk * static_cast<int64_t>(sizeof(int32_t)));
  else
    clear(args_.route.token_in_rank, 0, num_places * shape.ranks_per_node());
  step(&kernels::launch_number);
  steps.begin([route, plan = plan_.node_plan()](NodeLane& lane) { plan->route(lane, route); });
  for (int64_t round = 0; round < trip_.num_rounds; ++round) {
    steps.await();
    pack(round);
    step(&kernels::launch_pack_routing);
    steps.ask();
    if (round == 0) route_batch(shape.node());
    if (round > 0) receive(round - 1);
  }
  receive(trip_.num_rounds - 1);
  for_each_batch(shape, [&](int32_t node) {
    if (node != shape.node()) route_batch(node);
  });
  step(&kernels::launch_number_batches);
  steps.await();
  tern::cuda::check(kernels::launch_copy(plan_.tables_data(), plan_.node_plan()->told(), plan_.told_bytes(), stream),
                    "launching the kernel that brings what the host has counted");
  step(&kernels::launch_settle);
}

void NodeRoute::pack(int64_t round) {
  args_.slots = plan_.exchange().nodes()->leaving(launch_.lane);
  args_.slots.slots_at = trip_.bank.slots();
  args_.slots.layout = trip_.bank.slot;
  args_.round = static_cast<int32_t>(round);
}

void NodeRoute::unpack(int64_t round) {
  pack(round);
  args_.slots.banks = plan_.exchange().nodes()->arrived(launch_.lane).banks;
  args_.slots.own_bytes = plan_.exchange().nodes()->arrived(launch_.lane).own_bytes;
}

// Rows of a batch alone: each expert has room for all that may come, so that they become rows of all by one addition.
kernels::RouteArgs NodeRoute::batch_args(int32_t node) const {
  const int32_t num_ranks = plan_.shape().ranks_per_node(), first_source = node * num_ranks;
  const kernels::NodeRouteTables& r = args_.route;
  const int64_t first_message = node * args_.batch_messages();
  kernels::RouteArgs args = plan_.route_args({}, launch_.lane);
  kernels::PlanView& v = args.plan;
  v = plan_.batch(node);
  v.num_sources = num_ranks;
  v.first_source = 0;
  v.alignment = 1;
  v.row_capacity = INT32_MAX;
  v.padded_group_rows = args_.batch_group_rows();
  if (v.has_expert_rows()) v.layout = TERN_LAYOUT_EXPERT_PADDED;
  v.num_tokens += first_source;
  v.counts += int64_t{first_source} * v.num_counts(num_ranks);
  v.chunk_begin += int64_t{first_source} * (layout::kMaxChunks + 1);
  v.received_begin = r.received_begin + node * (num_ranks + 1);
  v.source_token = r.source_token + first_message;
  v.received_experts = r.received_experts + first_message * v.topk_stride;
  v.received_rows = r.received_rows + first_message * v.topk_stride;
  v.group_begin = r.group_begin;
  v.source_begin = r.source_begin;
  args.topk_idx = v.experts;
  args.is_int32 = true;
  args.token_in_rank = r.token_in_rank + first_message;
  args.tokens_per_expert = v.num_topk == 0 ? r.given_entries + node * v.num_experts : nullptr;
  args.num_tokens = static_cast<int32_t>(v.max_tokens);
  args.device_num_tokens = r.batch_tokens + node;
  return args;
}

// ---- Dispatch

NodeDispatch::NodeDispatch(const CudaPlan& plan, const DispatchCall& call, const tern_launch& launch, int64_t most_tokens)
    : plan_(plan), launch_(launch), launch_in_node_(whole(launch)), in_node_(plan, call, launch_in_node_, most_tokens) {
  const int32_t num_weights = call.carries_weights ? plan.shape().num_topk : 0;
  trip_ = make_node_trip(plan, {.operation = TERN_OP_DISPATCH,
                                .phase = launch.phase,
                                .shape = in_node_.shape(),
                                .slot = {.payload_bytes = call.wire_bytes, .scale_bytes = call.scale_bytes, .num_words = num_weights},
                                .slots_per_token = 1,
                                .most_tokens = most_tokens});
}

void NodeDispatch::check(const Ticket& ticket, int64_t rail_rounds_before) const {
  if (launch_.phase == TERN_PHASE_RECEIVE)
    check_ticket(ticket, launch_, in_node_.shape(), "dispatch");
  else
    check_rail(plan_, launch_, TERN_OP_DISPATCH, rail_rounds_before + trip_.rail.num_rounds);
}

void NodeDispatch::enqueue(cudaStream_t stream, Ticket& ticket) const {
  take_rail(plan_, launch_, trip_.rail.num_rounds, in_node_.shape(), ticket);
  const NodeSteps steps(plan_, launch_, TERN_OP_DISPATCH, stream);
  const RailRounds rounds{trip_, plan_.node_plan()->report().there_begin};
  steps.begin(
      [rounds, phase = launch_.phase, plan = plan_.node_plan()](NodeLane& lane) { run_ahead(lane, rounds, phase, plan->dispatch_epoch); });
  const int32_t num_rounds = trip_.num_rounds();
  if (launch_.phase != TERN_PHASE_RECEIVE)
    for (int32_t round = 0; round < std::min(layout::kNumBanks, num_rounds); ++round) pack(steps, round);
  if (launch_.phase == TERN_PHASE_SEND) return;
  for (int32_t round = 0; round < num_rounds; ++round) {
    if (launch_.phase == TERN_PHASE_WHOLE) forward(stream, plan_.shape().node(), round);
    steps.await();
    for_each_batch(plan_.shape(), [&](int32_t node) {
      if (node != plan_.shape().node() || launch_.phase == TERN_PHASE_RECEIVE) forward(stream, node, round);
    });
    steps.ask();
    if (round + layout::kNumBanks < num_rounds) pack(steps, round + layout::kNumBanks);
  }
}

void NodeDispatch::pack(const NodeSteps& steps, int32_t round) const {
  steps.await();
  const Nodes& nodes = *plan_.exchange().nodes();
  kernels::PackArgs args;
  args.dispatch = in_node_.packing_args({.plan = plan_.batch(plan_.shape().node()), .chunks = trip_.chunks(round)});
  args.slots = with(nodes.leaving(launch_.lane), trip_, tokens_there(plan_), round);
  args.num_nodes = nodes.num_nodes();
  args.packs_own = launch_.phase == TERN_PHASE_SEND;  // until the receive the caller's tokens may be gone
  tern::cuda::check(kernels::launch_pack(args, num_sms(), steps.stream()), "launching the kernel that packs rows for other nodes");
  steps.ask();
}

// The exchange of one batch within the node.
void NodeDispatch::forward(cudaStream_t stream, int32_t node, int32_t round) const {
  const Nodes& nodes = *plan_.exchange().nodes();
  const bool is_packed = node != plan_.shape().node() || launch_.phase == TERN_PHASE_RECEIVE;
  const ChunkRange chunks = trip_.chunks(round);
  // What follows from the plan alone is written with the first batch.
  const bool is_first_batch = node == plan_.shape().node() && round == 0;
  for (int32_t begin = chunks.begin; begin < chunks.end; begin += in_node_.chunks_per_round()) {
    BatchRound batch{.plan = plan_.batch(node), .chunks = {begin, std::min(chunks.end, begin + in_node_.chunks_per_round())}, .node = node};
    if (is_packed) batch.slots = with(nodes.arrived(launch_.lane), trip_, tokens_here(plan_), round);
    batch.is_first = is_first_batch && begin == chunks.begin;
    in_node_.enqueue_round(batch, stream);
  }
}

// ---- Combine

NodeCombine::NodeCombine(const CudaPlan& plan, const CombineCall& call, const tern_launch& launch)
    : plan_(plan), call_(call), launch_(launch), launch_in_node_(whole(launch)), in_node_(plan, call, launch_in_node_) {
  const bool per_entry = in_node_.is_per_entry();
  const int32_t num_weights = !call.carries_weights ? 0 : per_entry ? 1 : plan.shape().num_topk;
  trip_ = make_node_trip(plan, {.operation = TERN_OP_COMBINE,
                                .phase = launch.phase,
                                .shape = in_node_.shape(),
                                .slot = {.payload_bytes = call.wire_bytes, .num_words = (per_entry ? 1 : 0) + num_weights},
                                .slots_per_token = per_entry ? plan.shape().num_topk : 1,
                                .most_tokens = plan.most_tokens()});
  if (sends_weights_ahead())
    weights_trip_ = make_node_trip(plan, {.operation = TERN_OP_WEIGHTS,
                                          .phase = TERN_PHASE_WHOLE,
                                          .shape = call_shape(plan.shape()),
                                          .slot = {.num_words = plan.shape().num_topk},
                                          .slots_per_token = 1,
                                          .most_tokens = plan.most_tokens()});
}

void NodeCombine::check(const Ticket& ticket) const {
  if (launch_.phase == TERN_PHASE_RECEIVE)
    check_ticket(ticket, launch_, in_node_.shape(), "combine");
  else
    check_rail(plan_, launch_, TERN_OP_COMBINE, trip_.rail.num_rounds + (sends_weights_ahead() ? weights_trip_.rail.num_rounds : 0));
}

void NodeCombine::enqueue(cudaStream_t stream, Ticket& ticket) const {
  if (sends_weights_ahead()) send_weights(stream);
  take_rail(plan_, launch_, trip_.rail.num_rounds, in_node_.shape(), ticket);
  const NodeSteps steps(plan_, launch_, TERN_OP_COMBINE, stream);
  const kernels::NodeRouteReport& report = plan_.node_plan()->report();
  const RailRounds rounds{trip_, in_node_.is_per_entry() ? report.entries_here_begin : report.here_begin};
  steps.begin(
      [rounds, phase = launch_.phase, plan = plan_.node_plan()](NodeLane& lane) { run_behind(lane, rounds, phase, plan->combine_epoch); });
  const auto take = [&](int32_t round) {
    steps.await();
    sum_nodes(stream, round);
    steps.ask();
  };
  const int32_t num_rounds = trip_.num_rounds();
  for (int32_t round = 0; round < num_rounds && launch_.phase != TERN_PHASE_RECEIVE; ++round) {
    steps.await();
    fill_slots(stream, round);
    steps.ask();
    if (launch_.phase == TERN_PHASE_WHOLE && round > 0) take(round - 1);
  }
  if (launch_.phase != TERN_PHASE_SEND) take(num_rounds - 1);
}

// Weights that only the owner knows, to the experts' ranks of all nodes.
void NodeCombine::send_weights(cudaStream_t stream) const {
  const NodeTrip& trip = weights_trip_;
  const Nodes& nodes = *plan_.exchange().nodes();
  nodes.lane(launch_.lane).epochs().take(trip.rail.num_rounds);
  const NodeSteps steps(plan_, launch_, TERN_OP_WEIGHTS, stream);
  const RailRounds rounds{trip, plan_.node_plan()->report().there_begin};
  steps.begin([rounds, plan = plan_.node_plan()](NodeLane& lane) {
    uint64_t epoch = 0;
    run_ahead(lane, rounds, TERN_PHASE_WHOLE, epoch);
  });
  const auto pack = [&](int32_t round) {
    steps.await();
    kernels::PackArgs args;
    args.dispatch = in_node_.weights_args({.plan = plan_.batch(plan_.shape().node()), .chunks = trip.chunks(round)});
    args.slots = with(nodes.leaving(launch_.lane), trip, tokens_there(plan_), round);
    args.num_nodes = nodes.num_nodes();
    tern::cuda::check(kernels::launch_pack(args, num_sms(), stream), "launching the kernel that packs weights for other nodes");
    steps.ask();
  };
  const auto forward = [&](int32_t node, int32_t round) {
    const ChunkRange chunks = trip.chunks(round);
    for (int32_t begin = chunks.begin; begin < chunks.end; begin += in_node_.weight_chunks_per_round()) {
      BatchRound batch{
          .plan = plan_.batch(node), .chunks = {begin, std::min(chunks.end, begin + in_node_.weight_chunks_per_round())}, .node = node};
      if (node != plan_.shape().node()) batch.slots = with(nodes.arrived(launch_.lane), trip, tokens_here(plan_), round);
      in_node_.enqueue_weights_round(batch, stream);
    }
  };
  for (int32_t round = 0; round < std::min(layout::kNumBanks, trip.num_rounds()); ++round) pack(round);
  for (int32_t round = 0; round < trip.num_rounds(); ++round) {
    forward(plan_.shape().node(), round);
    steps.await();
    for_each_batch(plan_.shape(), [&](int32_t node) {
      if (node != plan_.shape().node()) forward(node, round);
    });
    steps.ask();
    if (round + layout::kNumBanks < trip.num_rounds()) pack(round + layout::kNumBanks);
  }
}

// The node's sums for the owners of all batches.
void NodeCombine::fill_slots(cudaStream_t stream, int32_t round) const {
  const ChunkRange chunks = trip_.chunks(round);
  const SlotTable table = in_node_.is_per_entry() ? entries_here(plan_) : tokens_here(plan_);
  for_each_batch(plan_.shape(), [&](int32_t node) {
    for (int32_t begin = chunks.begin; begin < chunks.end; begin += in_node_.chunks_per_round())
      in_node_.enqueue_round({.plan = plan_.batch(node),
                              .chunks = {begin, std::min(chunks.end, begin + in_node_.chunks_per_round())},
                              .node = node,
                              .slots = with(plan_.exchange().nodes()->leaving(launch_.lane), trip_, table, round)},
                             stream);
  });
}

void NodeCombine::sum_nodes(cudaStream_t stream, int32_t round) const {
  const tern_combine_args& a = call_.args;
  const Nodes& nodes = *plan_.exchange().nodes();
  const ChunkRange chunks = trip_.chunks(round);
  kernels::NodeSumArgs args;
  args.exchange = plan_.exchange().view(launch_.lane);
  args.plan = plan_.batch(plan_.shape().node());
  args.per_entry = in_node_.is_per_entry();
  args.slots = with(nodes.arrived(launch_.lane), trip_, args.per_entry ? entries_there(plan_) : tokens_there(plan_), round);
  args.num_nodes = nodes.num_nodes();
  args.dtype = a.dtype;
  args.row_bytes = call_.row_bytes;
  args.wire = a.wire;
  args.node_of_entry = plan_.rails().node_of_entry;
  args.token_weights = in_node_.token_weights();
  args.bias[0] = static_cast<const std::byte*>(a.bias[0]);
  args.bias[1] = static_cast<const std::byte*>(a.bias[1]);
  args.out_tokens = static_cast<std::byte*>(a.out_tokens);
  args.out_topk_weights = a.out_topk_weights;
  args.returns_weights = call_.carries_weights;
  args.first_token = chunks.begin * args.plan.tokens_per_chunk;
  args.end_token = chunks.end * args.plan.tokens_per_chunk;
  constexpr int64_t kPartBytes = 4096;
  args.num_parts = static_cast<int32_t>((call_.row_bytes + kPartBytes - 1) / kPartBytes);
  args.part_bytes = static_cast<int32_t>(kPartBytes);
  tern::cuda::check(kernels::launch_node_sums(args, num_sms(), stream), "launching the kernel that sums what nodes return");
}

}  // namespace tern::cuda
