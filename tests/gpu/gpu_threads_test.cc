// SPDX-License-Identifier: Apache-2.0
// The conformance cases on GPU ranks that are threads of this process, also several on one GPU.
#include <tern/tern.hpp>

#include "gpu/cases.h"
#include "gpu/support.h"

namespace tern::conformance {
namespace {

class GpuThreads : public testing::TestWithParam<Placing> {
 protected:
  void SetUp() override { TERN_NEED_GPU(); }

  int32_t num_ranks() const { return GetParam().num_ranks; }
  RunOptions options() const { return gpu_options(num_ranks(), GetParam().most_gpus); }
  void expect_right_on_gpus(const std::vector<Case>& cases, const RunOptions& how) const {
    expect_all_right(cases, [&](const Case& c) { return run_as_threads(c, how); });
  }
  // With a third of the staging that would hold the batch.
  void expect_right_in_rounds(const std::vector<Case>& cases, const RunOptions& how) const {
    const std::vector<Group> groups = Group::local(num_ranks());
    expect_all_right(cases, [&](Case c) {
      tern_exchange_options wanted = Scenario(c).exchange_options();
      wanted.device = how.device;
      c.staging_bytes = Exchange::query_memory(groups.front(), wanted).staging_bytes / 3;
      return run_as_threads(c, how);
    });
  }
};

INSTANTIATE_TEST_SUITE_P(Ranks, GpuThreads,
                         testing::Values(Placing{1, 1}, Placing{2, 2}, Placing{3, 3}, Placing{4, 4}, Placing{8, 4}, Placing{4, 1}),
                         placing_name);

TEST_P(GpuThreads, EveryLayoutExtentEncodingAndOrderOfScales) { expect_right_on_gpus(layout_cases_of(num_ranks()), options()); }

TEST_P(GpuThreads, RandomCases) {
  const auto ranks = static_cast<uint64_t>(num_ranks() * 100 + GetParam().most_gpus);
  expect_right_on_gpus(random_cases_of(num_ranks(), ranks * 1'000'000, scaled(80)), options());
}

TEST_P(GpuThreads, ShapesOfModels) { expect_right_on_gpus(model_cases(num_ranks(), full_scale() ? 64 : 8), options()); }

TEST_P(GpuThreads, SmallBatches) {
  RunOptions how = options();
  expect_right_on_gpus(small_batch_cases(num_ranks()), how);
  how.num_replays = 5;
  expect_right_on_gpus(small_batch_cases(num_ranks()), how);
}

TEST_P(GpuThreads, WithMasks) {
  expect_right_on_gpus(with_masks(layout_cases_of(num_ranks())), options());
  const auto ranks = static_cast<uint64_t>(num_ranks());
  expect_right_on_gpus(with_masks(random_cases_of(num_ranks(), ranks * 1'000'000 + 700'000, scaled(80))), options());
}

TEST_P(GpuThreads, UnevenBatches) { expect_right_on_gpus(uneven_cases(num_ranks()), options()); }

TEST_P(GpuThreads, Windows) { expect_right_on_gpus(window_cases(num_ranks()), options()); }

TEST_P(GpuThreads, RowsFromWindowToWindow) {
  if (test_device() == TERN_DEVICE_CPU) GTEST_SKIP() << "CPU ranks have outputs in windows on all ranks or on none";
  RunOptions how = options();
  expect_right_on_gpus(delivery_cases(num_ranks()), how);
  expect_right_in_rounds(delivery_cases(num_ranks()), how);
  how.num_replays = 5;
  expect_right_on_gpus(delivery_cases(num_ranks(), {TERN_EXTENT_WORST}), how);
}

TEST_P(GpuThreads, Rounds) { expect_right_in_rounds(rounds_cases(num_ranks()), options()); }

TEST_P(GpuThreads, ReplayedGraphs) {
  RunOptions how = options();
  how.num_replays = 8;
  expect_right_on_gpus(graph_cases(num_ranks()), how);
}

TEST_P(GpuThreads, ReplayedGraphsOfRandomCases) {
  RunOptions how = options();
  how.num_replays = 5;
  const auto ranks = static_cast<uint64_t>(num_ranks() * 100 + GetParam().most_gpus);
  std::vector<Case> cases;
  for (const Case& c : random_cases_of(num_ranks(), ranks * 1'000'000 + 500'000, scaled(60)))
    if (c.extent == TERN_EXTENT_WORST) cases.push_back(c);
  expect_right_on_gpus(cases, how);
}

TEST_P(GpuThreads, ThousandsOfReplays) {
  RunOptions how = options();
  how.num_replays = static_cast<int>(scaled(2000));
  std::vector<Case> cases;
  for (const tern_layout layout : {TERN_LAYOUT_EXPERT_MAJOR, TERN_LAYOUT_EXPERT_PADDED}) {
    Case c = ordinary_case(num_ranks(), layout);
    c.extent = TERN_EXTENT_WORST;
    c.spread = Spread::kRandom;
    c.fused = true;
    cases.push_back(c.normalized());
  }
  expect_right_on_gpus(cases, how);
}

// Odd multiples of 16 bytes, and rows that no tile of a kernel divides.
TEST_P(GpuThreads, HiddenSizes) {
  std::vector<Case> cases;
  for (const tern_layout layout : kLayouts)
    for (const int64_t hidden : {8, 24, 72, 1000, 2056, 4104, 7176, 16'384}) {
      Case c = ordinary_case(num_ranks(), layout);
      c.hidden = hidden;
      cases.push_back(c.normalized());
      c.encoding = TERN_ENCODING_FP8_UE8M0;
      c.scale_order = TERN_SCALES_COLUMN_MAJOR;
      cases.push_back(c.normalized());
    }
  expect_right_on_gpus(cases, options());
}

TEST_P(GpuThreads, TopK) {
  std::vector<Case> cases;
  for (const tern_layout layout : kLayouts)
    for (const int32_t num_topk : {1, 7, 16, 32, 33, 64}) {
      Case c = ordinary_case(num_ranks(), layout);
      c.num_topk = num_topk;
      c.experts_per_rank = 64;
      cases.push_back(c.normalized());
    }
  expect_right_on_gpus(cases, options());
}

// More tokens than all blocks of a GPU take at once.
TEST_P(GpuThreads, ManyTokens) {
  std::vector<Case> cases;
  for (const tern_layout layout : {TERN_LAYOUT_RANK_MAJOR, TERN_LAYOUT_EXPERT_MAJOR})
    for (const tern_extent extent : {TERN_EXTENT_EXACT, TERN_EXTENT_WORST})
      for (const bool window : {false, true}) {
        Case c = ordinary_case(num_ranks(), layout);
        c.extent = extent;
        c.max_tokens = full_scale() ? 3000 : 300;
        c.hidden = 256;
        c.experts_per_rank = 16;
        c.num_topk = 8;
        c.window_tokens = c.window_dispatch = c.window_combine = window;
        cases.push_back(c.normalized());
      }
  expect_right_on_gpus(cases, options());
}

// Every sum of every dtype, with numbers that overflow, vanish and are none.
TEST_P(GpuThreads, Sums) {
  std::vector<Case> cases;
  for (const tern_layout layout : kLayouts)
    for (const tern_dtype dtype : {TERN_DTYPE_BF16, TERN_DTYPE_FP16, TERN_DTYPE_FP32})
      for (const tern_combine_mode mode : {TERN_COMBINE_HIERARCHICAL, TERN_COMBINE_EXACT})
        for (const tern_weighting weighting : {TERN_WEIGHTS_NONE, TERN_WEIGHTS_DISPATCH, TERN_WEIGHTS_OWNER}) {
          Case c = ordinary_case(num_ranks(), layout);
          c.combine_dtype = dtype;
          c.combine_mode = mode;
          c.weighting = weighting;
          c.num_biases = static_cast<int32_t>(cases.size() % 3);
          c.num_topk = 5;
          c.max_tokens = 40;
          cases.push_back(c.normalized());
        }
  expect_right_on_gpus(cases, options());
}

// The device finds them when it runs; they count as none and leave a record.
TEST_P(GpuThreads, ExpertNumbersOutOfRange) {
  if (test_device() == TERN_DEVICE_CPU) GTEST_SKIP() << "a CPU rank refuses them at the call";
  for (const tern_layout layout : kLayouts)
    for (const tern_extent extent : {TERN_EXTENT_EXACT, TERN_EXTENT_WORST}) {
      Case c = ordinary_case(num_ranks(), layout);
      c.extent = extent;
      c.routing = Routing::kHoles;
      c = c.normalized();
      Scenario scenario(c);
      std::vector<int64_t>& experts = scenario.routings.front().topk_idx;
      int64_t wrong = c.num_experts();
      for (int64_t& expert : experts)
        if (expert == -1) expert = wrong++ % 2 == 0 ? wrong : -wrong;
      expect_right(c, run_threads(c.num_ranks, scenario.exchange_options(), options(),
                                  [&](int32_t rank, tern_exchange* exchange, RankDevice& device) {
                                    RoundTrip trip(scenario, rank, exchange, device);
                                    trip.run();
                                    return trip.differences();
                                  }));
    }
}

TEST(GpuSweep, RandomCasesOfAnyNumberOfRanks) {
  TERN_NEED_GPU();
  expect_all_right(random_cases(1, scaled(200)), [](const Case& c) { return run_as_threads(c, gpu_options(c.num_ranks)); });
}

}  // namespace
}  // namespace tern::conformance
