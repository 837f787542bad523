// SPDX-License-Identifier: Apache-2.0
// The conformance cases on GPU ranks that are processes, on one node; several on a GPU where there are fewer GPUs.
#include "gpu/process_cases.h"

namespace tern::conformance {
namespace {

class GpuProcesses : public testing::TestWithParam<int32_t> {
 protected:
  void SetUp() override { TERN_NEED_GPU(); }

  void expect_right_on_gpus(const std::vector<Case>& cases, const CaseBody& body) const {
    expect_right_as_gpu_processes(GetParam(), cases, options(), body);
  }
  void expect_right_on_gpus(const std::vector<Case>& cases) const { expect_right_as_gpu_processes(GetParam(), cases, options()); }

  RunOptions options() const { return gpu_options(GetParam()); }
};

INSTANTIATE_TEST_SUITE_P(Ranks, GpuProcesses, testing::Values(1, 2, 3, 4, 8), testing::PrintToStringParamName());

TEST_P(GpuProcesses, EveryLayoutExtentEncodingAndOrderOfScales) { expect_right_on_gpus(layout_cases_of(GetParam())); }

TEST_P(GpuProcesses, RandomCases) {
  expect_right_on_gpus(random_cases_of(GetParam(), static_cast<uint64_t>(GetParam()) * 2'000'000'000, scaled(60)));
}

TEST_P(GpuProcesses, ShapesOfModels) { expect_right_on_gpus(model_cases(GetParam(), full_scale() ? 64 : 8)); }

TEST_P(GpuProcesses, UnevenBatches) { expect_right_on_gpus(uneven_cases(GetParam())); }

TEST_P(GpuProcesses, Windows) { expect_right_on_gpus(window_cases(GetParam())); }

TEST_P(GpuProcesses, RowsFromWindowToWindow) {
  if (test_device() == TERN_DEVICE_CPU) GTEST_SKIP() << "CPU ranks have outputs in windows on all ranks or on none";
  expect_right_on_gpus(delivery_cases(GetParam()));
}

// A third of the staging that would hold the batch.
TEST_P(GpuProcesses, Rounds) {
  expect_right_on_gpus(rounds_cases(GetParam()), [how = options()](const Group& group, Case c, RankDevice& device) {
    c.staging_bytes = Exchange::query_memory(group, with(Scenario(c).exchange_options(), how, device)).staging_bytes / 3;
    return run_case(group, Scenario(c), how, device);
  });
}

TEST_P(GpuProcesses, ReplayedGraphs) {
  expect_right_on_gpus(graph_cases(GetParam()), [how = options()](const Group& group, const Case& c, RankDevice& device) {
    return run_graph_case(group, c, how, device);
  });
}

// Only where the environment says so.
TEST(GpuSharing, ProcessesAreRefusedByDefault) {
  if (test_device() == TERN_DEVICE_CPU) GTEST_SKIP() << "needs a GPU";
  TERN_NEED_GPU();
  constexpr int32_t kNumRanks = 2;
  RankProcesses ranks(kNumRanks, 60'000, [](RankSeat& seat) -> std::string {
    ::unsetenv("TERN_SHARE_GPU");
    const Group group = Group::from_allgather(seat.rank(), seat.num_ranks(), RankSeat::allgather, &seat);
    tern_exchange_options options;
    options.device = TERN_DEVICE_CUDA;
    options.device_index = 0;
    try {
      const Exchange exchange(group, options);
    } catch (const Error& error) {
      const std::string text = error.what();
      return error.status() == TERN_UNSUPPORTED && text.find("set TERN_SHARE_GPU=1") != std::string::npos ? "" : text;
    }
    return "it was not refused";
  });
  expect_all_finished(ranks);
}

}  // namespace
}  // namespace tern::conformance
