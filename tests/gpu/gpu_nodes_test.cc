// SPDX-License-Identifier: Apache-2.0
// The conformance cases on GPU ranks of several nodes, which are declared on this host and reach each other over the network library: as
// processes and as threads, several on a GPU where there are fewer GPUs.
#include <csignal>

#include "engine/failure_scenes.h"
#include "engine/node_scenes.h"
#include "engine/nodes.h"
#include "gpu/process_cases.h"

namespace tern::conformance {
namespace {

struct Nodes {
  int32_t num_nodes, ranks_per_node;
  int32_t most_gpus;  // of threads
  int32_t num_ranks() const { return num_nodes * ranks_per_node; }
};
std::string nodes_name(const testing::TestParamInfo<Nodes>& info) {
  return fmt::format("{}NodesOf{}On{}", info.param.num_nodes, info.param.ranks_per_node, info.param.most_gpus);
}

Case on_nodes(Case c, const Nodes& nodes) {
  c.ranks_per_node = nodes.ranks_per_node;
  return c.normalized();
}

std::vector<Case> on_nodes(std::vector<Case> cases, const Nodes& nodes) {
  for (Case& c : cases) c = on_nodes(c, nodes);
  return cases;
}

// Staging that holds a few chunks of tokens: rounds within the nodes and between them.
std::vector<Case> many_rounds(const Nodes& nodes) {
  std::vector<Case> cases = on_nodes(rounds_cases(nodes.num_ranks()), nodes);
  int64_t num_tokens = 4;  // of 200 in 50 chunks
  for (Case& c : cases) c.staging_bytes = staging_for_rounds(c, num_tokens = num_tokens % 40 + 4);
  return cases;
}

class GpuNodes : public testing::TestWithParam<Nodes> {
 protected:
  int32_t num_ranks() const { return GetParam().num_ranks(); }
  std::vector<Case> random(uint64_t first, int64_t count) const {
    return on_nodes(random_cases_of(num_ranks(), first + static_cast<uint64_t>(num_ranks() * 10'000), count), GetParam());
  }
};

class GpuNodeProcesses : public GpuNodes {
 protected:
  void SetUp() override { TERN_NEED_GPU(); }

  RunOptions options() const {
    RunOptions options = gpu_options(num_ranks());
    options.ranks_per_node = GetParam().ranks_per_node;
    return options;
  }
  void expect_right(const std::vector<Case>& cases) const { expect_right_as_gpu_processes(num_ranks(), cases, options()); }
};

INSTANTIATE_TEST_SUITE_P(Ranks, GpuNodeProcesses, testing::Values(Nodes{2, 1, 2}, Nodes{2, 2, 4}, Nodes{4, 1, 4}, Nodes{4, 2, 8}),
                         nodes_name);

TEST_P(GpuNodeProcesses, EveryLayoutExtentEncodingAndOrderOfScales) { expect_right(on_nodes(layout_cases_of(num_ranks()), GetParam())); }
TEST_P(GpuNodeProcesses, RandomCases) { expect_right(random(31'000'000, scaled(60))); }
TEST_P(GpuNodeProcesses, ShapesOfModels) { expect_right(on_nodes(model_cases(num_ranks(), full_scale() ? 64 : 8), GetParam())); }
TEST_P(GpuNodeProcesses, UnevenBatches) { expect_right(on_nodes(uneven_cases(num_ranks()), GetParam())); }
TEST_P(GpuNodeProcesses, Windows) { expect_right(on_nodes(window_cases(num_ranks()), GetParam())); }
TEST_P(GpuNodeProcesses, Rounds) { expect_right(many_rounds(GetParam())); }

TEST_P(GpuNodeProcesses, ReplayedGraphs) {
  const RunOptions how = options();
  expect_right_as_gpu_processes(
      num_ranks(), on_nodes(graph_cases(num_ranks()), GetParam()), how,
      [&](const Group& group, const Case& c, RankDevice& device) { return run_graph_case(group, c, how, device); });
}

class GpuNodeFailure : public testing::Test {
 protected:
  void SetUp() override { TERN_NEED_GPU(); }
  static RunOptions options() {
    RunOptions options = gpu_options(4);
    options.timeout_ms = 1'500;
    return options;
  }
};
TEST_F(GpuNodeFailure, KilledRankIsNamedOnBothNodes) { strike(SIGKILL, 2, options()); }
TEST_F(GpuNodeFailure, StoppedRankIsNamedOnBothNodes) { strike(SIGSTOP, 1, options()); }

// The scenes of CPU ranks between nodes, on 2 nodes.
class GpuNodeRecovery : public testing::Test {
 protected:
  void SetUp() override { TERN_NEED_GPU(); }

  static SceneSettings nodes() {
    SceneSettings settings;
    settings.num_ranks = 4;
    settings.run = gpu_options(settings.num_ranks);
    settings.run.timeout_ms = 3'000;
    settings.run.ranks_per_node = settings.num_ranks / 2;
    settings.process_timeout_ms = 60'000 + 30 * settings.run.timeout_ms;
    return settings;
  }
};
TEST_F(GpuNodeRecovery, KilledRankIsNamedAndMasked) { killed_rank_is_named_and_masked(nodes()); }
TEST_F(GpuNodeRecovery, StoppedRankWakesUpAndHarmsNobody) { stopped_rank_wakes_up_and_harms_nobody(nodes()); }
TEST_F(GpuNodeRecovery, StoppedRankComesBack) { stopped_rank_comes_back(nodes()); }
TEST_F(GpuNodeRecovery, StoppedAnywhere) { struck_anywhere(nodes(), SIGSTOP); }
TEST_F(GpuNodeRecovery, KilledAnywhere) { struck_anywhere(nodes(), SIGKILL); }
TEST_F(GpuNodeRecovery, StruckInDispatchesThatRoute) {
  SceneSettings settings = nodes();
  settings.fused = true;
  struck_anywhere(settings, SIGSTOP);
  struck_anywhere(settings, SIGKILL);
}
TEST_F(GpuNodeRecovery, OfAllRanks) { recovery_of_all_ranks(nodes()); }
TEST_F(GpuNodeRecovery, FromAMismatch) { recovery_from_a_mismatch(nodes()); }
TEST_F(GpuNodeRecovery, WithoutAMaskNeedsEveryRank) { recovery_without_a_mask_needs_every_rank(nodes()); }
TEST_F(GpuNodeRecovery, ChosenMask) { chosen_mask(nodes()); }
TEST_F(GpuNodeRecovery, MaskedRankIsLetInAgain) { masked_rank_is_let_in_again(nodes()); }
// All of a node is gone.
TEST_F(GpuNodeRecovery, NodesOfOneRank) {
  SceneSettings settings = nodes();
  settings.run.ranks_per_node = 1;
  killed_rank_is_named_and_masked(settings);
  masked_rank_is_let_in_again(settings);
}

// Operations go on without a rank. Whoever is held up for the whole timeout is given up too; the driver holds up the processes that are left while
// it takes apart the one that was killed.
class GpuNodeMasks : public testing::Test {
 protected:
  void SetUp() override { TERN_NEED_GPU(); }
  static SceneSettings nodes(int32_t ranks_per_node) {
    SceneSettings settings;
    settings.num_ranks = 4;
    settings.run = gpu_options(settings.num_ranks);
    settings.run.timeout_ms = 5'000;
    settings.run.ranks_per_node = ranks_per_node;
    settings.process_timeout_ms = 150'000;
    return settings;
  }
};
TEST_F(GpuNodeMasks, OfASingleCall) { policy_mask_of_a_single_call(nodes(2)); }
TEST_F(GpuNodeMasks, OfASingleCallOnNodesOfOneRank) { policy_mask_of_a_single_call(nodes(1)); }
TEST_F(GpuNodeMasks, OfACombine) { policy_mask_of_a_combine(nodes(2), {}); }
TEST_F(GpuNodeMasks, OfACombineWithWeightsOfTheOwner) { policy_mask_of_a_combine(nodes(2), {.weighting = TERN_WEIGHTS_OWNER}); }
TEST_F(GpuNodeMasks, OfACombineOnNodesOfOneRank) { policy_mask_of_a_combine(nodes(1), {.weighting = TERN_WEIGHTS_OWNER}); }
TEST_F(GpuNodeMasks, OfAStoppedRank) { policy_mask_of_a_stopped_rank(nodes(2)); }
TEST_F(GpuNodeMasks, OfAStoppedRankOnNodesOfOneRank) { policy_mask_of_a_stopped_rank(nodes(1)); }
TEST_F(GpuNodeMasks, OfWhoWasLeftOut) { policy_mask_of_who_was_left_out(nodes(2)); }
TEST_F(GpuNodeMasks, StoppedAnywhere) { policy_mask_anywhere(nodes(2), SIGSTOP); }
TEST_F(GpuNodeMasks, KilledAnywhere) {
  policy_mask_anywhere(nodes(2), SIGKILL);
  policy_mask_anywhere(nodes(1), SIGKILL);
}

class GpuNodeThreads : public GpuNodes {
 protected:
  void SetUp() override { TERN_NEED_GPU(); }

  RunOptions options() const { return gpu_options(num_ranks(), GetParam().most_gpus); }
  void expect_right(const std::vector<Case>& cases, const RunOptions& how) const {
    expect_all_right(cases, [&](const Case& c) { return run_as_threads(c, how); });
  }
};

INSTANTIATE_TEST_SUITE_P(Ranks, GpuNodeThreads,
                         testing::Values(Nodes{2, 1, 2}, Nodes{2, 2, 4}, Nodes{2, 2, 1}, Nodes{4, 1, 2}, Nodes{3, 2, 4}), nodes_name);

TEST_P(GpuNodeThreads, EveryLayoutExtentEncodingAndOrderOfScales) {
  expect_right(on_nodes(layout_cases_of(num_ranks()), GetParam()), options());
}
// As large batches are: batch by batch within the node.
TEST_P(GpuNodeThreads, EveryLayoutByThroughput) {
  std::vector<Case> cases = on_nodes(layout_cases_of(num_ranks()), GetParam());
  for (Case& c : cases) c.mode = TERN_MODE_THROUGHPUT;
  expect_right(cases, options());
}
TEST_P(GpuNodeThreads, RandomCases) { expect_right(random(41'000'000, scaled(60)), options()); }
TEST_P(GpuNodeThreads, WithMasks) {
  expect_right(with_masks(on_nodes(layout_cases_of(num_ranks()), GetParam())), options());
  expect_right(with_masks(random(43'000'000, scaled(60))), options());
}

TEST_P(GpuNodeThreads, Rounds) { expect_right(many_rounds(GetParam()), options()); }

TEST_P(GpuNodeThreads, ReplayedGraphs) {
  RunOptions how = options();
  how.num_replays = 5;
  expect_right(on_nodes(graph_cases(num_ranks()), GetParam()), how);
}

// What is on the network while sends are under way; those that route, with their routing.
TEST_P(GpuNodeThreads, TwoSendsUnderWay) {
  for (const bool fused : {false, true}) {
    Case c = on_nodes(ordinary_case(num_ranks(), TERN_LAYOUT_EXPERT_MAJOR), GetParam());
    c.phases = c.delays = true;
    c.fused = fused;
    if (fused) c.extent = TERN_EXTENT_WORST;
    const Scenario a(c);
    c.seed = 52;
    const Scenario b(c);
    RunOptions how = options();
    how.ranks_per_node = c.ranks_per_node;
    conformance::expect_right(
        c, run_threads(num_ranks(), a.exchange_options(), how, [&](int32_t rank, tern_exchange* exchange, RankDevice& device) {
          RoundTrip first(a, rank, exchange, device), second(b, rank, exchange, device);
          if (!fused) {
            first.route();
            second.route();
          }
          run_two_in_flight(first, second, {.dispatches_in_order = false});
          std::vector<std::string> differences = first.differences();
          differences.insert(differences.end(), second.differences().begin(), second.differences().end());
          return differences;
        }));
  }
}

}  // namespace
}  // namespace tern::conformance
