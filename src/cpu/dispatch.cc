// SPDX-License-Identifier: Apache-2.0
// Dispatch: every token's row is read once and written once for each destination rank; with its slot go the source token, the
// local experts, the weights and the scales.
//
// Where the outputs lie in windows, rows go straight to their final place and slots hold everything else. Otherwise rows
// travel in the slots, and the receiver puts them in place.
//
// Between nodes each token first goes to the rail of each of its nodes. The rounds of the rail are two ahead: what has come in one of them
// is a batch that the rail sends on as it does its own tokens, while the network brings the next.
//
// A small batch is routed on its way (`fused`): its counts, and between nodes where each token goes, travel with the rows.
#include <algorithm>
#include <cstring>
#include <span>

#include "base/error.h"
#include "cpu/outputs.h"
#include "cpu/plan.h"
#include "rows/rows.h"

namespace tern::cpu {
namespace {

layout::BankLayout bank_in_node(const PlanContext& ctx, const DispatchCall& call, bool fused, bool with_rows) {
  const PlanShape& shape = ctx.shape();
  return {.num_counts = fused ? shape.num_nodes * ctx.table.num_counts() : 0,
          .slot = {.payload_bytes = with_rows ? call.wire_bytes : 0,
                   .scale_bytes = call.scale_bytes,
                   .num_experts = shape.num_topk,
                   .num_weights = call.carries_weights ? shape.num_topk : 0}};
}

layout::RailBankLayout rail_bank(const PlanContext& ctx, const DispatchCall& call, bool fused) {
  const PlanShape& shape = ctx.shape();
  const int32_t num_routing_words = fused ? shape.routing_words() : 0;
  return {.num_counts = fused ? ctx.table.num_counts() : 0,
          .slot = {.payload_bytes = call.wire_bytes,
                   .scale_bytes = call.scale_bytes,
                   .num_words = num_routing_words + (call.carries_weights ? shape.num_topk : 0),
                   .num_routing_words = num_routing_words}};
}

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
    // Within a node: with rails the phases are those of the network.
    const tern_phase phase = ctx_.rail != nullptr ? TERN_PHASE_WHOLE : run.phase;
    packs_own_ = phase != run.phase;
    own_in_place_ = !zero_copy_ && run.phase == TERN_PHASE_WHOLE && args_.encoding == TERN_ENCODING_AS_GIVEN;
    send_store_ = zero_copy_ ? store_ : slot_store(ctx_, call_.wire_bytes, phase);
    set_trip(phase, run.phase);
  }

  void check(tern_phase phase, const Ticket& ticket, bool after_route) const {
    if (ctx_.rail == nullptr) check_phase(ctx_, trip_, phase);
    if (phase == TERN_PHASE_RECEIVE)
      check_ticket(ctx_, ticket, trip_);
    else if (ctx_.rail != nullptr)
      ctx_.rail->check_room(trip_.operation, (after_route ? rail_trip_of_route(ctx_).num_rounds : 0) + rail_trip_.num_rounds);
    else
      ctx_.lane.check_room(trip_.operation, (after_route ? 1 : 0) + trip_.num_rounds);
  }

  void run(tern_phase phase, Ticket& ticket) {
    if (phase != TERN_PHASE_RECEIVE) keep_weights();
    if (ctx_.rail != nullptr) return run_between_nodes(phase, ticket);
    if (phase == TERN_PHASE_WHOLE) {
      run_in_node();
    } else if (phase == TERN_PHASE_SEND) {
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
  void run_in_node() {
    ctx_.lane.run(
        trip_, [&](int64_t round, uint64_t epoch) { fill(round, epoch); }, [&](int64_t round, uint64_t epoch) { drain(round, epoch); });
    finish_outputs();
  }

  void run_between_nodes(tern_phase phase, Ticket& ticket) {
    if (phase == TERN_PHASE_RECEIVE) {
      rail_epoch_ = ticket.epoch;
      run_in_node();
      ticket = {};
      return;
    }
    rail_epoch_ = ctx_.rail->begin(trip_.operation, rail_trip_.num_rounds);
    std::fill(ctx_.scratch.next_to.begin(), ctx_.scratch.next_to.end(), 0);
    for (int64_t round = 0; round < std::min<int64_t>(layout::kNumBanks, rail_trip_.num_rounds); ++round) send_to_rails(round);
    if (phase == TERN_PHASE_WHOLE) return run_in_node();
    ticket = {rail_epoch_, ctx_.lane.index(), ctx_.domain().generation, trip_.shape};
  }

  // `phase`: within a node; `call_phase`: as called.
  void set_trip(tern_phase phase, tern_phase call_phase) {
    trip_.operation = TERN_OP_DISPATCH;
    trip_.shape = call_shape(shape_);
    trip_.shape.row_bytes = call_.wire_bytes;
    trip_.shape.scale_bytes = call_.scale_bytes;
    trip_.shape.choices |= static_cast<int32_t>(args_.dtype) << 8 | static_cast<int32_t>(args_.encoding) << 12 |
                           static_cast<int32_t>(call_.carries_weights) << 16 | static_cast<int32_t>(zero_copy_) << 17 |
                           static_cast<int32_t>(fused_) << 18;
    trip_.bank = bank_in_node(ctx_, call_, fused_, !zero_copy_);
    trip_.num_tokens = ctx_.table.num_tokens();
    trip_.tokens_per_round = tokens_per_round(ctx_, trip_.bank, shape_.num_nodes, phase, "dispatch");
    // Before the counts are known, only the plan's bound is the same on every rank.
    const int64_t most_tokens = fused_ ? shape_.max_tokens : ctx_.table.most_tokens_of_any_rank();
    if (ctx_.rail != nullptr) {
      rail_trip_.operation = trip_.operation;
      rail_trip_.bank = rail_bank(ctx_, call_, fused_);
      if (fused_)
        rail_trip_.tokens_per_round = most_tokens;
      else
        set_rail_rounds(ctx_, rail_trip_, trip_, 1, call_phase);
    }
    trip_.shape.tokens_per_round = trip_.tokens_per_round;
    rail_trip_.shape = trip_.shape;
    trip_.num_rounds = std::max<int64_t>(1, (most_tokens + trip_.tokens_per_round - 1) / trip_.tokens_per_round);
  }

  void keep_weights() {
    ctx_.weights.carried = call_.carries_weights;
    if (args_.topk_weights != nullptr)
      std::copy_n(args_.topk_weights, trip_.num_tokens * shape_.num_topk, ctx_.weights.sent[static_cast<size_t>(shape_.node())].begin());
  }

  // ---- To the rails.

  void send_to_rails(int64_t round) {
    const uint64_t epoch = rail_epoch_ + static_cast<uint64_t>(round);
    ctx_.rail->start_round(rail_trip_, epoch);
    if (fused_) ctx_.rail->for_each_other_node([&](int node) { put_counts_for(ctx_, rail_trip_, epoch, node); });
    Span span(ctx_.lane.spans(), {.kind = TERN_SPAN_SEND, .operation = trip_.operation, .epoch = epoch});
    const int64_t begin = round * rail_trip_.tokens_per_round;
    const int64_t end = std::min(begin + rail_trip_.tokens_per_round, trip_.num_tokens);
    for (int64_t token = begin; token < end; ++token) {
      payloads_.clear();
      scales_.clear();
      ctx_.rail->for_each_other_node([&](int node) {
        const auto tokens = ctx_.table.tokens_to(node);
        size_t& next = ctx_.scratch.next_to[static_cast<size_t>(node)];
        if (next == tokens.size() || tokens[next] != token) return;
        ++next;
        add_rail_slot(node, token, epoch);
      });
      if (packs_own_) add_rail_slot(ctx_.rail->own_node(), token, epoch);
      write_own_row(token);
    }
    span.set_bytes(ctx_.rail->send_round(rail_trip_, epoch));
  }

  void add_rail_slot(int node, int64_t token, uint64_t epoch) {
    const layout::RailSlotLayout& layout = rail_trip_.bank.slot;
    std::byte* slot = ctx_.rail->next_slot(rail_trip_, epoch, node);
    payloads_.push_back(slot + layout.payload());
    if (call_.scale_bytes > 0) scales_.push_back(slot + layout.scales());
    if (fused_) put_token_words(ctx_, rail_trip_, node, static_cast<int32_t>(token), slot);
    if (call_.carries_weights) std::memcpy(slot + layout.weights(), args_.topk_weights + token * shape_.num_topk, topk_bytes());
  }

  int64_t rail_round_of(const TokenRange& range) const { return range.begin / rail_trip_.tokens_per_round; }

  void await_rails(int64_t rail_round) {
    std::vector<const std::byte*>& banks = rail_banks(rail_round);
    const uint64_t epoch = rail_epoch_ + static_cast<uint64_t>(rail_round);
    for (int32_t node = 0; node < shape_.num_nodes; ++node)
      banks[static_cast<size_t>(node)] =
          is_packed(node) && ctx_.rail->serves(node) ? ctx_.rail->await_arrived(rail_trip_, epoch, node) : nullptr;
    if (!fused_) return;
    ctx_.rail->for_each_other_node([&](int node) {
      if (banks[static_cast<size_t>(node)] != nullptr) take_tokens(ctx_, rail_trip_, node, banks[static_cast<size_t>(node)]);
    });
  }

  // The rows of a rail's round are no longer needed: its peers may send the next but one.
  void finish_rails(int64_t rail_round) {
    ctx_.rail->finish_round(rail_epoch_ + static_cast<uint64_t>(rail_round));
    if (rail_round + layout::kNumBanks < rail_trip_.num_rounds) send_to_rails(rail_round + layout::kNumBanks);
  }

  std::vector<const std::byte*>& rail_banks(int64_t rail_round) const { return ctx_.scratch.rail_banks[rail_round % layout::kNumBanks]; }
  // Do the batch's rows lie in the rail's banks, as they will arrive?
  bool is_packed(int32_t node) const { return packs_own_ || node != shape_.node(); }
  // Has the rail that was to send the batch been given up?
  bool is_missing(int32_t node, const TokenRange& range) const {
    return ctx_.rail != nullptr && is_packed(node) && rail_banks(rail_round_of(range))[static_cast<size_t>(node)] == nullptr;
  }
  const std::byte* rail_slot(const SourceBatch& batch, int64_t token, const TokenRange& range) const {
    const int64_t round = rail_round_of(range);
    const std::byte* bank = rail_banks(round)[static_cast<size_t>(shape_.node_of_rank(batch.source()))];
    return bank + rail_trip_.bank.slot_at(token - batch.first_from(round * rail_trip_.tokens_per_round));
  }

  // ---- Sending.

  void fill(int64_t round, uint64_t epoch) {
    if (round == 0 && zero_copy_) exchange_addresses(epoch);
    const TokenRange range = tokens_of_round(trip_, round);
    if (ctx_.rail != nullptr && range.begin % rail_trip_.tokens_per_round == 0) await_rails(rail_round_of(range));
    if (round == 0 && fused_) put_counts_in_node(ctx_, trip_, epoch);
    for (const SourceBatch& batch : ctx_.table.batches()) {
      if (is_missing(shape_.node_of_rank(batch.source()), range)) continue;
      const int64_t end = batch.first_from(range.end);
      for (int64_t token = batch.first_from(range.begin); token < end; ++token) send_token(batch, token, range, epoch);
    }
  }

  void exchange_addresses(uint64_t epoch) {
    ctx_.lane.post_ready(epoch, trip_.operation, std::max<int64_t>(0, ctx_.exchange.heap_offset(args_.out_tokens, 0)));
    ctx_.domain().for_each_member(
        [&](int peer) { row_address_[static_cast<size_t>(peer)] = ctx_.lane.await_ready(epoch, trip_.operation, peer); });
  }

  void send_token(const SourceBatch& batch, int64_t token, const TokenRange& range, uint64_t epoch) {
    const auto messages = batch.messages_of(token);
    if (messages.empty()) return;
    const int32_t node = shape_.node_of_rank(batch.source());
    const std::byte* packed = is_packed(node) && ctx_.rail != nullptr ? rail_slot(batch, token, range) : nullptr;
    const float* weights = weights_of(batch, token, packed);
    payloads_.clear();
    scales_.clear();
    for (const Message message : messages) {
      const int local_rank = message.rank - shape_.first_rank();
      if (ctx_.lane.gave_up(local_rank)) continue;  // it may come back to life, and write to its slots here
      std::byte* slot = ctx_.lane.next_slot(trip_, epoch, local_rank);
      write_metadata(slot, batch, token, message.rank);
      if (trip_.bank.slot.num_weights > 0) std::memcpy(slot + trip_.bank.slot.weights(), weights, topk_bytes());
      if (call_.scale_bytes > 0) scales_.push_back(slot + trip_.bank.slot.scales());
      if (zero_copy_)
        add_final_rows(batch, token, message);
      else if (message.rank != shape_.rank || !stays(packed != nullptr))
        payloads_.push_back(slot + trip_.bank.slot.payload());
    }
    if (packed == nullptr) return write_own_row(token);
    for (std::byte* place : payloads_) copy_row(place, packed, static_cast<size_t>(call_.wire_bytes), send_store_);
    for (std::byte* place : scales_) std::memcpy(place, packed + rail_trip_.bank.slot.scales(), static_cast<size_t>(call_.scale_bytes));
  }

  // Rows from this rank to itself that lie as they arrive stay where they are until they are put in place.
  bool stays(bool packed) const { return own_in_place_ || (packed && !zero_copy_); }

  // Those of other nodes' tokens are kept for combine.
  const float* weights_of(const SourceBatch& batch, int64_t token, const std::byte* packed) const {
    if (!call_.carries_weights) return nullptr;
    if (packed == nullptr) return args_.topk_weights + token * shape_.num_topk;
    const auto* weights = reinterpret_cast<const float*>(packed + rail_trip_.bank.slot.weights());
    std::copy_n(weights, shape_.num_topk,
                ctx_.weights.sent[static_cast<size_t>(shape_.node_of_rank(batch.source()))].begin() + token * shape_.num_topk);
    return weights;
  }

  size_t topk_bytes() const { return static_cast<size_t>(shape_.num_topk) * sizeof(float); }

  void write_metadata(std::byte* slot, const SourceBatch& batch, int64_t token, int32_t destination) const {
    const layout::SlotLayout& layout = trip_.bank.slot;
    const int32_t source_rank = batch.source(), source_token = batch.source_token(token);
    std::memcpy(slot + layout.source_rank(), &source_rank, sizeof(source_rank));
    std::memcpy(slot + layout.source_token(), &source_token, sizeof(source_token));
    auto* experts = reinterpret_cast<int32_t*>(slot + layout.experts());
    for (int32_t k = 0; k < shape_.num_topk; ++k) {
      const int32_t expert = batch.expert_of(token, k);
      experts[k] = expert >= 0 && shape_.rank_of_expert(expert) == destination ? expert % shape_.local_experts() : -1;
    }
  }

  // Where the token's row goes in the windows of `message.rank`: one place, or one for each local expert.
  void add_final_rows(const SourceBatch& batch, int64_t token, Message message) {
    std::byte* rows = row_address_[static_cast<size_t>(message.rank - shape_.first_rank())];
    if (rows == nullptr) return;  // given up
    if (!shape_.has_expert_rows()) {
      const int32_t row = batch.message_row(message);
      if (row >= 0) payloads_.push_back(rows + row * call_.wire_bytes);
      return;
    }
    for (int32_t k = 0; k < shape_.num_topk; ++k) {
      const int32_t expert = batch.expert_of(token, k);
      if (expert < 0 || shape_.rank_of_expert(expert) != message.rank) continue;
      const int32_t row = batch.entry_row(token, k);
      if (row >= 0) payloads_.push_back(rows + row * call_.wire_bytes);
    }
  }

  // Writes a row of this rank's to all its places; a cast row is made in the first of them.
  void write_own_row(int64_t token) {
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
    const TokenRange range = tokens_of_round(trip_, round);
    ctx_.domain().for_each_member(
        [&](int peer) { ctx_.lane.receive_from(trip_, epoch, peer, [&](const std::byte* bank) { receive_messages(peer, bank, range); }); });
    const bool is_last = round + 1 == trip_.num_rounds;
    if (ctx_.rail != nullptr && (is_last || range.end % rail_trip_.tokens_per_round == 0)) finish_rails(rail_round_of(range));
    if (is_last && ctx_.lane.gave_up_any()) clear_missing();
  }

  // What came from a rank that was given up, or over such a rank, may have come in part.
  void clear_missing() {
    for (int r = 0; r < shape_.num_ranks; ++r)
      if (ctx_.lane.gave_up_rank(r) || !ctx_.table.has_placed_all(r)) outputs_.clear_missing(r);
  }

  void receive_counts(uint64_t epoch) {
    const Span span(ctx_.lane.spans(), {.kind = TERN_SPAN_PLAN, .operation = trip_.operation});
    ctx_.domain().for_each_member([&](int peer) {
      const std::byte* bank = ctx_.lane.await_arrived(trip_, epoch, peer);
      if (bank != nullptr) take_counts_in_node(ctx_, trip_, peer, bank);
    });
    ctx_.table.finish();
  }

  void finish_outputs() {
    const Span span(ctx_.lane.spans(), {.kind = TERN_SPAN_RECEIVE, .operation = trip_.operation});
    outputs_.finish();
  }

  void receive_messages(int peer, const std::byte* bank, const TokenRange& range) {
    const layout::SlotLayout& layout = trip_.bank.slot;
    const int32_t num_messages = reinterpret_cast<const layout::MessageHeader*>(bank)->num_messages;
    for (int32_t i = 0; i < num_messages; ++i) {
      const std::byte* slot = bank + trip_.bank.slot_at(i);
      ArrivedMessage message{.experts = {reinterpret_cast<const int32_t*>(slot + layout.experts()), static_cast<size_t>(shape_.num_topk)},
                             .weights = {reinterpret_cast<const float*>(slot + layout.weights()), static_cast<size_t>(layout.num_weights)},
                             .payload = zero_copy_ ? nullptr : slot + layout.payload(),
                             .scales = slot + layout.scales()};
      std::memcpy(&message.source, slot + layout.source_rank(), sizeof(message.source));
      std::memcpy(&message.source_token, slot + layout.source_token(), sizeof(message.source_token));
      if (peer == ctx_.domain().rank) find_row_that_stayed(message, range);
      const int64_t index = ctx_.table.place_message(message.source, message.source_token, message.experts);
      std::copy(message.weights.begin(), message.weights.end(), ctx_.weights.received.begin() + index * shape_.num_topk);
      outputs_.write(index, message, store_);
    }
  }

  void find_row_that_stayed(ArrivedMessage& message, const TokenRange& range) const {
    const int32_t node = shape_.node_of_rank(message.source);
    const bool packed = ctx_.rail != nullptr && is_packed(node);
    if (!stays(packed)) return;
    const SourceBatch& batch = ctx_.table.batch(node);
    message.payload = packed ? rail_slot(batch, batch.first_from(message.source_token), range) : token_row(message.source_token);
  }

  const PlanContext& ctx_;
  const DispatchCall& call_;
  const tern_dispatch_args& args_;
  const bool fused_;
  const PlanShape& shape_;
  DispatchOutputs outputs_;
  bool zero_copy_ = false;
  bool own_in_place_ = false;          // this rank's rows to itself stay in the caller's tokens until they are put in place
  bool packs_own_ = false;             // a phase between nodes: this rank's own batch is in the rail's bank too
  Store send_store_ = Store::kCached;  // into windows
  Store store_ = Store::kCached;       // into the outputs
  RoundTrip trip_;
  RailTrip rail_trip_;
  uint64_t rail_epoch_ = 0;  // of the first of the rail's rounds
  std::vector<std::byte*>& row_address_;
  std::vector<std::byte*>& payloads_;
  std::vector<std::byte*>& scales_;
};

}  // namespace

void check_dispatch(const PlanContext& context, const DispatchRun& run, bool after_route) {
  Dispatch(context, run).check(run.phase, run.ticket, after_route);
}

bool can_fuse(const PlanContext& context, const DispatchCall& call) {
  const PlanShape& shape = context.shape();
  return rail_bank(context, call, true).slots_in(context.rail->bank_bytes()) >= shape.max_tokens &&
         bank_in_node(context, call, true, true).slots_in(context.domain().layout.bank_bytes) >= shape.num_nodes;
}

void run_dispatch(const PlanContext& context, const DispatchRun& run) { Dispatch(context, run).run(run.phase, run.ticket); }

}  // namespace tern::cpu
