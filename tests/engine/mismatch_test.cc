// SPDX-License-Identifier: Apache-2.0
// Ranks that disagree about what they do get an error, and nobody hangs.
#include <functional>
#include <tern/tern.hpp>
#include <thread>

#include "engine/support.h"

namespace tern::conformance {
namespace {

constexpr int32_t kNumRanks = 3;
constexpr int64_t kNumTokens = 4;
constexpr int64_t kTopk[kNumTokens] = {0, 2, 4, 5};
constexpr float kWeights[kNumTokens] = {1, 2, 3, 4};
constexpr float kManyWeights[64] = {};

struct Result {
  tern_status status = TERN_OK;
  std::string text;
};

// What a rank is about to do; the odd one changes a part of it.
struct Intent {
  tern_plan_options plan;
  tern_routing routing;
  tern_dispatch_args dispatch;
  tern_combine_args combine;
  bool window_dispatch = false, window_combine = false;
  bool combine_instead_of_dispatch = false, route_instead_of_dispatch = false;
};
using Change = std::function<void(Intent& intent)>;

Intent common_intent() {
  Intent intent;
  intent.plan.max_tokens = kNumTokens;
  intent.plan.num_experts = 6;
  intent.plan.num_topk = 1;
  intent.plan.layout = TERN_LAYOUT_EXPERT_MAJOR;
  intent.plan.extent = TERN_EXTENT_WORST;
  intent.routing.topk_idx = kTopk;
  intent.routing.num_tokens = kNumTokens;
  intent.dispatch.hidden = 64;
  intent.dispatch.topk_weights = kWeights;
  intent.combine.hidden = 64;
  return intent;
}

// Route, dispatch, combine; returns at the first error.
tern_status play(tern_exchange* exchange, Intent intent) {
  constexpr int64_t kRoom = 65'536;
  const std::vector<uint8_t> inputs(kRoom, 1);
  GuardedBuffer rows(kRoom, intent.window_dispatch ? exchange : nullptr), results(kRoom, intent.window_combine ? exchange : nullptr),
      out(kRoom, nullptr);
  results.write(Bytes(kRoom, 0));
  const PlanHandle plan = make_plan(exchange, intent.plan);
  tern_status status = tern_plan_route(plan.get(), &intent.routing, nullptr, nullptr);
  if (status == TERN_OK && intent.route_instead_of_dispatch) status = tern_plan_route(plan.get(), &intent.routing, nullptr, nullptr);
  if (status != TERN_OK) return status;
  intent.dispatch.tokens = inputs.data();
  intent.dispatch.out_tokens = rows.data();
  if (intent.dispatch.scale_bytes > 0) intent.dispatch.scales = inputs.data();
  status = tern_dispatch(plan.get(), &intent.dispatch, nullptr);
  if (status != TERN_OK) return status;
  intent.combine.rows = results.data();
  intent.combine.out_tokens = out.data();
  status = tern_combine(plan.get(), &intent.combine, nullptr);
  if (status == TERN_OK && intent.combine_instead_of_dispatch) status = tern_combine(plan.get(), &intent.combine, nullptr);
  // One more operation: what one rank saw in the last one reaches the others here at the latest.
  return status == TERN_OK ? tern_dispatch(plan.get(), &intent.dispatch, nullptr) : status;
}

std::vector<Result> run_ranks(const Change& change) {
  std::vector<Result> results(kNumRanks);
  tern_exchange_options options;
  options.window_bytes = 1 << 18;
  options.mode = TERN_MODE_THROUGHPUT;  // small batches may go without the window
  const auto differences = run_threads(kNumRanks, options, {.timeout_ms = 20'000}, [&](int32_t rank, tern_exchange* exchange, RankDevice&) {
    Result& result = results[static_cast<size_t>(rank)];
    Intent intent = common_intent();
    if (rank == 1) change(intent);
    result.status = play(exchange, intent);
    if (result.status != TERN_OK) result.text = tern_last_error();
    return std::vector<std::string>();
  });
  EXPECT_TRUE(differences.empty()) << join_lines(differences);
  return results;
}

// At least one rank sees the mismatch; those that do not see it themselves are told. Nobody waits until the deadline.
void expect_mismatch(const char* what, const Change& change) {
  SCOPED_TRACE(what);
  int num_mismatches = 0;
  for (const Result& result : run_ranks(change)) {
    EXPECT_TRUE(result.status == TERN_MISMATCH || result.status == TERN_ABORTED) << tern_status_name(result.status) << ": " << result.text;
    EXPECT_FALSE(result.text.empty());
    num_mismatches += result.status == TERN_MISMATCH ? 1 : 0;
  }
  EXPECT_GT(num_mismatches, 0);
}

TEST(Mismatch, NothingDiffers) {
  for (const Result& result : run_ranks([](Intent&) {})) EXPECT_EQ(result.status, TERN_OK) << result.text;
}

TEST(Mismatch, PlanOptions) {
  expect_mismatch("max_tokens", [](Intent& intent) { intent.plan.max_tokens = 5; });
  expect_mismatch("num_experts", [](Intent& intent) { intent.plan.num_experts = 9; });
  expect_mismatch("num_topk", [](Intent& intent) { intent.plan.num_topk = 2, intent.routing.num_tokens = 2; });
  expect_mismatch("layout", [](Intent& intent) { intent.plan.layout = TERN_LAYOUT_EXPERT_PADDED; });
  expect_mismatch("expert_alignment", [](Intent& intent) { intent.plan.expert_alignment = 8; });
  expect_mismatch("row_capacity", [](Intent& intent) { intent.plan.row_capacity = 20; });
}

TEST(Mismatch, DispatchArguments) {
  expect_mismatch("hidden", [](Intent& intent) { intent.dispatch.hidden = 72; });
  expect_mismatch("dtype", [](Intent& intent) { intent.dispatch.dtype = TERN_DTYPE_FP32; });
  expect_mismatch("encoding", [](Intent& intent) { intent.dispatch.encoding = TERN_ENCODING_FP8_F32; });
  expect_mismatch("scale_bytes", [](Intent& intent) { intent.dispatch.scale_bytes = 8; });
  expect_mismatch("weights", [](Intent& intent) { intent.dispatch.topk_weights = nullptr; });
  expect_mismatch("window", [](Intent& intent) { intent.window_dispatch = true; });
}

TEST(Mismatch, CombineArguments) {
  expect_mismatch("hidden", [](Intent& intent) { intent.combine.hidden = 72; });
  expect_mismatch("dtype", [](Intent& intent) { intent.combine.dtype = TERN_DTYPE_FP16; });
  expect_mismatch("mode", [](Intent& intent) { intent.combine.mode = TERN_COMBINE_EXACT; });
  expect_mismatch("weighting", [](Intent& intent) {
    intent.combine.weighting = TERN_WEIGHTS_OWNER;
    intent.combine.topk_weights = kWeights;
  });
  expect_mismatch("carry_weights", [](Intent& intent) { intent.combine.row_weights = kManyWeights; });
  expect_mismatch("window", [](Intent& intent) { intent.window_combine = true; });
}

TEST(Mismatch, Operations) {
  expect_mismatch("route, others dispatch", [](Intent& intent) { intent.route_instead_of_dispatch = true; });
  expect_mismatch("combine, others dispatch", [](Intent& intent) { intent.combine_instead_of_dispatch = true; });
}

void expect_exchange_mismatch(const char* what, const std::function<void(tern_exchange_options&)>& change) {
  SCOPED_TRACE(what);
  const std::vector<Group> groups = Group::local(kNumRanks);
  std::vector<std::thread> threads;
  std::vector<tern_status> statuses(kNumRanks, TERN_OK);
  for (size_t rank = 0; rank < kNumRanks; ++rank) {
    threads.emplace_back([&, rank] {
      tern_exchange_options options;
      options.device = TERN_DEVICE_CPU;
      options.max_tokens = 8;
      if (rank == 1) change(options);
      tern_exchange* exchange = nullptr;
      statuses[rank] = tern_exchange_create(groups[rank].get(), &options, &exchange);
      EXPECT_EQ(exchange, nullptr);
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const tern_status status : statuses) EXPECT_EQ(status, TERN_MISMATCH);
}

TEST(Mismatch, ExchangeOptions) {
  expect_exchange_mismatch("max_tokens", [](tern_exchange_options& options) { options.max_tokens = 9; });
  expect_exchange_mismatch("num_lanes", [](tern_exchange_options& options) { options.num_lanes = 2; });
  expect_exchange_mismatch("window_bytes", [](tern_exchange_options& options) { options.window_bytes = 4096; });
  expect_exchange_mismatch("timeout_ms", [](tern_exchange_options& options) { options.timeout_ms = 12'345; });
  expect_exchange_mismatch("on_timeout", [](tern_exchange_options& options) { options.on_timeout = TERN_ON_TIMEOUT_MASK; });
}

}  // namespace
}  // namespace tern::conformance
