// SPDX-License-Identifier: Apache-2.0
// Nodes that share nothing but a network: network namespaces, joined by virtual Ethernet. Skipped where they cannot be made.
// Ranks with two devices need an environment of their own, TERN_FABRIC_DOMAIN=veth0,veth1.
#include "engine/namespaces.h"

#include <chrono>
#include <cstdlib>
#include <optional>
#include <string>
#include <tern/tern.hpp>

#include "conformance/processes.h"
#include "engine/nodes.h"
#include "engine/support.h"

namespace tern::conformance {
namespace {

constexpr int64_t kSceneMs = 120'000;

// A rank of the scenario on its node, which the library finds out by itself.
struct Seated {
  Seated(RankSeat& seat, const Namespaces& nodes, const Scenario& scenario, int64_t timeout_ms,
         tern_timeout_policy policy = TERN_ON_TIMEOUT_ABORT)
      : group((nodes.enter(scenario.c.node_of(seat.rank())),
               Group::from_allgather(seat.rank(), seat.num_ranks(), RankSeat::allgather, &seat))),
        exchange(group, options(scenario, timeout_ms, policy)),
        trip(scenario, seat.rank(), exchange.get()) {}

  static tern_exchange_options options(const Scenario& scenario, int64_t timeout_ms, tern_timeout_policy policy) {
    tern_exchange_options result = scenario.exchange_options();
    result.device = TERN_DEVICE_CPU;
    result.timeout_ms = timeout_ms;
    result.on_timeout = policy;
    return result;
  }

  Group group;
  Exchange exchange;
  RoundTrip trip;
};

void expect_clean(const Case& c, const std::vector<RankReport>& reports) {
  for (size_t rank = 0; rank < reports.size(); ++rank) {
    EXPECT_TRUE(reports[rank].finished) << c.name() << "\nrank " << rank << " left no report";
    EXPECT_EQ(reports[rank].text, "") << c.name() << "\nrank " << rank;
  }
}

void expect_right_on(const Namespaces& nodes, const Case& c) {
  const Scenario scenario(c);
  RankProcesses ranks(c.num_ranks, kSceneMs, [&](RankSeat& seat) {
    Seated seated(seat, nodes, scenario, 30'000);
    if (seated.group.info().num_nodes != c.num_nodes()) return std::string("the nodes were not found out");
    seated.trip.run();
    return join_lines(seated.trip.differences());
  });
  expect_clean(c, ranks.join());
}

std::vector<Case> some_cases(int32_t num_nodes, int32_t ranks_per_node) {
  std::vector<Case> cases;
  for (uint64_t seed = 3001; seed <= 3000 + static_cast<uint64_t>(scaled(3)); ++seed) {
    Case c = random_case(seed);
    c.num_ranks = num_nodes * ranks_per_node;
    c.ranks_per_node = ranks_per_node;
    c.row_capacity = 0;
    cases.push_back(c.normalized());
  }
  Case large;  // many rounds
  large.num_ranks = num_nodes * ranks_per_node;
  large.ranks_per_node = ranks_per_node;
  large.max_tokens = full_scale() ? 300 : 150;
  large.hidden = 2048;
  large.num_topk = 4;
  large.layout = TERN_LAYOUT_EXPERT_MAJOR;
  large.weighting = TERN_WEIGHTS_OWNER;
  large = large.normalized();
  large.staging_bytes = staging_for_rounds(large, 20);
  cases.push_back(large);
  return cases;
}

class NodesInNamespaces : public ::testing::TestWithParam<std::pair<int32_t, int32_t>> {};

TEST_P(NodesInNamespaces, AreRight) {
  const auto [num_nodes, ranks_per_node] = GetParam();
  const Namespaces nodes(num_nodes);
  if (!nodes.problem().empty()) GTEST_SKIP() << nodes.problem();
  for (const Case& c : some_cases(num_nodes, ranks_per_node)) expect_right_on(nodes, c);
}

INSTANTIATE_TEST_SUITE_P(NodesAndRanks, NodesInNamespaces,
                         ::testing::Values(std::pair(2, 1), std::pair(2, 2), std::pair(3, 1), std::pair(3, 2)));

TEST(NamespacesOfTwoLinks, BothCarryWhatRanksSend) {
  const char* devices = std::getenv("TERN_FABRIC_DOMAIN");
  if (devices == nullptr || std::string(devices) != "veth0,veth1") GTEST_SKIP() << "TERN_FABRIC_DOMAIN is not veth0,veth1";
  const Namespaces nodes(2, 2);
  if (!nodes.problem().empty()) GTEST_SKIP() << nodes.problem();
  for (const Case& c : some_cases(2, 2)) expect_right_on(nodes, c);
  constexpr int64_t kMany = 1 << 20;
  for (const int node : {0, 1})
    for (const int link : {0, 1}) EXPECT_GT(nodes.sent_bytes(node, link), kMany) << "node " << node << ", veth" << link;
}

TEST(Namespaces, DelayJitterLossAndReorderingChangeNothingButTime) {
  const Namespaces nodes(2);
  if (!nodes.problem().empty()) GTEST_SKIP() << nodes.problem();
  if (!nodes.disturb("delay 2ms 2ms loss 1% reorder 25% 50%")) GTEST_SKIP() << "tc has no netem here";
  for (const Case& c : some_cases(2, 2)) expect_right_on(nodes, c);
}

// The operations of a rank whose link was cut, or that waits for ranks behind it: they must fail in time, with a record of two ranks of which
// one is on the node that was cut. "": so they do.
std::string fail_in_time(Seated& seated, const Case& c, int64_t timeout_ms) {
  const auto start = std::chrono::steady_clock::now();
  std::string error = "the operations went through";
  try {
    for (int batch = 0; batch < 4; ++batch) seated.trip.dispatch(batch);
  } catch (const std::runtime_error& failure) {
    error = failure.what();
  }
  const auto elapsed = std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::steady_clock::now() - start).count();
  const tern_exchange_state state = seated.exchange.state();
  const bool across = c.node_of(state.failure.waiter) != c.node_of(state.failure.awaited);
  const bool right = state.health == TERN_HEALTH_FAILED && across && elapsed < 4 * timeout_ms;
  return right ? std::string() : fmt::format("after {} ms: {}", elapsed, error);
}

std::string run_without(const Scenario& scenario, Seated& seated, int repeats) {
  RoundTrip trip(scenario, seated.group.rank(), seated.exchange.get());
  for (int repeat = 0; repeat < repeats; ++repeat) trip.run();
  return join_lines(trip.differences());
}

void recover(Seated& seated, tern_recover_options options) {
  if (tern_exchange_recover(seated.exchange.get(), &options) != TERN_OK) throw std::runtime_error(tern_last_error());
}

// The cable is pulled between two operations: every rank gets an error that names a rank of the other side. Then both sides go on alone.
TEST(Namespaces, ACutLinkIsAnErrorForAllAndBothSidesGoOn) {
  const Namespaces nodes(2);
  if (!nodes.problem().empty()) GTEST_SKIP() << nodes.problem();
  const int64_t timeout_ms = full_scale() ? 2'000 : 10'000;
  Case c;
  c.num_ranks = 4;
  c.ranks_per_node = 2;
  const Scenario scenario(c), sides[] = {Scenario(c, {0, 0, 1, 1}), Scenario(c, {1, 1, 0, 0})};
  RankProcesses ranks(c.num_ranks, kSceneMs, [&](RankSeat& seat) {
    Seated seated(seat, nodes, scenario, timeout_ms);
    seated.trip.run();
    seat.set_stage(1);
    seat.wait_for_stage(-1, 1);
    const std::string problem = fail_in_time(seated, c, timeout_ms);
    if (!problem.empty()) return problem;
    recover(seated, {.allow_mask = 1});
    return run_without(sides[c.node_of(seat.rank())], seated, 3);
  });
  for (int32_t rank = 0; rank < c.num_ranks; ++rank) ranks.wait_for_stage(rank, 1);
  nodes.cut(1);
  ranks.set_stage(1);
  expect_clean(c, ranks.join());
}

// The same under TERN_ON_TIMEOUT_MASK: each side goes on by itself, and the very call that misses the other one is right without it.
TEST(Namespaces, ACutLinkIsNoErrorWhereBothSidesMask) {
  const Namespaces nodes(2);
  if (!nodes.problem().empty()) GTEST_SKIP() << nodes.problem();
  Case c;
  c.num_ranks = 4;
  c.ranks_per_node = 2;
  c.layout = TERN_LAYOUT_EXPERT_MAJOR;
  const Scenario scenario(c), sides[] = {Scenario(c, {0, 0, 1, 1}), Scenario(c, {1, 1, 0, 0})};
  RankProcesses ranks(c.num_ranks, kSceneMs, [&](RankSeat& seat) {
    Seated seated(seat, nodes, scenario, full_scale() ? 2'000 : 10'000, TERN_ON_TIMEOUT_MASK);
    seated.trip.run();
    seat.set_stage(1);
    seat.wait_for_stage(-1, 1);
    return run_without(sides[c.node_of(seat.rank())], seated, 3);
  });
  for (int32_t rank = 0; rank < c.num_ranks; ++rank) ranks.wait_for_stage(rank, 1);
  nodes.cut(1);
  ranks.set_stage(1);
  expect_clean(c, ranks.join());
}

// One of three nodes vanishes. The others go on without it, and let it in again when its cable is back.
TEST(Namespaces, AVanishedNodeIsLetInAgain) {
  const Namespaces nodes(3);
  if (!nodes.problem().empty()) GTEST_SKIP() << nodes.problem();
  const int64_t timeout_ms = full_scale() ? 2'000 : 10'000;
  Case c;
  c.num_ranks = 6;
  c.ranks_per_node = 2;
  c.layout = TERN_LAYOUT_EXPERT_MAJOR;
  const Scenario scenario(c), without(c, {0, 0, 0, 0, 1, 1});
  RankProcesses ranks(c.num_ranks, kSceneMs, [&](RankSeat& seat) {
    Seated seated(seat, nodes, scenario, timeout_ms);
    seated.trip.run();
    seat.set_stage(1);
    seat.wait_for_stage(-1, 1);
    std::string problem = fail_in_time(seated, c, timeout_ms);
    if (problem.empty() && c.node_of(seat.rank()) != 2) {
      recover(seated, {.allow_mask = 1});
      problem = run_without(without, seated, 3);
    }
    seat.set_stage(2);
    seat.wait_for_stage(-1, 2);
    if (!problem.empty()) return problem;
    recover(seated, {.timeout_ms = kSceneMs / 4, .readmit = 1});  // the network takes its time to find out that the cable is back
    return run_without(scenario, seated, 3);
  });
  for (int32_t rank = 0; rank < c.num_ranks; ++rank) ranks.wait_for_stage(rank, 1);
  nodes.cut(2);
  ranks.set_stage(1);
  for (int32_t rank = 0; rank < c.num_ranks; ++rank) ranks.wait_for_stage(rank, 2);
  nodes.mend(2);
  ranks.set_stage(2);
  expect_clean(c, ranks.join());
}

}  // namespace
}  // namespace tern::conformance
