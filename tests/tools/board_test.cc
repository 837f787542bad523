// SPDX-License-Identifier: Apache-2.0
// Ranks that line up, and launches of ranks that do not touch the library.
#include "tools/board.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <csignal>
#include <numeric>
#include <thread>
#include <vector>

#include "base/error.h"
#include "tools/launch_processes.h"
#include "tools/meter.h"

namespace tern::tools {
namespace {

constexpr int64_t kTimeoutMs = 20000;

TEST(Board, GathersBytesOfAllRanksAlsoInSeveralPieces) {
  constexpr int kRanks = 3;
  constexpr size_t kBytes = 50000;
  Board board = Board::create({.num_ranks = kRanks});
  std::vector<std::vector<std::byte>> gathered(kRanks, std::vector<std::byte>(kRanks * kBytes));
  std::vector<std::thread> threads;
  for (int rank = 0; rank < kRanks; ++rank) {
    threads.emplace_back([&, rank] {
      const std::vector<std::byte> mine(kBytes, static_cast<std::byte>(rank + 1));
      board.allgather(rank, mine, gathered[static_cast<size_t>(rank)].data(), kTimeoutMs);
    });
  }
  for (std::thread& thread : threads) thread.join();
  std::vector<std::byte> expected;
  for (int rank = 0; rank < kRanks; ++rank) expected.insert(expected.end(), kBytes, static_cast<std::byte>(rank + 1));
  for (const auto& of_rank : gathered) EXPECT_EQ(of_rank, expected);
}

TEST(Board, AttachedBoardIsTheSameMemory) {
  Board board = Board::create({.num_ranks = 1, .shared_bytes = 16});
  Board again = Board::attach({.num_ranks = 1, .shared_bytes = 16}, getpid(), board.fd());
  *board.shared_as<int32_t>() = 42;
  EXPECT_EQ(*again.shared_as<int32_t>(), 42);
}

TEST(Board, ABarrierThatNobodyElseReachesTimesOut) {
  Board board = Board::create({.num_ranks = 2});
  try {
    board.barrier(1, 20);
    FAIL() << "passed alone";
  } catch (const Failure& failure) {
    EXPECT_EQ(failure.status(), TERN_TIMEOUT);
    EXPECT_NE(std::string(failure.what()).find("for rank 0 to line up"), std::string::npos);
  }
}

TEST(Board, AFailureEndsTheWaitOfTheOthers) {
  Board board = Board::create({.num_ranks = 2});
  board.post_failure(1, "no more tokens");
  EXPECT_EQ(run_and_report(board, 0,
                           [&] {
                             board.barrier(0, kTimeoutMs);
                             return 0;
                           }),
            1);
  EXPECT_EQ(board.failure_of(0), "another rank failed");
  EXPECT_EQ(board.failure_of(1), "no more tokens");
}

TEST(Launch, ProcessesRunAndReturnTheirCode) {
  const auto code_of = [](int failing_rank) {
    return launch({.num_ranks = 3, .timeout_ms = kTimeoutMs}, [&](RankContext& context) {
      context.align();
      return context.rank == failing_rank ? 7 : 0;
    });
  };
  EXPECT_EQ(code_of(-1), 0);
  EXPECT_EQ(code_of(1), 7);
}

TEST(Launch, AKilledProcessEndsTheOthers) {
  testing::internal::CaptureStderr();
  const int code = launch({.num_ranks = 3, .timeout_ms = kTimeoutMs}, [](RankContext& context) {
    if (context.rank == 2) raise(SIGKILL);
    context.align();
    return 0;
  });
  EXPECT_EQ(code, 128 + SIGKILL);
  EXPECT_NE(testing::internal::GetCapturedStderr().find("tern: rank 2: process"), std::string::npos);
}

TEST(Launch, ThreadsSayWhichRankFailedAndWhy) {
  testing::internal::CaptureStderr();
  const int code = launch({.kind = LaunchKind::kThreads, .num_ranks = 3, .timeout_ms = kTimeoutMs}, [](RankContext& context) -> int {
    if (context.rank == 1) fail(TERN_INTERNAL_ERROR, "out of ideas");
    context.align();
    return 0;
  });
  EXPECT_EQ(code, 1);
  EXPECT_EQ(testing::internal::GetCapturedStderr(), "tern: rank 1: out of ideas\n");
}

TEST(Meter, QuantilesAreTimesThatWereMeasured) {
  Times times;
  times.us.resize(100);
  std::iota(times.us.rbegin(), times.us.rend(), 1.0);  // 100 .. 1
  EXPECT_EQ(times.median_us(), 50);
  EXPECT_EQ(times.p99_us(), 99);
  EXPECT_EQ(times.quantile_us(1.0), 100);
  EXPECT_EQ(Times{}.median_us(), 0);
}

}  // namespace
}  // namespace tern::tools
