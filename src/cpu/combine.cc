// SPDX-License-Identifier: Apache-2.0
// Combine: one result per token, back at its owner, summed in the order that tern_combine promises.
//
// Where the expert rows lie in windows, the owner pulls them and sums. Otherwise each rank pushes: hierarchical, one row per
// message, summed here and rounded or encoded once; exact, one row per entry. Slots come in message order, within a message in ascending
// k, so both sides count them alike. Weights that are known only to the owner and needed by the pusher travel first.
#include <algorithm>
#include <cstring>

#include "base/error.h"
#include "cpu/plan.h"
#include "rows/rows.h"

namespace tern::cpu {
namespace {

// The owner's weights on their way to the ranks of the experts, in message order.
void send_owner_weights(const PlanContext& ctx, const float* topk_weights) {
  const PlanShape& shape = ctx.shape();
  const auto row_bytes = static_cast<size_t>(shape.num_topk) * sizeof(float);
  RoundTrip trip{.operation = TERN_OP_WEIGHTS,
                 .shape = call_shape(shape),
                 .bank = {.num_counts = 0, .slot = {.num_weights = shape.num_topk}},
                 .num_tokens = ctx.table.num_tokens()};
  trip.tokens_per_round = tokens_per_round(ctx, trip.bank, 1, TERN_PHASE_WHOLE, "combine");
  trip.shape.tokens_per_round = trip.tokens_per_round;
  trip.num_rounds = std::max<int64_t>(1, (ctx.table.most_tokens_of_any_rank() + trip.tokens_per_round - 1) / trip.tokens_per_round);
  std::vector<int64_t>& next_message = ctx.scratch.next_message;
  for (int r = 0; r < shape.num_ranks; ++r) next_message[static_cast<size_t>(r)] = ctx.table.received_begin(r);

  const auto fill = [&](int64_t round, uint64_t epoch) {
    const TokenRange range = tokens_of_round(trip, round);
    for (int64_t token = range.begin; token < std::min(range.end, trip.num_tokens); ++token)
      for (const Message message : ctx.table.messages_of(token))
        std::memcpy(ctx.lane.next_slot(trip, epoch, message.rank) + trip.bank.slot.weights(), topk_weights + token * shape.num_topk,
                    row_bytes);
  };
  const auto drain = [&](int64_t, uint64_t epoch) {
    ctx.domain().for_each_member([&](int owner) {
      ctx.lane.receive_from(trip, epoch, owner, [&](const std::byte* bank) {
        const int32_t num_messages = reinterpret_cast<const layout::MessageHeader*>(bank)->num_messages;
        for (int32_t i = 0; i < num_messages; ++i) {
          const int64_t message = next_message[static_cast<size_t>(owner)]++;
          std::memcpy(ctx.weights.from_owner.data() + message * shape.num_topk, bank + trip.bank.slot_at(i) + trip.bank.slot.weights(),
                      row_bytes);
        }
      });
    });
  };
  ctx.lane.run(trip, fill, drain);
}

class Combine {
 public:
  Combine(const PlanContext& context, const CombineRun& run)
      : ctx_(context), call_(run.call), args_(run.call.args), shape_(context.shape()), scratch_(context.scratch) {
    const bool in_window = uses_window(ctx_, "combine", args_.rows, call_.row_bytes, args_.zero_copy != 0);
    // Not behind an open send: `consumed` stays before it, so nobody could tell when the others have done with the rows.
    pull_ = in_window && !encodes() && run.phase == TERN_PHASE_WHOLE && !is_small(ctx_, call_.row_bytes) && !ctx_.lane.has_unreceived();
    per_entry_ = args_.mode == TERN_COMBINE_EXACT && shape_.has_expert_rows();
    own_in_place_ = !pull_ && !encodes() && run.phase == TERN_PHASE_WHOLE && !shape_.has_expert_rows();
    store_ = slot_store(ctx_, call_.row_bytes, run.phase);
    set_trip(run.phase);
  }

  void run(tern_phase phase, Ticket& ticket) {
    check_phase(ctx_, trip_, phase);
    if (phase == TERN_PHASE_RECEIVE) {
      check_ticket(ctx_, ticket, trip_);
      start_receiving();
      ctx_.lane.receive_round(ticket.epoch, [&](uint64_t e) { drain(0, e); });
      ticket = {};
      return;
    }
    const bool weights_go_ahead = !pull_ && !per_entry_ && args_.weighting == TERN_WEIGHTS_OWNER;
    ctx_.lane.check_room(trip_.operation, trip_.num_rounds + (weights_go_ahead ? 1 : 0));
    if (weights_go_ahead) send_owner_weights(ctx_, args_.topk_weights);
    start_sending();
    if (phase == TERN_PHASE_SEND) {
      const uint64_t epoch = ctx_.lane.begin(trip_.operation, 1);
      ctx_.lane.send_round(trip_, epoch, [&](uint64_t e) { fill(0, e); });
      ticket = {epoch, ctx_.lane.index(), ctx_.domain().generation, trip_.shape};
      return;
    }
    start_receiving();
    ctx_.lane.run(
        trip_, [&](int64_t round, uint64_t epoch) { fill(round, epoch); }, [&](int64_t round, uint64_t epoch) { drain(round, epoch); });
    // The caller may write into its rows again as soon as this returns.
    if (pull_)
      ctx_.domain().for_each_member([&](int peer) { ctx_.lane.await_consumed(ctx_.lane.next_epoch() - 1, trip_.operation, peer); });
  }

 private:
  bool encodes() const { return args_.wire != TERN_WIRE_AS_DTYPE; }

  void set_trip(tern_phase phase) {
    trip_.operation = TERN_OP_COMBINE;
    trip_.shape = call_shape(shape_);
    trip_.shape.row_bytes = call_.row_bytes;
    trip_.shape.choices |= static_cast<int32_t>(args_.dtype) << 8 | static_cast<int32_t>(args_.mode) << 12 |
                           static_cast<int32_t>(args_.weighting) << 16 | static_cast<int32_t>(call_.carries_weights) << 20 |
                           static_cast<int32_t>(pull_) << 21 | static_cast<int32_t>(args_.wire) << 24;
    const int32_t num_weights = !call_.carries_weights ? 0 : per_entry_ ? 1 : shape_.num_topk;
    trip_.bank.slot = {.payload_bytes = pull_ ? 0 : call_.wire_bytes, .num_weights = num_weights};
    trip_.num_tokens = ctx_.table.num_tokens();
    const int64_t most_tokens = std::max<int64_t>(1, ctx_.table.most_tokens_of_any_rank());
    has_slots_ = !pull_ || call_.carries_weights;
    trip_.tokens_per_round =
        has_slots_ ? tokens_per_round(ctx_, trip_.bank, per_entry_ ? shape_.num_topk : 1, phase, "combine") : most_tokens;
    trip_.shape.tokens_per_round = trip_.tokens_per_round;
    trip_.num_rounds = (most_tokens + trip_.tokens_per_round - 1) / trip_.tokens_per_round;
  }

  // ---- The ranks of the experts send.

  void start_sending() {
    for (int r = 0; r < shape_.num_ranks; ++r) scratch_.next_message[static_cast<size_t>(r)] = ctx_.table.received_begin(r);
  }

  void fill(int64_t round, uint64_t epoch) {
    if (round == 0 && pull_) exchange_addresses(epoch);
    if (!has_slots_) return;
    const TokenRange range = tokens_of_round(trip_, round);
    ctx_.domain().for_each_member([&](int owner) {
      int64_t& message = scratch_.next_message[static_cast<size_t>(owner)];
      const int64_t end = ctx_.table.received_begin(owner + 1);
      for (; message < end && ctx_.table.source_token(message) < range.end; ++message) send_message(message, owner, epoch);
    });
  }

  void exchange_addresses(uint64_t epoch) {
    ctx_.lane.post_ready(epoch, trip_.operation, std::max<int64_t>(0, ctx_.exchange.heap_offset(args_.rows, 0)));
    ctx_.domain().for_each_member(
        [&](int peer) { scratch_.row_address[static_cast<size_t>(peer)] = ctx_.lane.await_ready(epoch, trip_.operation, peer); });
  }

  void send_message(int64_t message, int owner, uint64_t epoch) {
    if (per_entry_) {
      for (int32_t k = 0; k < shape_.num_topk; ++k) {
        const int32_t row = ctx_.table.placed_row(message, k);
        if (row >= 0) send_entry(row, ctx_.lane.next_slot(trip_, epoch, owner));
      }
      return;
    }
    std::byte* slot = ctx_.lane.next_slot(trip_, epoch, owner);
    const bool stays = own_in_place_ && owner == shape_.rank;
    if (!pull_ && !stays) write_message_row(message, slot + trip_.bank.slot.payload());
    if (call_.carries_weights) write_message_weights(message, reinterpret_cast<float*>(slot + trip_.bank.slot.weights()));
  }

  void send_entry(int32_t row, std::byte* slot) {
    if (!pull_) send_row(row, slot + trip_.bank.slot.payload());
    if (call_.carries_weights) *reinterpret_cast<float*>(slot + trip_.bank.slot.weights()) = args_.row_weights[row];
  }

  const std::byte* expert_row(int32_t row) const { return static_cast<const std::byte*>(args_.rows) + row * call_.row_bytes; }

  // A row by itself.
  void send_row(int32_t row, std::byte* out) {
    if (!encodes()) return copy_row(out, expert_row(row), static_cast<size_t>(call_.row_bytes), store_);
    scratch_.terms.assign(1, {expert_row(row), 1.0f});
    write_sum(false, out);
  }

  // What this rank contributes to one token: its row, or the weighted sum of its entries' rows.
  void write_message_row(int64_t message, std::byte* out) {
    scratch_.terms.clear();
    if (!shape_.has_expert_rows()) {
      const int32_t row = ctx_.table.received_row(message);
      if (row >= 0) return send_row(row, out);
    } else {
      const std::vector<float>& weights = args_.weighting == TERN_WEIGHTS_OWNER ? ctx_.weights.from_owner : ctx_.weights.received;
      for (int32_t k = 0; k < shape_.num_topk; ++k) {
        const int32_t row = ctx_.table.placed_row(message, k);
        if (row >= 0) scratch_.terms.push_back({expert_row(row), weights[static_cast<size_t>(message * shape_.num_topk + k)]});
      }
    }
    write_sum(args_.weighting != TERN_WEIGHTS_NONE, out);
  }

  void write_sum(bool weighted, std::byte* out) const {
    sum_rows({.dtype = args_.dtype,
              .hidden = args_.hidden,
              .weighted = weighted,
              .terms = scratch_.terms,
              .group_ends = {},
              .bias = {},
              .out = out,
              .store = store_,
              .out_wire = args_.wire});
  }

  void write_message_weights(int64_t message, float* out) const {
    for (int32_t k = 0; k < shape_.num_topk; ++k) {
      const int32_t row = shape_.has_expert_rows() ? ctx_.table.placed_row(message, k) : ctx_.table.received_row(message);
      out[k] = row < 0 ? 0.0f : shape_.has_expert_rows() ? args_.row_weights[row] : args_.row_weights[int64_t{row} * shape_.num_topk + k];
    }
  }

  // ---- The owner receives.

  void start_receiving() { std::fill(scratch_.arrived.begin(), scratch_.arrived.end(), nullptr); }

  void drain(int64_t round, uint64_t epoch) {
    std::fill(scratch_.next_slot.begin(), scratch_.next_slot.end(), 0);
    ctx_.domain().for_each_member(
        [&](int peer) { scratch_.arrived[static_cast<size_t>(peer)] = ctx_.lane.await_arrived(trip_, epoch, peer); });
    Span span(ctx_.lane.spans(), {.kind = TERN_SPAN_REDUCE, .operation = trip_.operation, .epoch = epoch});
    size_t num_rows = 0;
    const TokenRange range = tokens_of_round(trip_, round);
    for (int64_t token = range.begin; token < std::min(range.end, trip_.num_tokens); ++token) {
      scratch_.terms.clear();
      scratch_.group_ends.clear();
      float* out_weights = args_.out_topk_weights == nullptr ? nullptr : args_.out_topk_weights + token * shape_.num_topk;
      if (out_weights != nullptr && call_.carries_weights) std::fill_n(out_weights, shape_.num_topk, 0.0f);
      if (per_entry_)
        gather_entries(token, out_weights);
      else
        gather_messages(token, out_weights);
      write_result(token);
      num_rows += scratch_.terms.size();
    }
    span.set_bytes(static_cast<int64_t>(num_rows) * call_.row_bytes);
  }

  // The next slot that `rank` has sent in this round; nullptr if it was given up.
  const std::byte* next_arrived_slot(int32_t rank) {
    const std::byte* bank = scratch_.arrived[static_cast<size_t>(rank)];
    return bank == nullptr ? nullptr : bank + trip_.bank.slot_at(scratch_.next_slot[static_cast<size_t>(rank)]++);
  }

  void gather_entries(int64_t token, float* out_weights) {
    for (int32_t k = 0; k < shape_.num_topk; ++k) {
      const int32_t expert = ctx_.table.expert_of(token, k);
      if (expert < 0) continue;
      const int32_t rank = shape_.rank_of_expert(expert);
      const int32_t row = ctx_.table.entry_row(token, k);
      if (row < 0) continue;
      const std::byte* slot = has_slots_ ? next_arrived_slot(rank) : nullptr;
      if (slot != nullptr && out_weights != nullptr && call_.carries_weights)
        out_weights[k] += *reinterpret_cast<const float*>(slot + trip_.bank.slot.weights());
      const std::byte* payload = pull_ ? pulled_row(rank, row) : slot == nullptr ? nullptr : slot + trip_.bank.slot.payload();
      if (payload != nullptr) scratch_.terms.push_back({payload, owner_weight(token, k)});
    }
  }

  void gather_messages(int64_t token, float* out_weights) {
    for (const Message message : ctx_.table.messages_of(token)) {
      const std::byte* slot = has_slots_ ? next_arrived_slot(message.rank) : nullptr;
      if (slot != nullptr && out_weights != nullptr && call_.carries_weights) {
        const auto* handed_back = reinterpret_cast<const float*>(slot + trip_.bank.slot.weights());
        for (int32_t k = 0; k < shape_.num_topk; ++k) out_weights[k] += handed_back[k];
      }
      if (pull_)
        pull_message(token, message);
      else if (own_in_place_ && message.rank == shape_.rank)
        add_own_row(message);
      else if (slot != nullptr)
        scratch_.terms.push_back({slot + trip_.bank.slot.payload(), 1.0f});
    }
  }

  void add_own_row(Message message) {
    const int32_t row = ctx_.table.message_row(message);
    if (row >= 0) scratch_.terms.push_back({expert_row(row), 1.0f});
  }

  // The rows of one message where they lie; a group of its own, so that the sum on its rank is rounded as if it were made there.
  void pull_message(int64_t token, Message message) {
    if (!shape_.has_expert_rows()) {
      const int32_t row = ctx_.table.message_row(message);
      const std::byte* payload = row < 0 ? nullptr : pulled_row(message.rank, row);
      if (payload != nullptr) scratch_.terms.push_back({payload, 1.0f});
      return;
    }
    for (int32_t k = 0; k < shape_.num_topk; ++k) {
      const int32_t expert = ctx_.table.expert_of(token, k);
      if (expert < 0 || shape_.rank_of_expert(expert) != message.rank) continue;
      const int32_t row = ctx_.table.entry_row(token, k);
      const std::byte* payload = row < 0 ? nullptr : pulled_row(message.rank, row);
      if (payload != nullptr) scratch_.terms.push_back({payload, owner_weight(token, k)});
    }
    scratch_.group_ends.push_back(static_cast<int32_t>(scratch_.terms.size()));
  }

  const std::byte* pulled_row(int32_t rank, int32_t row) const {
    const std::byte* rows = scratch_.row_address[static_cast<size_t>(rank)];
    return rows == nullptr ? nullptr : rows + row * call_.row_bytes;
  }

  float owner_weight(int64_t token, int32_t k) const {
    if (args_.weighting == TERN_WEIGHTS_NONE) return 1.0f;
    const float* weights = args_.weighting == TERN_WEIGHTS_OWNER ? args_.topk_weights : ctx_.weights.sent.data();
    return weights[token * shape_.num_topk + k];
  }

  void write_result(int64_t token) {
    const auto row_of = [&](const void* matrix) {
      return matrix == nullptr ? nullptr : static_cast<const std::byte*>(matrix) + token * call_.row_bytes;
    };
    // Rows that were summed at their experts' ranks are weighted already.
    const bool weighted = args_.weighting != TERN_WEIGHTS_NONE && (pull_ || per_entry_);
    sum_rows({.dtype = args_.dtype,
              .hidden = args_.hidden,
              .weighted = weighted,
              .terms = scratch_.terms,
              .group_ends = scratch_.group_ends,
              .bias = {row_of(args_.bias[0]), row_of(args_.bias[1])},
              .out = static_cast<std::byte*>(args_.out_tokens) + token * call_.row_bytes,
              .store = Store::kCached,
              .terms_wire = args_.wire});
  }

  const PlanContext& ctx_;
  const CombineCall& call_;
  const tern_combine_args& args_;
  const PlanShape& shape_;
  PlanScratch& scratch_;
  bool pull_ = false;          // owners read the rows in their experts' windows
  bool own_in_place_ = false;  // this rank's rows for its own tokens are not copied to a slot
  bool per_entry_ = false;     // every expert's row goes to the owner
  bool has_slots_ = true;
  Store store_ = Store::kCached;
  RoundTrip trip_;
};

}  // namespace

void run_combine(const PlanContext& context, const CombineRun& run) { Combine(context, run).run(run.phase, run.ticket); }

}  // namespace tern::cpu
