// SPDX-License-Identifier: Apache-2.0
// Ranks on several nodes of which one dies or stops, as processes: all others, on its node and on the others, get an error that names it.
#pragma once

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <chrono>
#include <csignal>
#include <tern/tern.hpp>

#include "conformance/processes.h"
#include "conformance/round_trip.h"
#include "conformance/runner.h"

namespace tern::conformance {

// What a survivor finds; "" if all is as it must be.
inline std::string survive(RankSeat& seat, RoundTrip& trip, const Exchange& exchange, int32_t victim, int64_t timeout_ms) {
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
  const bool in_time = elapsed < 4 * timeout_ms;
  const bool failed = exchange.state().health == TERN_HEALTH_FAILED;
  return named && in_time && failed ? "" : fmt::format("after {} ms, record awaits rank {}: {}", elapsed, record.awaited, error);
}

// The victim, one of 4 ranks on 2 nodes, gets the signal between two operations.
inline void strike(int signal, int32_t victim, const RunOptions& run) {
  constexpr int64_t kStartMs = 60'000;  // CUDA takes seconds
  Case c;
  c.num_ranks = 4;
  c.ranks_per_node = 2;
  c.num_topk = 3;
  const Scenario scenario(c);
  RankProcesses ranks(c.num_ranks, kStartMs + 10 * run.timeout_ms, [&](RankSeat& seat) {
    tern_group_options group_options;
    group_options.ranks_per_node = c.ranks_per_node;
    const Group group = Group::from_allgather(seat.rank(), seat.num_ranks(), RankSeat::allgather, &seat, group_options);
    const std::unique_ptr<RankDevice> device = make_rank_device(run, seat.rank());
    const Exchange exchange(group, with(scenario.exchange_options(), run, *device));
    RoundTrip trip(scenario, seat.rank(), exchange.get(), *device);
    trip.route();
    trip.dispatch(0);
    trip.combine(0);
    seat.set_stage(1);
    seat.wait_for_stage(-1, seat.rank() == victim ? 2 : 1);
    return survive(seat, trip, exchange, victim, run.timeout_ms);
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

}  // namespace tern::conformance
