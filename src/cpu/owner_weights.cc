// SPDX-License-Identifier: Apache-2.0
#include "cpu/owner_weights.h"

#include <algorithm>
#include <cstring>

#include "base/error.h"

namespace tern::cpu {
namespace {

RailTrip rail_trip_of_weights(const PlanContext& ctx) {
  RailTrip trip{.operation = TERN_OP_WEIGHTS,
                .shape = call_shape(ctx.shape()),
                .bank = {.num_counts = 0, .slot = {.num_words = ctx.shape().num_topk}}};
  trip.tokens_per_round = trip.bank.slots_in(ctx.rail->bank_bytes());
  if (trip.tokens_per_round == 0)
    fail(TERN_OUT_OF_MEMORY,
         "combine: one token's weights need {} bytes of a bank for what goes to another node, which has {}; create the exchange with more "
         "staging_bytes",
         trip.bank.bytes(1), ctx.rail->bank_bytes());
  trip.shape.tokens_per_round = trip.tokens_per_round;
  trip.num_rounds = num_rounds_for(ctx, trip.tokens_per_round);
  return trip;
}

}  // namespace

int64_t num_rail_rounds_of_weights(const PlanContext& ctx) { return rail_trip_of_weights(ctx).num_rounds; }

void send_weights_to_rails(const PlanContext& ctx, const float* topk_weights) {
  const auto row_bytes = static_cast<size_t>(ctx.shape().num_topk) * sizeof(float);
  const RailTrip trip = rail_trip_of_weights(ctx);
  const uint64_t first = ctx.rail->begin(trip.operation, trip.num_rounds);
  std::fill(ctx.scratch.next_to.begin(), ctx.scratch.next_to.end(), 0);
  const auto send = [&](int64_t round) {
    const uint64_t epoch = first + static_cast<uint64_t>(round);
    ctx.rail->start_round(trip, epoch);
    ctx.rail->for_each_other_node([&](int node) {
      const auto tokens = ctx.table.tokens_to(node);
      size_t& next = ctx.scratch.next_to[static_cast<size_t>(node)];
      for (; next < tokens.size() && tokens[next] < (round + 1) * trip.tokens_per_round; ++next)
        std::memcpy(ctx.rail->next_slot(trip, epoch, node), topk_weights + int64_t{tokens[next]} * ctx.shape().num_topk, row_bytes);
    });
    ctx.rail->send_round(trip, epoch);
  };
  const auto receive = [&](int64_t round) {
    const uint64_t epoch = first + static_cast<uint64_t>(round);
    ctx.rail->for_each_other_node([&](int node) {
      const std::byte* bank = ctx.rail->await_arrived(trip, epoch, node);
      if (bank == nullptr) return;
      const int32_t num_slots = reinterpret_cast<const layout::RailHeader*>(bank)->num_slots;
      float* weights = ctx.weights.at_rail[static_cast<size_t>(node)].data() +
                       ctx.table.batch(node).first_from(round * trip.tokens_per_round) * ctx.shape().num_topk;
      for (int32_t i = 0; i < num_slots; ++i, weights += ctx.shape().num_topk) std::memcpy(weights, bank + trip.bank.slot_at(i), row_bytes);
    });
    ctx.rail->finish_round(epoch);
  };
  for (int64_t round = 0; round < trip.num_rounds; ++round) {
    send(round);
    if (round > 0) receive(round - 1);
  }
  receive(trip.num_rounds - 1);
}

void send_weights_in_node(const PlanContext& ctx, const float* topk_weights) {
  const PlanShape& shape = ctx.shape();
  const auto row_bytes = static_cast<size_t>(shape.num_topk) * sizeof(float);
  RoundTrip trip{.operation = TERN_OP_WEIGHTS,
                 .shape = call_shape(shape),
                 .bank = {.num_counts = 0, .slot = {.num_weights = shape.num_topk}},
                 .num_tokens = ctx.table.num_tokens()};
  trip.tokens_per_round = tokens_per_round(ctx, trip.bank, shape.num_nodes, TERN_PHASE_WHOLE, "combine");
  trip.shape.tokens_per_round = trip.tokens_per_round;
  trip.num_rounds = num_rounds_for(ctx, trip.tokens_per_round);
  const auto weights_of = [&](const SourceBatch& batch) {
    return batch.source() == shape.rank ? topk_weights
                                        : ctx.weights.at_rail[static_cast<size_t>(shape.node_of_rank(batch.source()))].data();
  };
  restart_messages(ctx);

  const auto fill = [&](int64_t round, uint64_t epoch) {
    const TokenRange range = tokens_of_round(trip, round);
    for (const SourceBatch& batch : ctx.table.batches()) {
      const int64_t end = batch.first_from(range.end);
      for (int64_t token = batch.first_from(range.begin); token < end; ++token)
        for (const Message message : batch.messages_of(token))
          std::memcpy(ctx.lane.next_slot(trip, epoch, message.rank - shape.first_rank()) + trip.bank.slot.weights(),
                      weights_of(batch) + token * shape.num_topk, row_bytes);
    }
  };
  const auto drain = [&](int64_t round, uint64_t epoch) {
    ctx.domain().for_each_member([&](int rail) {
      ctx.lane.receive_from(trip, epoch, rail, [&](const std::byte* bank) {
        int64_t slot_idx = 0;
        for_each_message(ctx, rail, tokens_of_round(trip, round).end, [&](int64_t message) {
          std::memcpy(ctx.weights.from_owner.data() + message * shape.num_topk,
                      bank + trip.bank.slot_at(slot_idx++) + trip.bank.slot.weights(), row_bytes);
        });
      });
    });
  };
  ctx.lane.run(trip, fill, drain);
}

}  // namespace tern::cpu
