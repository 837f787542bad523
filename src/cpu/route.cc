// SPDX-License-Identifier: Apache-2.0
// Route: every rank tells every rank its counts; then everybody knows every offset.
#include <cstring>

#include "base/error.h"
#include "cpu/plan.h"

namespace tern::cpu {

void run_route(const PlanContext& ctx) {
  RoundTrip trip{.operation = TERN_OP_ROUTE,
                 .shape = call_shape(ctx.shape()),
                 .bank = {.num_counts = ctx.table.num_counts(), .slot = {}},
                 .num_tokens = ctx.table.num_tokens(),
                 .tokens_per_round = 1};
  if (trip.bank.slots() > ctx.domain().layout.bank_bytes)
    fail(TERN_OUT_OF_MEMORY,
         "route: the counts of {} experts need {} bytes of a staging bank, which has {}; create the exchange with more staging_bytes or "
         "max_experts",
         ctx.shape().num_experts, trip.bank.slots(), ctx.domain().layout.bank_bytes);
  const auto own = ctx.table.counts_of(ctx.shape().rank);
  const auto send_counts = [&](int64_t, uint64_t epoch) {
    ctx.lane.for_each_peer([&](int peer) {
      std::byte* bank = ctx.domain().bank(peer, ctx.lane.index(), epoch, ctx.shape().rank);
      std::memcpy(bank + trip.bank.counts(), own.data(), own.size_bytes());
    });
  };
  const auto receive_counts = [&](int64_t, uint64_t epoch) {
    ctx.domain().for_each_member([&](int source) {
      ctx.lane.receive_from(trip, epoch, source, [&](const std::byte* bank) {
        if (source == ctx.shape().rank) return;
        std::memcpy(ctx.table.counts_of(source).data(), bank + trip.bank.counts(), own.size_bytes());
        ctx.table.tokens_of(source) = reinterpret_cast<const layout::MessageHeader*>(bank)->num_tokens;
      });
    });
  };
  ctx.lane.run(trip, send_counts, receive_counts);
  // Others may have the counts of a rank that was given up here: no row may move until all have the same.
  if (ctx.lane.gave_up_any()) fail(TERN_ABORTED, "route: a rank did not come; the next generation starts without it");
  const Span span(ctx.lane.spans(), {.kind = TERN_SPAN_PLAN, .operation = trip.operation});
  ctx.table.finish();
}

}  // namespace tern::cpu
