// SPDX-License-Identifier: Apache-2.0
#include "engine/failure_scenes.h"

#include <csignal>
#include <filesystem>

#include "engine/failure_steps.h"

namespace tern::conformance {
namespace {

void require_dispatch_names_victim(const Member& member, RoundTrip& trip) {
  require_names_victim(failing(member, [&] { trip.dispatch(0); }), "dispatch", TERN_OP_DISPATCH, member);
}

// What survivors do once the victim is out of action: see the error, recover without it, go on.
void survive(RankSeat& seat, const Member& member, RoundTrip& trip, const Case& c) {
  seat.wait_for_stage(-1, kStruck);
  require_dispatch_names_victim(member, trip);
  // A failed exchange stays failed until it is recovered.
  require(!failing(member, [&] { trip.combine(0); }).empty(), "");

  recover_masking(member);
  require_masked(member, only_victim(member.settings), 1);
  require_stale(member, trip);

  const Scenario without(c, only_victim(member.settings));
  for (int repeat = 0; repeat < 3; ++repeat) require_right(without, member);
  seat.set_stage(kRecovered);
}

// What all ranks do when none is gone.
void recover_together(const Scenario& scenario, const Member& member, RoundTrip& trip) {
  recover(member);
  require_masked(member, {}, 1);
  require_stale(member, trip);
  for (int repeat = 0; repeat < 3; ++repeat) require_right(scenario, member);
  require_right_again(trip);
}

}  // namespace

void killed_rank_is_named_and_masked(const SceneSettings& settings) {
  constexpr const char* kScene = "killed";
  const Scenario scenario(ordinary_case(settings)), without(scenario.c, only_victim(settings));
  RankProcesses ranks = start_ranks(kScene, scenario, settings, [&](RankSeat& seat, const Member& member) {
    RoundTrip trip = member.trip(scenario);
    trip.run();
    seat.set_stage(kReady);
    if (seat.rank() == settings.victim()) seat.wait_for_stage(-1, kWokenUp);
    survive(seat, member, trip, scenario.c);
    RoundTrip again = member.trip(without);
    require_right_again(again);
  });
  const std::string victim_pid = std::to_string(ranks.pid(settings.victim()));
  strike_and_join(ranks, settings, SIGKILL);

  for (const auto& entry : std::filesystem::directory_iterator("/dev/shm")) {
    const std::string left = entry.path().filename().string();
    EXPECT_TRUE(left.find(group_name(kScene)) == std::string::npos && left.find(victim_pid) == std::string::npos)
        << left << " was left behind";
  }
}

void stopped_rank_wakes_up_and_harms_nobody(const SceneSettings& settings) {
  const Scenario scenario(ordinary_case(settings)), without(scenario.c, only_victim(settings));
  RankProcesses ranks = start_ranks("stopped", scenario, settings, [&](RankSeat& seat, const Member& member) {
    RoundTrip trip = member.trip(scenario);
    trip.run();
    seat.set_stage(kReady);
    if (seat.rank() == settings.victim()) {
      seat.wait_for_stage(-1, kWokenUp);
      const std::string text = failing(member, [&] { trip.dispatch(0); });
      require(text.find("returned TERN_OK") == std::string::npos, text);
      require_left_out(member);
      seat.set_stage(kAnswered);
      return;
    }
    survive(seat, member, trip, scenario.c);
    // Work goes on while the other one wakes up, and afterwards.
    for (int repeat = 0; repeat < 50; ++repeat) require_right(without, member);
    seat.wait_for_stage(settings.victim(), kAnswered);
    for (int repeat = 0; repeat < 5; ++repeat) require_right(without, member);
  });
  strike_and_join(ranks, settings, SIGSTOP);
}

void stopped_rank_comes_back(const SceneSettings& settings) {
  const Scenario scenario(ordinary_case(settings));
  RankProcesses ranks = start_ranks("back", scenario, settings, [&](RankSeat& seat, const Member& member) {
    RoundTrip trip = member.trip(scenario);
    trip.run();
    seat.set_stage(kReady);
    if (seat.rank() != settings.victim()) {
      seat.wait_for_stage(-1, kStruck);
      require_dispatch_names_victim(member, trip);
      seat.set_stage(kFailed);
    }
    seat.wait_for_stage(-1, kWokenUp);
    recover_together(scenario, member, trip);
  });
  strike_and_join(ranks, settings, SIGSTOP, kFailed);
}

void struck_anywhere(const SceneSettings& settings, int signal) {
  const Scenario scenario(ordinary_case(settings)), without(scenario.c, only_victim(settings));
  RankProcesses ranks = start_ranks("anywhere", scenario, settings, [&](RankSeat& seat, const Member& member) {
    const std::string text = failing(member, [&] {
      RoundTrip trip = member.trip(scenario);
      for (int batch = 0; batch < 1'000'000; ++batch) {
        if (batch == 10) seat.set_stage(kReady);
        RoundTrip fused_trip = member.trip(scenario);
        RoundTrip& one = scenario.c.fused ? fused_trip : trip;
        if (!scenario.c.fused) one.route();
        one.dispatch(batch);
        one.combine(batch);
        require_right(one);
      }
    });
    if (seat.rank() == settings.victim()) return;  // an error is all that it can get
    require(says_connection_lost(text, settings) || text.find("TERN_TIMEOUT") != std::string::npos ||
                text.find("TERN_ABORTED") != std::string::npos,
            text);
    recover_masking(member);
    require_masked(member, only_victim(settings), 1);
    require_right(without, member);
    seat.set_stage(kRecovered);
    for (int repeat = 0; repeat < 50; ++repeat) require_right(without, member);
  });
  strike_and_join(ranks, settings, signal);
}

void recovery_of_all_ranks(const SceneSettings& settings) {
  const Scenario scenario(ordinary_case(settings));
  RankProcesses ranks = start_ranks("skipped", scenario, settings, [&](RankSeat& seat, const Member& member) {
    RoundTrip trip = member.trip(scenario);
    trip.run();
    if (seat.rank() == settings.victim()) {
      wait_for_survivors(seat, settings, kReady);
      await_failed(member);
    } else {
      require_dispatch_names_victim(member, trip);
      seat.set_stage(kReady);
    }
    recover_together(scenario, member, trip);
  });
  expect_no_complaints(ranks.join());
}

void recovery_from_a_mismatch(const SceneSettings& settings) {
  const Scenario scenario(ordinary_case(settings));
  RankProcesses ranks = start_ranks("mismatch", scenario, settings, [&](RankSeat& seat, const Member& member) {
    RoundTrip trip = member.trip(scenario);
    trip.run();
    // One more after it: what one rank saw in the last operation reaches the others here at the latest.
    const std::string text = failing(member, [&] {
      if (seat.rank() == settings.victim()) trip.combine(2);
      trip.dispatch(2);
      trip.dispatch(2);
    });
    require(text.find("TERN_MISMATCH") != std::string::npos || text.find("TERN_ABORTED") != std::string::npos, text);
    await_failed(member);
    const tern_status status = member.exchange.state().failure.status;
    require(status == TERN_MISMATCH, fmt::format("the record's status is {}", tern_status_name(status)));
    recover_together(scenario, member, trip);
  });
  expect_no_complaints(ranks.join());
}

void recovery_without_a_mask_needs_every_rank(const SceneSettings& settings) {
  const Scenario scenario(ordinary_case(settings)), without(scenario.c, only_victim(settings));
  RankProcesses ranks = start_ranks("unmasked", scenario, settings, [&](RankSeat& seat, const Member& member) {
    if (seat.rank() != settings.victim()) {
      const tern_status status = tern_exchange_recover(member.get(), nullptr);
      require(status == TERN_TIMEOUT || status == TERN_ABORTED, fmt::format("{}: {}", tern_status_name(status), tern_last_error()));
      require(std::string(tern_last_error()).find(fmt::format("rank {}", settings.victim())) != std::string::npos, tern_last_error());
      recover_masking(member);
      require(member.exchange.state().masked[settings.victim()] == 1, "the rank is not masked");
      require_right(without, member);
    }
    seat.set_stage(kReady);
    wait_for_all(seat, settings, kReady);
  });
  expect_no_complaints(ranks.join());
}

void recovery_without_memory(const SceneSettings& settings) {
  const Scenario scenario(ordinary_case(settings));
  RankProcesses ranks = start_ranks("no-memory", scenario, settings, [&](RankSeat& seat, const Member& member) {
    RoundTrip trip = member.trip(scenario);
    trip.run();
    seat.set_stage(kReady);
    wait_for_all(seat, settings, kReady);
    {
      const NoSharedMemory none(seat.rank() == settings.victim());
      const tern_status status = tern_exchange_recover(member.get(), nullptr);
      require(status != TERN_OK, "the generation began without a rank's windows");
    }
    require(member.exchange.state().health == TERN_HEALTH_FAILED, "health is not FAILED");
    failing(member, [&] { trip.dispatch(2); });
    seat.set_stage(kFailed);
    wait_for_all(seat, settings, kFailed);
    recover(member);
    require_masked(member, {}, 2);
    require_right(scenario, member);
  });
  expect_no_complaints(ranks.join());
}

void chosen_mask(const SceneSettings& settings) {
  const Scenario scenario(ordinary_case(settings)), without(scenario.c, only_victim(settings));
  RankProcesses ranks = start_ranks("chosen", scenario, settings, [&](RankSeat& seat, const Member& member) {
    require_right(scenario, member);
    // A single survivor agrees with itself at once: the victim may still be at its last combine.
    seat.set_stage(kReady);
    wait_for_all(seat, settings, kReady);
    if (seat.rank() != settings.victim()) {
      recover_without(only_victim(settings), member);
      require_masked(member, only_victim(settings), 1);
      require_right(without, member);
      seat.set_stage(kRecovered);
      seat.wait_for_stage(settings.victim(), kAnswered);
      require_right(without, member);
      return;
    }
    wait_for_survivors(seat, settings, kRecovered);
    failing(member, [&] { require_right(scenario, member); });
    require_left_out(member);
    seat.set_stage(kAnswered);
  });
  expect_no_complaints(ranks.join());
}

void policy_mask(const SceneSettings& settings) {
  const Scenario scenario(ordinary_case(settings)), without(scenario.c, only_victim(settings));
  const auto act = [&](RankSeat& seat, const Member& member) {
    require_right(scenario, member);
    seat.set_stage(kReady);
    if (seat.rank() == settings.victim()) seat.wait_for_stage(-1, kWokenUp);
    seat.wait_for_stage(-1, kStruck);

    const PlanHandle plan = make_plan(member.get(), scenario.plan_options());
    RoutingCall call;
    call.load(scenario, {seat.rank(), member.get(), member.device.get(), scenario.c.max_tokens}, false);
    tern_launch launch;
    launch.stream = member.device->stream();
    require_ok(tern_plan_route(plan.get(), &call.routing, &launch, nullptr), "tern_plan_route");
    member.device->synchronise();
    for (int repeat = 0; repeat < 3; ++repeat) require_right(without, member);
    require_masked(member, only_victim(settings), 1);
  };
  RankProcesses ranks = start_ranks("policy", scenario, settings, act, TERN_ON_TIMEOUT_MASK);
  strike_and_join(ranks, settings, SIGKILL);
}

void policy_mask_needs_the_latency_path(const SceneSettings& settings) {
  const Scenario scenario(ordinary_case(settings));
  const auto act = [&](RankSeat&, const Member& member) {
    RoundTrip trip = member.trip(scenario);
    const std::string text = failing(member, [&] { trip.route(); });
    for (const char* part : {"TERN_UNSUPPORTED", "TERN_ON_TIMEOUT_MASK"}) require(text.find(part) != std::string::npos, text);
  };
  RankProcesses ranks = start_ranks("large", scenario, settings, act, TERN_ON_TIMEOUT_MASK);
  expect_no_complaints(ranks.join());
}

}  // namespace tern::conformance
