// SPDX-License-Identifier: Apache-2.0
#include "plan/source_batch.h"

#include <algorithm>

namespace tern {

SourceBatch::SourceBatch(const PlanShape& shape, int32_t source)
    : shape_(shape),
      source_(source),
      experts_(shape.max_tokens * shape.num_topk),
      entry_rows_(shape.max_tokens * shape.num_topk),
      message_begin_(shape.max_tokens + 1),
      num_messages_(shape.ranks_per_node()),
      rank_row_begin_(shape.ranks_per_node()),
      next_row_(shape.node_experts()) {
  source_tokens_.reserve(shape.max_tokens);
  messages_.reserve(shape.max_tokens * shape.max_messages_per_token());
}

void SourceBatch::clear() {
  source_tokens_.clear();
  messages_.clear();
  std::fill(num_messages_.begin(), num_messages_.end(), 0);
}

void SourceBatch::add_message(int32_t rank) { messages_.push_back({rank, num_messages_[rank - shape_.first_rank()]++}); }

void SourceBatch::add_token(int32_t source_token, std::span<const int32_t> words) {
  const int64_t token = num_tokens();
  source_tokens_.push_back(source_token);
  if (shape_.num_topk == 0) {
    for (int32_t i = 0; i < shape_.ranks_per_node(); ++i)
      if ((static_cast<uint32_t>(words[i / 32]) >> (i % 32) & 1) != 0) add_message(shape_.first_rank() + i);
  } else {
    int32_t ranks[64];
    int32_t num_found = 0;
    std::copy(words.begin(), words.end(), experts_.begin() + token * shape_.num_topk);
    for (const int32_t expert : words)
      if (expert >= 0) ranks[num_found++] = shape_.rank_of_expert(expert);
    // Destinations in ascending order, each once.
    std::sort(ranks, ranks + num_found);
    const int32_t* end = std::unique(ranks, ranks + num_found);
    for (const int32_t* rank = ranks; rank != end; ++rank) add_message(*rank);
  }
  message_begin_[token + 1] = static_cast<int32_t>(messages_.size());
}

int64_t SourceBatch::first_from(int64_t source_token) const {
  return std::ranges::lower_bound(source_tokens_, source_token) - source_tokens_.begin();
}

int32_t SourceBatch::message_row(Message message) const {
  const int64_t row = rank_row_begin_[message.rank - shape_.first_rank()] + message.position;
  return row < shape_.row_capacity ? static_cast<int32_t>(row) : -1;
}

// The sender's side of the arithmetic in RoutingTable.
void SourceBatch::set_rows() {
  const int64_t group_rows = shape_.padded_group_rows();
  for (int64_t i = 0; i < num_tokens() * shape_.num_topk; ++i) {
    const int32_t expert = experts_[i];
    entry_rows_[i] = -1;
    if (expert < 0) continue;
    const int64_t row = next_row_[expert - shape_.first_expert()]++;
    const int64_t group_begin = shape_.layout == TERN_LAYOUT_EXPERT_PADDED ? expert % shape_.local_experts() * group_rows : 0;
    entry_rows_[i] = shape_.bounded_row(group_begin, row - group_begin);
  }
}

}  // namespace tern
