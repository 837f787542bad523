// SPDX-License-Identifier: Apache-2.0
#include "conformance/scenario.h"

#include <algorithm>
#include <utility>

#include "conformance/buffer.h"

namespace tern::conformance {

Scenario::Scenario(const Case& of, std::vector<uint8_t> masked_ranks) : c(of), masked(std::move(masked_ranks)) {
  for (int32_t rank = 0; rank < c.num_ranks; ++rank) routings.push_back(make_routing(c, rank));
  placements = place(c, routings, masked);
}

tern_exchange_options Scenario::exchange_options(int32_t num_trips) const {
  tern_exchange_options options;
  // With exact sums every entry of a token crosses the link by itself.
  const bool sends_entries = c.combine_mode == TERN_COMBINE_EXACT && c.layout != TERN_LAYOUT_RANK_MAJOR;
  options.max_tokens = c.max_tokens * (sends_entries ? c.num_topk : 1);
  options.max_row_bytes =
      std::max({c.token_bytes() + c.arriving_scale_bytes(), c.arriving_token_bytes() + c.arriving_scale_bytes(), c.combine_wire_bytes()});
  options.max_topk = std::max(c.num_topk, 1);
  options.max_experts = c.num_experts();
  options.num_lanes = c.num_lanes;
  options.staging_bytes = c.staging_bytes;
  options.mode = c.mode;
  options.on_timeout = c.masks ? TERN_ON_TIMEOUT_MASK : TERN_ON_TIMEOUT_ABORT;
  size_t most_rows = 0;
  for (const Placement& placement : placements) most_rows = std::max(most_rows, placement.rows.size());
  const auto num_rows = static_cast<int64_t>(most_rows);
  if (c.window_tokens)
    options.window_bytes += GuardedBuffer::window_bytes(c.max_tokens * c.token_stride_bytes()) +
                            GuardedBuffer::window_bytes(c.max_tokens * c.scale_token_stride_bytes());
  if (c.window_dispatch)
    options.window_bytes +=
        GuardedBuffer::window_bytes(num_rows * c.arriving_token_bytes()) + GuardedBuffer::window_bytes(num_rows * c.arriving_scale_bytes());
  if (c.window_combine) options.window_bytes += GuardedBuffer::window_bytes(num_rows * c.combine_row_bytes());
  options.window_bytes *= num_trips;
  return options;
}

tern_plan_options Scenario::plan_options() const {
  tern_plan_options options;
  options.max_tokens = c.max_tokens;
  options.num_experts = c.num_experts();
  options.num_topk = c.num_topk;
  options.layout = c.layout;
  options.extent = c.extent;
  options.expert_alignment = c.expert_alignment;
  options.zero_padding = c.zero_padding ? 1 : 0;
  options.row_capacity = c.row_capacity;
  return options;
}

std::vector<Scenario> replay_scenarios(const Case& c, int count) {
  constexpr uint64_t kSeedStep = 1'000'003;
  std::vector<Scenario> result;
  for (int i = 0; i < count; ++i) {
    Case other = c;
    other.seed += static_cast<uint64_t>(i) * kSeedStep;
    result.emplace_back(other);
  }
  return result;
}

}  // namespace tern::conformance
