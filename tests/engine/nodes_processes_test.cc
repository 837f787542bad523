// SPDX-License-Identifier: Apache-2.0
// Ranks as processes on nodes that are declared on this host; ranks that die or stop.
#include <csignal>

#include <chrono>
#include <tern/tern.hpp>

#include "conformance/processes.h"
#include "engine/nodes.h"
#include "engine/support.h"

namespace tern::conformance {
namespace {

int64_t timeout_ms() { return full_scale() ? 2'000 : 10'000; }

class NodeProcesses : public ::testing::Test {
 protected:
  void SetUp() override {
    const std::string problem = missing_network(run_as_processes(smallest_case_on_nodes()));
    if (!problem.empty()) GTEST_SKIP() << problem;
  }
};

TEST_F(NodeProcesses, RandomCases) {
  for (int64_t seed = 2001; seed <= 2000 + scaled(16); ++seed) expect_right_as_processes(random_case_on_nodes(static_cast<uint64_t>(seed)));
}

// What a survivor finds; "" if all is as it must be.
std::string survive(RankSeat& seat, RoundTrip& trip, const Exchange& exchange, int32_t victim) {
  const auto start = std::chrono::steady_clock::now();
  std::string error = "the operations went through";
  try {
    for (int batch = 0; batch < 4; ++batch) trip.dispatch(batch);
  } catch (const std::runtime_error& failure) {
    error = failure.what();
  }
  const auto elapsed = std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::steady_clock::now() - start).count();
  seat.set_stage(2);
  const tern_failure record = exchange.state().failure;
  const bool named = error.find(fmt::format("rank {}", victim)) != std::string::npos && record.awaited == victim;
  const bool in_time = elapsed < 4 * timeout_ms();
  const bool failed = exchange.state().health == TERN_HEALTH_FAILED;
  return named && in_time && failed ? "" : fmt::format("after {} ms, record awaits rank {}: {}", elapsed, record.awaited, error);
}

void strike(int signal, int32_t victim) {
  Case c;
  c.num_ranks = 4;
  c.ranks_per_node = 2;
  c.num_topk = 3;
  const Scenario scenario(c);
  RankProcesses ranks(c.num_ranks, 10 * timeout_ms(), [&](RankSeat& seat) {
    tern_group_options group_options;
    group_options.ranks_per_node = c.ranks_per_node;
    const Group group = Group::from_allgather(seat.rank(), seat.num_ranks(), RankSeat::allgather, &seat, group_options);
    tern_exchange_options options = scenario.exchange_options();
    options.device = TERN_DEVICE_CPU;
    options.timeout_ms = timeout_ms();
    const Exchange exchange(group, options);
    RoundTrip trip(scenario, seat.rank(), exchange.get());
    trip.route();
    trip.dispatch(0);
    trip.combine(0);
    seat.set_stage(1);
    seat.wait_for_stage(-1, seat.rank() == victim ? 2 : 1);
    return survive(seat, trip, exchange, victim);
  });
  for (int32_t rank = 0; rank < c.num_ranks; ++rank) ranks.wait_for_stage(rank, 1);
  kill(ranks.pid(victim), signal);
  ranks.set_stage(1);
  for (int32_t rank = 0; rank < c.num_ranks; ++rank)
    if (rank != victim) ranks.wait_for_stage(rank, 2);
  kill(ranks.pid(victim), SIGKILL);
  const std::vector<RankReport> reports = ranks.join();
  for (int32_t rank = 0; rank < c.num_ranks; ++rank) {
    if (rank == victim) continue;
    EXPECT_TRUE(reports[static_cast<size_t>(rank)].finished) << "rank " << rank << " left no report";
    EXPECT_EQ(reports[static_cast<size_t>(rank)].text, "") << "rank " << rank;
  }
}

TEST_F(NodeProcesses, KilledRankIsNamedOnBothNodes) { strike(SIGKILL, 2); }
TEST_F(NodeProcesses, StoppedRankIsNamedOnBothNodes) { strike(SIGSTOP, 1); }

}  // namespace
}  // namespace tern::conformance
