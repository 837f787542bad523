// SPDX-License-Identifier: Apache-2.0
// Ranks that die, stop or do not come, on nodes that are declared on this host: the others go on without, on all nodes.
#include <csignal>

#include "conformance/runner.h"
#include "engine/failure_scenes.h"
#include "engine/nodes.h"
#include "engine/support.h"

namespace tern::conformance {
namespace {

class NodesFailure : public ::testing::Test {
 protected:
  void SetUp() override {
    const std::string problem = missing_network(run_as_processes(smallest_case_on_nodes()));
    if (!problem.empty()) GTEST_SKIP() << problem;
  }

  // 2 nodes of 2 ranks; the victim is the first of the second node.
  static SceneSettings nodes() {
    SceneSettings settings;
    settings.run.timeout_ms = full_scale() ? 2'000 : 10'000;
    settings.run.ranks_per_node = 2;
    settings.process_timeout_ms = 30 * settings.run.timeout_ms;
    return settings;
  }
};

TEST_F(NodesFailure, KilledRankIsNamedAndMasked) { killed_rank_is_named_and_masked(nodes()); }
TEST_F(NodesFailure, StoppedRankWakesUpAndHarmsNobody) { stopped_rank_wakes_up_and_harms_nobody(nodes()); }
TEST_F(NodesFailure, StoppedRankComesBack) { stopped_rank_comes_back(nodes()); }
TEST_F(NodesFailure, StoppedAnywhere) { struck_anywhere(nodes(), SIGSTOP); }
TEST_F(NodesFailure, KilledAnywhere) { struck_anywhere(nodes(), SIGKILL); }
TEST_F(NodesFailure, StruckInDispatchesThatRoute) {
  SceneSettings settings = nodes();
  settings.fused = true;
  struck_anywhere(settings, SIGSTOP);
  struck_anywhere(settings, SIGKILL);
}
TEST_F(NodesFailure, RecoveryOfAllRanks) { recovery_of_all_ranks(nodes()); }
TEST_F(NodesFailure, RecoveryFromAMismatch) { recovery_from_a_mismatch(nodes()); }
TEST_F(NodesFailure, RecoveryWithoutAMaskNeedsEveryRank) { recovery_without_a_mask_needs_every_rank(nodes()); }
TEST_F(NodesFailure, RecoveryWithoutMemory) { recovery_without_memory(nodes()); }
TEST_F(NodesFailure, ChosenMask) { chosen_mask(nodes()); }
TEST_F(NodesFailure, MaskedRankIsLetInAgain) { masked_rank_is_let_in_again(nodes()); }
TEST_F(NodesFailure, ThreeNodes) {
  SceneSettings settings = nodes();
  settings.num_ranks = 6;
  killed_rank_is_named_and_masked(settings);
  masked_rank_is_let_in_again(settings);
}
TEST_F(NodesFailure, PolicyMask) { policy_mask(nodes()); }
TEST_F(NodesFailure, PolicyMaskOfASingleCall) { policy_mask_of_a_single_call(nodes()); }
TEST_F(NodesFailure, PolicyMaskOfACombine) { policy_mask_of_a_combine(nodes(), {.mode = TERN_COMBINE_HIERARCHICAL}); }
TEST_F(NodesFailure, PolicyMaskOfAnExactCombine) { policy_mask_of_a_combine(nodes(), {.mode = TERN_COMBINE_EXACT}); }
// A node of one rank: all of it is gone.
TEST_F(NodesFailure, NodesOfOneRank) {
  SceneSettings settings = nodes();
  settings.run.ranks_per_node = 1;
  killed_rank_is_named_and_masked(settings);
  masked_rank_is_let_in_again(settings);
}

}  // namespace
}  // namespace tern::conformance
