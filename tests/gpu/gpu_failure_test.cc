// SPDX-License-Identifier: Apache-2.0
// Ranks that die, stop or do not come, on GPUs: the others get the error within the timeout, their CUDA context goes on working (each
// scene uses it right after the error), and they recover.
#include <csignal>

#include "engine/failure_scenes.h"
#include "gpu/support.h"

namespace tern::conformance {
namespace {

SceneSettings failure_settings(tern_extent extent) {
  SceneSettings result;
  result.num_ranks = 4;
  result.run = gpu_options(result.num_ranks);
  result.run.timeout_ms = 1'500;
  result.extent = extent;
  result.process_timeout_ms = 150'000;  // CUDA takes seconds to start
  return result;
}

class GpuFailure : public testing::TestWithParam<tern_extent> {
 protected:
  void SetUp() override { TERN_NEED_GPU(); }
  SceneSettings settings() const { return failure_settings(GetParam()); }
};

std::string extent_name(const testing::TestParamInfo<tern_extent>& chosen) { return chosen.param == TERN_EXTENT_EXACT ? "Exact" : "Worst"; }

INSTANTIATE_TEST_SUITE_P(Extents, GpuFailure, testing::Values(TERN_EXTENT_EXACT, TERN_EXTENT_WORST), extent_name);

TEST_P(GpuFailure, KilledRankIsNamedAndMasked) { killed_rank_is_named_and_masked(settings()); }
TEST_P(GpuFailure, StoppedRankWakesUpAndHarmsNobody) { stopped_rank_wakes_up_and_harms_nobody(settings()); }
TEST_P(GpuFailure, StoppedRankComesBack) { stopped_rank_comes_back(settings()); }
TEST_P(GpuFailure, StoppedAnywhere) { struck_anywhere(settings(), SIGSTOP); }
TEST_P(GpuFailure, KilledAnywhere) { struck_anywhere(settings(), SIGKILL); }
TEST_P(GpuFailure, RecoveryOfAllRanks) { recovery_of_all_ranks(settings()); }
TEST_P(GpuFailure, RecoveryFromAMismatch) { recovery_from_a_mismatch(settings()); }
TEST_P(GpuFailure, RecoveryWithoutAMaskNeedsEveryRank) { recovery_without_a_mask_needs_every_rank(settings()); }
TEST_P(GpuFailure, ChosenMask) { chosen_mask(settings()); }
TEST_P(GpuFailure, MaskedRankIsLetInAgain) { masked_rank_is_let_in_again(settings()); }
TEST_P(GpuFailure, PolicyMaskNeedsTheLatencyPath) {
  if (test_device() == TERN_DEVICE_CPU) GTEST_SKIP() << "CPU ranks have it everywhere";
  policy_mask_needs_the_latency_path(settings());
}

// Ranks write into each other's outputs.
class GpuFailureInWindows : public GpuFailure {
 protected:
  SceneSettings settings() const {
    SceneSettings result = GpuFailure::settings();
    result.in_windows = true;
    return result;
  }
};

INSTANTIATE_TEST_SUITE_P(Extents, GpuFailureInWindows, testing::Values(TERN_EXTENT_EXACT, TERN_EXTENT_WORST), extent_name);

TEST_P(GpuFailureInWindows, KilledRankIsNamedAndMasked) { killed_rank_is_named_and_masked(settings()); }
TEST_P(GpuFailureInWindows, StoppedRankWakesUpAndHarmsNobody) { stopped_rank_wakes_up_and_harms_nobody(settings()); }
TEST_P(GpuFailureInWindows, StoppedAnywhere) { struck_anywhere(settings(), SIGSTOP); }
TEST_P(GpuFailureInWindows, KilledAnywhere) { struck_anywhere(settings(), SIGKILL); }
TEST_P(GpuFailureInWindows, RecoveryOfAllRanks) { recovery_of_all_ranks(settings()); }

// Of small batches in one call, with extent WORST.
class GpuMasks : public testing::Test {
 protected:
  void SetUp() override { TERN_NEED_GPU(); }

  // Ranks go on by themselves here, so whoever is held up for the whole timeout is given up too; and the driver holds up the processes that are
  // left while it takes apart the one that was killed.
  static SceneSettings settings() {
    SceneSettings result = failure_settings(TERN_EXTENT_WORST);
    result.run.timeout_ms = 5'000;
    return result;
  }
};

TEST_F(GpuMasks, OfASingleCall) { policy_mask_of_a_single_call(settings()); }
TEST_F(GpuMasks, OfACombine) { policy_mask_of_a_combine(settings(), {.mode = TERN_COMBINE_HIERARCHICAL}); }
TEST_F(GpuMasks, OfAnExactCombine) { policy_mask_of_a_combine(settings(), {.mode = TERN_COMBINE_EXACT}); }
TEST_F(GpuMasks, OfWhoWasLeftOut) { policy_mask_of_who_was_left_out(settings()); }
TEST_F(GpuMasks, StoppedAnywhere) { policy_mask_anywhere(settings(), SIGSTOP); }
TEST_F(GpuMasks, KilledAnywhere) { policy_mask_anywhere(settings(), SIGKILL); }

}  // namespace
}  // namespace tern::conformance
