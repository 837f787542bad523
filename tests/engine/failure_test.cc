// SPDX-License-Identifier: Apache-2.0
// Ranks that die, stop or do not come, on the CPU.
#include <csignal>
#include <tern/tern.hpp>
#include <thread>

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
TEST(Failure, RecoveryWithoutAMaskNeedsEveryRank) { recovery_without_a_mask_needs_every_rank(cpu()); }
TEST(Failure, ChosenMask) { chosen_mask(cpu()); }
TEST(Failure, PolicyMask) { policy_mask(cpu()); }

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

}  // namespace
}  // namespace tern::conformance
