// SPDX-License-Identifier: Apache-2.0
#include "cuda/node_plan.h"

#include <algorithm>
#include <cstring>

#include "base/error.h"

namespace tern::cuda {
namespace {

constexpr int64_t kInputAlignment = 64;

// For each chunk of tokens the first of the slots, which ascend with the tokens: `slot_of(token)` is -1 where there is none.
template <typename SlotOf>
void set_chunk_begin(const kernels::PlanView& v, int32_t* chunk_begin, SlotOf slot_of) {
  int32_t num_slots = 0;
  for (int32_t chunk = 0; chunk <= layout::kMaxChunks; ++chunk) {
    chunk_begin[chunk] = num_slots;
    const int64_t begin = std::min(int64_t{chunk} * v.tokens_per_chunk, v.max_tokens);
    const int64_t end = std::min(begin + v.tokens_per_chunk, v.max_tokens);
    for (int64_t token = begin; token < end; ++token) num_slots = std::max(num_slots, slot_of(token) + 1);
  }
}

}  // namespace

NodePlan::NodePlan(int device, const PlanShape& shape, NodeLane& any_lane) : table_(shape), scratch_(shape), placed_(shape, nullptr) {
  const int64_t routing_bytes = shape.max_tokens * (shape.num_topk > 0 ? shape.num_topk * static_cast<int64_t>(sizeof(int64_t))
                                                                       : static_cast<int64_t>(shape.num_ranks));
  experts_at_ = layout::align_up(routing_bytes, kInputAlignment);
  num_tokens_at_ = experts_at_ + layout::align_up(shape.num_experts * static_cast<int64_t>(sizeof(int32_t)), kInputAlignment);
  inputs_ = {device, static_cast<size_t>(num_tokens_at_ + kInputAlignment)};
  tables_ = {device, static_cast<size_t>(placed_.routed_bytes)};
  placed_ = PlacedTables(shape, tables_.data());
  rounds_of_route_ = cpu::num_rail_rounds_of_route({any_lane.lane(), &any_lane.rail(), table_, scratch_});
  const layout::BankLayout counts{.num_counts = shape.num_nodes * table_.num_counts(), .slot = {.num_experts = shape.num_topk}};
  const int64_t bank_bytes = any_lane.lane().domain().layout.bank_bytes;
  if (counts.bytes(shape.num_nodes) > bank_bytes)
    fail(TERN_OUT_OF_MEMORY,
         "plan: the routing of {} experts, top-{}, on {} nodes needs {} bytes from each rank, the exchange has {}; create it with "
         "max_experts "
         "and max_topk of at least these",
         shape.num_experts, shape.num_topk, shape.num_nodes, counts.bytes(shape.num_nodes), bank_bytes);
}

int64_t NodePlan::topk_bytes(const tern_routing& routing) const {
  const auto index_bytes = static_cast<int64_t>(routing.topk_idx_type == TERN_INDEX_INT32 ? sizeof(int32_t) : sizeof(int64_t));
  return routing.num_tokens * shape().num_topk * index_bytes;
}

tern_routing NodePlan::bring(const tern_routing& routing, cudaStream_t stream) const {
  tern_routing brought = routing;
  const auto copy = [&](const void* from, int64_t at, int64_t num_bytes) {
    if (from != nullptr && num_bytes > 0)
      check(kernels::launch_copy(inputs_.data() + at, from, num_bytes, stream), "launching the kernel that brings a routing to the host");
    return from == nullptr ? nullptr : inputs_.data() + at;
  };
  brought.topk_idx = copy(routing.topk_idx, 0, topk_bytes(routing));
  brought.token_in_rank = reinterpret_cast<const uint8_t*>(copy(routing.token_in_rank, 0, routing.num_tokens * int64_t{shape().num_ranks}));
  brought.tokens_per_expert = reinterpret_cast<const int32_t*>(
      copy(routing.tokens_per_expert, experts_at_, shape().num_experts * static_cast<int64_t>(sizeof(int32_t))));
  brought.device_num_tokens =
      reinterpret_cast<const int32_t*>(copy(routing.device_num_tokens, num_tokens_at_, static_cast<int64_t>(sizeof(int32_t))));
  return brought;
}

// Numbers that are no expert count as -1. True: there were some.
bool NodePlan::drop_invalid(tern_routing& routing) const {
  if (routing.device_num_tokens != nullptr) routing.num_tokens = std::clamp<int64_t>(*routing.device_num_tokens, 0, routing.num_tokens);
  bool found = false;
  const auto drop = [&]<typename Index>(Index* idx) {
    for (int64_t i = 0; i < routing.num_tokens * shape().num_topk; ++i) {
      if (idx[i] >= -1 && idx[i] < shape().num_experts) continue;
      idx[i] = -1;
      found = true;
    }
  };
  if (shape().num_topk == 0) return false;
  if (routing.topk_idx_type == TERN_INDEX_INT32)
    drop(reinterpret_cast<int32_t*>(inputs_.data()));
  else
    drop(reinterpret_cast<int64_t*>(inputs_.data()));
  return found;
}

void NodePlan::route(NodeLane& lane, const Route& route) {
  tern_routing own = route.routing;
  if (drop_invalid(own)) route.note(TERN_INVALID_ARGUMENT);
  table_.set_routing(own, *route.unreachable);
  cpu::run_route({lane.lane(), &lane.rail(), table_, scratch_});
  tell_messages(lane.lane());
  write_sources();
  for (int32_t node = 0; node < shape().num_nodes; ++node) write_batch(node);
  write_own();
  if (table_.exceeds_capacity()) route.note(TERN_CAPACITY_EXCEEDED);
  routed_ = route.ticket;
  lane.answer(0);
}

// Every rank of the node learns which messages come to it: their tokens and experts.
void NodePlan::tell_messages(cpu::Lane& lane) {
  cpu::RoundTrip trip{.operation = TERN_OP_ROUTE,
                      .shape = call_shape(shape()),
                      .bank = {.num_counts = 0, .slot = {.num_experts = shape().num_topk}},
                      .num_tokens = table_.num_tokens()};
  trip.tokens_per_round = trip.bank.slots_in(lane.domain().layout.bank_bytes) / shape().num_nodes;
  if (trip.tokens_per_round <= 0)
    fail(TERN_OUT_OF_MEMORY,
         "route: the hosts of a node tell each other the experts of a token of each of {} nodes, top-{}, in banks of {} bytes, too few",
         shape().num_nodes, shape().num_topk, lane.domain().layout.bank_bytes);
  trip.shape.tokens_per_round = trip.tokens_per_round;
  trip.num_rounds = std::max<int64_t>(1, (table_.most_tokens_of_any_rank() + trip.tokens_per_round - 1) / trip.tokens_per_round);
  const auto fill = [&](int64_t round, uint64_t epoch) {
    const cpu::TokenRange range = tokens_of_round(trip, round);
    for (const SourceBatch& batch : table_.batches()) {
      const int64_t end = batch.first_from(range.end);
      for (int64_t token = batch.first_from(range.begin); token < end; ++token)
        for (const Message message : batch.messages_of(token))
          write_message(batch, token, message.rank, trip.bank.slot, lane.next_slot(trip, epoch, message.rank - shape().first_rank()));
    }
  };
  const auto drain = [&](int64_t, uint64_t epoch) {
    lane.domain().for_each_member([&](int peer) {
      lane.receive_from(trip, epoch, peer, [&](const std::byte* bank) {
        const int32_t num_messages = reinterpret_cast<const layout::MessageHeader*>(bank)->num_messages;
        for (int32_t i = 0; i < num_messages; ++i) place_message(trip.bank.slot, bank + trip.bank.slot_at(i));
      });
    });
  };
  lane.run(trip, fill, drain);
}

void NodePlan::write_message(const SourceBatch& batch, int64_t token, int32_t rank, const layout::SlotLayout& layout,
                             std::byte* slot) const {
  const int32_t source_rank = batch.source(), source_token = batch.source_token(token);
  std::memcpy(slot + layout.source_rank(), &source_rank, sizeof(source_rank));
  std::memcpy(slot + layout.source_token(), &source_token, sizeof(source_token));
  auto* experts = reinterpret_cast<int32_t*>(slot + layout.experts());
  for (int32_t k = 0; k < shape().num_topk; ++k) {
    const int32_t expert = batch.expert_of(token, k);
    experts[k] = expert >= 0 && shape().rank_of_expert(expert) == rank ? expert % shape().local_experts() : -1;
  }
}

void NodePlan::place_message(const layout::SlotLayout& layout, const std::byte* slot) {
  const int32_t num_topk = shape().num_topk;
  const kernels::PlanView& v = placed_.plan;
  int32_t source = 0, token = 0;
  std::memcpy(&source, slot + layout.source_rank(), sizeof(source));
  std::memcpy(&token, slot + layout.source_token(), sizeof(token));
  const auto* experts = reinterpret_cast<const int32_t*>(slot + layout.experts());
  const int64_t message = table_.place_message(source, token, {experts, static_cast<size_t>(num_topk)});
  v.source_token[message] = token;
  for (int32_t k = 0; k < v.topk_stride; ++k) {
    v.received_rows[message * v.topk_stride + k] = k < num_topk ? table_.placed_row(message, k) : -1;
    v.received_experts[message * v.topk_stride + k] = k < num_topk ? experts[k] : -1;
  }
}

// Of what arrives here.
void NodePlan::write_sources() const {
  const PlanShape& s = shape();
  const kernels::PlanView& v = placed_.plan;
  const int32_t num_counts = v.num_counts(s.ranks_per_node());
  for (int32_t source = 0; source < s.num_ranks; ++source) {
    v.num_tokens[source] = table_.tokens_of(source);
    const auto counts = table_.counts_of(source);
    int32_t* const to = v.counts + int64_t{source} * num_counts;
    std::copy_n(counts.begin(), s.node_experts(), to);
    std::copy_n(counts.begin() + s.node_experts() + s.first_rank(), s.ranks_per_node(), to + s.node_experts());
    const int64_t begin = table_.received_begin(source), end = table_.received_begin(source + 1);
    v.received_begin[source] = static_cast<int32_t>(begin);
    int32_t* const chunk_begin = v.chunk_begin + int64_t{source} * (layout::kMaxChunks + 1);
    for (int32_t chunk = 0; chunk <= layout::kMaxChunks; ++chunk)
      chunk_begin[chunk] = static_cast<int32_t>(
          std::lower_bound(v.source_token + begin, v.source_token + end, int64_t{chunk} * v.tokens_per_chunk) - v.source_token - begin);
  }
  v.received_begin[s.num_ranks] = static_cast<int32_t>(table_.num_received());
  for (int32_t e = 0; e <= s.local_experts() && s.has_expert_rows(); ++e) {
    v.group_begin[e] = static_cast<int32_t>(table_.group_begin(e));
    for (int32_t source = 0; source < s.num_ranks && e < s.local_experts(); ++source)
      v.source_begin[e * s.num_ranks + source] = static_cast<int32_t>(table_.source_begin(source, e));
  }
}

// Of the tokens that one rank sends to this node, by way of this one.
void NodePlan::write_batch(int32_t node) const {
  const PlanShape& s = shape();
  const kernels::PlanView& v = placed_.plan;
  const kernels::RailTables& r = placed_.rails;
  const SourceBatch& batch = table_.batch(node);
  const int64_t first_token = node * s.max_tokens;
  int32_t* const here = r.here + first_token;
  int32_t* const entries_here = r.entries_here + first_token * s.num_topk;
  std::fill_n(r.experts + first_token * s.num_topk, s.max_tokens * s.num_topk, -1);
  std::fill_n(r.entry_rows + first_token * s.num_topk, s.max_tokens * s.num_topk, -1);
  std::fill_n(r.messages + first_token * v.messages_per_token, s.max_tokens * v.messages_per_token, kernels::MessageRef{-1, 0});
  std::fill_n(here, s.max_tokens, -1);
  std::fill_n(entries_here, s.max_tokens * s.num_topk, -1);
  int32_t num_slots = 0, num_entries = 0;
  for (int64_t i = 0; i < batch.num_tokens(); ++i) {
    const int64_t token = batch.source_token(i);
    for (int32_t k = 0; k < s.num_topk; ++k) {
      const int32_t expert = batch.expert_of(i, k);
      if (expert < 0) continue;
      const int64_t entry = (first_token + token) * s.num_topk + k;
      r.experts[entry] = expert - s.first_expert();
      if (s.has_expert_rows()) r.entry_rows[entry] = batch.entry_row(i, k);
      entries_here[token * s.num_topk + k] = num_entries++;
    }
    kernels::MessageRef* message = r.messages + (first_token + token) * v.messages_per_token;
    for (const Message m : batch.messages_of(i)) *message++ = {m.rank - s.first_rank(), s.has_expert_rows() ? 0 : batch.message_row(m)};
    if (!batch.messages_of(i).empty()) here[token] = num_slots++;
  }
  constexpr int64_t kEnds = layout::kMaxChunks + 1;
  set_chunk_begin(v, r.here_begin + node * kEnds, [&](int64_t token) { return here[token]; });
  set_chunk_begin(v, r.entries_here_begin + node * kEnds, [&](int64_t token) {
    const int32_t* entries = entries_here + token * s.num_topk;
    return s.num_topk == 0 ? -1 : *std::max_element(entries, entries + s.num_topk);
  });
}

// Of this rank's tokens in all nodes.
void NodePlan::write_own() {
  const PlanShape& s = shape();
  const kernels::PlanView& v = placed_.plan;
  const kernels::RailTables& r = placed_.rails;
  constexpr int64_t kEnds = layout::kMaxChunks + 1;
  std::fill_n(r.node_of_entry, s.max_tokens * s.num_topk, -1);
  std::fill_n(r.entries_there, s.max_tokens * s.num_topk, -1);
  std::vector<size_t>& num_entries = scratch_.next_to;
  std::fill(num_entries.begin(), num_entries.end(), 0);
  for (int64_t i = 0; i < table_.num_tokens() * s.num_topk; ++i) {
    const int32_t expert = table_.expert_of(i / s.num_topk, static_cast<int32_t>(i % s.num_topk));
    if (expert < 0) continue;
    r.node_of_entry[i] = expert / s.node_experts();
    r.entries_there[i] = static_cast<int32_t>(num_entries[static_cast<size_t>(r.node_of_entry[i])]++);
  }
  for (int32_t node = 0; node < s.num_nodes; ++node) {
    int32_t* const there = r.there + node * s.max_tokens;
    if (node == s.node()) {
      std::copy_n(r.here + node * s.max_tokens, s.max_tokens, there);
    } else {
      std::fill_n(there, s.max_tokens, -1);
      int32_t num_slots = 0;
      for (const int32_t token : table_.tokens_to(node)) there[token] = num_slots++;
    }
    set_chunk_begin(v, r.there_begin + node * kEnds, [&](int64_t token) { return there[token]; });
    set_chunk_begin(v, r.entries_there_begin + node * kEnds, [&](int64_t token) {
      int32_t last = -1;
      for (int64_t i = token * s.num_topk; i < (token + 1) * s.num_topk; ++i)
        if (r.node_of_entry[i] == node) last = std::max(last, r.entries_there[i]);
      return last;
    });
  }
}

}  // namespace tern::cuda
