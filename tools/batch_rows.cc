// SPDX-License-Identifier: Apache-2.0
// Where the rows of a batch lie, by the definition of the layouts in tern.h.
#include <algorithm>

#include "tools/batch.h"

namespace tern::tools {
namespace {

constexpr int64_t kWindowAlignment = 256;

std::vector<ArrivingRow> rank_major_rows(const Routing& routing, int rank) {
  std::vector<ArrivingRow> rows;
  for (int source = 0; source < routing.num_ranks(); ++source) {
    for (int64_t token = 0; token < routing.num_tokens(source); ++token) {
      if (!routing.goes_to(source, token, rank)) continue;
      rows.push_back({.row = static_cast<int64_t>(rows.size()), .source_rank = source, .source_token = static_cast<int32_t>(token)});
    }
  }
  return rows;
}

// Entries of the rank's experts in the order (expert, source rank, source token, k), not yet numbered.
std::vector<ArrivingRow> expert_entries(const Routing& routing, int rank) {
  std::vector<ArrivingRow> rows;
  const int first = rank * routing.experts_per_rank(), end = first + routing.experts_per_rank();
  for (int source = 0; source < routing.num_ranks(); ++source) {
    for (int64_t token = 0; token < routing.num_tokens(source); ++token) {
      const int32_t* entries = routing.entries(source, token);
      for (int k = 0; k < routing.num_topk; ++k) {
        if (entries[k] >= first && entries[k] < end)
          rows.push_back({.source_rank = source, .source_token = static_cast<int32_t>(token), .expert = entries[k], .k = k});
      }
    }
  }
  std::ranges::stable_sort(rows, {}, &ArrivingRow::expert);
  return rows;
}

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

int64_t padded_rows_per_expert(const Routing& routing) { return routing.num_ranks() * routing.max_tokens(); }

}  // namespace

std::vector<ArrivingRow> arriving_rows(const BatchShape& shape, int rank) {
  const Routing& routing = shape.routing;
  if (shape.layout == TERN_LAYOUT_RANK_MAJOR) return rank_major_rows(routing, rank);
  std::vector<ArrivingRow> rows = expert_entries(routing, rank);
  int64_t next = 0;
  for (size_t i = 0; i < rows.size(); ++i) {
    const bool new_expert = i == 0 || rows[i].expert != rows[i - 1].expert;
    if (shape.layout == TERN_LAYOUT_EXPERT_PADDED && new_expert)
      next = (rows[i].expert % routing.experts_per_rank()) * padded_rows_per_expert(routing);
    if (shape.layout == TERN_LAYOUT_EXPERT_MAJOR && new_expert) next = round_up(next, shape.expert_alignment);
    rows[i].row = next++;
  }
  return rows;
}

int64_t num_output_rows(const BatchShape& shape, int rank) {
  const Routing& routing = shape.routing;
  if (shape.layout == TERN_LAYOUT_EXPERT_PADDED) return routing.experts_per_rank() * padded_rows_per_expert(routing);
  if (shape.layout == TERN_LAYOUT_EXPERT_MAJOR) return expert_offsets(shape, rank).back();
  int64_t result = 0;
  for (int source = 0; source < routing.num_ranks(); ++source) {
    for (int64_t token = 0; token < routing.num_tokens(source); ++token) result += routing.goes_to(source, token, rank);
  }
  return result;
}

std::vector<int64_t> expert_offsets(const BatchShape& shape, int rank) {
  const Routing& routing = shape.routing;
  const int32_t num_experts = routing.experts_per_rank();
  std::vector<int64_t> offsets(static_cast<size_t>(num_experts) + 1, 0);  // first, counts: [e + 1]
  for (const std::vector<int32_t>& of_rank : routing.topk_idx) {
    for (const int32_t expert : of_rank) {
      if (expert >= 0 && expert / num_experts == rank) ++offsets[static_cast<size_t>(expert % num_experts) + 1];
    }
  }
  for (size_t e = 1; e < offsets.size(); ++e) offsets[e] = offsets[e - 1] + round_up(offsets[e], shape.expert_alignment);
  return offsets;
}

int64_t max_output_rows(const BatchShape& shape) {
  int64_t result = 0;
  for (int rank = 0; rank < shape.routing.num_ranks(); ++rank) result = std::max(result, num_output_rows(shape, rank));
  return result;
}

int64_t window_bytes(const BatchShape& shape) {
  const int64_t rows = max_output_rows(shape), tokens = shape.routing.max_tokens();
  const auto rounded = [](int64_t bytes) {
    return (bytes + kWindowAlignment - 1) / kWindowAlignment * kWindowAlignment + kWindowAlignment;
  };
  return rounded(tokens * shape.format.given_row_bytes(shape.hidden)) + rounded(tokens * shape.format.given_scale_bytes(shape.hidden)) +
         rounded(rows * shape.format.arriving_row_bytes(shape.hidden)) + rounded(rows * shape.format.arriving_scale_bytes(shape.hidden)) +
         rounded(rows * shape.format.combine_row_bytes(shape.hidden));
}

int64_t BatchShape::combine_wire_bytes() const {
  const bool sums = layout != TERN_LAYOUT_RANK_MAJOR && combine_mode == TERN_COMBINE_HIERARCHICAL;
  return sums && wire == TERN_WIRE_FP32 ? hidden * element_bytes(TERN_DTYPE_FP32) : format.combine_row_bytes(hidden);
}

tern_plan_options plan_options(const BatchShape& shape, tern_extent extent) {
  return {.max_tokens = std::max<int64_t>(1, shape.routing.max_tokens()),
          .num_experts = shape.routing.num_experts,
          .num_topk = shape.routing.num_topk,
          .layout = shape.layout,
          .extent = extent,
          .expert_alignment = shape.expert_alignment,
          .row_capacity =
              extent == TERN_EXTENT_WORST && shape.layout != TERN_LAYOUT_EXPERT_PADDED ? std::max<int64_t>(1, max_output_rows(shape)) : 0};
}

}  // namespace tern::tools
