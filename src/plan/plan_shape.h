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
  // Messages that can arrive at a rank, and that one token can send.
  int64_t max_messages() const { return num_ranks * max_tokens; }
  int32_t max_messages_per_token() const { return num_topk == 0 || num_topk > num_ranks ? num_ranks : num_topk; }
  // Rows of one expert in expert_padded.
  int64_t padded_group_rows() const { return num_ranks * max_tokens; }
};

// Validates a caller's options (TERN_INVALID_ARGUMENT) and fills in their defaults.
PlanShape make_plan_shape(const tern_plan_options& options, int32_t rank, int32_t num_ranks);

// TERN_INVALID_ARGUMENT if the routing does not fit the shape, as far as its arguments tell: what its arrays hold is not looked at.
void check_routing_arguments(const PlanShape& shape, const tern_routing& routing);

// What the plan adds to what ranks compare in each operation.
layout::CallShape call_shape(const PlanShape& shape);

}  // namespace tern
