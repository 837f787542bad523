// SPDX-License-Identifier: Apache-2.0
#include "cuda/node_operations.h"

#include <algorithm>

#include "base/error.h"
#include "cuda/nodes.h"

namespace tern::cuda {
namespace {

constexpr int32_t kSummedPartBytes = 2048, kLargeSummedPartBytes = 4096;  // of a row, that a warp sums over the nodes

}  // namespace

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
  const kernels::RailSlots slots = slots_of_round(plan_.exchange().nodes()->leaving(launch_.lane), trip_, tokens_here(plan_), 0);
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
      if (node != plan_.shape().node()) batch.slots = slots_of_round(nodes.arrived(launch_.lane), trip, tokens_here(plan_), round);
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
  args.slots = slots_of_round(nodes.leaving(launch_.lane), weights_trip_, tokens_there(plan_), round);
  args.steps = steps.of_kernel(of_kernel);
  args.num_nodes = nodes.num_nodes();
  tern::cuda::check(kernels::launch_pack(args, num_sms(), steps.stream()), "launching the kernel that packs weights for other nodes");
}

// Of all batches; within the node they go with the sums.
void NodeCombine::take_weights(const NodeSteps& steps) const {
  const kernels::TakeWeightsArgs args{
      .exchange = plan_.exchange().view(launch_.lane),
      .rails = plan_.rails(),
      .slots = slots_of_round(plan_.exchange().nodes()->arrived(launch_.lane), weights_trip_, tokens_here(plan_), 0),
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
                              .slots = slots_of_round(plan_.exchange().nodes()->leaving(launch_.lane), trip_, table, round)},
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
  args.slots = slots_of_round(nodes.arrived(launch_.lane), trip_, args.per_entry ? entries_there(plan_) : tokens_there(plan_), round);
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
  args.part_bytes = at_once_ ? kSummedPartBytes : kLargeSummedPartBytes;
  args.num_parts = static_cast<int32_t>((call_.row_bytes + args.part_bytes - 1) / args.part_bytes);
  tern::cuda::check(kernels::launch_node_sums(args, num_sms(), steps.stream()), "launching the kernel that sums what nodes return");
}

}  // namespace tern::cuda
