// SPDX-License-Identifier: Apache-2.0
#include "witness.h"

#include <cstdio>
#include <cstdlib>
#include <vector>

namespace tern::fuzz {
namespace {

constexpr int kNumTokens = 3;
constexpr int kTopk = 2;
constexpr int kNumExperts = 4;
constexpr int kHidden = 8;

// Experts in an order that is not that of the tokens, a duplicate, and an entry with none.
constexpr int32_t kExperts[kNumTokens * kTopk] = {3, 0, 1, 1, -1, 0};
constexpr int32_t kRowTokens[] = {0, 2, 1, 1, 0};
constexpr float kEntriesOfToken[kNumTokens] = {2, 2, 1};
constexpr size_t kNumRows = std::size(kRowTokens);

}  // namespace

void require(bool condition, const char* call, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "%s: %s; the last error is \"%s\"\n", call, what, tern_last_error());
  std::abort();
}

Witness::Witness(tern_exchange* exchange, int lane) : lane_(lane) {
  tern_plan_options options;
  options.max_tokens = kNumTokens;
  options.num_experts = kNumExperts;
  options.num_topk = kTopk;
  options.layout = TERN_LAYOUT_EXPERT_MAJOR;
  require(tern_plan_create(exchange, &options, &plan_) == TERN_OK, "witness", "its plan cannot be made");
}

void Witness::make_round_trip(const char* after) {
  tern_launch launch;
  launch.lane = lane_;
  tern_routing routing;
  routing.topk_idx = kExperts;
  routing.topk_idx_type = TERN_INDEX_INT32;
  routing.num_tokens = kNumTokens;
  tern_plan_info info;
  require(tern_plan_route(plan_, &routing, &launch, &info) == TERN_OK, after, "a known-good route fails after it");
  require(info.num_rows == kNumRows, after, "a known-good route counts other rows after it");

  std::vector<float> tokens(kNumTokens * kHidden);
  for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<float>(i + 1);
  std::vector<float> rows(kNumRows * kHidden);
  tern_dispatch_args dispatch;
  dispatch.tokens = tokens.data();
  dispatch.dtype = TERN_DTYPE_FP32;
  dispatch.hidden = kHidden;
  dispatch.out_tokens = rows.data();
  require(tern_dispatch(plan_, &dispatch, &launch) == TERN_OK, after, "a known-good dispatch fails after it");
  for (size_t i = 0; i < rows.size(); ++i)
    require(rows[i] == tokens[static_cast<size_t>(kRowTokens[i / kHidden] * kHidden) + i % kHidden], after,
            "a known-good dispatch brings other rows after it");

  std::vector<float> result(tokens.size());
  tern_combine_args combine;
  combine.rows = rows.data();
  combine.dtype = TERN_DTYPE_FP32;
  combine.hidden = kHidden;
  combine.out_tokens = result.data();
  require(tern_combine(plan_, &combine, &launch) == TERN_OK, after, "a known-good combine fails after it");
  for (size_t i = 0; i < result.size(); ++i)
    require(result[i] == kEntriesOfToken[i / kHidden] * tokens[i], after, "a known-good combine sums otherwise after it");
}

}  // namespace tern::fuzz
