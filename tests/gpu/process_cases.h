// SPDX-License-Identifier: Apache-2.0
// Cases on GPU ranks that are processes. Starting CUDA takes a process seconds, so one set of processes runs all cases of a test. The process
// that starts them never uses CUDA: what it forks could not.
#pragma once

#include <unistd.h>

#include <functional>
#include <tern/tern.hpp>

#include "conformance/processes.h"
#include "gpu/cases.h"
#include "gpu/support.h"

namespace tern::conformance {

// Of one rank with one case; returns differences.
using CaseBody = std::function<std::vector<std::string>(const Group& group, const Case& c, RankDevice& device)>;

inline std::vector<std::string> run_case(const Group& group, const Scenario& scenario, const RunOptions& how, RankDevice& device) {
  const Exchange exchange(group, with(scenario.exchange_options(), how, device));
  RoundTrip trip(scenario, group.rank(), exchange.get(), device);
  trip.run();
  return trip.differences();
}

// Does any rank say yes?
inline bool any(RankSeat& seat, bool mine) {
  const uint8_t own = mine ? 1 : 0;
  std::vector<uint8_t> all(static_cast<size_t>(seat.num_ranks()));
  if (RankSeat::allgather(&seat, &own, all.data(), 1) != 0) throw std::runtime_error("a rank did not come to the end of its case");
  return std::find(all.begin(), all.end(), 1) != all.end();
}

// All cases in turn, on one group; the first wrong one ends it.
inline std::string run_cases(RankSeat& seat, const std::string& name, const std::vector<Case>& cases, const RunOptions& how,
                             const CaseBody& body) {
  const std::unique_ptr<RankDevice> device = make_rank_device(how, seat.rank());
  tern_group_options group_options;
  group_options.name = name.c_str();
  group_options.timeout_ms = 60'000;
  group_options.ranks_per_node = how.ranks_per_node;
  const Group group = Group::from_allgather(seat.rank(), seat.num_ranks(), RankSeat::allgather, &seat, group_options);
  for (const Case& c : cases) {
    std::vector<std::string> differences;
    try {
      differences = body(group, c, *device);
    } catch (const std::exception& error) {
      differences.push_back(fmt::format("rank {}: {}", seat.rank(), error.what()));
    }
    if (any(seat, !differences.empty())) return c.name() + "\n" + join_lines(differences);
  }
  return "";
}

inline void expect_all_finished(RankProcesses& ranks) {
  const std::vector<RankReport> reports = ranks.join();
  for (size_t rank = 0; rank < reports.size(); ++rank) {
    EXPECT_TRUE(reports[rank].finished) << "rank " << rank << " left no report";
    EXPECT_EQ(reports[rank].text, "") << "rank " << rank;
  }
}

inline void expect_right_as_gpu_processes(int32_t num_ranks, const std::vector<Case>& cases, const RunOptions& how, const CaseBody& body) {
  constexpr int64_t kTimeoutMs = 280'000;  // less than ctest's
  const std::string name = fmt::format("gpu-processes-{}", getpid());
  RankProcesses ranks(num_ranks, kTimeoutMs, [&](RankSeat& seat) { return run_cases(seat, name, cases, how, body); });
  expect_all_finished(ranks);
}

inline void expect_right_as_gpu_processes(int32_t num_ranks, const std::vector<Case>& cases, const RunOptions& how) {
  expect_right_as_gpu_processes(num_ranks, cases, how, [&how](const Group& group, const Case& c, RankDevice& device) {
    return run_case(group, Scenario(c), how, device);
  });
}

inline std::vector<std::string> run_graph_case(const Group& group, const Case& c, const RunOptions& how, RankDevice& device) {
  constexpr int kNumReplays = 4;
  const std::vector<Scenario> scenarios = replay_scenarios(c, kNumReplays);
  const Exchange exchange(group, with(scenarios.front().exchange_options(), how, device));
  RoundTrip trip(scenarios.front(), group.rank(), exchange.get(), device);
  trip.run_graph(scenarios, kNumReplays);
  return trip.differences();
}

}  // namespace tern::conformance
