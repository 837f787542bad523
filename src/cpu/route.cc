// SPDX-License-Identifier: Apache-2.0
// Route: every rank tells every rank its counts; then everybody knows every offset. Between nodes it first tells its rail in each node what
// that node must know: its counts there, and which tokens come, with their experts. Rails hand on the counts as they do their own.
#include <algorithm>
#include <cstring>

#include "base/error.h"
#include "cpu/plan.h"

namespace tern::cpu {
namespace {

// The counts go with every round, since each has room for them.
void send_tokens(const RouteContext& ctx, const RailTrip& trip, uint64_t epoch, int64_t begin) {
  ctx.rail->start_round(trip, epoch);
  ctx.rail->for_each_other_node([&](int node) {
    put_counts_for(ctx, trip, epoch, node);
    const auto tokens = ctx.table.tokens_to(node);
    size_t& next = ctx.scratch.next_to[static_cast<size_t>(node)];
    for (; next < tokens.size() && tokens[next] < begin + trip.tokens_per_round; ++next)
      put_token_words(ctx, trip, node, tokens[next], ctx.rail->next_slot(trip, epoch, node));
  });
  ctx.rail->send_round(trip, epoch);
}

void receive_tokens(const RouteContext& ctx, const RailTrip& trip, uint64_t epoch) {
  ctx.rail->for_each_other_node([&](int node) {
    const std::byte* bank = ctx.rail->await_arrived(trip, epoch, node);
    if (bank != nullptr) take_tokens(ctx, trip, node, bank);
  });
  ctx.rail->finish_round(epoch);
}

void exchange_between_nodes(const RouteContext& ctx) {
  const RailTrip trip = rail_trip_of_route(ctx);
  const uint64_t first = ctx.rail->begin(trip.operation, trip.num_rounds);
  std::fill(ctx.scratch.next_to.begin(), ctx.scratch.next_to.end(), 0);
  for (int64_t round = 0; round < trip.num_rounds; ++round) {
    send_tokens(ctx, trip, first + static_cast<uint64_t>(round), round * trip.tokens_per_round);
    if (round > 0) receive_tokens(ctx, trip, first + static_cast<uint64_t>(round) - 1);
  }
  receive_tokens(ctx, trip, first + static_cast<uint64_t>(trip.num_rounds) - 1);
}

}  // namespace

void put_counts_for(const RouteContext& ctx, const RailTrip& trip, uint64_t epoch, int node) {
  ctx.table.get_counts_for(node, {ctx.rail->counts_for(trip, epoch, node), static_cast<size_t>(ctx.table.num_counts())});
}

void put_token_words(const RouteContext& ctx, const RailTrip& trip, int node, int32_t token, std::byte* slot) {
  auto* words = reinterpret_cast<int32_t*>(slot + trip.bank.slot.words());
  words[0] = token;
  ctx.table.get_words_for(node, token, {words + 1, static_cast<size_t>(ctx.shape().route_words())});
}

void take_tokens(const RouteContext& ctx, const RailTrip& trip, int node, const std::byte* bank) {
  SourceBatch& batch = ctx.table.batch(node);
  const auto counts = ctx.table.counts_of(batch.source());
  std::memcpy(counts.data(), bank + trip.bank.counts(), counts.size_bytes());
  const int32_t num_slots = reinterpret_cast<const layout::RailHeader*>(bank)->num_slots;
  for (int32_t i = 0; i < num_slots; ++i) {
    const auto* words = reinterpret_cast<const int32_t*>(bank + trip.bank.slot_at(i) + trip.bank.slot.words());
    batch.add_token(words[0], {words + 1, static_cast<size_t>(ctx.shape().route_words())});
  }
}

// Of this rank and its rails, one node after the other.
void put_counts_in_node(const RouteContext& ctx, const RoundTrip& trip, uint64_t epoch) {
  ctx.lane.for_each_peer([&](int peer) {
    std::byte* counts = ctx.domain().bank(peer, ctx.lane.index(), epoch, ctx.domain().rank) + trip.bank.counts();
    for (const SourceBatch& batch : ctx.table.batches()) {
      const auto of_source = ctx.table.counts_of(batch.source());
      std::memcpy(counts, of_source.data(), of_source.size_bytes());
      counts += of_source.size_bytes();
    }
  });
}

void take_counts_in_node(const RouteContext& ctx, const RoundTrip& trip, int peer, const std::byte* bank) {
  if (peer == ctx.domain().rank) return;
  const std::byte* counts = bank + trip.bank.counts();
  for (int32_t node = 0; node < ctx.shape().num_nodes; ++node) {
    const auto of_source = ctx.table.counts_of(node * ctx.shape().ranks_per_node() + peer);
    std::memcpy(of_source.data(), counts, of_source.size_bytes());
    counts += of_source.size_bytes();
  }
}

// A slot: the token, then its words.
RailTrip rail_trip_of_route(const RouteContext& ctx) {
  const PlanShape& shape = ctx.shape();
  RailTrip trip{.operation = TERN_OP_ROUTE,
                .shape = call_shape(shape),
                .bank = {.num_counts = ctx.table.num_counts(),
                         .slot = {.num_words = shape.routing_words(), .num_routing_words = shape.routing_words()}}};
  trip.tokens_per_round = std::min(shape.max_tokens, trip.bank.slots_in(ctx.rail->bank_bytes()));
  if (trip.tokens_per_round == 0)
    fail(TERN_OUT_OF_MEMORY,
         "route: the counts of {} experts and {} ranks need {} bytes of a bank for what goes to another node, which has {}; create the "
         "exchange with more staging_bytes or max_experts",
         shape.num_experts, shape.num_ranks, trip.bank.bytes(1), ctx.rail->bank_bytes());
  // The counts are not known yet: only the plan's bound is the same on every rank.
  trip.num_rounds = (shape.max_tokens + trip.tokens_per_round - 1) / trip.tokens_per_round;
  return trip;
}

void run_route(const RouteContext& ctx) {
  if (ctx.rail != nullptr) exchange_between_nodes(ctx);
  run_route_in_node(ctx);
}

void run_route_in_node(const RouteContext& ctx) {
  RoundTrip trip{.operation = TERN_OP_ROUTE,
                 .shape = call_shape(ctx.shape()),
                 .bank = {.num_counts = ctx.shape().num_nodes * ctx.table.num_counts(), .slot = {}},
                 .num_tokens = ctx.table.num_tokens(),
                 .tokens_per_round = 1};
  if (trip.bank.slots() > ctx.domain().layout.bank_bytes)
    fail(TERN_OUT_OF_MEMORY,
         "route: the counts of {} experts need {} bytes of a staging bank, which has {}; create the exchange with more staging_bytes or "
         "max_experts",
         ctx.shape().num_experts, trip.bank.slots(), ctx.domain().layout.bank_bytes);
  ctx.lane.run(
      trip, [&](int64_t, uint64_t epoch) { put_counts_in_node(ctx, trip, epoch); },
      [&](int64_t, uint64_t epoch) {
        ctx.domain().for_each_member([&](int peer) {
          ctx.lane.receive_from(trip, epoch, peer, [&](const std::byte* bank) { take_counts_in_node(ctx, trip, peer, bank); });
        });
      });
  // Others may have the counts of a rank that was given up here: no row may move until all have the same.
  if (ctx.lane.gave_up_any()) fail(TERN_ABORTED, "route: a rank did not come; the next generation starts without it");
  const Span span(ctx.lane.spans(), {.kind = TERN_SPAN_PLAN, .operation = trip.operation});
  ctx.table.finish();
}

}  // namespace tern::cpu
