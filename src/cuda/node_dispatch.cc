// SPDX-License-Identifier: Apache-2.0
#include "cuda/node_operations.h"

#include <algorithm>

#include "base/error.h"
#include "base/knobs.h"
#include "cuda/nodes.h"
#include "plan/batch_path.h"

namespace tern::cuda {
namespace {

constexpr int32_t kPackedPartBytes = 2048;    // of a row of a small batch, that a warp packs
constexpr int32_t kRoutesOnItsWay = 1 << 25;  // in CallShape::choices

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

}  // namespace

bool NodeDispatch::can_route_on_its_way(const CudaPlan& plan, const DispatchCall& call, tern_phase phase) {
  const tern_mode mode = plan.exchange().options().mode;
  const int64_t most_bytes = knobs().latency_max_kb.value_or(kRoutedOnTheWayKbGpu) << 10;
  const bool is_small = mode == TERN_MODE_AUTO ? plan.shape().max_tokens * call.wire_bytes <= most_bytes : mode == TERN_MODE_LATENCY;
  return (is_small || phase != TERN_PHASE_WHOLE || plan.exchange().masks_late_ranks()) &&
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
  const uint64_t command =
      steps.add([trip = trip_.rail, phase = launch_.phase, how = options_.route, routes_in_node, plan = plan_.node_plan()](NodeLane& lane) {
        plan->dispatch(lane, trip, phase, how, routes_in_node);
      });
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
  args.slots = slots_of_round(nodes.leaving(launch_.lane), trip_, tokens_there(plan_), round);
  args.steps = steps.of_kernel(of_kernel);
  args.num_nodes = nodes.num_nodes();
  args.packs_own = packs_own_;
  if (at_once_ && args.dispatch.in.encoding == TERN_ENCODING_AS_GIVEN) {
    args.part_bytes = kPackedPartBytes;
    args.num_parts = static_cast<int32_t>((call_.wire_bytes + kPackedPartBytes - 1) / kPackedPartBytes);
  }
  tern::cuda::check(kernels::launch_pack(args, num_sms(), steps.stream()), "launching the kernel that packs rows for other nodes");
}

void NodeDispatch::forward_at_once(const NodeSteps& steps, kernels::HostSteps of_kernel) const {
  const kernels::RailSlots slots = slots_of_round(plan_.exchange().nodes()->arrived(launch_.lane), trip_, tokens_here(plan_), 0);
  at_once_->enqueue_batches({.slots = slots, .steps = steps.of_kernel(of_kernel), .has_own_packed = packs_own_}, options_.routes_on_its_way,
                            steps.stream());
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
    if (is_packed) batch.slots = slots_of_round(nodes.arrived(launch_.lane), trip_, tokens_here(plan_), round);
    batch.is_first = is_first_batch && begin == chunks.begin;
    in_node_.enqueue_round(batch, stream);
  }
}

}  // namespace tern::cuda
