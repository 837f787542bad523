// SPDX-License-Identifier: Apache-2.0
// Ranks that die, stop or do not come, on the CPU.
#include <barrier>
#include <csignal>
#include <tern/tern.hpp>
#include <thread>
#include <vector>

#include "engine/failure_scenes.h"
#include "engine/support.h"

namespace tern::conformance {
namespace {

int64_t timeout_ms() { return full_scale() ? 2'000 : 10'000; }

SceneSettings cpu() {
  SceneSettings settings;
  settings.run.timeout_ms = timeout_ms();
  settings.process_timeout_ms = 20 * timeout_ms();
  return settings;
}

TEST(Failure, KilledRankIsNamedAndMasked) { killed_rank_is_named_and_masked(cpu()); }
TEST(Failure, StoppedRankWakesUpAndHarmsNobody) { stopped_rank_wakes_up_and_harms_nobody(cpu()); }
TEST(Failure, StoppedRankComesBack) { stopped_rank_comes_back(cpu()); }
TEST(Failure, StoppedAnywhere) { struck_anywhere(cpu(), SIGSTOP); }
TEST(Failure, KilledAnywhere) { struck_anywhere(cpu(), SIGKILL); }
TEST(Failure, RecoveryOfAllRanks) { recovery_of_all_ranks(cpu()); }
TEST(Failure, RecoveryFromAMismatch) { recovery_from_a_mismatch(cpu()); }
TEST(Failure, RecoveryWithoutMemory) {
  SceneSettings settings = cpu();
  settings.in_windows = true;
  recovery_without_memory(settings);
}
TEST(Failure, RecoveryWithoutAMaskNeedsEveryRank) { recovery_without_a_mask_needs_every_rank(cpu()); }
TEST(Failure, ChosenMask) { chosen_mask(cpu()); }
TEST(Failure, PolicyMask) { policy_mask(cpu()); }
TEST(Failure, PolicyMaskOfASingleCall) { policy_mask_of_a_single_call(cpu()); }
TEST(Failure, PolicyMaskOfACombine) { policy_mask_of_a_combine(cpu(), {.mode = TERN_COMBINE_HIERARCHICAL}); }
TEST(Failure, PolicyMaskOfAnExactCombine) { policy_mask_of_a_combine(cpu(), {.mode = TERN_COMBINE_EXACT}); }
TEST(Failure, PolicyMaskOfWhoWasLeftOut) {
  SceneSettings settings = cpu();
  settings.num_ranks = 2;  // each other rank is missed for a whole timeout
  policy_mask_of_who_was_left_out(settings);
}
TEST(Failure, MaskedRankIsLetInAgain) { masked_rank_is_let_in_again(cpu()); }

// Ranks as threads, one of which never creates its exchange.
TEST(Failure, NeverJoins) {
  tern_group_options options;
  options.timeout_ms = timeout_ms();
  const std::vector<Group> groups = Group::local(3, options);
  std::vector<std::thread> threads;
  for (const size_t rank : {0, 1}) {
    threads.emplace_back([&, rank] {
      tern_exchange_options wanted;
      wanted.device = TERN_DEVICE_CPU;
      wanted.timeout_ms = timeout_ms();
      tern_exchange* exchange = nullptr;
      const tern_status status = tern_exchange_create(groups[rank].get(), &wanted, &exchange);
      EXPECT_TRUE(status == TERN_TIMEOUT || status == TERN_ABORTED) << tern_status_name(status);
      EXPECT_NE(std::string(tern_last_error()).find("rank 2"), std::string::npos) << tern_last_error();
      EXPECT_EQ(exchange, nullptr);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// Ranks as threads. Rank 0 goes on alone; first rank 1 comes back, then rank 2 too.
TEST(Failure, RanksComeBackOneAfterTheOther) {
  Case c;
  c.num_ranks = 3;
  c.window_combine = true;
  const Scenario all(c), without_2(c, {0, 0, 1});
  RunOptions run;
  run.timeout_ms = timeout_ms();  // rank 2 is waited for in vain once
  std::barrier step(3);
  const auto body = [&](int32_t rank, tern_exchange* exchange, RankDevice&) {
    const auto expect_recovers = [&](const uint8_t* mask, int32_t readmit, tern_status expected) {
      tern_recover_options options;
      options.mask = mask;
      options.readmit = readmit;
      EXPECT_EQ(tern_exchange_recover(exchange, &options), expected) << "rank " << rank << ": " << tern_last_error();
    };
    const auto expect_right = [&](const Scenario& scenario) {
      RoundTrip trip(scenario, rank, exchange);
      EXPECT_NO_THROW(trip.run());  // whoever left would be waited for at the next step
      EXPECT_EQ(join_lines(trip.differences()), "");
    };
    const uint8_t alone[] = {0, 1, 1};
    if (rank == 0) expect_recovers(alone, 0, TERN_OK);
    step.arrive_and_wait();
    if (rank != 0) expect_recovers(nullptr, 0, TERN_MASKED_OUT);
    step.arrive_and_wait();
    if (rank != 2) {
      expect_recovers(nullptr, 1, TERN_OK);
      expect_right(without_2);
      tern_exchange_state state;
      tern_exchange_get_state(exchange, &state);
      EXPECT_EQ(state.generation, 2u);
      EXPECT_EQ(state.health, TERN_HEALTH_DEGRADED);
      EXPECT_EQ(std::vector(state.masked, state.masked + 3), (std::vector<uint8_t>{0, 0, 1}));
    }
    step.arrive_and_wait();
    if (rank == 2) expect_recovers(nullptr, 1, TERN_MASKED_OUT);  // nobody lets it in now
    step.arrive_and_wait();
    expect_recovers(nullptr, 1, TERN_OK);
    expect_right(all);
    return std::vector<std::string>();
  };
  EXPECT_EQ(join_lines(run_threads(3, all.exchange_options(), run, body)), "");
}

}  // namespace
}  // namespace tern::conformance
