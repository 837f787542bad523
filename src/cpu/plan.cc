// SPDX-License-Identifier: Apache-2.0
#include "cpu/plan.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "base/error.h"
#include "base/knobs.h"
#include "plan/batch_path.h"
#include "plan/window_sizing.h"

namespace tern::cpu {
namespace {

constexpr int64_t kRoundBytes = 256 << 10;    // of slots from one rank to another
constexpr int64_t kStreamingBytes = 1 << 20;  // batches from this size on are written past the caches

// Of slots from one rank to another node. Larger rounds wait less for each other, smaller ones stay in the caches. Ranks that share cores wait longest,
// for those that have none at the moment: so all that fits goes in one.
int64_t rail_round_bytes(const CpuExchange& exchange) {
  if (exchange.shares_cores()) return std::numeric_limits<int64_t>::max();
  return std::max<int64_t>(512 << 10, (1 << 20) / (exchange.domain().topology.num_nodes - 1));
}

size_t topk_elements(int64_t rows, const PlanShape& shape) { return static_cast<size_t>(rows * shape.num_topk); }

bool is_small(const PlanContext& context, int64_t row_bytes, int64_t most_kb) {
  switch (context.exchange.options().mode) {
    case TERN_MODE_THROUGHPUT: return false;
    case TERN_MODE_LATENCY: return true;
    case TERN_MODE_AUTO: break;
  }
  return context.shape().max_tokens * row_bytes <= knobs().latency_max_kb.value_or(most_kb) << 10;
}

}  // namespace

PlanScratch::PlanScratch(const PlanShape& shape)
    : row_address(static_cast<size_t>(shape.ranks_per_node())),
      next_message(static_cast<size_t>(shape.num_ranks)),
      arrived(static_cast<size_t>(shape.ranks_per_node())),
      next_slot(static_cast<size_t>(shape.ranks_per_node())),
      next_to(static_cast<size_t>(shape.num_nodes)),
      rail_slots(static_cast<size_t>(shape.num_nodes)) {
  const auto most_per_token = static_cast<size_t>(std::max(shape.num_ranks, shape.num_topk));
  payload_places.reserve(most_per_token);
  scale_places.reserve(most_per_token);
  terms.reserve(most_per_token);
  group_ends.reserve(most_per_token);
  for (auto& banks : rail_banks) banks.resize(static_cast<size_t>(shape.num_nodes));
}

CpuPlan::CpuPlan(CpuExchange& exchange, const PlanShape& shape)
    : exchange_(exchange),
      table_(shape),
      weights_{std::vector(static_cast<size_t>(shape.num_nodes), std::vector<float>(topk_elements(shape.max_tokens, shape))),
               std::vector(static_cast<size_t>(shape.num_nodes > 1 ? shape.num_nodes : 0),
                           std::vector<float>(topk_elements(shape.max_tokens, shape))),
               std::vector<float>(topk_elements(shape.max_messages(), shape)),
               std::vector<float>(topk_elements(shape.max_messages(), shape))},
      scratch_(shape),
      counts_(shape, true) {}

template <typename Operation>
void CpuPlan::operate(const tern_launch& launch, bool routes, Operation operation) {
  Lane& lane = exchange_.lane(launch.lane);
  for (bool again = false;; again = true) {
    exchange_.start_operation(lane, again);
    if (!routes && generation_ != exchange_.domain().generation)
      fail(TERN_STALE_PLAN,
           "the plan was routed in generation {}, the exchange is in generation {} since its last recovery; route it again", generation_,
           exchange_.domain().generation);
    try {
      operation(lane);
      // Rows that were routed with a rank which has gone would be stale at once; without it they serve the combine too.
      if (routes && launch.phase == TERN_PHASE_WHOLE && lane.gave_up_any() && !exchange_.has_open_sends(lane)) continue;
      if (launch.phase != TERN_PHASE_SEND && lane.gave_up_any()) exchange_.finish_without_missing(launch.phase);
      return;
    } catch (const Failure&) {
      const bool routed_without_all = routes && lane.gave_up_any();
      if (!exchange_.needs_next_generation(lane) && !routed_without_all) throw;
    }
  }
}

void CpuPlan::check_ready(const char* operation, bool must_be_dispatched) const {
  if (!routed_) fail(TERN_INVALID_STATE, "{}: the plan is not routed; call tern_plan_route, or give the dispatch a routing", operation);
  if (must_be_dispatched && !dispatched_)
    fail(TERN_INVALID_STATE, "{}: the plan has not been dispatched; its rows are not known here", operation);
}

void CpuPlan::check_nothing_under_way(const char* operation) const {
  if (is_under_way(tickets_.dispatch) || is_under_way(tickets_.combine))
    fail(TERN_INVALID_STATE, "{}: a send along this plan has not been received yet", operation);
}

void CpuPlan::set_routing(Lane& lane, const tern_routing& routing) {
  const Span span(lane.spans(), {.kind = TERN_SPAN_PLAN, .operation = TERN_OP_ROUTE});
  tickets_ = {};
  routed_ = dispatched_ = false;
  weights_.carried = false;
  table_.set_routing(routing, exchange_.unreachable());
}

void CpuPlan::finish_routing() {
  counts_.set(table_);
  generation_ = exchange_.domain().generation;
  routed_ = true;
}

void CpuPlan::route(const tern_routing& routing, const tern_launch& launch) {
  operate(launch, true, [&](Lane& lane) {
    check_nothing_under_way("route");
    const PlanContext ctx = context(lane);
    lane.check_room(TERN_OP_ROUTE, 1);
    if (ctx.rail != nullptr) ctx.rail->check_room(TERN_OP_ROUTE, rail_trip_of_route(ctx).num_rounds);
    set_routing(lane, routing);
    run_route(ctx);
    finish_routing();
    latency_path_ = false;
    lane.counters().routes.fetch_add(1, std::memory_order_relaxed);
  });
}

void CpuPlan::dispatch(const DispatchCall& call, const tern_launch& launch) {
  const bool routes = call.args.routing != nullptr && launch.phase != TERN_PHASE_RECEIVE;
  if (!routes && launch.phase != TERN_PHASE_RECEIVE) check_ready("dispatch", false);
  if (launch.phase == TERN_PHASE_RECEIVE && tickets_.dispatch.epoch == 0)
    fail(TERN_INVALID_STATE, "dispatch: nothing to receive; the plan's last dispatch was not a send, or has been received");
  operate(launch, routes, [&](Lane& lane) {
    const CountedWaits counted(lane, call.args.wait_ns);
    const PlanContext ctx = context(lane);
    // Counts and rows together while it is cheap to copy rows twice; else counts first, and rows straight to their place.
    const bool small = is_small(ctx, call.wire_bytes, ctx.rail == nullptr ? kSmallKb : kRoutedOnTheWayKbCpu);
    const bool fused =
        call.args.routing != nullptr && (small || launch.phase != TERN_PHASE_WHOLE) && (ctx.rail == nullptr || can_fuse(ctx, call));
    const DispatchRun run{call, fused, launch.phase, tickets_.dispatch};
    if (launch.phase != TERN_PHASE_RECEIVE) check_nothing_under_way("dispatch");
    check_dispatch(ctx, run, routes && !fused);
    if (routes) {
      set_routing(lane, *call.args.routing);
      if (!fused) {
        run_route(ctx);
        finish_routing();
      }
    }
    run_dispatch(ctx, run);
    latency_path_ = fused;
    if (launch.phase == TERN_PHASE_SEND) {
      generation_ = exchange_.domain().generation;  // the counts of a fused send come with its receive
      return;
    }
    if (fused) finish_routing();
    dispatched_ = true;
    lane.counters().dispatches.fetch_add(1, std::memory_order_relaxed);
    lane.counters().received_rows.fetch_add(static_cast<uint64_t>(table_.num_received()), std::memory_order_relaxed);
  });
  if (launch.phase == TERN_PHASE_SEND || !table_.exceeds_capacity()) return;
  fail(TERN_CAPACITY_EXCEEDED,
       "dispatch: {} messages with {} entries arrived, which is more than the outputs' {} rows hold; what lies beyond was left out",
       table_.num_received(), std::accumulate(counts_.received_per_expert.begin(), counts_.received_per_expert.end(), int64_t{0}),
       shape().row_capacity);
}

void CpuPlan::combine(const CombineCall& call, const tern_launch& launch) {
  check_ready("combine", true);
  if (is_under_way(tickets_.dispatch)) fail(TERN_INVALID_STATE, "combine: a dispatch along this plan has been sent and not received yet");
  if (launch.phase == TERN_PHASE_RECEIVE && tickets_.combine.epoch == 0)
    fail(TERN_INVALID_STATE, "combine: nothing to receive; the plan's last combine was not a send, or has been received");
  if (launch.phase != TERN_PHASE_RECEIVE && is_under_way(tickets_.combine))
    fail(TERN_INVALID_STATE, "combine: the plan's last send has not been received yet");
  if (call.args.weighting == TERN_WEIGHTS_DISPATCH && !weights_.carried)
    fail(TERN_INVALID_STATE, "combine: weighting is TERN_WEIGHTS_DISPATCH, but the plan's last dispatch carried no topk_weights");
  operate(launch, false, [&](Lane& lane) {
    const CountedWaits counted(lane, call.args.wait_ns);
    run_combine(context(lane), {call, launch.phase, tickets_.combine});
    if (launch.phase != TERN_PHASE_SEND) lane.counters().combines.fetch_add(1, std::memory_order_relaxed);
  });
}

tern_plan_info CpuPlan::info() const {
  check_ready("plan info", false);
  tern_plan_info info;
  info.num_tokens = table_.num_tokens();
  info.num_received = table_.num_received();
  info.num_rows = table_.num_rows();
  info.row_capacity = shape().row_capacity;
  info.generation = generation_;
  info.latency_path = latency_path_;
  counts_.tell(info);
  return info;
}

int64_t tokens_per_round(const PlanContext& context, const layout::BankLayout& bank, int64_t slots_per_token, tern_phase phase,
                         const char* operation) {
  const layout::WindowLayout& window = context.domain().layout;
  const int64_t tokens = bank.slots_in(window.bank_bytes) / slots_per_token;
  if (tokens == 0)
    fail(TERN_OUT_OF_MEMORY,
         "{}: one token needs {} bytes of a staging bank, which has {}; create the exchange with staging_bytes of at least {}, better {} "
         "for {} tokens in one round",
         operation, bank.bytes(slots_per_token), window.bank_bytes,
         window.staging_bytes() / window.bank_bytes * bank.bytes(slots_per_token),
         window.staging_bytes() / window.bank_bytes * bank.bytes(slots_per_token * context.shape().max_tokens), context.shape().max_tokens);
  if (phase != TERN_PHASE_WHOLE || context.lane.has_unreceived()) return tokens;
  return std::clamp<int64_t>(kRoundBytes / (bank.slot.stride() * slots_per_token), 1, tokens);
}

int64_t num_rounds_for(const PlanContext& context, int64_t tokens_per_round) {
  return std::max<int64_t>(1, (context.table.most_tokens_of_any_rank() + tokens_per_round - 1) / tokens_per_round);
}

void restart_messages(const PlanContext& context) {
  for (int32_t source = 0; source < context.shape().num_ranks; ++source)
    context.scratch.next_message[static_cast<size_t>(source)] = context.table.received_begin(source);
}

void set_rail_rounds(const PlanContext& context, RailTrip& rail_trip, RoundTrip& trip, int64_t slots_per_token, tern_phase phase) {
  const int64_t most_tokens = std::max<int64_t>(1, context.table.most_tokens_of_any_rank());
  const int64_t fitting = rail_trip.bank.slots_in(context.rail->bank_bytes()) / slots_per_token;
  const int64_t needed = phase == TERN_PHASE_WHOLE ? 1 : most_tokens;
  if (fitting < needed) {
    const auto staging_for = [&](int64_t tokens) {
      return num_rail_banks(context.exchange.options(), context.rail->num_nodes()) *
             layout::align_up(rail_trip.bank.bytes(tokens * slots_per_token), static_cast<int64_t>(layout::kCacheLine));
    };
    fail(TERN_OUT_OF_MEMORY,
         "{}: {} tokens need {} bytes of a bank for what goes to another node, which has {}; create the exchange with staging_bytes of at "
         "least {}, better {} for {} tokens in one round",
         operation_name(trip.operation), needed, rail_trip.bank.bytes(needed * slots_per_token), context.rail->bank_bytes(),
         staging_for(needed), staging_for(context.shape().max_tokens), context.shape().max_tokens);
  }
  trip.tokens_per_round = std::min(trip.tokens_per_round, fitting);
  if (phase == TERN_PHASE_WHOLE) {
    // Rounds without rows, whose slots are small, are cut too: the network brings the next one meanwhile.
    const int64_t round_bytes = rail_round_bytes(context.exchange);
    const int64_t wanted = std::max<int64_t>(1, round_bytes / (rail_trip.bank.slot.stride() * slots_per_token));
    trip.tokens_per_round = std::min(trip.tokens_per_round, wanted);
    const int64_t most = (fitting < most_tokens ? fitting : most_tokens + trip.tokens_per_round - 1) / trip.tokens_per_round;
    rail_trip.tokens_per_round = std::clamp<int64_t>(wanted / trip.tokens_per_round, 1, most) * trip.tokens_per_round;
  } else {
    rail_trip.tokens_per_round = most_tokens;
  }
  rail_trip.num_rounds = (most_tokens + rail_trip.tokens_per_round - 1) / rail_trip.tokens_per_round;
}

Store batch_store(const PlanContext& context, int64_t row_bytes) {
  return context.shape().max_tokens * row_bytes >= kStreamingBytes ? Store::kStreaming : Store::kCached;
}

Store slot_store(const PlanContext& context, int64_t row_bytes, tern_phase phase) {
  return phase == TERN_PHASE_WHOLE ? Store::kCached : batch_store(context, row_bytes);
}

bool is_small(const PlanContext& context, int64_t row_bytes) { return is_small(context, row_bytes, kSmallKb); }

bool uses_window(const PlanContext& context, const char* operation, const void* rows, int64_t row_bytes, bool zero_copy) {
  const int64_t bytes = context.table.num_rows() * row_bytes;
  const bool in_window = context.exchange.heap_offset(rows, bytes) >= 0;
  if (zero_copy && !in_window && (rows != nullptr || context.exchange.options().window_bytes == 0))
    fail(TERN_INVALID_ARGUMENT,
         "{}: zero_copy is set, but the {} bytes of rows are not in this rank's window of {} bytes; take them from tern_window_alloc, or "
         "set it to 0",
         operation, bytes, context.exchange.options().window_bytes);
  return in_window || zero_copy;
}

void check_phase(const PlanContext& context, const RoundTrip& trip, tern_phase phase) {
  if (phase == TERN_PHASE_WHOLE || trip.num_rounds == 1) return;
  const layout::WindowLayout& window = context.domain().layout;
  const int64_t slots = context.shape().max_tokens * (trip.bank.slots_in(window.bank_bytes) / trip.tokens_per_round);
  fail(TERN_OUT_OF_MEMORY,
       "{}: a send must fit one staging bank, {} tokens need {} rounds; create the exchange with staging_bytes of at least {}",
       operation_name(trip.operation), context.shape().max_tokens, trip.num_rounds,
       window.staging_bytes() / window.bank_bytes * trip.bank.bytes(slots));
}

void check_ticket(const PlanContext& context, const Ticket& ticket, const RoundTrip& trip) {
  const char* operation = operation_name(trip.operation);
  if (ticket.lane_idx != context.lane.index())
    fail(TERN_INVALID_ARGUMENT, "{}: the plan's last send was on lane {}, its receive is called on lane {}; use the same", operation,
         ticket.lane_idx, context.lane.index());
  if (ticket.shape != trip.shape)
    fail(TERN_INVALID_ARGUMENT, "{}: the plan's last send was called with [{}], its receive with [{}]; give it the same arguments",
         operation, shape_text(ticket.shape), shape_text(trip.shape));
}

}  // namespace tern::cpu
