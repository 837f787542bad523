// SPDX-License-Identifier: Apache-2.0
// The tokens of one rank as the ranks of this node see them: which of them come here, to which ranks, and to which rows.
//
// A rank has a batch for each node: of its own tokens, and of those that its rail in each other node sends here. The ranks of a node
// exchange their batches as if all were tokens of their own.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "plan/plan_shape.h"

namespace tern {

struct Message {
  int32_t rank;      // where it goes
  int32_t position;  // among the source's messages to there, in token order
};

class SourceBatch {
 public:
  SourceBatch(const PlanShape& shape, int32_t source);

  int32_t source() const { return source_; }
  void clear();

  // The source's next token. `words`: [shape.route_words()] experts, -1: none or not of this node; or with top-k 0 a set of
  // ranks of this node, one bit each.
  void add_token(int32_t source_token, std::span<const int32_t> words);

  int64_t num_tokens() const { return static_cast<int64_t>(source_tokens_.size()); }
  int32_t source_token(int64_t token) const { return source_tokens_[token]; }
  // The first token that is at least `source_token` at the source.
  int64_t first_from(int64_t source_token) const;

  std::span<const Message> messages_of(int64_t token) const {
    return {messages_.data() + message_begin_[token], messages_.data() + message_begin_[token + 1]};
  }
  // -1: none, or not in this node.
  int32_t expert_of(int64_t token, int32_t k) const { return experts_[token * shape_.num_topk + k]; }
  // Row at the destination, -1: beyond its capacity. Expert layouts: of an entry; rank_major: of a message.
  int32_t entry_row(int64_t token, int32_t k) const { return entry_rows_[token * shape_.num_topk + k]; }
  int32_t message_row(Message message) const;

  // Where the batch's rows begin, [ranks of the node] and [experts of the node]: to be filled in before set_rows().
  std::span<int64_t> rank_row_begin() { return rank_row_begin_; }
  std::span<int64_t> next_row() { return next_row_; }
  void set_rows();

 private:
  void add_message(int32_t rank);

  PlanShape shape_;
  int32_t source_;
  std::vector<int32_t> source_tokens_;   // reserved: max_tokens
  std::vector<int32_t> experts_;         // [max_tokens, num_topk]
  std::vector<int32_t> entry_rows_;      // [max_tokens, num_topk]
  std::vector<Message> messages_;        // by token, ranks ascending
  std::vector<int32_t> message_begin_;   // [max_tokens + 1]
  std::vector<int32_t> num_messages_;    // [ranks of the node]
  std::vector<int64_t> rank_row_begin_;  // [ranks of the node] first rank_major row
  std::vector<int64_t> next_row_;        // [experts of the node] next row of the expert's entries
};

}  // namespace tern
