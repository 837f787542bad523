// SPDX-License-Identifier: Apache-2.0
// The paths between declared nodes, ranks as threads, over the network's loopback. Nothing is expected of the numbers but that they are there.
#include "paths/paths.h"

#include <gtest/gtest.h>

#include <chrono>
#include <functional>
#include <thread>
#include <utility>

#include "base/error.h"
#include "paths/flows.h"
#include "transport/fabric_report.h"

// libfabric 1.17's provider "net" loses a few hundred bytes with each endpoint, also when it is closed.
extern "C" __attribute__((visibility("default"))) const char* __lsan_default_suppressions() { return "leak:libfabric.so.1"; }

namespace tern::tools {
namespace {

constexpr int64_t kAmpleMs = 60000;

using Body = std::function<void(Bootstrap&)>;

// What each rank threw, "" for nothing.
std::vector<std::string> run_ranks(int num_ranks, const Body& body) {
  const auto bootstraps = make_local_bootstraps(num_ranks);
  std::vector<std::string> outcomes(bootstraps.size());
  std::vector<std::thread> threads;
  for (size_t rank = 0; rank < bootstraps.size(); ++rank) {
    threads.emplace_back([&, rank] {
      try {
        body(*bootstraps[rank]);
      } catch (const std::exception& error) {
        outcomes[rank] = error.what();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return outcomes;
}

class Paths : public testing::Test {
 protected:
  void SetUp() override {
    if (read_fabric().libfabric.empty()) GTEST_SKIP() << "libfabric is not on this machine";
  }
};

std::vector<PathReport> reports(int num_ranks, const PathOptions& options) {
  std::vector<PathReport> all(static_cast<size_t>(num_ranks));
  const auto outcomes =
      run_ranks(num_ranks, [&](Bootstrap& bootstrap) { all[static_cast<size_t>(bootstrap.rank())] = test_paths(bootstrap, options); });
  for (const std::string& outcome : outcomes) EXPECT_EQ(outcome, "");
  return all;
}

using Pairs = std::vector<std::pair<int, int>>;

void expect_pairs(const PathReport& report, const Pairs& expected) {
  Pairs found;
  double at_once_gbps = 0;
  for (const PathPair& pair : report.pairs) {
    found.emplace_back(pair.a, pair.b);
    EXPECT_EQ(pair.problem, "");
    EXPECT_GT(pair.one_way_us, 0);
    EXPECT_GE(pair.one_way_p99_us, pair.one_way_us);
    for (const double gbps : {pair.there_gbps, pair.back_gbps, pair.both_gbps, pair.at_once_gbps}) EXPECT_GT(gbps, 0);
    at_once_gbps += pair.at_once_gbps;
  }
  EXPECT_EQ(found, expected);
  EXPECT_DOUBLE_EQ(report.at_once_gbps, at_once_gbps);
}

TEST_F(Paths, OfTwoNodesOfOneRank) {
  const auto all = reports(2, {.ranks_per_node = 1, .timeout_ms = kAmpleMs, .duration_ms = 5});
  for (const PathReport& report : all) {
    expect_pairs(report, {{0, 1}});
    EXPECT_FALSE(report.provider.empty());
    ASSERT_EQ(report.ranks.size(), 2u);
    for (size_t r = 0; r < 2; ++r) {
      EXPECT_EQ(report.ranks[r].node, static_cast<int>(r));
      EXPECT_FALSE(report.ranks[r].host.empty());
      EXPECT_FALSE(report.ranks[r].devices.empty());
    }
  }
  EXPECT_EQ(all[0].pairs[0].there_gbps, all[1].pairs[0].there_gbps) << "ranks have the same report";
}

TEST_F(Paths, OfTwoNodesOfTwoRanks) {
  const PathOptions every{.ranks_per_node = 2, .timeout_ms = kAmpleMs, .duration_ms = 5};
  for (const PathReport& report : reports(4, every)) expect_pairs(report, {{0, 2}, {0, 3}, {1, 2}, {1, 3}});
  PathOptions rails = every;
  rails.rails = true;
  for (const PathReport& report : reports(4, rails)) expect_pairs(report, {{0, 2}, {1, 3}});
}

TEST_F(Paths, NeedTwoNodes) {
  for (const int64_t ranks_per_node : {0, 2}) {
    for (const std::string& outcome :
         run_ranks(2, [&](Bootstrap& bootstrap) { test_paths(bootstrap, {.ranks_per_node = ranks_per_node, .timeout_ms = kAmpleMs}); }))
      EXPECT_NE(outcome.find("2 ranks are on one node"), std::string::npos) << outcome;
  }
}

// The counterpart never runs, so the deadline ends the wait, with the rank that was waited for.
TEST_F(Paths, OfASilentPeerAreAProblem) {
  const auto outcomes = run_ranks(2, [](Bootstrap& bootstrap) {
    Flows flows(bootstrap, "", Deadline::in_ms(kAmpleMs));
    if (bootstrap.rank() == 0) {
      std::vector<Flow> none{{.peer = 1, .receives = true}};
      flows.run(none, {}, Deadline::in_ms(100));
      EXPECT_NE(none[0].problem.find("rank 0 waited "), std::string::npos) << none[0].problem;
      EXPECT_NE(none[0].problem.find("in vain for rank 1: its writes did not come"), std::string::npos) << none[0].problem;
    }
    char done = 0, all[2];
    bootstrap.allgather(&done, all, 1, Deadline::in_ms(kAmpleMs));
  });
  for (const std::string& outcome : outcomes) EXPECT_EQ(outcome, "");
}

// Rank 1 is away while rank 0 waits for it: their pair has failed, for both the reason, and all others are as good as ever.
TEST_F(Paths, ThatFailLeaveTheOthersAlone) {
  constexpr int64_t kTimeoutMs = 8000;  // ample for the others, also with sanitizers
  std::vector<PathReport> all(3);
  const auto outcomes = run_ranks(3, [&](Bootstrap& bootstrap) {
    PathOptions options{.ranks_per_node = 1, .timeout_ms = kTimeoutMs, .duration_ms = 5};
    options.progress = [&](const std::string&, int64_t done, int64_t) {
      if (done == 0 && bootstrap.rank() == 1) std::this_thread::sleep_for(std::chrono::milliseconds(kTimeoutMs + 500));
    };
    all[static_cast<size_t>(bootstrap.rank())] = test_paths(bootstrap, options);
  });
  for (const std::string& outcome : outcomes) EXPECT_EQ(outcome, "");
  for (const PathReport& report : all) {
    ASSERT_EQ(report.pairs.size(), 3u);
    for (const PathPair& pair : report.pairs) {
      if (pair.b == 1) {
        EXPECT_NE(pair.problem.find("rank 0 waited "), std::string::npos) << pair.problem;
        EXPECT_NE(pair.problem.find("in vain for rank 1: 0 epochs of 1 were answered"), std::string::npos) << pair.problem;
        EXPECT_EQ(pair.at_once_gbps, 0);
      } else {
        EXPECT_EQ(pair.problem, "");
        EXPECT_GT(pair.at_once_gbps, 0);
      }
    }
  }
}

// Each way as many epochs as were asked for, each answered once, and the bytes as they were sent.
TEST_F(Paths, CarryAllEpochsBothWays) {
  const auto outcomes = run_ranks(2, [](Bootstrap& bootstrap) {
    Flows flows(bootstrap, "", Deadline::in_ms(kAmpleMs));
    const int peer = 1 - bootstrap.rank();
    EXPECT_FALSE(flows.received_unchanged(peer));
    std::vector<Flow> both{{.peer = peer, .sends = true, .receives = true}};
    for (const int num_epochs : {1, 2, 5}) {
      flows.run(both, {.num_writes = Flows::kMostWrites, .num_under_way = 2, .most_epochs = num_epochs, .duration_ms = kAmpleMs},
                Deadline::in_ms(kAmpleMs));
      EXPECT_EQ(both[0].problem, "");
      EXPECT_EQ(both[0].round_trip_us.size(), static_cast<size_t>(num_epochs));
      EXPECT_TRUE(flows.received_unchanged(peer));
    }
    char done = 0, all[2];
    bootstrap.allgather(&done, all, 1, Deadline::in_ms(kAmpleMs));
  });
  for (const std::string& outcome : outcomes) EXPECT_EQ(outcome, "");
}

PathPair pair_of(double one_way_us, double gbps) {
  return {.one_way_us = one_way_us, .there_gbps = gbps, .back_gbps = gbps, .both_gbps = gbps, .at_once_gbps = gbps};
}

TEST(SlowPaths, AreFarFromTheMedian) {
  std::vector<PathPair> pairs(5, pair_of(10, 8));
  pairs[1].one_way_us = 21;
  pairs[2].back_gbps = 3.9;
  pairs[3] = {.problem = "rank 0: lost"};
  mark_slow(pairs);
  using Texts = std::vector<std::string>;
  EXPECT_EQ(pairs[0].slow, Texts());
  EXPECT_EQ(pairs[1].slow, Texts{"latency"});
  EXPECT_EQ(pairs[2].slow, Texts{"back"});
  EXPECT_EQ(pairs[3].slow, Texts()) << "it is worse than that";
  EXPECT_EQ(median_of(pairs, &PathPair::one_way_us), 10);

  std::vector<PathPair> two{pair_of(10, 8), pair_of(100, 1)};
  mark_slow(two);
  for (const PathPair& pair : two) EXPECT_EQ(pair.slow, Texts()) << "there is no telling which one is odd";
}

}  // namespace
}  // namespace tern::tools
