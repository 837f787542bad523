// SPDX-License-Identifier: Apache-2.0
#include "engine/failure_scenes.h"

#include <signal.h>

#include <filesystem>

#include "engine/failure_steps.h"

namespace tern::conformance {
namespace {

// What survivors do once the victim is out of action: see the error, recover without it, go on.
void survive(RankSeat& seat, const Member& member, RoundTrip& trip, const Case& c) {
  seat.wait_for_stage(-1, kStruck);
  const std::string text = failing(member, [&] { trip.dispatch(0); });
  require_names_victim(text, "dispatch", TERN_OP_DISPATCH, member);
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
  require_ok(tern_exchange_recover(member.get(), nullptr), "tern_exchange_recover");
  require_masked(member, {}, 1);
  require_stale(member, trip);
  for (int repeat = 0; repeat < 3; ++repeat) require_right(scenario, member);
  // A plan of the old generation lives again once it is routed.
  trip.route();
  trip.dispatch(3);
  trip.combine(3);
  require(trip.differences().empty(), join_lines(trip.differences()));
}

}  // namespace

void killed_rank_is_named_and_masked(const SceneSettings& settings) {
  const std::string name = group_name("killed");
  const Scenario scenario(ordinary_case(settings));
  RankProcesses ranks(settings.num_ranks, settings.process_timeout_ms, [&](RankSeat& seat) {
    const Member member(seat, name, scenario, settings);
    RoundTrip trip = member.trip(scenario);
    trip.run();
    seat.set_stage(kReady);
    if (seat.rank() == settings.victim()) seat.wait_for_stage(-1, kWokenUp);
    survive(seat, member, trip, scenario.c);
    // A plan of the old generation lives again once it is routed.
    const Scenario without(scenario.c, only_victim(settings));
    RoundTrip again = member.trip(without);
    again.route();
    again.dispatch(2);
    again.combine(2);
    return join_lines(again.differences());
  });
  wait_for_all(ranks, settings, kReady);
  const std::string victim_pid = std::to_string(ranks.pid(settings.victim()));
  ASSERT_EQ(kill(ranks.pid(settings.victim()), SIGKILL), 0);
  ranks.set_stage(kStruck);
  expect_no_complaints(ranks.join(), settings.victim());

  for (const auto& entry : std::filesystem::directory_iterator("/dev/shm")) {
    const std::string left = entry.path().filename().string();
    EXPECT_TRUE(left.find(name) == std::string::npos && left.find(victim_pid) == std::string::npos) << left << " was left behind";
  }
}

void stopped_rank_wakes_up_and_harms_nobody(const SceneSettings& settings) {
  const std::string name = group_name("stopped");
  const Scenario scenario(ordinary_case(settings));
  RankProcesses ranks(settings.num_ranks, settings.process_timeout_ms, [&](RankSeat& seat) {
    const Member member(seat, name, scenario, settings);
    RoundTrip trip = member.trip(scenario);
    trip.run();
    seat.set_stage(kReady);
    if (seat.rank() == settings.victim()) {
      seat.wait_for_stage(-1, kWokenUp);
      const std::string text = failing(member, [&] { trip.dispatch(0); });
      require(text.find("returned TERN_OK") == std::string::npos, text);
      const tern_status status = tern_exchange_recover(member.get(), nullptr);
      require(status == TERN_MASKED_OUT, fmt::format("recover of the masked rank: {}: {}", tern_status_name(status), tern_last_error()));
      seat.set_stage(kAnswered);
      return std::string();
    }
    survive(seat, member, trip, scenario.c);
    // Work goes on while the other one wakes up, and afterwards.
    const Scenario without(scenario.c, only_victim(settings));
    for (int repeat = 0; repeat < 50; ++repeat) require_right(without, member);
    seat.wait_for_stage(settings.victim(), kAnswered);
    for (int repeat = 0; repeat < 5; ++repeat) require_right(without, member);
    return std::string();
  });
  wait_for_all(ranks, settings, kReady);
  ASSERT_EQ(kill(ranks.pid(settings.victim()), SIGSTOP), 0);
  ranks.set_stage(kStruck);
  ranks.wait_for_stage(0, kRecovered);
  ASSERT_EQ(kill(ranks.pid(settings.victim()), SIGCONT), 0);
  ranks.set_stage(kWokenUp);
  expect_no_complaints(ranks.join(), std::nullopt);
}

void stopped_rank_comes_back(const SceneSettings& settings) {
  const std::string name = group_name("back");
  const Scenario scenario(ordinary_case(settings));
  RankProcesses ranks(settings.num_ranks, settings.process_timeout_ms, [&](RankSeat& seat) {
    const Member member(seat, name, scenario, settings);
    RoundTrip trip = member.trip(scenario);
    trip.run();
    seat.set_stage(kReady);
    if (seat.rank() != settings.victim()) {
      seat.wait_for_stage(-1, kStruck);
      require_names_victim(failing(member, [&] { trip.dispatch(0); }), "dispatch", TERN_OP_DISPATCH, member);
      seat.set_stage(kFailed);
    }
    seat.wait_for_stage(-1, kWokenUp);
    recover_together(scenario, member, trip);
    return std::string();
  });
  wait_for_all(ranks, settings, kReady);
  ASSERT_EQ(kill(ranks.pid(settings.victim()), SIGSTOP), 0);
  ranks.set_stage(kStruck);
  wait_for_survivors(ranks, settings, kFailed);
  ASSERT_EQ(kill(ranks.pid(settings.victim()), SIGCONT), 0);
  ranks.set_stage(kWokenUp);
  expect_no_complaints(ranks.join(), std::nullopt);
}

void struck_anywhere(const SceneSettings& settings, int signal) {
  const std::string name = group_name("anywhere");
  const Scenario scenario(ordinary_case(settings)), without(scenario.c, only_victim(settings));
  RankProcesses ranks(settings.num_ranks, settings.process_timeout_ms, [&](RankSeat& seat) {
    const Member member(seat, name, scenario, settings);
    const std::string text = failing(member, [&] {
      RoundTrip trip = member.trip(scenario);
      for (int batch = 0; batch < 1'000'000; ++batch) {
        if (batch == 10) seat.set_stage(kReady);
        RoundTrip fused_trip = member.trip(scenario);
        RoundTrip& one = scenario.c.fused ? fused_trip : trip;
        if (!scenario.c.fused) one.route();
        one.dispatch(batch);
        one.combine(batch);
        require(one.differences().empty(), join_lines(one.differences()));
      }
    });
    if (seat.rank() == settings.victim()) return std::string();  // an error is all that it can get
    require(says_connection_lost(text, settings) || text.find("TERN_TIMEOUT") != std::string::npos ||
                text.find("TERN_ABORTED") != std::string::npos,
            text);
    recover_masking(member);
    require_masked(member, only_victim(settings), 1);
    require_right(without, member);
    seat.set_stage(kRecovered);
    for (int repeat = 0; repeat < 50; ++repeat) require_right(without, member);
    return std::string();
  });
  wait_for_all(ranks, settings, kReady);
  ASSERT_EQ(kill(ranks.pid(settings.victim()), signal), 0);
  wait_for_survivors(ranks, settings, kRecovered);
  if (signal == SIGKILL) return expect_no_complaints(ranks.join(), settings.victim());
  ASSERT_EQ(kill(ranks.pid(settings.victim()), SIGCONT), 0);
  expect_no_complaints(ranks.join(), std::nullopt);
}

void recovery_of_all_ranks(const SceneSettings& settings) {
  const std::string name = group_name("skipped");
  const Scenario scenario(ordinary_case(settings));
  RankProcesses ranks(settings.num_ranks, settings.process_timeout_ms, [&](RankSeat& seat) {
    const Member member(seat, name, scenario, settings);
    RoundTrip trip = member.trip(scenario);
    trip.run();
    if (seat.rank() == settings.victim()) {
      wait_for_survivors(seat, settings, kReady);
      await_failed(member);
    } else {
      require_names_victim(failing(member, [&] { trip.dispatch(0); }), "dispatch", TERN_OP_DISPATCH, member);
      seat.set_stage(kReady);
    }
    recover_together(scenario, member, trip);
    return std::string();
  });
  expect_no_complaints(ranks.join(), std::nullopt);
}

void recovery_from_a_mismatch(const SceneSettings& settings) {
  const std::string name = group_name("mismatch");
  const Scenario scenario(ordinary_case(settings));
  RankProcesses ranks(settings.num_ranks, settings.process_timeout_ms, [&](RankSeat& seat) {
    const Member member(seat, name, scenario, settings);
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
    return std::string();
  });
  expect_no_complaints(ranks.join(), std::nullopt);
}

void recovery_without_a_mask_needs_every_rank(const SceneSettings& settings) {
  const std::string name = group_name("unmasked");
  const Scenario scenario(ordinary_case(settings));
  RankProcesses ranks(settings.num_ranks, settings.process_timeout_ms, [&](RankSeat& seat) {
    const Member member(seat, name, scenario, settings);
    if (seat.rank() != settings.victim()) {
      const tern_status status = tern_exchange_recover(member.get(), nullptr);
      require(status == TERN_TIMEOUT || status == TERN_ABORTED, fmt::format("{}: {}", tern_status_name(status), tern_last_error()));
      require(std::string(tern_last_error()).find(fmt::format("rank {}", settings.victim())) != std::string::npos, tern_last_error());
      recover_masking(member);
      require(member.exchange.state().masked[settings.victim()] == 1, "the rank is not masked");
      require_right(Scenario(scenario.c, only_victim(settings)), member);
    }
    seat.set_stage(kReady);
    wait_for_all(seat, settings, kReady);
    return std::string();
  });
  expect_no_complaints(ranks.join(), std::nullopt);
}

void recovery_without_memory(const SceneSettings& settings) {
  const std::string name = group_name("no-memory");
  const Scenario scenario(ordinary_case(settings));
  RankProcesses ranks(settings.num_ranks, settings.process_timeout_ms, [&](RankSeat& seat) {
    const Member member(seat, name, scenario, settings);
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
    require_ok(tern_exchange_recover(member.get(), nullptr), "tern_exchange_recover");
    require_masked(member, {}, 2);
    require_right(scenario, member);
    return std::string();
  });
  expect_no_complaints(ranks.join(), std::nullopt);
}

void chosen_mask(const SceneSettings& settings) {
  const std::string name = group_name("chosen");
  const Scenario scenario(ordinary_case(settings));
  RankProcesses ranks(settings.num_ranks, settings.process_timeout_ms, [&](RankSeat& seat) {
    const Member member(seat, name, scenario, settings);
    require_right(scenario, member);
    // A single survivor agrees with itself at once: the victim may still be at its last combine.
    seat.set_stage(kReady);
    wait_for_all(seat, settings, kReady);
    if (seat.rank() != settings.victim()) {
      const std::vector<uint8_t> mask = only_victim(settings);
      tern_recover_options options;
      options.mask = mask.data();
      require_ok(tern_exchange_recover(member.get(), &options), "tern_exchange_recover");
      require_masked(member, mask, 1);
      require_right(Scenario(scenario.c, mask), member);
      seat.set_stage(kRecovered);
      seat.wait_for_stage(settings.victim(), kAnswered);
      require_right(Scenario(scenario.c, mask), member);
      return std::string();
    }
    wait_for_survivors(seat, settings, kRecovered);
    failing(member, [&] { require_right(scenario, member); });
    const tern_status status = tern_exchange_recover(member.get(), nullptr);
    require(status == TERN_MASKED_OUT, fmt::format("{}: {}", tern_status_name(status), tern_last_error()));
    seat.set_stage(kAnswered);
    return std::string();
  });
  expect_no_complaints(ranks.join(), std::nullopt);
}

void policy_mask(const SceneSettings& settings) {
  const std::string name = group_name("policy");
  const Scenario scenario(ordinary_case(settings)), without(scenario.c, only_victim(settings));
  RankProcesses ranks(settings.num_ranks, settings.process_timeout_ms, [&](RankSeat& seat) {
    const Member member(seat, name, scenario, settings, TERN_ON_TIMEOUT_MASK);
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
    return std::string();
  });
  kill_victim_and_join(ranks, settings);
}

void policy_mask_needs_the_latency_path(const SceneSettings& settings) {
  const std::string name = group_name("large");
  const Scenario scenario(ordinary_case(settings));
  RankProcesses ranks(settings.num_ranks, settings.process_timeout_ms, [&](RankSeat& seat) {
    const Member member(seat, name, scenario, settings, TERN_ON_TIMEOUT_MASK);
    RoundTrip trip = member.trip(scenario);
    const std::string text = failing(member, [&] { trip.route(); });
    for (const char* part : {"TERN_UNSUPPORTED", "TERN_ON_TIMEOUT_MASK"}) require(text.find(part) != std::string::npos, text);
    return std::string();
  });
  expect_no_complaints(ranks.join(), std::nullopt);
}

}  // namespace tern::conformance
