// SPDX-License-Identifier: Apache-2.0
#include "plan/routing_table.h"

#include <algorithm>

#include "base/error.h"
#include "layout/window.h"

namespace tern {

int64_t topk_at(const tern_routing& routing, int64_t idx) {
  if (routing.topk_idx_type == TERN_INDEX_INT32) return static_cast<const int32_t*>(routing.topk_idx)[idx];
  return static_cast<const int64_t*>(routing.topk_idx)[idx];
}

void check_routing(const PlanShape& shape, const tern_routing& routing) {
  constexpr auto kBad = TERN_INVALID_ARGUMENT;
  check_routing_arguments(shape, routing);
  if (shape.num_topk == 0) {
    for (int32_t expert = 0; expert < shape.num_experts && routing.tokens_per_expert != nullptr; ++expert)
      if (routing.tokens_per_expert[expert] < 0)
        fail(kBad, "routing: tokens_per_expert of expert {} is {}, must not be negative", expert, routing.tokens_per_expert[expert]);
    return;
  }
  for (int64_t i = 0; i < routing.num_tokens * shape.num_topk; ++i) {
    const int64_t expert = topk_at(routing, i);
    if (expert < -1 || expert >= shape.num_experts)
      fail(kBad, "routing: token {} names expert {} at k = {}, must be -1 (none) or 0 to {}", i / shape.num_topk, expert,
           i % shape.num_topk, shape.num_experts - 1);
  }
}

RoutingTable::RoutingTable(const PlanShape& shape)
    : shape_(shape),
      experts_(shape.max_tokens * shape.num_topk),
      rank_bits_(shape.num_topk > 0 ? 0 : shape.max_tokens * shape.num_nodes * shape.route_words()),
      own_entries_(shape.num_experts),
      tokens_to_(shape.num_nodes),
      counts_(shape.num_ranks * num_counts()),
      received_begin_(shape.num_ranks + 1),
      group_begin_(shape.local_experts() + 1),
      source_begin_(static_cast<size_t>(shape.local_experts()) * shape.num_ranks),
      next_message_(shape.num_ranks),
      next_entry_(static_cast<size_t>(shape.local_experts()) * shape.num_ranks),
      source_tokens_(shape.max_messages()),
      placed_rows_(shape.max_messages() * shape.num_topk) {
  for (int32_t node = 0; node < shape.num_nodes; ++node) {
    batches_.emplace_back(shape, shape.rail_in(node));
    if (node != shape.node()) tokens_to_[node].reserve(shape.max_tokens);
  }
}

void RoutingTable::begin_counts(std::span<const uint8_t> masked) {
  std::fill(counts_.begin(), counts_.end(), 0);
  for (SourceBatch& batch : batches_) batch.clear();
  for (auto& tokens : tokens_to_) tokens.clear();
  knows_all_counts_ = shape_.num_nodes == 1 || std::find(masked.begin(), masked.end(), 1) == masked.end();
}

void RoutingTable::set_routing(const tern_routing& routing, std::span<const uint8_t> masked) {
  begin_counts(masked);
  std::fill(own_entries_.begin(), own_entries_.end(), 0);
  if (shape_.num_topk > 0)
    set_topk(routing, masked);
  else
    set_token_in_rank(routing, masked);
  own_counts()[num_counts() - 1] = static_cast<int32_t>(routing.num_tokens);
  std::copy_n(own_entries_.begin() + shape_.first_expert(), shape_.node_experts(), own_counts());
}

void RoutingTable::set_topk(const tern_routing& routing, std::span<const uint8_t> masked) {
  const int32_t num_topk = shape_.num_topk;
  int32_t* messages = own_counts() + shape_.node_experts();
  for (int64_t token = 0; token < routing.num_tokens; ++token) {
    int32_t* experts = experts_.data() + token * num_topk;
    for (int32_t k = 0; k < num_topk; ++k) {
      auto expert = static_cast<int32_t>(topk_at(routing, token * num_topk + k));
      if (expert >= 0 && masked[shape_.rank_of_expert(expert)] != 0) expert = -1;
      experts[k] = expert;
      if (expert < 0) continue;
      ++own_entries_[expert];
      const auto same_rank = [&](int32_t other) { return other >= 0 && shape_.rank_of_expert(other) == shape_.rank_of_expert(expert); };
      if (std::none_of(experts, experts + k, same_rank)) ++messages[shape_.rank_of_expert(expert)];
    }
    add_token(static_cast<int32_t>(token));
  }
}

void RoutingTable::set_token_in_rank(const tern_routing& routing, std::span<const uint8_t> masked) {
  int32_t* messages = own_counts() + shape_.node_experts();
  std::fill(rank_bits_.begin(), rank_bits_.end(), 0);
  for (int64_t token = 0; token < routing.num_tokens; ++token) {
    for (int32_t rank = 0; rank < shape_.num_ranks; ++rank) {
      if (routing.token_in_rank[token * shape_.num_ranks + rank] == 0 || masked[rank] != 0) continue;
      ++messages[rank];
      const int32_t bit = rank % shape_.ranks_per_node();
      const int64_t word = (token * shape_.num_nodes + shape_.node_of_rank(rank)) * shape_.route_words() + bit / 32;
      rank_bits_[word] = static_cast<int32_t>(static_cast<uint32_t>(rank_bits_[word]) | uint32_t{1} << (bit % 32));
    }
    add_token(static_cast<int32_t>(token));
  }
  if (routing.tokens_per_expert != nullptr) std::copy_n(routing.tokens_per_expert, shape_.num_experts, own_entries_.begin());
}

void RoutingTable::add_token(int32_t token) {
  int32_t words[64];
  const std::span<int32_t> in_node(words, static_cast<size_t>(shape_.route_words()));
  const int32_t nothing = shape_.num_topk > 0 ? -1 : 0;
  for (int32_t node = 0; node < shape_.num_nodes; ++node) {
    get_words_for(node, token, in_node);
    if (node == shape_.node())
      batch(node).add_token(token, in_node);
    else if (std::any_of(in_node.begin(), in_node.end(), [&](int32_t word) { return word != nothing; }))
      tokens_to_[node].push_back(token);
  }
}

void RoutingTable::get_words_for(int32_t node, int64_t token, std::span<int32_t> words) const {
  if (shape_.num_topk == 0) {
    std::copy_n(rank_bits_.begin() + (token * shape_.num_nodes + node) * shape_.route_words(), words.size(), words.begin());
    return;
  }
  for (int32_t k = 0; k < shape_.num_topk; ++k) {
    const int32_t expert = expert_of(token, k);
    words[k] = expert >= 0 && expert / shape_.node_experts() == node ? expert : -1;
  }
}

void RoutingTable::get_counts_for(int32_t node, std::span<int32_t> counts) const {
  const auto own = counts_of(shape_.rank);
  std::copy(own.begin(), own.end(), counts.begin());
  std::copy_n(own_entries_.begin() + node * shape_.node_experts(), shape_.node_experts(), counts.begin());
}

void RoutingTable::finish() {
  exceeds_capacity_ = false;
  set_received();
  set_batch_rows();
  restart_placing();
}

int64_t RoutingTable::entries_of_expert(int32_t expert_in_node) const {
  int64_t sum = 0;
  for (int32_t source = 0; source < shape_.num_ranks; ++source) sum += counts_[source * num_counts() + expert_in_node];
  return sum;
}

void RoutingTable::set_received() {
  received_begin_[0] = 0;
  for (int32_t source = 0; source < shape_.num_ranks; ++source)
    received_begin_[source + 1] = received_begin_[source] + messages_between(source, shape_.rank);
  if (!shape_.has_expert_rows()) {
    exceeds_capacity_ = num_received() > shape_.row_capacity;
    return;
  }
  group_begin_[0] = 0;
  for (int32_t local = 0; local < shape_.local_experts(); ++local) {
    int64_t entries = 0;
    for (int32_t source = 0; source < shape_.num_ranks; ++source) {
      source_begin_[local * shape_.num_ranks + source] = entries;
      entries += source_entries(source, local);
    }
    const bool is_padded = shape_.layout == TERN_LAYOUT_EXPERT_PADDED;
    group_begin_[local + 1] = group_begin_[local] + (is_padded ? shape_.padded_group_rows() : layout::align_up(entries, shape_.alignment));
    if (entries > 0 && shape_.bounded_row(group_begin_[local], entries - 1) < 0) exceeds_capacity_ = true;
  }
}

// Where the entries of each batch come to lie at their destinations in this node: what the sources before it have, for each rank and expert.
void RoutingTable::set_batch_rows() {
  const auto batch_of = [&](int32_t source) {
    const bool of_rail = source % shape_.ranks_per_node() == shape_.rank % shape_.ranks_per_node();
    return of_rail ? &batch(shape_.node_of_rank(source)) : nullptr;
  };
  for (int32_t i = 0; i < shape_.ranks_per_node(); ++i) {
    int64_t row = 0;
    for (int32_t source = 0; source < shape_.num_ranks; ++source) {
      if (SourceBatch* batch = batch_of(source)) batch->rank_row_begin()[i] = row;
      row += messages_between(source, shape_.first_rank() + i);
    }
  }
  if (!shape_.has_expert_rows()) return;
  int64_t group_begin = 0;
  for (int32_t expert = 0; expert < shape_.node_experts(); ++expert) {
    if (expert % shape_.local_experts() == 0) group_begin = 0;
    int64_t row = group_begin;
    for (int32_t source = 0; source < shape_.num_ranks; ++source) {
      if (SourceBatch* batch = batch_of(source)) batch->next_row()[expert] = row;
      row += counts_of(source)[expert];
    }
    const bool is_padded = shape_.layout == TERN_LAYOUT_EXPERT_PADDED;
    group_begin = is_padded ? group_begin + shape_.padded_group_rows() : layout::align_up(row, shape_.alignment);
  }
  for (SourceBatch& batch : batches_) batch.set_rows();
}

void RoutingTable::get_row_begins(int32_t node, std::span<int64_t> begins) const {
  const int32_t first_source = node * shape_.ranks_per_node();
  const auto sum = [&](int32_t num_sources, int64_t count) {
    int64_t rows = 0;
    for (int32_t source = 0; source < num_sources; ++source) rows += counts_[source * num_counts() + count];
    return rows;
  };
  int64_t group_begin = 0;
  for (int32_t i = 0; i < shape_.num_row_begins(); ++i) {
    if (!shape_.has_expert_rows()) {
      begins[i] = sum(first_source, shape_.node_experts() + shape_.first_rank() + i);
      continue;
    }
    if (i % shape_.local_experts() == 0) group_begin = 0;
    begins[i] = group_begin + sum(first_source, i);
    const bool is_padded = shape_.layout == TERN_LAYOUT_EXPERT_PADDED;
    group_begin += is_padded ? shape_.padded_group_rows() : layout::align_up(sum(shape_.num_ranks, i), shape_.alignment);
  }
}

int64_t RoutingTable::most_tokens_of_any_rank() const {
  if (!knows_all_counts_) return shape_.max_tokens;
  int32_t most = 0;
  for (int32_t rank = 0; rank < shape_.num_ranks; ++rank) most = std::max(most, tokens_of(rank));
  return most;
}

int32_t RoutingTable::received_entries(int32_t local_expert) const {
  return static_cast<int32_t>(entries_of_expert(shape_.rank * shape_.local_experts() - shape_.first_expert() + local_expert));
}

int32_t RoutingTable::source_entries(int32_t source, int32_t local_expert) const {
  return counts_of(source)[shape_.rank * shape_.local_experts() - shape_.first_expert() + local_expert];
}

int64_t RoutingTable::num_rows() const {
  if (shape_.extent == TERN_EXTENT_WORST || shape_.layout == TERN_LAYOUT_EXPERT_PADDED) return shape_.row_capacity;
  return shape_.layout == TERN_LAYOUT_RANK_MAJOR ? num_received() : group_begin_.back();
}

void RoutingTable::restart_placing() {
  std::copy_n(received_begin_.begin(), next_message_.size(), next_message_.begin());
  std::copy(source_begin_.begin(), source_begin_.end(), next_entry_.begin());
}

int64_t RoutingTable::place_message(int32_t source, int32_t source_token, std::span<const int32_t> experts) {
  const int64_t message = next_message_[source]++;
  source_tokens_[message] = source_token;
  int32_t* rows = placed_rows_.data() + message * shape_.num_topk;
  for (int32_t k = 0; k < shape_.num_topk; ++k) {
    const int32_t local = experts[k];
    if (local < 0) {
      rows[k] = -1;
    } else if (shape_.has_expert_rows()) {
      rows[k] = shape_.bounded_row(group_begin_[local], next_entry_[local * shape_.num_ranks + source]++);
    } else {
      rows[k] = received_row(message);
    }
  }
  return message;
}

}  // namespace tern
