// SPDX-License-Identifier: Apache-2.0
// What the GPU tests share. Where GPUs are missing a test is skipped and says so. With TERN_TEST_DEVICE=cpu in the environment those
// tests that use nothing of CUDA themselves run on CPU ranks: that checks the tests.
#pragma once

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <stdlib.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "devices/rank_device.h"
#include "engine/support.h"

namespace tern::conformance {

// Before CUDA starts. Streams of one process that share a hardware queue wait for each other; ranks that share a GPU must not.
inline const bool kQueuesForAllStreams = ::setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 0) == 0;

// Ranks that are processes share GPUs too where there are fewer, by turns.
inline const bool kProcessesShareGpus = ::setenv("TERN_SHARE_GPU", "1", 0) == 0;

inline tern_device_type test_device() {
  const char* text = std::getenv("TERN_TEST_DEVICE");
  return text != nullptr && std::string_view(text) == "cpu" ? TERN_DEVICE_CPU : TERN_DEVICE_CUDA;
}

// Counted by a child, so that processes can be forked afterwards.
inline int32_t num_gpus() {
  constexpr int32_t kPretended = 4;
  static const int32_t count = test_device() == TERN_DEVICE_CPU ? kPretended : tools::count_cuda_devices_in_child();
  return count;
}

// Skips the running test where there is none.
#define TERN_NEED_GPU() \
  if (::tern::conformance::num_gpus() < 1) GTEST_SKIP() << "needs a GPU"

// How many ranks, on how many GPUs at the most.
struct Placing {
  int32_t num_ranks, most_gpus;
};
inline std::string placing_name(const testing::TestParamInfo<Placing>& info) {
  return fmt::format("{}RanksOn{}", info.param.num_ranks, info.param.most_gpus);
}

inline RunOptions gpu_options(int32_t num_ranks, int32_t most_gpus = INT32_MAX) {
  RunOptions options;
  options.device = test_device();
  options.num_devices = std::max(1, std::min({num_ranks, most_gpus, num_gpus()}));
  options.timeout_ms = 15'000;
  return options;
}

// Runs `run(case)`, which returns differences, for one case after the other; stops when several have failed, since each may take as long
// as its timeout.
template <typename Run>
void expect_all_right(const std::vector<Case>& cases, Run run) {
  constexpr int kMostFailures = 3;
  int num_failures = 0;
  for (size_t i = 0; i < cases.size(); ++i) {
    const std::vector<std::string> differences = run(cases[i]);
    expect_right(cases[i], differences);
    if (!differences.empty() && ++num_failures == kMostFailures) {
      ADD_FAILURE() << "stopped after " << i + 1 << " of " << cases.size() << " cases";
      return;
    }
  }
}

}  // namespace tern::conformance
