// SPDX-License-Identifier: Apache-2.0
// Dispatch: every token's row is read once and written once for each destination rank; with its slot go the source token, the
// local experts, the weights and the scales.
//
// Where the outputs lie in windows, rows go straight to their final place and slots hold everything else. Otherwise rows
// travel in the slots, and the receiver puts them in place.
#include <algorithm>
#include <cstring>
#include <span>

#include "base/error.h"
#include "cpu/outputs.h"
#include "cpu/plan.h"
#include "rows/rows.h"

namespace tern::cpu {
namespace {

class Dispatch {
 public:
  Dispatch(const PlanContext& context, const DispatchRun& run)
      : ctx_(context),
        call_(run.call),
        args_(run.call.args),
        fused_(run.fused),
        shape_(context.shape()),
        outputs_(context.table, run.call),
        row_address_(context.scratch.row_address),
        payloads_(context.scratch.payload_places),
        scales_(context.scratch.scale_places) {
    zero_copy_ = uses_window(ctx_, "dispatch", args_.out_tokens, call_.wire_bytes, args_.zero_copy != 0) && !fused_;
    store_ = batch_store(ctx_, call_.wire_bytes);
    own_in_place_ = !zero_copy_ && run.phase == TERN_PHASE_WHOLE && args_.encoding == TERN_ENCODING_AS_GIVEN;
    send_store_ = zero_copy_ ? store_ : slot_store(ctx_, call_.wire_bytes, run.phase);
    set_trip(run.phase);
  }

  void check(tern_phase phase, const Ticket& ticket, int64_t num_rounds_before) const {
    check_phase(ctx_, trip_, phase);
    if (phase == TERN_PHASE_RECEIVE)
      check_ticket(ctx_, ticket, trip_);
    else
      ctx_.lane.check_room(trip_.operation, num_rounds_before + trip_.num_rounds);
  }

  void run(tern_phase phase, Ticket& ticket) {
    if (phase == TERN_PHASE_WHOLE) {
      keep_weights();
      ctx_.lane.run(
          trip_, [&](int64_t round, uint64_t epoch) { fill(round, epoch); }, [&](int64_t round, uint64_t epoch) { drain(round, epoch); });
      finish_outputs();
    } else if (phase == TERN_PHASE_SEND) {
      keep_weights();
      const uint64_t epoch = ctx_.lane.begin(trip_.operation, 1);
      ctx_.lane.send_round(trip_, epoch, [&](uint64_t e) { fill(0, e); });
      ticket = {epoch, ctx_.lane.index(), ctx_.domain().generation, trip_.shape};
    } else {
      ctx_.lane.receive_round(ticket.epoch, [&](uint64_t e) { drain(0, e); });
      ticket = {};
      finish_outputs();
    }
  }

 private:
  void set_trip(tern_phase phase) {
    trip_.operation = TERN_OP_DISPATCH;
    trip_.shape = call_shape(shape_);
    trip_.shape.row_bytes = call_.wire_bytes;
    trip_.shape.scale_bytes = call_.scale_bytes;
    trip_.shape.choices |= static_cast<int32_t>(args_.dtype) << 8 | static_cast<int32_t>(args_.encoding) << 12 |
                           static_cast<int32_t>(call_.carries_weights) << 16 | static_cast<int32_t>(zero_copy_) << 17 |
                           static_cast<int32_t>(fused_) << 18;
    trip_.bank = {.num_counts = fused_ ? ctx_.table.num_counts() : 0,
                  .slot = {.payload_bytes = zero_copy_ ? 0 : call_.wire_bytes,
                           .scale_bytes = call_.scale_bytes,
                           .num_experts = shape_.num_topk,
                           .num_weights = call_.carries_weights ? shape_.num_topk : 0}};
    trip_.num_tokens = ctx_.table.num_tokens();
    trip_.tokens_per_round = tokens_per_round(ctx_, trip_.bank, 1, phase, "dispatch");
    // Before the counts are known, only the plan's bound is the same on every rank.
    const int64_t most_tokens = fused_ ? shape_.max_tokens : ctx_.table.most_tokens_of_any_rank();
    trip_.shape.tokens_per_round = trip_.tokens_per_round;
    trip_.num_rounds = std::max<int64_t>(1, (most_tokens + trip_.tokens_per_round - 1) / trip_.tokens_per_round);
  }

  void keep_weights() {
    ctx_.weights.carried = call_.carries_weights;
    if (args_.topk_weights != nullptr) std::copy_n(args_.topk_weights, trip_.num_tokens * shape_.num_topk, ctx_.weights.sent.begin());
  }

  // ---- Sending.

  void fill(int64_t round, uint64_t epoch) {
    if (round == 0 && fused_) send_counts(epoch);
    if (round == 0 && zero_copy_) exchange_addresses(epoch);
    const TokenRange range = tokens_of_round(trip_, round);
    for (int64_t token = range.begin; token < std::min(range.end, trip_.num_tokens); ++token) send_token(token, epoch);
  }

  void send_counts(uint64_t epoch) {
    const auto own = ctx_.table.counts_of(shape_.rank);
    ctx_.lane.for_each_peer([&](int peer) {
      std::memcpy(ctx_.domain().bank(peer, ctx_.lane.index(), epoch, shape_.rank) + trip_.bank.counts(), own.data(), own.size_bytes());
    });
  }

  void exchange_addresses(uint64_t epoch) {
    ctx_.lane.post_ready(epoch, trip_.operation, std::max<int64_t>(0, ctx_.exchange.heap_offset(args_.out_tokens, 0)));
    ctx_.domain().for_each_member(
        [&](int peer) { row_address_[static_cast<size_t>(peer)] = ctx_.lane.await_ready(epoch, trip_.operation, peer); });
  }

  void send_token(int64_t token, uint64_t epoch) {
    payloads_.clear();
    scales_.clear();
    for (const Message message : ctx_.table.messages_of(token)) {
      std::byte* slot = ctx_.lane.next_slot(trip_, epoch, message.rank);
      write_metadata(slot, token, message.rank);
      if (call_.scale_bytes > 0) scales_.push_back(slot + trip_.bank.slot.scales());
      if (zero_copy_)
        add_final_rows(token, message);
      else if (!own_in_place_ || message.rank != shape_.rank)
        payloads_.push_back(slot + trip_.bank.slot.payload());
    }
    write_row(token);
  }

  void write_metadata(std::byte* slot, int64_t token, int32_t destination) const {
    const layout::SlotLayout& layout = trip_.bank.slot;
    const auto source_token = static_cast<int32_t>(token);
    std::memcpy(slot + layout.source_token(), &source_token, sizeof(source_token));
    auto* experts = reinterpret_cast<int32_t*>(slot + layout.experts());
    for (int32_t k = 0; k < shape_.num_topk; ++k) {
      const int32_t expert = ctx_.table.expert_of(token, k);
      experts[k] = expert >= 0 && shape_.rank_of_expert(expert) == destination ? expert % shape_.local_experts() : -1;
    }
    if (layout.num_weights > 0)
      std::memcpy(slot + layout.weights(), args_.topk_weights + token * shape_.num_topk,
                  static_cast<size_t>(shape_.num_topk) * sizeof(float));
  }

  // Where the token's row goes in the windows of `message.rank`: one place, or one for each local expert.
  void add_final_rows(int64_t token, Message message) {
    std::byte* rows = row_address_[static_cast<size_t>(message.rank)];
    if (rows == nullptr) return;  // given up
    if (!shape_.has_expert_rows()) {
      const int32_t row = ctx_.table.message_row(message);
      if (row >= 0) payloads_.push_back(rows + row * call_.wire_bytes);
      return;
    }
    for (int32_t k = 0; k < shape_.num_topk; ++k) {
      const int32_t expert = ctx_.table.expert_of(token, k);
      if (expert < 0 || shape_.rank_of_expert(expert) != message.rank) continue;
      const int32_t row = ctx_.table.entry_row(token, k);
      if (row >= 0) payloads_.push_back(rows + row * call_.wire_bytes);
    }
  }

  // Writes the row to all its places; a cast row is made in the first of them.
  void write_row(int64_t token) {
    const std::byte* row = token_row(token);
    if (args_.encoding == TERN_ENCODING_AS_GIVEN) {
      for (std::byte* place : payloads_) copy_row(place, row, static_cast<size_t>(call_.wire_bytes), send_store_);
      for (std::byte* place : scales_) gather_scales(place, token);
      return;
    }
    if (payloads_.empty()) return;
    cast_row_fp8(row, args_.dtype, args_.hidden, args_.encoding, payloads_[0], scales_[0]);
    for (size_t i = 1; i < payloads_.size(); ++i) copy_row(payloads_[i], payloads_[0], static_cast<size_t>(call_.wire_bytes), send_store_);
    for (size_t i = 1; i < scales_.size(); ++i) std::memcpy(scales_[i], scales_[0], static_cast<size_t>(call_.scale_bytes));
  }

  const std::byte* token_row(int64_t token) const { return static_cast<const std::byte*>(args_.tokens) + token * args_.token_stride_bytes; }

  void gather_scales(std::byte* place, int64_t token) const {
    const auto* scales = static_cast<const std::byte*>(args_.scales) + token * args_.scale_token_stride_bytes;
    const int64_t element = call_.scale_element_bytes;
    if (args_.scale_element_stride_bytes == element) {
      std::memcpy(place, scales, static_cast<size_t>(call_.scale_bytes));
      return;
    }
    for (int64_t at = 0; at < call_.scale_bytes; at += element, scales += args_.scale_element_stride_bytes)
      std::memcpy(place + at, scales, static_cast<size_t>(element));
  }

  // ---- Receiving.

  void drain(int64_t round, uint64_t epoch) {
    if (round == 0) {
      if (fused_) receive_counts(epoch);
      ctx_.table.restart_placing();
    }
    ctx_.domain().for_each_member(
        [&](int source) { ctx_.lane.receive_from(trip_, epoch, source, [&](const std::byte* bank) { receive_messages(source, bank); }); });
    if (round + 1 < trip_.num_rounds || !ctx_.lane.gave_up_any()) return;
    for (int r = 0; r < shape_.num_ranks; ++r)
      if (ctx_.lane.gave_up(r)) outputs_.clear_missing(r);
  }

  void receive_counts(uint64_t epoch) {
    const Span span(ctx_.lane.spans(), {.kind = TERN_SPAN_PLAN, .operation = trip_.operation});
    const auto own = ctx_.table.counts_of(shape_.rank);
    ctx_.domain().for_each_member([&](int source) {
      const std::byte* bank = ctx_.lane.await_arrived(trip_, epoch, source);
      if (bank == nullptr || source == shape_.rank) return;
      std::memcpy(ctx_.table.counts_of(source).data(), bank + trip_.bank.counts(), own.size_bytes());
      ctx_.table.tokens_of(source) = reinterpret_cast<const layout::MessageHeader*>(bank)->num_tokens;
    });
    ctx_.table.finish();
  }

  void finish_outputs() {
    const Span span(ctx_.lane.spans(), {.kind = TERN_SPAN_RECEIVE, .operation = trip_.operation});
    outputs_.finish();
  }

  void receive_messages(int source, const std::byte* bank) {
    const layout::SlotLayout& layout = trip_.bank.slot;
    const int32_t num_messages = reinterpret_cast<const layout::MessageHeader*>(bank)->num_messages;
    for (int32_t i = 0; i < num_messages; ++i) {
      const std::byte* slot = bank + trip_.bank.slot_at(i);
      ArrivedMessage message{.source = source,
                             .experts = {reinterpret_cast<const int32_t*>(slot + layout.experts()), static_cast<size_t>(shape_.num_topk)},
                             .weights = {reinterpret_cast<const float*>(slot + layout.weights()), static_cast<size_t>(layout.num_weights)},
                             .payload = zero_copy_ ? nullptr : slot + layout.payload(),
                             .scales = slot + layout.scales()};
      std::memcpy(&message.source_token, slot + layout.source_token(), sizeof(message.source_token));
      if (own_in_place_ && source == shape_.rank) message.payload = token_row(message.source_token);
      const int64_t index = ctx_.table.place_message(source, message.source_token, message.experts);
      std::copy(message.weights.begin(), message.weights.end(), ctx_.weights.received.begin() + index * shape_.num_topk);
      outputs_.write(index, message, store_);
    }
  }

  const PlanContext& ctx_;
  const DispatchCall& call_;
  const tern_dispatch_args& args_;
  const bool fused_;
  const PlanShape& shape_;
  DispatchOutputs outputs_;
  bool zero_copy_ = false;
  bool own_in_place_ = false;          // rows to this rank itself stay in the caller's tokens until they are put in place
  Store send_store_ = Store::kCached;  // into windows
  Store store_ = Store::kCached;       // into the outputs
  RoundTrip trip_;
  std::vector<std::byte*>& row_address_;
  std::vector<std::byte*>& payloads_;
  std::vector<std::byte*>& scales_;
};

}  // namespace

void check_dispatch(const PlanContext& context, const DispatchRun& run, int64_t num_rounds_before) {
  Dispatch(context, run).check(run.phase, run.ticket, num_rounds_before);
}

void run_dispatch(const PlanContext& context, const DispatchRun& run) { Dispatch(context, run).run(run.phase, run.ticket); }

}  // namespace tern::cpu
