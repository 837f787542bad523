// SPDX-License-Identifier: Apache-2.0
// The conformance cases on GPU ranks that are processes, each with a GPU of its own. Starting CUDA takes a process seconds, so one set of
// processes runs all cases of a test. This process itself never uses CUDA: what it forks could not.
#include <unistd.h>

#include <functional>
#include <tern/tern.hpp>

#include "conformance/processes.h"
#include "gpu/cases.h"
#include "gpu/support.h"

namespace tern::conformance {
namespace {

// Of one rank with one case; returns differences.
using CaseBody = std::function<std::vector<std::string>(const Group& group, const Case& c, RankDevice& device)>;

std::vector<std::string> run_case(const Group& group, const Scenario& scenario, const RunOptions& how, RankDevice& device) {
  const Exchange exchange(group, with(scenario.exchange_options(), how, device));
  RoundTrip trip(scenario, group.rank(), exchange.get(), device);
  trip.run();
  return trip.differences();
}

// Does any rank say yes?
bool any(RankSeat& seat, bool mine) {
  const uint8_t own = mine ? 1 : 0;
  std::vector<uint8_t> all(static_cast<size_t>(seat.num_ranks()));
  if (RankSeat::allgather(&seat, &own, all.data(), 1) != 0) throw std::runtime_error("a rank did not come to the end of its case");
  return std::find(all.begin(), all.end(), 1) != all.end();
}

// All cases in turn, on one group; the first wrong one ends it.
std::string run_cases(RankSeat& seat, const std::string& name, const std::vector<Case>& cases, const RunOptions& how,
                      const CaseBody& body) {
  const std::unique_ptr<RankDevice> device = make_rank_device(how, seat.rank());
  tern_group_options group_options;
  group_options.name = name.c_str();
  group_options.timeout_ms = 60'000;
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

class GpuProcesses : public testing::TestWithParam<int32_t> {
 protected:
  void SetUp() override { TERN_NEED_GPUS(GetParam()); }

  void expect_right_on_gpus(const std::vector<Case>& cases, const CaseBody& body) const {
    const RunOptions how = options();
    const std::string name = fmt::format("gpu-processes-{}", getpid());
    RankProcesses ranks(GetParam(), kTimeoutMs, [&](RankSeat& seat) { return run_cases(seat, name, cases, how, body); });
    const std::vector<RankReport> reports = ranks.join();
    for (size_t rank = 0; rank < reports.size(); ++rank) {
      EXPECT_TRUE(reports[rank].finished) << "rank " << rank << " left no report";
      EXPECT_EQ(reports[rank].text, "") << "rank " << rank;
    }
  }
  void expect_right_on_gpus(const std::vector<Case>& cases) const {
    expect_right_on_gpus(cases, [how = options()](const Group& group, const Case& c, RankDevice& device) {
      return run_case(group, Scenario(c), how, device);
    });
  }

  RunOptions options() const { return gpu_options(GetParam()); }

 private:
  static constexpr int64_t kTimeoutMs = 280'000;  // less than ctest's
};

INSTANTIATE_TEST_SUITE_P(Ranks, GpuProcesses, testing::Values(1, 2, 3, 4, 8), testing::PrintToStringParamName());

TEST_P(GpuProcesses, EveryLayoutExtentEncodingAndOrderOfScales) { expect_right_on_gpus(layout_cases_of(GetParam())); }

TEST_P(GpuProcesses, RandomCases) {
  expect_right_on_gpus(random_cases_of(GetParam(), static_cast<uint64_t>(GetParam()) * 2'000'000'000, scaled(60)));
}

TEST_P(GpuProcesses, ShapesOfModels) { expect_right_on_gpus(model_cases(GetParam(), full_scale() ? 64 : 8)); }

TEST_P(GpuProcesses, UnevenBatches) { expect_right_on_gpus(uneven_cases(GetParam())); }

TEST_P(GpuProcesses, Windows) { expect_right_on_gpus(window_cases(GetParam())); }

// A third of the staging that would hold the batch.
TEST_P(GpuProcesses, Rounds) {
  expect_right_on_gpus(rounds_cases(GetParam()), [how = options()](const Group& group, Case c, RankDevice& device) {
    c.staging_bytes = Exchange::query_memory(group, with(Scenario(c).exchange_options(), how, device)).staging_bytes / 3;
    return run_case(group, Scenario(c), how, device);
  });
}

TEST_P(GpuProcesses, ReplayedGraphs) {
  expect_right_on_gpus(graph_cases(GetParam()), [how = options()](const Group& group, const Case& c, RankDevice& device) {
    const std::vector<Scenario> scenarios = replay_scenarios(c, 4);
    const Exchange exchange(group, with(scenarios.front().exchange_options(), how, device));
    RoundTrip trip(scenarios.front(), group.rank(), exchange.get(), device);
    trip.run_graph(scenarios, 4);
    return trip.differences();
  });
}

}  // namespace
}  // namespace tern::conformance
