// SPDX-License-Identifier: Apache-2.0
// How large the parts of a GPU rank's window are.
#include <algorithm>

#include "cuda/engine.h"
#include "cuda/latency.h"
#include "plan/window_sizing.h"

namespace tern::cuda {
namespace {

// Of one (lane, bank), for the rows of small batches: a slot for each token of each rank. Rows that have flags go into the staging: all under
// TERN_ON_TIMEOUT_MASK. At most `most_bytes`.
int64_t latency_slot_bytes(const tern_exchange_options& options, int32_t num_ranks, int64_t latency_tokens, int64_t most_bytes) {
  if (options.on_timeout == TERN_ON_TIMEOUT_MASK || options.mode == TERN_MODE_THROUGHPUT) return 0;
  constexpr int64_t kScales = 1024;  // of a row, and what is lost at its end
  int64_t most_rows = latency_tokens * options.max_row_bytes;
  if (options.mode == TERN_MODE_AUTO) most_rows = std::min(most_rows, most_latency_bytes());
  const int64_t per_rank = most_rows + latency_tokens * kScales;
  return std::min(layout::align_up(per_rank * num_ranks, layout::kBulkLine), most_bytes);
}

}  // namespace

// Staging as asked for, or what one round of the expected shapes takes, bounded: per owner of tokens that combine stages for, and as much for
// all of dispatch together.
layout::DeviceWindowLayout make_device_layout(const tern_exchange_options& options, int32_t num_group_ranks, int32_t num_nodes) {
  const int32_t num_ranks = num_group_ranks / num_nodes;
  const layout::RoutingBankLayout routing{
      .num_counts = int64_t{options.max_experts} + num_ranks, .num_topk = options.max_topk, .max_tokens = options.max_tokens};
  const bool masks = options.on_timeout == TERN_ON_TIMEOUT_MASK;
  int64_t per_rank = make_window_layout(options, num_ranks).bank_bytes;
  if (options.staging_bytes == 0) {
    constexpr int64_t kPartPadding = 2 * 16;  // rows and scales begin at multiples of it; the last of the chunks is counted as a full one
    const auto weight_bytes = int64_t{options.max_topk} * static_cast<int64_t>(sizeof(float));
    const layout::StagedSlot slot{options.max_row_bytes + kPartPadding, 0, weight_bytes};
    const int64_t most = staging_bound(options) / (int64_t{options.num_lanes} * layout::kNumBanks * num_ranks);
    per_rank = std::max(per_rank, std::min(slot.stride() * (options.max_tokens + layout::kMaxChunks), most));
    // Batches for decoding: the latency path takes a combine in mode EXACT at once.
    constexpr int64_t kDecodingTokens = 256;
    const int64_t entry_rows = options.max_tokens * layout::align_up(options.max_topk * options.max_row_bytes + weight_bytes + 16, 128);
    // As a rule rows of several ranks share a slot: LatencyCombineArgs.shares_slots. Between nodes there is no such combine with masks.
    const int32_t num_sharing = masks ? 1 : num_ranks;
    if (options.max_tokens <= kDecodingTokens && !(masks && num_nodes > 1))
      per_rank = std::max(per_rank, std::min(entry_rows / num_sharing + 1, most));
  }
  const bool has_latency_path = num_group_ranks <= layout::kMostLatencyRanks;
  const int64_t latency_tokens = has_latency_path ? std::min(num_nodes * options.max_tokens, layout::kMostLatencyTokens) : 0;
  const layout::LatencyWords words{.num_counts = int64_t{options.max_experts} / num_nodes + num_ranks,
                                   .max_tokens = latency_tokens / num_nodes,
                                   .num_topk = options.max_topk,
                                   .num_batches = num_nodes};
  // That is for batches of one node's tokens; slots for small ones are for all nodes'.
  const int64_t bytes_of_node = num_ranks * layout::align_up(per_rank, layout::kBulkLine);
  return {.num_ranks = num_ranks,
          .num_lanes = options.num_lanes,
          .routing_bytes = routing.bytes(),
          .staging_bytes = masks ? num_nodes * bytes_of_node : bytes_of_node,
          .slot_bytes = latency_tokens > 0 ? latency_slot_bytes(options, num_ranks, latency_tokens, num_nodes * bytes_of_node) : 0,
          .latency_words = latency_tokens > 0 ? layout::align_up(words.num_words(), 16) : 0,
          .latency_tokens = latency_tokens};
}

}  // namespace tern::cuda
