// SPDX-License-Identifier: Apache-2.0
// What times work on GPUs and measures their links. Ranks are threads: two on one GPU, and one on each.
#include <gtest/gtest.h>

#include <algorithm>

#include "tools/link_ceiling.h"
#include "tools/stream_timer.h"

namespace tern::tools {
namespace {

#define TERN_NEED_A_GPU() \
  if (num_cuda_devices() == 0) GTEST_SKIP() << "needs a GPU, here is none"

// Every rank's bytes are compared where they arrive: damage is a failure of the rank.
void expect_rates(int num_ranks) {
  const int num_gpus = num_cuda_devices();
  const int code = launch({.kind = LaunchKind::kThreads, .num_ranks = num_ranks}, [&](RankContext& context) {
    const std::unique_ptr<RankDevice> device = make_rank_device(TERN_DEVICE_CUDA, context.rank % num_gpus);
    const std::unique_ptr<LinkCeiling> ceiling = make_link_ceiling(context, *device);
    const LinkRates rates = ceiling->at(8), engines = ceiling->copy_engines();
    ceiling->close();
    const bool all_there = std::ranges::min({rates.push_gbps, rates.pull_gbps, rates.push_all_gbps, rates.pull_all_gbps, engines.push_gbps,
                                             engines.pull_gbps}) > 0;
    return all_there && rates.num_sms == 8 ? 0 : 3;
  });
  EXPECT_EQ(code, 0);
}

TEST(GpuMeters, RanksThatShareAGpuCopyToEachOther) {
  TERN_NEED_A_GPU();
  expect_rates(num_cuda_devices() == 1 ? 2 : num_cuda_devices() + 1);
}

TEST(GpuMeters, OneRankOnEachGpuCopiesToAllOthers) {
  TERN_NEED_A_GPU();
  if (num_cuda_devices() < 2) GTEST_SKIP() << "needs 2 GPUs, here is one";
  expect_rates(num_cuda_devices());
}

TEST(GpuMeters, EveryRunOnAStreamHasATime) {
  TERN_NEED_A_GPU();
  const std::unique_ptr<RankDevice> device = make_rank_device(TERN_DEVICE_CUDA, 0);
  const DeviceMemory memory(*device, 1 << 20);
  for (const bool cold : {false, true}) {
    const std::unique_ptr<StreamTimer> timer = make_stream_timer(*device, {.num_runs = 7, .cold = cold});
    const std::vector<double> us = timer->time_us([&] { device->fill(memory.data(), 1, memory.num_bytes()); });
    ASSERT_EQ(us.size(), 7u);
    EXPECT_GT(std::ranges::min(us), 0.0);
  }
}

TEST(GpuMeters, PartsOfARunAreTimedByThemselvesAndPausesAreNot) {
  TERN_NEED_A_GPU();
  constexpr double kPauseUs = 20'000;
  const std::unique_ptr<RankDevice> device = make_rank_device(TERN_DEVICE_CUDA, 0);
  const DeviceMemory memory(*device, 1 << 20);
  const std::unique_ptr<StreamTimer> timer = make_stream_timer(*device, {.num_runs = 5});
  int num_first = 0, num_second = 0;
  const auto fill = [&](int& count) {
    ++count;
    device->fill(memory.data(), 1, memory.num_bytes());
  };
  const auto us = timer->time_parts_us({[&] { fill(num_first); }, [&] { fill(num_second); }}, kPauseUs);
  ASSERT_EQ(us.size(), 2u);
  EXPECT_EQ(num_first, num_second);
  for (const std::vector<double>& of_part : us) {
    ASSERT_EQ(of_part.size(), 5u);
    EXPECT_GT(std::ranges::min(of_part), 0.0);
    EXPECT_LT(std::ranges::min(of_part), kPauseUs);
  }
}

}  // namespace
}  // namespace tern::tools
