// SPDX-License-Identifier: Apache-2.0
// Combine: one result per token, back at its owner, summed in the order that tern_combine promises.
//
// Where the expert rows lie in windows, the owner pulls them and sums. Otherwise each rank pushes: hierarchical, one row per
// message, summed here and rounded or encoded once; exact, one row per entry. Slots come in message order, within a message in ascending
// k, so both sides count them alike. Weights that are known only to the owner and needed by the pusher travel first.
//
// Between nodes the rail of a token does what its owner does in a node: it sums the rows of its node's ranks, and sends the sum, rounded
// once, to the owner (exact: every row), who sums what the nodes send.
#include <algorithm>
#include <cstring>

#include "base/error.h"
#include "cpu/owner_weights.h"
#include "cpu/plan.h"
#include "rows/rows.h"

namespace tern::cpu {
namespace {

class Combine {
 public:
  Combine(const PlanContext& context, const CombineRun& run)
      : ctx_(context), call_(run.call), args_(run.call.args), shape_(context.shape()), scratch_(context.scratch) {
    const bool in_window = uses_window(ctx_, "combine", args_.rows, call_.row_bytes, args_.zero_copy != 0);
    // Within a node: with rails the phases are those of the network.
    const tern_phase phase = ctx_.rail != nullptr ? TERN_PHASE_WHOLE : run.phase;
    // Not behind an open send: `consumed` stays before it, so nobody could tell when the others have done with the rows.
    pull_ = in_window && !encodes() && phase == TERN_PHASE_WHOLE && !is_small(ctx_, call_.row_bytes) && !ctx_.lane.has_unreceived();
    per_entry_ = args_.mode == TERN_COMBINE_EXACT && shape_.has_expert_rows();
    own_in_place_ = !pull_ && !encodes() && phase == TERN_PHASE_WHOLE && !shape_.has_expert_rows();
    own_node_in_place_ = ctx_.rail != nullptr && shape_.ranks_per_node() == 1 && run.phase == TERN_PHASE_WHOLE && !per_entry_ &&
                         !call_.carries_weights && (pull_ || own_in_place_);
    store_ = slot_store(ctx_, call_.row_bytes, phase);
    set_trip(phase, run.phase);
  }

  void run(tern_phase phase, Ticket& ticket) {
    if (ctx_.rail != nullptr) return run_between_nodes(phase, ticket);
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
    if (weights_go_ahead) send_weights_in_node(ctx_, args_.topk_weights);
    restart_messages(ctx_);
    if (phase == TERN_PHASE_WHOLE) return run_in_node();
    const uint64_t epoch = ctx_.lane.begin(trip_.operation, 1);
    ctx_.lane.send_round(trip_, epoch, [&](uint64_t e) { fill(0, e); });
    ticket = {epoch, ctx_.lane.index(), ctx_.domain().generation, trip_.shape};
  }

 private:
  void run_in_node() {
    start_receiving();
    ctx_.lane.run(
        trip_, [&](int64_t round, uint64_t epoch) { fill(round, epoch); }, [&](int64_t round, uint64_t epoch) { drain(round, epoch); });
    // The caller may write into its rows again as soon as this returns.
    if (pull_)
      ctx_.domain().for_each_member([&](int peer) { ctx_.lane.await_consumed(ctx_.lane.next_epoch() - 1, trip_.operation, peer); });
  }

  bool encodes() const { return args_.wire != TERN_WIRE_AS_DTYPE; }

  // What a send leaves for its receive is on the network; the sums within the nodes are made.
  void run_between_nodes(tern_phase phase, Ticket& ticket) {
    if (phase == TERN_PHASE_RECEIVE) {
      check_ticket(ctx_, ticket, trip_);
      rail_epoch_ = ticket.epoch;
      start_returning();
      receive_from_rails(0);
      ticket = {};
      return;
    }
    const bool weights_go_ahead = !per_entry_ && args_.weighting == TERN_WEIGHTS_OWNER;
    ctx_.rail->check_room(trip_.operation, rail_trip_.num_rounds + (weights_go_ahead ? num_rail_rounds_of_weights(ctx_) : 0));
    if (weights_go_ahead) send_weights_to_rails(ctx_, args_.topk_weights);
    if (weights_go_ahead && !pull_) send_weights_in_node(ctx_, args_.topk_weights);
    restart_messages(ctx_);
    rail_epoch_ = ctx_.rail->begin(trip_.operation, rail_trip_.num_rounds);
    start_returning();
    receives_as_it_sends_ = phase == TERN_PHASE_WHOLE;
    run_in_node();
    if (phase == TERN_PHASE_WHOLE)
      receive_from_rails(rail_trip_.num_rounds - 1);
    else
      ticket = {rail_epoch_, ctx_.lane.index(), ctx_.domain().generation, trip_.shape};
  }

  // `phase`: within a node; `call_phase`: as called.
  void set_trip(tern_phase phase, tern_phase call_phase) {
    trip_.operation = TERN_OP_COMBINE;
    trip_.shape = call_shape(shape_);
    trip_.shape.row_bytes = call_.row_bytes;
    trip_.shape.choices |= static_cast<int32_t>(args_.dtype) << 8 | static_cast<int32_t>(args_.mode) << 12 |
                           static_cast<int32_t>(args_.weighting) << 16 | static_cast<int32_t>(call_.carries_weights) << 20 |
                           static_cast<int32_t>(pull_) << 21 | static_cast<int32_t>(args_.wire) << 24;
    const int32_t num_weights = !call_.carries_weights ? 0 : per_entry_ ? 1 : shape_.num_topk;
    const int64_t slots_per_token = per_entry_ ? shape_.num_topk : 1;
    trip_.bank.slot = {.payload_bytes = pull_ ? 0 : call_.wire_bytes, .num_weights = num_weights};
    trip_.num_tokens = ctx_.table.num_tokens();
    const int64_t most_tokens = std::max<int64_t>(1, ctx_.table.most_tokens_of_any_rank());
    has_slots_ = !pull_ || call_.carries_weights;
    trip_.tokens_per_round =
        has_slots_ ? tokens_per_round(ctx_, trip_.bank, slots_per_token * shape_.num_nodes, phase, "combine") : most_tokens;
    if (ctx_.rail != nullptr) {
      // Words: exact: is there a row?; then the weights that are handed back.
      rail_trip_.operation = trip_.operation;
      rail_trip_.bank.slot = {.payload_bytes = call_.wire_bytes, .num_words = (per_entry_ ? 1 : 0) + num_weights};
      set_rail_rounds(ctx_, rail_trip_, trip_, slots_per_token, call_phase);
    }
    trip_.shape.tokens_per_round = trip_.tokens_per_round;
    rail_trip_.shape = trip_.shape;
    trip_.num_rounds = num_rounds_for(ctx_, trip_.tokens_per_round);
  }

  // ---- The ranks of the experts send.

  void fill(int64_t round, uint64_t epoch) {
    if (round == 0 && pull_) exchange_addresses(epoch);
    if (!has_slots_) return;
    const TokenRange range = tokens_of_round(trip_, round);
    ctx_.domain().for_each_member(
        [&](int rail) { for_each_message(ctx_, rail, range.end, [&](int64_t message) { send_message(message, rail, epoch); }); });
  }

  void exchange_addresses(uint64_t epoch) {
    ctx_.lane.post_ready(epoch, trip_.operation, std::max<int64_t>(0, ctx_.exchange.heap_offset(args_.rows, 0)));
    ctx_.domain().for_each_member(
        [&](int peer) { scratch_.row_address[static_cast<size_t>(peer)] = ctx_.lane.await_ready(epoch, trip_.operation, peer); });
  }

  void send_message(int64_t message, int rail, uint64_t epoch) {
    if (per_entry_) {
      for (int32_t k = 0; k < shape_.num_topk; ++k) {
        const int32_t row = ctx_.table.placed_row(message, k);
        if (row >= 0) send_entry(row, ctx_.lane.next_slot(trip_, epoch, rail));
      }
      return;
    }
    std::byte* slot = ctx_.lane.next_slot(trip_, epoch, rail);
    const bool stays = own_in_place_ && rail == ctx_.domain().rank;
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

  // ---- The owner receives; between nodes, the rail.

  void start_receiving() { std::fill(scratch_.arrived.begin(), scratch_.arrived.end(), nullptr); }

  void drain(int64_t round, uint64_t epoch) {
    std::fill(scratch_.next_slot.begin(), scratch_.next_slot.end(), 0);
    ctx_.domain().for_each_member(
        [&](int peer) { scratch_.arrived[static_cast<size_t>(peer)] = ctx_.lane.await_arrived(trip_, epoch, peer); });
    const TokenRange range = tokens_of_round(trip_, round);
    if (ctx_.rail != nullptr && range.begin % rail_trip_.tokens_per_round == 0)
      ctx_.rail->start_round(rail_trip_, rail_epoch(rail_round_of(range)));
    reduce(range, epoch);
    if (ctx_.rail == nullptr || (round + 1 < trip_.num_rounds && range.end % rail_trip_.tokens_per_round != 0)) return;
    const int64_t rail_round = rail_round_of(range);
    ctx_.rail->send_round(rail_trip_, rail_epoch(rail_round));
    if (receives_as_it_sends_ && rail_round > 0) receive_from_rails(rail_round - 1);
  }

  void reduce(const TokenRange& range, uint64_t epoch) {
    Span span(ctx_.lane.spans(), {.kind = TERN_SPAN_REDUCE, .operation = trip_.operation, .epoch = epoch});
    size_t num_rows = 0;
    for (const SourceBatch& batch : ctx_.table.batches()) {
      if (own_node_in_place_ && batch.source() == shape_.rank) continue;
      const int64_t end = batch.first_from(range.end);
      for (int64_t token = batch.first_from(range.begin); token < end; ++token) {
        scratch_.terms.clear();
        scratch_.group_ends.clear();
        if (ctx_.rail == nullptr)
          write_result(batch, token);
        else if (per_entry_)
          return_entries(batch, token, rail_epoch(rail_round_of(range)));
        else
          return_sum(batch, token, rail_epoch(rail_round_of(range)));
        num_rows += scratch_.terms.size();
      }
    }
    span.set_bytes(static_cast<int64_t>(num_rows) * call_.row_bytes);
  }

  // The result of one node.
  void write_result(const SourceBatch& batch, int64_t token) {
    float* out_weights = out_weights_of(token);
    if (per_entry_)
      gather_entries(batch, token, out_weights);
    else
      gather_messages(batch, token, out_weights);
    // Rows that were summed at their experts' ranks are weighted already.
    sum_terms(args_.weighting != TERN_WEIGHTS_NONE && (pull_ || per_entry_), token);
  }

  // Into the caller's output, on top of the biases.
  void sum_terms(bool weighted, int64_t token) {
    const auto row_of = [&](const void* matrix) {
      return matrix == nullptr ? nullptr : static_cast<const std::byte*>(matrix) + token * call_.row_bytes;
    };
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

  // Where the weights that are handed back for a token go, zeroed; nullptr: nowhere.
  float* out_weights_of(int64_t token) const {
    if (args_.out_topk_weights == nullptr || !call_.carries_weights) return nullptr;
    float* weights = args_.out_topk_weights + token * shape_.num_topk;
    std::fill_n(weights, shape_.num_topk, 0.0f);
    return weights;
  }

  // The next slot that `rank` has sent in this round; nullptr if it was given up.
  const std::byte* next_arrived_slot(int32_t rank) {
    const auto peer = static_cast<size_t>(rank - shape_.first_rank());
    const std::byte* bank = scratch_.arrived[peer];
    return bank == nullptr ? nullptr : bank + trip_.bank.slot_at(scratch_.next_slot[peer]++);
  }

  // An entry's row where it is, and the weight that is handed back; nullptr: none.
  struct ArrivedEntry {
    const std::byte* row = nullptr;
    const float* weight = nullptr;
  };
  ArrivedEntry next_entry(const SourceBatch& batch, int64_t token, int32_t k) {
    const int32_t expert = batch.expert_of(token, k);
    const int32_t row = expert < 0 ? -1 : batch.entry_row(token, k);
    if (row < 0) return {};
    const int32_t rank = shape_.rank_of_expert(expert);
    const std::byte* slot = has_slots_ ? next_arrived_slot(rank) : nullptr;
    ArrivedEntry entry{.row = pull_ ? pulled_row(rank, row) : slot == nullptr ? nullptr : slot + trip_.bank.slot.payload()};
    if (slot != nullptr && call_.carries_weights) entry.weight = reinterpret_cast<const float*>(slot + trip_.bank.slot.weights());
    return entry;
  }

  void gather_entries(const SourceBatch& batch, int64_t token, float* out_weights) {
    for (int32_t k = 0; k < shape_.num_topk; ++k) {
      const ArrivedEntry entry = next_entry(batch, token, k);
      if (entry.weight != nullptr && out_weights != nullptr) out_weights[k] += *entry.weight;
      if (entry.row != nullptr) scratch_.terms.push_back({entry.row, weight_of(batch, token, k)});
    }
  }

  void gather_messages(const SourceBatch& batch, int64_t token, float* out_weights) {
    for (const Message message : batch.messages_of(token)) {
      const std::byte* slot = has_slots_ ? next_arrived_slot(message.rank) : nullptr;
      if (slot != nullptr && out_weights != nullptr) {
        const auto* handed_back = reinterpret_cast<const float*>(slot + trip_.bank.slot.weights());
        for (int32_t k = 0; k < shape_.num_topk; ++k) out_weights[k] += handed_back[k];
      }
      if (pull_)
        pull_message(batch, token, message);
      else if (own_in_place_ && message.rank == shape_.rank)
        add_own_row(batch, message);
      else if (slot != nullptr)
        scratch_.terms.push_back({slot + trip_.bank.slot.payload(), 1.0f});
    }
  }

  void add_own_row(const SourceBatch& batch, Message message) {
    const int32_t row = batch.message_row(message);
    if (row >= 0) scratch_.terms.push_back({expert_row(row), 1.0f});
  }

  // The rows of one message where they lie; a group of its own, so that the sum on its rank is rounded as if it were made there.
  void pull_message(const SourceBatch& batch, int64_t token, Message message) {
    if (!has_groups()) {
      const int32_t row = batch.message_row(message);
      const std::byte* payload = row < 0 ? nullptr : pulled_row(message.rank, row);
      if (payload != nullptr) scratch_.terms.push_back({payload, 1.0f});
      return;
    }
    for (int32_t k = 0; k < shape_.num_topk; ++k) {
      const int32_t expert = batch.expert_of(token, k);
      if (expert < 0 || shape_.rank_of_expert(expert) != message.rank) continue;
      const int32_t row = batch.entry_row(token, k);
      const std::byte* payload = row < 0 ? nullptr : pulled_row(message.rank, row);
      if (payload != nullptr) scratch_.terms.push_back({payload, weight_of(batch, token, k)});
    }
    scratch_.group_ends.push_back(static_cast<int32_t>(scratch_.terms.size()));
  }

  // Is what a rank contributes a sum that is made where the token's is?
  bool has_groups() const { return pull_ && shape_.has_expert_rows(); }

  const std::byte* pulled_row(int32_t rank, int32_t row) const {
    const std::byte* rows = scratch_.row_address[static_cast<size_t>(rank - shape_.first_rank())];
    return rows == nullptr ? nullptr : rows + row * call_.row_bytes;
  }

  // As its owner has it; of other nodes' tokens, as it came with the dispatch or ahead of this combine.
  const float& weight_of(const SourceBatch& batch, int64_t token, int32_t k) const {
    static constexpr float kOne = 1.0f;
    if (args_.weighting == TERN_WEIGHTS_NONE) return kOne;
    const auto node = static_cast<size_t>(shape_.node_of_rank(batch.source()));
    const float* weights = args_.weighting == TERN_WEIGHTS_DISPATCH ? ctx_.weights.sent[node].data()
                           : batch.source() == shape_.rank          ? args_.topk_weights
                                                                    : ctx_.weights.at_rail[node].data();
    return weights[token * shape_.num_topk + k];
  }

  // ---- Between nodes: the rail sends to the owner ...

  uint64_t rail_epoch(int64_t rail_round) const { return rail_epoch_ + static_cast<uint64_t>(rail_round); }
  int64_t rail_round_of(const TokenRange& range) const { return range.begin / rail_trip_.tokens_per_round; }

  // One row for a token that has messages to this node. The own node's tokens are summed as all others.
  void return_sum(const SourceBatch& batch, int64_t token, uint64_t epoch) {
    if (batch.messages_of(token).empty()) return;
    std::byte* slot = ctx_.rail->next_slot(rail_trip_, epoch, shape_.node_of_rank(batch.source()));
    auto* handed_back = call_.carries_weights ? reinterpret_cast<float*>(slot + rail_trip_.bank.slot.words()) : nullptr;
    if (handed_back != nullptr) std::fill_n(handed_back, shape_.num_topk, 0.0f);
    gather_messages(batch, token, handed_back);
    sum_rows({.dtype = args_.dtype,
              .hidden = args_.hidden,
              .weighted = args_.weighting != TERN_WEIGHTS_NONE && pull_,
              .terms = scratch_.terms,
              .group_ends = scratch_.group_ends,
              .bias = {},
              .out = slot,
              .store = Store::kCached,
              .terms_wire = args_.wire,
              .out_wire = args_.wire});
  }

  // One slot for each of the token's entries in this node, also for those beyond the capacity: the owner does not know which they are.
  void return_entries(const SourceBatch& batch, int64_t token, uint64_t epoch) {
    for (int32_t k = 0; k < shape_.num_topk; ++k) {
      if (batch.expert_of(token, k) < 0) continue;
      std::byte* slot = ctx_.rail->next_slot(rail_trip_, epoch, shape_.node_of_rank(batch.source()));
      auto* words = reinterpret_cast<uint32_t*>(slot + rail_trip_.bank.slot.words());
      const ArrivedEntry entry = next_entry(batch, token, k);
      words[0] = entry.row != nullptr ? 1 : 0;
      if (call_.carries_weights) *reinterpret_cast<float*>(words + 1) = entry.weight != nullptr ? *entry.weight : 0.0f;
      if (entry.row == nullptr) continue;
      copy_row(slot, entry.row, static_cast<size_t>(call_.wire_bytes), Store::kCached);
      scratch_.terms.push_back({entry.row, 1.0f});
    }
  }

  // ... who sums what the nodes have sent.

  void start_returning() { std::fill(scratch_.next_to.begin(), scratch_.next_to.end(), 0); }

  void receive_from_rails(int64_t rail_round) {
    std::vector<const std::byte*>& banks = scratch_.rail_banks[rail_round % layout::kNumBanks];
    for (int32_t node = 0; node < shape_.num_nodes; ++node)
      banks[static_cast<size_t>(node)] =
          ctx_.rail->serves(node) ? ctx_.rail->await_arrived(rail_trip_, rail_epoch(rail_round), node) : nullptr;
    Span span(ctx_.lane.spans(), {.kind = TERN_SPAN_REDUCE, .operation = trip_.operation, .epoch = rail_epoch(rail_round)});
    std::fill(scratch_.rail_slots.begin(), scratch_.rail_slots.end(), 0);
    const int64_t begin = rail_round * rail_trip_.tokens_per_round;
    const int64_t end = std::min(begin + rail_trip_.tokens_per_round, trip_.num_tokens);
    for (int64_t token = begin; token < end; ++token) {
      scratch_.terms.clear();
      scratch_.group_ends.clear();
      if (per_entry_)
        gather_returned_entries(token, banks);
      else
        gather_returned_sums(token, banks);
      sum_terms((per_entry_ || (own_node_in_place_ && pull_)) && args_.weighting != TERN_WEIGHTS_NONE, token);
    }
    ctx_.rail->finish_round(rail_epoch(rail_round));
  }

  // nullptr: the rail there was given up.
  const std::byte* next_returned_slot(int32_t node, const std::vector<const std::byte*>& banks) {
    if (banks[static_cast<size_t>(node)] == nullptr) return nullptr;
    return banks[static_cast<size_t>(node)] + rail_trip_.bank.slot_at(scratch_.rail_slots[static_cast<size_t>(node)]++);
  }

  void gather_returned_sums(int64_t token, const std::vector<const std::byte*>& banks) {
    float* out_weights = out_weights_of(token);
    for (int32_t node = 0; node < shape_.num_nodes; ++node) {
      if (!goes_to(token, node)) continue;
      if (own_node_in_place_ && node == shape_.node()) {
        gather_messages(ctx_.table.own(), token, nullptr);
        continue;
      }
      const std::byte* slot = next_returned_slot(node, banks);
      if (slot == nullptr) continue;
      scratch_.terms.push_back({slot, 1.0f});
      if (own_node_in_place_ && has_groups()) scratch_.group_ends.push_back(static_cast<int32_t>(scratch_.terms.size()));
      const auto* handed_back = reinterpret_cast<const float*>(slot + rail_trip_.bank.slot.words());
      for (int32_t k = 0; k < shape_.num_topk && out_weights != nullptr; ++k) out_weights[k] += handed_back[k];
    }
  }

  // Asked once for each token and node, tokens ascending.
  bool goes_to(int64_t token, int32_t node) {
    if (node == shape_.node()) return !ctx_.table.own().messages_of(token).empty();
    const auto tokens = ctx_.table.tokens_to(node);
    size_t& next = scratch_.next_to[static_cast<size_t>(node)];
    const bool goes = next < tokens.size() && tokens[next] == token;
    if (goes) ++next;
    return goes;
  }

  void gather_returned_entries(int64_t token, const std::vector<const std::byte*>& banks) {
    float* out_weights = out_weights_of(token);
    for (int32_t k = 0; k < shape_.num_topk; ++k) {
      const int32_t expert = ctx_.table.expert_of(token, k);
      if (expert < 0) continue;
      const std::byte* slot = next_returned_slot(expert / shape_.node_experts(), banks);
      if (slot == nullptr) continue;
      const auto* words = reinterpret_cast<const uint32_t*>(slot + rail_trip_.bank.slot.words());
      if (words[0] == 0) continue;
      scratch_.terms.push_back({slot, weight_of(ctx_.table.own(), token, k)});
      if (out_weights != nullptr) out_weights[k] += *reinterpret_cast<const float*>(words + 1);
    }
  }

  const PlanContext& ctx_;
  const CombineCall& call_;
  const tern_combine_args& args_;
  const PlanShape& shape_;
  PlanScratch& scratch_;
  bool pull_ = false;          // owners read the rows in their experts' windows
  bool own_in_place_ = false;  // this rank's rows for its own tokens are not copied to a slot
  // Between nodes, with one rank on each: they are not copied to the rail's bank either, but summed with what the nodes return.
  bool own_node_in_place_ = false;
  bool per_entry_ = false;  // every expert's row goes to the owner
  bool has_slots_ = true;
  bool receives_as_it_sends_ = false;  // between nodes, no phase: a round of the rail is received when the next one is sent
  Store store_ = Store::kCached;
  RoundTrip trip_;
  RailTrip rail_trip_;
  uint64_t rail_epoch_ = 0;  // of the first of the rail's rounds
};

}  // namespace

void run_combine(const PlanContext& context, const CombineRun& run) { Combine(context, run).run(run.phase, run.ticket); }

}  // namespace tern::cpu
