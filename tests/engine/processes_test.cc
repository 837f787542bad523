// SPDX-License-Identifier: Apache-2.0
// The processes that play ranks: how they meet.
#include "conformance/processes.h"

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <array>
#include <atomic>
#include <new>

namespace tern::conformance {
namespace {

constexpr int64_t kTimeoutMs = 60'000;

TEST(RankProcesses, AnAllGatherOfNothingIsABarrier) {
  constexpr int32_t kNumRanks = 4;
  using Counters = std::array<std::atomic<int>, kNumRanks>;
  void* memory = mmap(nullptr, sizeof(Counters), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(memory, MAP_FAILED);
  Counters& turns = *new (memory) Counters{};
  RankProcesses ranks(kNumRanks, kTimeoutMs, [&](RankSeat& seat) {
    for (int turn = 1; turn <= 1000; ++turn) {
      turns[static_cast<size_t>(seat.rank())] = turn;
      if (RankSeat::allgather(&seat, nullptr, nullptr, 0) != 0) return std::string("failed");
      for (const std::atomic<int>& theirs : turns)
        if (theirs < turn) return std::string("a rank was late");
    }
    return std::string();
  });
  for (const RankReport& report : ranks.join()) {
    EXPECT_TRUE(report.finished);
    EXPECT_EQ(report.text, "");
  }
  munmap(memory, sizeof(Counters));
}

TEST(RankProcesses, NobodyWaitsForARankThatHasReturned) {
  RankProcesses ranks(2, kTimeoutMs, [](RankSeat& seat) {
    int32_t all[2] = {};
    const int32_t own = seat.rank();
    if (RankSeat::allgather(&seat, &own, all, sizeof own) != 0 || all[0] != 0 || all[1] != 1) return std::string("no first all-gather");
    if (seat.rank() == 1) return std::string("left");
    return std::string(RankSeat::allgather(&seat, &own, all, sizeof own) == 0 ? "no error" : "was told");
  });
  const std::vector<RankReport> reports = ranks.join();
  EXPECT_TRUE(reports[0].finished);
  EXPECT_EQ(reports[0].text, "was told");
  EXPECT_EQ(reports[1].text, "left");
}

}  // namespace
}  // namespace tern::conformance
