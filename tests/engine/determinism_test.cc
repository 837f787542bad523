// SPDX-License-Identifier: Apache-2.0
// Equal inputs give equal bits: from run to run, as threads and as processes, with and without window memory, in one round
// or many.
#include "engine/support.h"

namespace tern::conformance {
namespace {

using Outputs = std::vector<std::vector<uint8_t>>;

Outputs outputs_of_threads(const Case& c) {
  Outputs outputs;
  RunOptions options;
  options.outputs = &outputs;
  expect_right(c, run_as_threads(c, options));
  return outputs;
}

Outputs outputs_of_processes(const Case& c) {
  Outputs outputs;
  RunOptions options;
  options.outputs = &outputs;
  expect_right(c, run_as_processes(c, options));
  return outputs;
}

Case ordinary_case(tern_layout layout) {
  Case c;
  c.seed = 5;
  c.num_ranks = 4;
  c.max_tokens = 20;
  c.num_topk = 6;
  c.layout = layout;
  c.weighting = TERN_WEIGHTS_DISPATCH;
  c.return_weights = true;
  c.num_biases = 1;
  return c.normalized();
}

TEST(Determinism, EqualBitsHoweverItRuns) {
  for (const tern_layout layout : {TERN_LAYOUT_RANK_MAJOR, TERN_LAYOUT_EXPERT_MAJOR, TERN_LAYOUT_EXPERT_PADDED}) {
    const Case c = ordinary_case(layout);
    const Outputs first = outputs_of_threads(c);
    ASSERT_EQ(first.size(), 4u);
    ASSERT_FALSE(first[0].empty());
    for (int repeat = 0; repeat < 3; ++repeat) EXPECT_EQ(outputs_of_threads(c), first);
    EXPECT_EQ(outputs_of_processes(c), first);

    Case other = c;
    other.window_dispatch = other.window_combine = true;
    EXPECT_EQ(outputs_of_threads(other), first);
    other = c;
    other.phases = true;
    EXPECT_EQ(outputs_of_threads(other), first);
    other = c;
    other.mode = TERN_MODE_LATENCY;
    EXPECT_EQ(outputs_of_threads(other), first);
    other = c;
    other.staging_bytes = int64_t{2} * 4 * 16'384;
    EXPECT_EQ(outputs_of_threads(other), first);
  }
}

}  // namespace
}  // namespace tern::conformance
