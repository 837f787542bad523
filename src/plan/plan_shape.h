// SPDX-License-Identifier: Apache-2.0
// What a plan is for: the numbers that stay the same for every batch routed along it, and what follows from them alone.
#pragma once

#include <tern/tern.h>

#include <cstdint>

#include "layout/message.h"

namespace tern {

struct PlanShape {
  int32_t rank = 0;
  int32_t num_ranks = 0;
  int32_t num_nodes = 1;  // each of equally many ranks that follow each other
  int64_t max_tokens = 0;
  int32_t num_experts = 0;
  int32_t num_topk = 0;
  tern_layout layout = TERN_LAYOUT_RANK_MAJOR;
  tern_extent extent = TERN_EXTENT_EXACT;
  int32_t alignment = 1;
  bool zero_padding = false;
  int64_t row_capacity = 0;  // worst: rows of the outputs; exact: the most that any routing can need

  int32_t local_experts() const { return num_experts / num_ranks; }
  int32_t rank_of_expert(int32_t expert) const { return expert / local_experts(); }
  bool has_expert_rows() const { return layout != TERN_LAYOUT_RANK_MAJOR; }
  int32_t ranks_per_node() const { return num_ranks / num_nodes; }
  int32_t node_of_rank(int32_t r) const { return r / ranks_per_node(); }
  // This rank's node: its index, first rank, experts and their first.
  int32_t node() const { return node_of_rank(rank); }
  int32_t first_rank() const { return node() * ranks_per_node(); }
  int32_t node_experts() const { return num_experts / num_nodes; }
  int32_t first_expert() const { return node() * node_experts(); }
  // The rank with this rank's index in that node.
  int32_t rail_in(int32_t other_node) const { return other_node * ranks_per_node() + rank % ranks_per_node(); }

  // Tokens that a rank sends within its node: its own, and those that its rails bring.
  int64_t most_sent_tokens() const { return num_nodes * max_tokens; }
  // Messages that can arrive at a rank, and that one token can send within a node.
  int64_t max_messages() const { return num_ranks * max_tokens; }
  int32_t max_messages_per_token() const { return num_topk == 0 || num_topk > ranks_per_node() ? ranks_per_node() : num_topk; }
  // What says where a token goes in one node: its experts, or with top-k 0 a bit for each rank.
  int32_t route_words() const { return num_topk > 0 ? num_topk : (ranks_per_node() + 31) / 32; }
  // With the token, in a slot between nodes.
  int32_t routing_words() const { return 1 + route_words(); }
  // Groups of rows in this node that a source's rows are spread over: its experts, or in rank_major its ranks.
  int32_t num_row_begins() const { return has_expert_rows() ? node_experts() : ranks_per_node(); }
  // Rows of one expert in expert_padded.
  int64_t padded_group_rows() const { return num_ranks * max_tokens; }
  // -1: beyond the end of the group, or of the outputs.
  int32_t bounded_row(int64_t group_begin, int64_t row_in_group) const {
    if (layout == TERN_LAYOUT_EXPERT_PADDED && row_in_group >= padded_group_rows()) return -1;
    const int64_t row = group_begin + row_in_group;
    return row < row_capacity ? static_cast<int32_t>(row) : -1;
  }
};

// Validates a caller's options (TERN_INVALID_ARGUMENT) and fills in their defaults.
PlanShape make_plan_shape(const tern_plan_options& options, int32_t rank, int32_t num_ranks);

// TERN_INVALID_ARGUMENT if the routing does not fit the shape, as far as its arguments tell: what its arrays hold is not looked at.
void check_routing_arguments(const PlanShape& shape, const tern_routing& routing);

// What the plan adds to what ranks compare in each operation.
layout::CallShape call_shape(const PlanShape& shape);

}  // namespace tern
