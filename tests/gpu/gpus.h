// SPDX-License-Identifier: Apache-2.0
// GPU tests run in child processes: CUDA does not survive a fork, so the process that forks must not have used it.
//
//   if (num_gpus() < 2) GTEST_SKIP() << too_few_gpus(2);
//   expect_all_done(run_ranks(2, [](RankSeat& seat) { ...; require(seen == 3, "seen 3"); }));
#pragma once

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <functional>
#include <string>
#include <vector>

#include "conformance/processes.h"
#include "cuda/driver.h"

namespace tern::test {

using conformance::RankProcesses;
using conformance::RankReport;
using conformance::RankSeat;

constexpr int64_t kRanksTimeoutMs = 200'000;

// Found out by a child.
inline int num_gpus() {
  static const int count = [] {
    RankProcesses child(1, 60'000, [](RankSeat&) { return std::to_string(cuda::num_devices()); });
    return std::stoi(child.join()[0].text);
  }();
  return count;
}

inline std::string too_few_gpus(int wanted) { return fmt::format("needs {} GPUs, this machine has {}", wanted, num_gpus()); }

inline std::vector<RankReport> run_ranks(int num_ranks, const std::function<void(RankSeat&)>& body) {
  return RankProcesses(num_ranks, kRanksTimeoutMs,
                       [&](RankSeat& seat) {
                         body(seat);
                         return std::string();
                       })
      .join();
}

inline void expect_all_done(const std::vector<RankReport>& reports) {
  for (size_t r = 0; r < reports.size(); ++r) {
    EXPECT_TRUE(reports[r].finished) << "rank " << r;
    EXPECT_EQ(reports[r].text, "") << "rank " << r;
  }
}

}  // namespace tern::test
