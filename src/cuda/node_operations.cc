// SPDX-License-Identifier: Apache-2.0
#include "cuda/node_operations.h"

#include <algorithm>

#include "base/error.h"
#include "base/knobs.h"
#include "cuda/nodes.h"
#include "plan/batch_path.h"
#include "plan/window_sizing.h"

namespace tern::cuda {
namespace {

// A round of the rail, to each node: what is packed while the last one is on its way.
constexpr int64_t kRailRoundBytes = 8 << 20;
constexpr int32_t kSmallPartBytes = 2048;     // of a row of a small batch, that a warp packs, or sums over the nodes
constexpr int32_t kRoutesOnItsWay = 1 << 25;  // in CallShape::choices

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

namespace {

layout::RailSlotLayout dispatch_slot(const CudaPlan& plan, const DispatchCall& call, int32_t num_routing_words) {
  return {.payload_bytes = call.wire_bytes,
          .scale_bytes = call.scale_bytes,
          .num_words = num_routing_words + (call.carries_weights ? plan.shape().num_topk : 0),
          .num_routing_words = num_routing_words};
}

layout::RailBankLayout routing_bank(const CudaPlan& plan, const DispatchCall& call) {
  return {.num_counts = plan.node_plan()->table().num_counts(), .slot = dispatch_slot(plan, call, plan.shape().routing_words())};
}

// Of a dispatch that routes on its way: the whole batch in one round.
NodeTrip routing_trip(const CudaPlan& plan, const DispatchCall& call, const layout::CallShape& shape) {
  NodeTrip trip{.rail = {.operation = TERN_OP_DISPATCH,
                         .shape = shape,
                         .bank = routing_bank(plan, call),
                         .tokens_per_round = plan.shape().max_tokens,
                         .num_rounds = 1},
                .num_chunks = plan.tables().num_chunks,
                .chunks_per_round = plan.tables().num_chunks};
  trip.rail.shape.tokens_per_round = plan.shape().max_tokens;
  trip.rail.shape.choices |= kRoutesOnItsWay;
  return trip;
}

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

}  // namespace

// ---- Dispatch

bool NodeDispatch::can_route_on_its_way(const CudaPlan& plan, const DispatchCall& call, tern_phase phase) {
  const tern_mode mode = plan.exchange().options().mode;
  const int64_t most_bytes = knobs().latency_max_kb.value_or(kRoutedOnTheWayKbGpu) << 10;
  const bool is_small = mode == TERN_MODE_AUTO ? plan.shape().max_tokens * call.wire_bytes <= most_bytes : mode == TERN_MODE_LATENCY;
  return (is_small || phase != TERN_PHASE_WHOLE) &&
         routing_bank(plan, call).slots_in(plan.exchange().nodes()->bank_bytes()) >= plan.shape().max_tokens;
}

NodeDispatch::NodeDispatch(const CudaPlan& plan, const DispatchCall& call, const tern_launch& launch, const Options& options)
    : plan_(plan),
      call_(call),
      launch_(launch),
      launch_in_node_(whole(launch)),
      options_(options),
      in_node_(plan, call, launch_in_node_, options.most_tokens) {
  if (options.routes_on_its_way)
    trip_ = routing_trip(plan, call, in_node_.shape());
  else
    trip_ = make_node_trip(plan, {.operation = TERN_OP_DISPATCH,
                                  .phase = launch.phase,
                                  .shape = in_node_.shape(),
                                  .slot = dispatch_slot(plan, call, 0),
                                  .slots_per_token = 1,
                                  .most_tokens = options.most_tokens});
  if (trip_.num_rounds() == 1 && takes_batches_at_once(plan, call)) at_once_.emplace(plan, call, launch_in_node_);
  // Until the receive the caller's tokens may be gone; and batches that are taken at once are all as they arrive.
  packs_own_ = launch.phase != TERN_PHASE_WHOLE || (at_once_ && call.args.encoding != TERN_ENCODING_AS_GIVEN);
}

void NodeDispatch::check(const Ticket& ticket, int64_t rail_rounds_before) const {
  if (launch_.phase == TERN_PHASE_RECEIVE)
    check_ticket(ticket, launch_, in_node_.shape(), "dispatch");
  else
    check_rail(plan_, launch_, TERN_OP_DISPATCH, rail_rounds_before + trip_.rail.num_rounds);
}

void NodeDispatch::enqueue(cudaStream_t stream, Ticket& ticket) const {
  take_rail(plan_, launch_, trip_.rail.num_rounds, in_node_.shape(), ticket);
  if (launch_.phase == TERN_PHASE_SEND) ticket.routed = options_.routes_on_its_way;
  if (options_.routes_on_its_way) return enqueue_routing(stream);
  const NodeSteps steps(plan_, launch_, TERN_OP_DISPATCH, stream);
  const RailRounds rounds{trip_, plan_.node_plan()->report().there_begin};
  const uint64_t command = steps.add(
      [rounds, phase = launch_.phase, plan = plan_.node_plan()](NodeLane& lane) { run_ahead(lane, rounds, phase, plan->dispatch_epoch); });
  if (at_once_) return enqueue_at_once(steps, command);
  steps.talk(trip_.begin(launch_.phase, command));
  const int32_t own_node = plan_.shape().node();
  enqueue_ahead(
      steps, trip_.num_rounds(), launch_.phase, [&](int32_t round) { pack(steps, round, {.asks_last = true}); },
      [&](int32_t round) { forward(stream, own_node, round); },
      [&](int32_t round) {
        for_each_batch(plan_.shape(), [&](int32_t node) {
          if (node != own_node) forward(stream, node, round);
        });
      });
}

void NodeDispatch::enqueue_at_once(const NodeSteps& steps, uint64_t command) const {
  kernels::HostSteps first = trip_.begin(launch_.phase, command);
  first.asks_last = true;
  if (launch_.phase == TERN_PHASE_RECEIVE) return forward_at_once(steps, first);
  pack(steps, 0, first);
  if (launch_.phase == TERN_PHASE_WHOLE) forward_at_once(steps, {.awaits = true, .asks_last = true});
}

// One trip of the rail. Each kernel does the steps that stand before it and behind it, since a batch that takes this way is small, or a phase.
void NodeDispatch::enqueue_routing(cudaStream_t stream) const {
  const NodeSteps steps(plan_, launch_, TERN_OP_DISPATCH, stream);
  const tern_routing none = {};
  NodeRoute route(plan_, call_.args.routing == nullptr ? none : *call_.args.routing, launch_, trip_.rail, options_.route_sms);
  const bool routes_in_node = !at_once_;
  const uint64_t command = steps.add([trip = trip_.rail, phase = launch_.phase, how = options_.route, routes_in_node,
                                      plan = plan_.node_plan()](NodeLane& lane) { plan->dispatch(lane, trip, phase, how, routes_in_node); });
  const bool receives = launch_.phase == TERN_PHASE_RECEIVE;
  if (!receives) {
    route.give(steps, 0, trip_.begin(launch_.phase, command));
    pack(steps, 0, {.asks_last = true});
  }
  if (launch_.phase == TERN_PHASE_SEND) return;
  const kernels::HostSteps first = receives ? trip_.begin(launch_.phase, command) : kernels::HostSteps{.awaits = true};
  if (at_once_) {
    route.take(steps, 0, first);
    return forward_at_once(steps, {.asks_last = true});
  }
  route.route_batch(plan_.shape().node(), stream);
  route.take(steps, 0, first);
  route.finish(steps);
  for_each_batch(plan_.shape(), [&](int32_t node) { forward(stream, node, 0); });
  steps.ask();
}

// Into banks that are free, when the kernel has awaited what it is to.
void NodeDispatch::pack(const NodeSteps& steps, int32_t round, kernels::HostSteps of_kernel) const {
  const Nodes& nodes = *plan_.exchange().nodes();
  kernels::PackArgs args;
  args.dispatch = in_node_.packing_args({.plan = plan_.batch(plan_.shape().node()), .chunks = trip_.chunks(round)});
  args.slots = with(nodes.leaving(launch_.lane), trip_, tokens_there(plan_), round);
  args.steps = steps.of_kernel(of_kernel);
  args.num_nodes = nodes.num_nodes();
  args.packs_own = packs_own_;
  if (at_once_ && args.dispatch.in.encoding == TERN_ENCODING_AS_GIVEN) {
    args.part_bytes = kSmallPartBytes;
    args.num_parts = static_cast<int32_t>((call_.wire_bytes + kSmallPartBytes - 1) / kSmallPartBytes);
  }
  tern::cuda::check(kernels::launch_pack(args, num_sms(), steps.stream()), "launching the kernel that packs rows for other nodes");
}

void NodeDispatch::forward_at_once(const NodeSteps& steps, kernels::HostSteps of_kernel) const {
  const kernels::RailSlots slots = with(plan_.exchange().nodes()->arrived(launch_.lane), trip_, tokens_here(plan_), 0);
  at_once_->enqueue_batches({.slots = slots, .steps = steps.of_kernel(of_kernel), .has_own_packed = packs_own_},
                            options_.routes_on_its_way, steps.stream());
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
  if (trip_.num_rounds() == 1 && weights_trip_.num_rounds() == 1 && takes_batches_at_once(plan, call))
    at_once_.emplace(plan, call, launch_in_node_);
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
  const uint64_t command = steps.add(
      [rounds, phase = launch_.phase, plan = plan_.node_plan()](NodeLane& lane) { run_behind(lane, rounds, phase, plan->combine_epoch); });
  if (at_once_) return enqueue_at_once(steps, command);
  steps.talk(trip_.begin(launch_.phase, command));
  const int32_t num_rounds = trip_.num_rounds();
  // Filling and summing take turns from round 1 on; each begins behind an answer. A sum asks itself when it is done.
  for (int32_t round = 0; round < num_rounds && launch_.phase != TERN_PHASE_RECEIVE; ++round) {
    if (round > 1) steps.await();
    fill_slots(stream, round);
    if (launch_.phase == TERN_PHASE_SEND) return steps.ask();
    steps.ask_and_await();
    if (round > 0) sum_nodes(steps, round - 1, {.asks_last = true});
  }
  if (num_rounds > 1) steps.await();
  sum_nodes(steps, num_rounds - 1, {.asks_last = true});
}

void NodeCombine::enqueue_at_once(const NodeSteps& steps, uint64_t command) const {
  kernels::HostSteps first = trip_.begin(launch_.phase, command);
  first.asks_last = true;
  if (launch_.phase == TERN_PHASE_RECEIVE) return sum_nodes(steps, 0, first);
  const kernels::RailSlots slots = with(plan_.exchange().nodes()->leaving(launch_.lane), trip_, tokens_here(plan_), 0);
  at_once_->enqueue_batches({.slots = slots, .steps = steps.of_kernel(first)}, steps.stream());
  if (launch_.phase == TERN_PHASE_WHOLE) sum_nodes(steps, 0, {.awaits = true, .asks_last = true});
}

// Weights that only the owner knows, to the experts' ranks of all nodes.
void NodeCombine::send_weights(cudaStream_t stream) const {
  const NodeTrip& trip = weights_trip_;
  const Nodes& nodes = *plan_.exchange().nodes();
  nodes.lane(launch_.lane).epochs().take(trip.rail.num_rounds);
  const NodeSteps steps(plan_, launch_, TERN_OP_WEIGHTS, stream);
  const RailRounds rounds{trip, plan_.node_plan()->report().there_begin};
  kernels::HostSteps first = trip.begin(TERN_PHASE_WHOLE, steps.add([rounds](NodeLane& lane) {
    uint64_t epoch = 0;
    run_ahead(lane, rounds, TERN_PHASE_WHOLE, epoch);
  }));
  if (at_once_) {
    first.asks_last = true;
    pack_weights(steps, 0, first);
    return take_weights(steps);
  }
  steps.talk(first);
  const auto forward = [&](int32_t node, int32_t round) {
    const ChunkRange chunks = trip.chunks(round);
    for (int32_t begin = chunks.begin; begin < chunks.end; begin += in_node_.weight_chunks_per_round()) {
      BatchRound batch{
          .plan = plan_.batch(node), .chunks = {begin, std::min(chunks.end, begin + in_node_.weight_chunks_per_round())}, .node = node};
      if (node != plan_.shape().node()) batch.slots = with(nodes.arrived(launch_.lane), trip, tokens_here(plan_), round);
      in_node_.enqueue_weights_round(batch, stream);
    }
  };
  const int32_t own_node = plan_.shape().node();
  enqueue_ahead(
      steps, trip.num_rounds(), TERN_PHASE_WHOLE, [&](int32_t round) { pack_weights(steps, round, {.asks_last = true}); },
      [&](int32_t round) { forward(own_node, round); },
      [&](int32_t round) {
        for_each_batch(plan_.shape(), [&](int32_t node) {
          if (node != own_node) forward(node, round);
        });
      });
}

void NodeCombine::pack_weights(const NodeSteps& steps, int32_t round, kernels::HostSteps of_kernel) const {
  const Nodes& nodes = *plan_.exchange().nodes();
  kernels::PackArgs args;
  args.dispatch = in_node_.weights_args({.plan = plan_.batch(plan_.shape().node()), .chunks = weights_trip_.chunks(round)});
  args.slots = with(nodes.leaving(launch_.lane), weights_trip_, tokens_there(plan_), round);
  args.steps = steps.of_kernel(of_kernel);
  args.num_nodes = nodes.num_nodes();
  tern::cuda::check(kernels::launch_pack(args, num_sms(), steps.stream()), "launching the kernel that packs weights for other nodes");
}

// Of all batches; within the node they go with the sums.
void NodeCombine::take_weights(const NodeSteps& steps) const {
  const kernels::TakeWeightsArgs args{.exchange = plan_.exchange().view(launch_.lane),
                                      .rails = plan_.rails(),
                                      .slots = with(plan_.exchange().nodes()->arrived(launch_.lane), weights_trip_, tokens_here(plan_), 0),
                                      .steps = steps.of_kernel({.awaits = true, .asks_last = true}),
                                      .max_tokens = plan_.shape().max_tokens,
                                      .num_topk = plan_.shape().num_topk,
                                      .own = call_.args.topk_weights};
  tern::cuda::check(kernels::launch_take_weights(args, steps.stream()), "launching the kernel that takes weights of other nodes");
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

void NodeCombine::sum_nodes(const NodeSteps& steps, int32_t round, kernels::HostSteps of_kernel) const {
  const tern_combine_args& a = call_.args;
  const Nodes& nodes = *plan_.exchange().nodes();
  const ChunkRange chunks = trip_.chunks(round);
  kernels::NodeSumArgs args;
  args.exchange = plan_.exchange().view(launch_.lane);
  args.plan = plan_.batch(plan_.shape().node());
  args.per_entry = in_node_.is_per_entry();
  args.slots = with(nodes.arrived(launch_.lane), trip_, args.per_entry ? entries_there(plan_) : tokens_there(plan_), round);
  args.steps = steps.of_kernel(of_kernel);
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
  args.part_bytes = at_once_ ? kSmallPartBytes : 4096;
  args.num_parts = static_cast<int32_t>((call_.row_bytes + args.part_bytes - 1) / args.part_bytes);
  tern::cuda::check(kernels::launch_node_sums(args, num_sms(), steps.stream()), "launching the kernel that sums what nodes return");
}

}  // namespace tern::cuda
