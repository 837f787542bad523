// SPDX-License-Identifier: Apache-2.0
#include "cuda/node_plan.h"

#include <algorithm>

#include "base/error.h"

namespace tern::cuda {
namespace {

// What kernels count in 32 bits, or in shared memory.
void check_shape(const PlanShape& shape) {
  const int64_t rows = int64_t{shape.local_experts()} * shape.ranks_per_node() * shape.max_tokens * std::max(1, shape.num_topk);
  if (shape.has_expert_rows() && rows > INT32_MAX)
    fail(TERN_UNSUPPORTED,
         "plan: {} experts on a rank with up to {} tokens of {} entries from {} ranks of a node make {} rows, at most {} are supported",
         shape.local_experts(), shape.max_tokens, shape.num_topk, shape.ranks_per_node(), rows, INT32_MAX);
  if (shape.node_experts() + shape.ranks_per_node() > kernels::kMostNodeCounters)
    fail(TERN_UNSUPPORTED, "plan: {} experts on a node, at most {} are supported with GPU ranks on {} nodes", shape.node_experts(),
         kernels::kMostNodeCounters - shape.ranks_per_node(), shape.num_nodes);
}

}  // namespace

NodePlan::NodePlan(int device, const PlanShape& shape, NodeLane& any_lane)
    : table_(shape),
      scratch_(shape),
      trip_(cpu::rail_trip_of_route({any_lane.lane(), &any_lane.rail(), table_, scratch_})),
      told_memory_(device, static_cast<size_t>(PlacedTables(shape, nullptr).told_bytes)),
      report_memory_(device, static_cast<size_t>(PlacedReport(shape, trip_.num_rounds, nullptr).total_bytes)),
      told_(shape, told_memory_.data()),
      placed_report_(shape, trip_.num_rounds, report_memory_.data()) {
  check_shape(shape);
  check_room(any_lane);
}

void NodePlan::check_room(NodeLane& any_lane) const {
  const PlanShape& shape = table_.shape();
  if (trip_.bank.slots() > any_lane.rail().head_bytes())
    fail(TERN_OUT_OF_MEMORY,
         "plan: the counts of {} experts on {} nodes need {} bytes of what goes to another node, the exchange has {}; create it with "
         "max_experts of at least that",
         shape.num_experts, shape.num_nodes, trip_.bank.slots(), any_lane.rail().head_bytes());
  const layout::BankLayout counts{.num_counts = shape.num_nodes * table_.num_counts(), .slot = {}};
  const int64_t bank_bytes = any_lane.lane().domain().layout.bank_bytes;
  if (counts.slots() > bank_bytes)
    fail(TERN_OUT_OF_MEMORY,
         "plan: the counts of {} experts on {} nodes need {} bytes from each rank, the exchange has {}; create it with max_experts of "
         "at least that",
         shape.num_experts, shape.num_nodes, counts.slots(), bank_bytes);
}

void NodePlan::route(NodeLane& lane, const Route& route) {
  table_.begin_counts(*route.unreachable);
  const uint64_t first = lane.rail().begin(TERN_OP_ROUTE, trip_.num_rounds), last = first + static_cast<uint64_t>(trip_.num_rounds) - 1;
  const auto receive = [&](uint64_t epoch) {
    take_counts(lane, trip_, epoch);
    lane.await_gpu(TERN_OP_ROUTE);
    lane.rail().finish_round(epoch);
  };
  for (int64_t round = 0; round < trip_.num_rounds; ++round) {
    send(lane, trip_, first, round);
    if (round > 0) receive(first + static_cast<uint64_t>(round) - 1);
  }
  receive(last);
  finish(lane, route, last);
}

void NodePlan::dispatch(NodeLane& lane, const cpu::RailTrip& trip, tern_phase phase, const Route& route, bool routes_in_node) {
  if (phase != TERN_PHASE_RECEIVE) {
    table_.begin_counts(*route.unreachable);
    dispatch_epoch = lane.rail().begin(trip.operation, trip.num_rounds);
    send(lane, trip, dispatch_epoch, 0);
  }
  if (phase == TERN_PHASE_SEND) return;
  take_counts(lane, trip, dispatch_epoch);
  if (routes_in_node) finish(lane, route, dispatch_epoch);
  lane.await_gpu(trip.operation);
  lane.rail().finish_round(dispatch_epoch);
}

// As the GPU has counted them.
void NodePlan::set_own_counts() {
  const PlanShape& s = shape();
  const auto own = table_.counts_of(s.rank);
  std::copy_n(report().entries + s.first_expert(), s.node_experts(), own.begin());
  std::copy_n(report().messages, s.num_ranks, own.begin() + s.node_experts());
  own.back() = *report().num_tokens;
}

// The counts go with every round, since each has room for them. The GPU has them by the time when the first round is packed.
void NodePlan::send(NodeLane& lane, const cpu::RailTrip& trip, uint64_t first, int64_t round) {
  const PlanShape& s = shape();
  const uint64_t epoch = first + static_cast<uint64_t>(round);
  cpu::Rail& rail = lane.rail();
  rail.start_round(trip, epoch);
  if (round == 0)
    lane.grant(epoch);
  else
    lane.answer(epoch);
  lane.await_gpu(trip.operation);
  if (round == 0) set_own_counts();
  const auto own = table_.counts_of(s.rank);
  rail.for_each_other_node([&](int node) {
    int32_t* const counts = rail.counts_for(trip, epoch, node);
    std::copy(own.begin(), own.end(), counts);
    std::copy_n(report().entries + node * s.node_experts(), s.node_experts(), counts);
    const int32_t* begin = report().round_begin + node * (trip.num_rounds + 1) + round;
    rail.set_num_slots(node, begin[1] - begin[0]);
  });
  rail.send_round(trip, epoch);
}

// When a round has come the GPU reads its slots, and its counts are taken here.
void NodePlan::take_counts(NodeLane& lane, const cpu::RailTrip& trip, uint64_t epoch) {
  cpu::Rail& rail = lane.rail();
  rail.for_each_other_node([&](int node) { rail.await_arrived(trip, epoch, node); });
  lane.meet(trip);
  lane.answer(epoch);
  rail.for_each_other_node([&](int node) {
    const std::byte* bank = rail.await_arrived(trip, epoch, node);
    if (bank == nullptr) return;
    const auto counts = table_.counts_of(shape().rail_in(node));
    std::copy_n(reinterpret_cast<const int32_t*>(bank + trip.bank.counts()), counts.size(), counts.begin());
  });
}

// The hosts of the node tell each other their counts and those of their rails; then the GPU hears where everybody's rows begin.
void NodePlan::finish(NodeLane& lane, const Route& route, uint64_t epoch) {
  cpu::run_route_in_node({lane.lane(), &lane.rail(), table_, scratch_});
  tell();
  if (table_.exceeds_capacity()) route.note(TERN_CAPACITY_EXCEEDED);
  routed_ = route.ticket;
  lane.answer(epoch);
}

void NodePlan::tell() {
  const PlanShape& s = shape();
  const kernels::PlanView& v = told_.plan;
  const int32_t num_experts = s.local_experts();
  for (int32_t source = 0; source <= s.num_ranks; ++source) v.received_begin[source] = static_cast<int32_t>(table_.received_begin(source));
  for (int32_t e = 0; e <= num_experts && s.has_expert_rows(); ++e) {
    v.group_begin[e] = static_cast<int32_t>(table_.group_begin(e));
    for (int32_t source = 0; source < s.num_ranks && e < num_experts; ++source)
      v.source_begin[e * s.num_ranks + source] = static_cast<int32_t>(table_.source_begin(source, e));
  }
  const auto num_begins = static_cast<size_t>(s.num_row_begins());
  for (int32_t node = 0; node < s.num_nodes; ++node)
    table_.get_row_begins(node, {told_.route.row_begins + static_cast<size_t>(node) * num_begins, num_begins});
}

}  // namespace tern::cuda
