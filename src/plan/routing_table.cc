// SPDX-License-Identifier: Apache-2.0
#include "plan/routing_table.h"

#include <algorithm>
#include <numeric>

#include "base/error.h"
#include "layout/window.h"

namespace tern {
namespace {

int64_t topk_at(const tern_routing& routing, int64_t idx) {
  if (routing.topk_idx_type == TERN_INDEX_INT32) return static_cast<const int32_t*>(routing.topk_idx)[idx];
  return static_cast<const int64_t*>(routing.topk_idx)[idx];
}

}  // namespace

RoutingTable::RoutingTable(const PlanShape& shape)
    : shape_(shape),
      experts_(shape.max_tokens * shape.num_topk),
      entry_rows_(shape.max_tokens * shape.num_topk),
      message_begin_(shape.max_tokens + 1),
      counts_(shape.num_ranks * num_counts()),
      tokens_of_(shape.num_ranks),
      rank_row_begin_(shape.num_ranks),
      next_row_(shape.num_experts),
      received_begin_(shape.num_ranks + 1),
      group_begin_(shape.local_experts() + 1),
      source_begin_(static_cast<size_t>(shape.local_experts()) * shape.num_ranks),
      next_message_(shape.num_ranks),
      next_entry_(static_cast<size_t>(shape.local_experts()) * shape.num_ranks),
      source_tokens_(shape.max_messages()),
      placed_rows_(shape.max_messages() * shape.num_topk) {
  messages_.reserve(shape.max_tokens * shape.max_messages_per_token());
}

void RoutingTable::check(const tern_routing& routing) const {
  constexpr auto kBad = TERN_INVALID_ARGUMENT;
  check_routing_arguments(shape_, routing);
  if (shape_.num_topk == 0) {
    for (int32_t expert = 0; expert < shape_.num_experts && routing.tokens_per_expert != nullptr; ++expert)
      if (routing.tokens_per_expert[expert] < 0)
        fail(kBad, "routing: tokens_per_expert of expert {} is {}, must not be negative", expert, routing.tokens_per_expert[expert]);
    return;
  }
  for (int64_t i = 0; i < routing.num_tokens * shape_.num_topk; ++i) {
    const int64_t expert = topk_at(routing, i);
    if (expert < -1 || expert >= shape_.num_experts)
      fail(kBad, "routing: token {} names expert {} at k = {}, must be -1 (none) or 0 to {}", i / shape_.num_topk, expert,
           i % shape_.num_topk, shape_.num_experts - 1);
  }
}

void RoutingTable::set_routing(const tern_routing& routing, std::span<const uint8_t> masked) {
  std::fill(counts_.begin(), counts_.end(), 0);
  std::fill(tokens_of_.begin(), tokens_of_.end(), 0);
  tokens_of(shape_.rank) = static_cast<int32_t>(routing.num_tokens);
  messages_.clear();
  message_begin_[0] = 0;
  if (shape_.num_topk > 0)
    set_topk(routing, masked);
  else
    set_token_in_rank(routing, masked);
}

void RoutingTable::add_message(int32_t rank) { messages_.push_back({rank, own_counts()[shape_.num_experts + rank]++}); }

void RoutingTable::set_topk(const tern_routing& routing, std::span<const uint8_t> masked) {
  const int32_t num_topk = shape_.num_topk;
  int32_t ranks[64];
  for (int64_t token = 0; token < routing.num_tokens; ++token) {
    int32_t num_found = 0;
    for (int32_t k = 0; k < num_topk; ++k) {
      auto expert = static_cast<int32_t>(topk_at(routing, token * num_topk + k));
      if (expert >= 0 && masked[shape_.rank_of_expert(expert)] != 0) expert = -1;
      experts_[token * num_topk + k] = expert;
      if (expert < 0) continue;
      ++own_counts()[expert];
      ranks[num_found++] = shape_.rank_of_expert(expert);
    }
    // Destinations in ascending order, each once.
    std::sort(ranks, ranks + num_found);
    const int32_t* end = std::unique(ranks, ranks + num_found);
    for (const int32_t* rank = ranks; rank != end; ++rank) add_message(*rank);
    message_begin_[token + 1] = static_cast<int32_t>(messages_.size());
  }
}

void RoutingTable::set_token_in_rank(const tern_routing& routing, std::span<const uint8_t> masked) {
  for (int64_t token = 0; token < routing.num_tokens; ++token) {
    for (int32_t rank = 0; rank < shape_.num_ranks; ++rank)
      if (routing.token_in_rank[token * shape_.num_ranks + rank] != 0 && masked[rank] == 0) add_message(rank);
    message_begin_[token + 1] = static_cast<int32_t>(messages_.size());
  }
  if (routing.tokens_per_expert != nullptr) std::copy_n(routing.tokens_per_expert, shape_.num_experts, own_counts());
}

void RoutingTable::finish() {
  exceeds_capacity_ = false;
  set_received();
  if (shape_.has_expert_rows()) set_entry_rows();
  restart_placing();
}

int64_t RoutingTable::entries_of_expert(int32_t expert) const { return entries_before(shape_.num_ranks, expert); }

int64_t RoutingTable::entries_before(int32_t source, int32_t expert) const {
  int64_t sum = 0;
  for (int32_t rank = 0; rank < source; ++rank) sum += counts_[rank * num_counts() + expert];
  return sum;
}

void RoutingTable::set_received() {
  received_begin_[0] = 0;
  for (int32_t source = 0; source < shape_.num_ranks; ++source)
    received_begin_[source + 1] = received_begin_[source] + messages_between(source, shape_.rank);
  for (int32_t rank = 0; rank < shape_.num_ranks; ++rank) {
    rank_row_begin_[rank] = 0;
    for (int32_t source = 0; source < shape_.rank; ++source) rank_row_begin_[rank] += messages_between(source, rank);
  }
  if (!shape_.has_expert_rows()) {
    exceeds_capacity_ = num_received() > shape_.row_capacity;
    return;
  }
  group_begin_[0] = 0;
  for (int32_t local = 0; local < shape_.local_experts(); ++local) {
    const int32_t expert = shape_.rank * shape_.local_experts() + local;
    int64_t entries = 0;
    for (int32_t source = 0; source < shape_.num_ranks; ++source) {
      source_begin_[local * shape_.num_ranks + source] = entries;
      entries += counts_of(source)[expert];
    }
    const bool is_padded = shape_.layout == TERN_LAYOUT_EXPERT_PADDED;
    group_begin_[local + 1] = group_begin_[local] + (is_padded ? shape_.padded_group_rows() : layout::align_up(entries, shape_.alignment));
    if (entries > 0 && bounded_row(group_begin_[local], entries - 1) < 0) exceeds_capacity_ = true;
  }
}

int32_t RoutingTable::bounded_row(int64_t group_begin, int64_t row_in_group) const {
  if (shape_.layout == TERN_LAYOUT_EXPERT_PADDED && row_in_group >= shape_.padded_group_rows()) return -1;
  const int64_t row = group_begin + row_in_group;
  return row < shape_.row_capacity ? static_cast<int32_t>(row) : -1;
}

// Where this rank's entries come to lie at their destinations: the sender's side of the same arithmetic.
void RoutingTable::set_entry_rows() {
  for (int32_t rank = 0; rank < shape_.num_ranks; ++rank) {
    int64_t group_begin = 0;
    for (int32_t local = 0; local < shape_.local_experts(); ++local) {
      const int32_t expert = rank * shape_.local_experts() + local;
      next_row_[expert] = group_begin + entries_before(shape_.rank, expert);
      group_begin += shape_.layout == TERN_LAYOUT_EXPERT_PADDED ? shape_.padded_group_rows()
                                                                : layout::align_up(entries_of_expert(expert), shape_.alignment);
    }
  }
  const int64_t group_rows = shape_.padded_group_rows();
  for (int64_t i = 0; i < num_tokens() * shape_.num_topk; ++i) {
    const int32_t expert = experts_[i];
    entry_rows_[i] = -1;
    if (expert < 0) continue;
    const int64_t row = next_row_[expert]++;
    if (shape_.layout == TERN_LAYOUT_EXPERT_PADDED) {
      const int64_t group_begin = expert % shape_.local_experts() * group_rows;
      entry_rows_[i] = bounded_row(group_begin, row - group_begin);
    } else {
      entry_rows_[i] = bounded_row(0, row);
    }
  }
}

int64_t RoutingTable::most_tokens_of_any_rank() const { return *std::max_element(tokens_of_.begin(), tokens_of_.end()); }

int32_t RoutingTable::message_row(Message message) const {
  const int64_t row = rank_row_begin_[message.rank] + message.position;
  return row < shape_.row_capacity ? static_cast<int32_t>(row) : -1;
}

int32_t RoutingTable::received_entries(int32_t local_expert) const {
  return static_cast<int32_t>(entries_of_expert(shape_.rank * shape_.local_experts() + local_expert));
}

int32_t RoutingTable::source_entries(int32_t source, int32_t local_expert) const {
  return counts_of(source)[shape_.rank * shape_.local_experts() + local_expert];
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
      rows[k] = bounded_row(group_begin_[local], next_entry_[local * shape_.num_ranks + source]++);
    } else {
      rows[k] = received_row(message);
    }
  }
  return message;
}

}  // namespace tern
