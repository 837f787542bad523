// SPDX-License-Identifier: Apache-2.0
#include "plan/plan_shape.h"

#include <limits>

#include "base/error.h"
#include "layout/window.h"

namespace tern {
namespace {

constexpr int64_t kMostRows = std::numeric_limits<int32_t>::max();  // rows are numbered by int32_t

// The most rows that a routing of this shape can put into one rank's outputs.
int64_t most_rows(const PlanShape& shape) {
  const int64_t entries = shape.max_messages() * (shape.num_topk > 0 ? shape.num_topk : 1);
  switch (shape.layout) {
    case TERN_LAYOUT_RANK_MAJOR: return shape.max_messages();
    case TERN_LAYOUT_EXPERT_PADDED: return shape.local_experts() * shape.padded_group_rows();
    case TERN_LAYOUT_EXPERT_MAJOR: break;
  }
  // Each group can lose at most alignment - 1 rows to padding; only groups with entries are padded.
  return entries + (shape.alignment - 1) * (entries < shape.local_experts() ? entries : shape.local_experts());
}

void check_options(const tern_plan_options& o, int32_t num_ranks) {
  constexpr auto kBad = TERN_INVALID_ARGUMENT;
  if (o.max_tokens <= 0) fail(kBad, "plan: max_tokens is {}, must be positive", o.max_tokens);
  if (o.num_experts <= 0 || o.num_experts % num_ranks != 0)
    fail(kBad, "plan: num_experts is {}, must be positive and divisible by the {} ranks", o.num_experts, num_ranks);
  if (o.num_topk < 0 || o.num_topk > 64) fail(kBad, "plan: num_topk is {}, must be 0 (token_in_rank routing) to 64", o.num_topk);
  if (o.layout < TERN_LAYOUT_RANK_MAJOR || o.layout > TERN_LAYOUT_EXPERT_PADDED)
    fail(kBad, "plan: layout is {}, which is no tern_layout", static_cast<int>(o.layout));
  if (o.extent != TERN_EXTENT_EXACT && o.extent != TERN_EXTENT_WORST)
    fail(kBad, "plan: extent is {}, which is no tern_extent", static_cast<int>(o.extent));
  if (o.layout != TERN_LAYOUT_RANK_MAJOR && o.num_topk == 0)
    fail(kBad, "plan: num_topk is 0, but the expert layouts need top-k indices; only rank_major can be routed by token_in_rank");
  if (o.expert_alignment < 0) fail(kBad, "plan: expert_alignment is {}, must not be negative", o.expert_alignment);
  if (o.row_capacity < 0 || o.row_capacity > kMostRows)
    fail(kBad, "plan: row_capacity is {}, must be 0 (what can arrive at most) to {}", o.row_capacity, kMostRows);
}

}  // namespace

PlanShape make_plan_shape(const tern_plan_options& options, int32_t rank, int32_t num_ranks) {
  check_options(options, num_ranks);
  PlanShape shape{.rank = rank,
                  .num_ranks = num_ranks,
                  .max_tokens = options.max_tokens,
                  .num_experts = options.num_experts,
                  .num_topk = options.num_topk,
                  .layout = options.layout,
                  .extent = options.extent,
                  .alignment = options.expert_alignment == 0 ? 1 : options.expert_alignment,
                  .zero_padding = options.zero_padding != 0};
  // The first test keeps the arithmetic of the second from overflowing.
  if (shape.max_tokens > kMostRows || shape.max_messages() * (shape.num_topk > 0 ? shape.num_topk : 1) > kMostRows ||
      most_rows(shape) > kMostRows)
    fail(TERN_INVALID_ARGUMENT, "plan: {} ranks with {} tokens each and top-{} could need more than {} rows on one rank; lower max_tokens",
         num_ranks, shape.max_tokens, shape.num_topk, kMostRows);
  const bool caller_sizes = shape.extent == TERN_EXTENT_WORST && shape.layout != TERN_LAYOUT_EXPERT_PADDED && options.row_capacity > 0;
  shape.row_capacity = caller_sizes ? options.row_capacity : most_rows(shape);
  return shape;
}

void check_routing_arguments(const PlanShape& shape, const tern_routing& routing) {
  constexpr auto kBad = TERN_INVALID_ARGUMENT;
  if (routing.num_tokens < 0 || routing.num_tokens > shape.max_tokens)
    fail(kBad, "routing: num_tokens is {}, must be 0 to the plan's max_tokens {}", routing.num_tokens, shape.max_tokens);
  if (routing.token_in_rank != nullptr && routing.topk_idx != nullptr)
    fail(kBad, "routing: both topk_idx and token_in_rank are given; give one");
  if (shape.num_topk == 0) {
    if (routing.token_in_rank == nullptr && routing.num_tokens > 0)
      fail(kBad, "routing: token_in_rank is NULL, but the plan's num_topk is 0, which means routing by token_in_rank");
    return;
  }
  if (routing.token_in_rank != nullptr) fail(kBad, "routing: token_in_rank needs a plan with num_topk 0; this one has {}", shape.num_topk);
  if (routing.topk_idx_type != TERN_INDEX_INT64 && routing.topk_idx_type != TERN_INDEX_INT32)
    fail(kBad, "routing: topk_idx_type is {}, which is no tern_index_type", static_cast<int>(routing.topk_idx_type));
  if (routing.topk_idx == nullptr && routing.num_tokens > 0) fail(kBad, "routing: topk_idx is NULL with {} tokens", routing.num_tokens);
}

layout::CallShape call_shape(const PlanShape& shape) {
  return {.max_tokens = shape.max_tokens,
          .row_capacity = shape.row_capacity,
          .num_experts = shape.num_experts,
          .num_topk = shape.num_topk,
          .choices = static_cast<int32_t>(shape.layout) << 4 | static_cast<int32_t>(shape.extent),
          .alignment = shape.alignment};
}

}  // namespace tern
