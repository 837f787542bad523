// SPDX-License-Identifier: Apache-2.0
// A route between nodes.
#include "base/error.h"
#include "cuda/node_operations.h"
#include "cuda/nodes.h"

namespace tern::cuda {

NodeRoute::NodeRoute(const CudaPlan& plan, const tern_routing& routing, const tern_launch& launch, const cpu::RailTrip& trip,
                     int32_t num_sms)
    : plan_(plan), launch_(launch), trip_(trip), num_sms_(num_sms) {
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

void NodeRoute::enqueue(const NodePlan::Route& route, cudaStream_t stream) {
  const NodeSteps steps(plan_, launch_, TERN_OP_ROUTE, stream);
  const uint64_t command = steps.add([route, plan = plan_.node_plan()](NodeLane& lane) { plan->route(lane, route); });
  constexpr kernels::HostSteps kOneRound{.awaits = true, .asks_last = true};
  for (int64_t round = 0; round < trip_.num_rounds; ++round) {
    give(steps, round,
         round > 0
             ? kOneRound
             : kernels::HostSteps{
                   .command = command, .asks_first = true, .takes_epochs = static_cast<int32_t>(trip_.num_rounds), .asks_last = true});
    if (round == 0) route_batch(plan_.shape().node(), stream);
    if (round > 0) take(steps, round - 1, kOneRound);
  }
  take(steps, trip_.num_rounds - 1, kOneRound);
  finish(steps);
}

void NodeRoute::give(const NodeSteps& steps, int64_t round, kernels::HostSteps of_kernel) {
  set_slots(round, plan_.exchange().nodes()->leaving(launch_.lane));
  args_.steps = steps.of_kernel(of_kernel);
  tern::cuda::check(kernels::launch_give(args_, steps.stream()), "launching the kernel that numbers tokens for other nodes");
}

void NodeRoute::take(const NodeSteps& steps, int64_t round, kernels::HostSteps of_kernel) {
  args_.heads = plan_.exchange().nodes()->arrived_heads(launch_.lane);
  set_slots(round, plan_.exchange().nodes()->arrived(launch_.lane));
  args_.steps = steps.of_kernel(of_kernel);
  tern::cuda::check(kernels::launch_take(args_, steps.stream()), "launching the kernel that takes tokens of other nodes");
}

void NodeRoute::route_batch(int32_t node, cudaStream_t stream) const {
  tern::cuda::check(kernels::launch_route(batch_args(node), stream), "launching the kernel of route");
}

void NodeRoute::finish(const NodeSteps& steps) const {
  for_each_batch(plan_.shape(), [&](int32_t node) {
    if (node != plan_.shape().node()) route_batch(node, steps.stream());
  });
  const kernels::CopyArgs told{.exchange = args_.exchange,
                               .operation = TERN_OP_ROUTE,
                               .steps = steps.of_kernel({.awaits = true}),
                               .to = plan_.tables_data(),
                               .from = plan_.node_plan()->told(),
                               .num_bytes = plan_.told_bytes()};
  tern::cuda::check(kernels::launch_copy(told, steps.stream()), "launching the kernel that brings what the host has counted");
  tern::cuda::check(kernels::launch_settle(args_, steps.stream()), "launching the kernel that gives rows of all batches");
}

void NodeRoute::set_slots(int64_t round, const kernels::RailSlots& slots) {
  args_.slots = slots;
  args_.slots.slots_at = trip_.bank.slots();
  args_.slots.layout = trip_.bank.slot;
  args_.round = static_cast<int32_t>(round);
}

// Rows of a batch alone: each expert has room for all that may come, so that they become rows of all by one addition.
kernels::RouteArgs NodeRoute::batch_args(int32_t node) const {
  const int32_t num_ranks = plan_.shape().ranks_per_node(), first_source = node * num_ranks;
  const kernels::NodeRouteTables& r = args_.route;
  const int64_t first_message = node * args_.batch_messages();
  kernels::RouteArgs args = plan_.route_args({}, launch_.lane, num_sms_);
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

}  // namespace tern::cuda
