// SPDX-License-Identifier: Apache-2.0
// Windows have room for the small batches that the limits allow. Needs no GPU.
#include <gtest/gtest.h>

#include <algorithm>

#include "cuda/engine.h"
#include "cuda/latency.h"

namespace tern::cuda {
namespace {

tern_exchange_options decoding(int64_t max_tokens, int64_t row_bytes) {
  tern_exchange_options options;
  options.max_tokens = max_tokens;
  options.max_row_bytes = row_bytes;
  options.max_topk = 8;
  options.max_experts = 256;
  options.num_lanes = 1;
  return options;
}

// A slot for each token that a rank may have to send within its node: its own and, between nodes, those of the ranks in its place.
TEST(WindowLayout, SlotsForTheTokensOfAllNodes) {
  for (const int32_t num_nodes : {1, 2, 4, 8})
    for (const int32_t ranks_per_node : {1, 2, 4, 8})
      for (const int64_t max_tokens : {1, 8, 128}) {
        const layout::LatencySlot slot{.row_bytes = 7168, .scale_bytes = 224};
        const layout::DeviceWindowLayout window =
            make_device_layout(decoding(max_tokens, slot.row_bytes + slot.scale_bytes), num_nodes * ranks_per_node, num_nodes);
        const int64_t num_tokens = std::min(num_nodes * max_tokens, layout::kMostLatencyTokens);
        EXPECT_EQ(window.latency_tokens, num_tokens);
        const int64_t most_bytes = num_nodes * max_tokens * slot.row_bytes;
        if (most_bytes > most_latency_bytes()) continue;
        EXPECT_GE(window.slot_bytes, ranks_per_node * num_tokens * slot.stride())
            << num_nodes << " nodes of " << ranks_per_node << " ranks, " << max_tokens << " tokens";
      }
}

// There rows have flags, and lie in the staging.
TEST(WindowLayout, WithMasksTheStagingHasSlotsForTheTokensOfAllNodes) {
  const layout::LatencySlot slot{.row_bytes = 14336, .scale_bytes = 0};
  tern_exchange_options options = decoding(128, slot.row_bytes);
  options.on_timeout = TERN_ON_TIMEOUT_MASK;
  for (const int32_t num_nodes : {1, 2, 4}) {
    const layout::DeviceWindowLayout window = make_device_layout(options, 4 * num_nodes, num_nodes);
    EXPECT_EQ(window.slot_bytes, 0);
    EXPECT_GE(window.staging_bytes, 4 * num_nodes * 128 * slot.stride()) << num_nodes << " nodes";
  }
}

// What a caller gives to the staging bounds the slots too.
TEST(WindowLayout, SlotsAreBoundedByTheStaging) {
  tern_exchange_options options = decoding(128, 14336);
  options.staging_bytes = 1 << 20;
  for (const int32_t num_nodes : {1, 2}) {
    const layout::DeviceWindowLayout window = make_device_layout(options, 8 * num_nodes, num_nodes);
    EXPECT_GT(window.slot_bytes, 0);
    EXPECT_LE(window.slot_bytes, num_nodes * window.staging_bytes);
  }
}

}  // namespace
}  // namespace tern::cuda
