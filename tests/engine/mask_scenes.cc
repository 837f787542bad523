// SPDX-License-Identifier: Apache-2.0
// Ranks that are left out while operations go on, and that come back.
#include <csignal>

#include "engine/failure_steps.h"

namespace tern::conformance {
namespace {

// What a decoding step calls: one dispatch that routes and casts, and a combine.
Case single_call_case(const SceneSettings& settings) {
  Case c = ordinary_case(settings);
  c.layout = TERN_LAYOUT_EXPERT_PADDED;
  c.extent = TERN_EXTENT_WORST;
  c.fused = true;
  c.mode = TERN_MODE_LATENCY;
  c.encoding = TERN_ENCODING_FP8_F32;
  c.hidden = 256;
  return c.normalized();
}

// Of the operations behind the one that has missed a rank. CPU ranks start one without it by themselves, GPU ranks when they are asked to.
uint32_t next_generation(const SceneSettings& settings) { return settings.run.device == TERN_DEVICE_CPU ? 1 : 0; }

// Each rank has waited for the missing one until the deadline once, or has heard of it before.
void require_one_timeout_at_most(const Member& member) {
  const auto timeouts = member.exchange.metrics().timeouts;
  require(timeouts <= 1, fmt::format("{} waits have ended at their deadline", timeouts));
}

// Of what was dispatched with all ranks, nothing comes back over the rail of a masked one.
void leave_out_unreached(Scenario& scenario, const std::vector<uint8_t>& masked) {
  for (int32_t rank = 0; rank < scenario.c.num_ranks; ++rank)
    for (Origin& row : scenario.placements[static_cast<size_t>(rank)].rows)
      if (row.kind == Origin::Kind::kToken && !reaches(scenario.c, masked, row.source_rank, rank)) row.kind = Origin::Kind::kUnused;
}

}  // namespace

void policy_mask_of_a_single_call(const SceneSettings& settings) {
  const Scenario scenario(single_call_case(settings)), without(scenario.c, only_victim(settings));
  const auto act = [&](RankSeat& seat, const Member& member) {
    require_right(scenario, member);
    seat.set_stage(kReady);
    if (seat.rank() == settings.victim()) seat.wait_for_stage(-1, kWokenUp);
    seat.wait_for_stage(-1, kStruck);
    // The very call that misses the rank is right without it.
    for (int repeat = 0; repeat < 3; ++repeat) require_right(without, member);
    require_masked(member, only_victim(settings), next_generation(settings));
    require_one_timeout_at_most(member);
  };
  RankProcesses ranks = start_ranks("single", scenario, settings, act, TERN_ON_TIMEOUT_MASK);
  strike_and_join(ranks, settings, SIGKILL);
}

void policy_mask_of_a_stopped_rank(const SceneSettings& settings) {
  const Scenario scenario(single_call_case(settings)), without(scenario.c, only_victim(settings));
  const auto act = [&](RankSeat& seat, const Member& member) {
    require_right(scenario, member);
    seat.set_stage(kReady);
    if (seat.rank() == settings.victim()) {
      seat.wait_for_stage(-1, kWokenUp);
      const std::string text = failing(member, [&] {
        for (int repeat = 0; repeat < 4; ++repeat) require_right(scenario, member);
      });
      require(text.find("TERN_MASKED_OUT") != std::string::npos, text);
    } else {
      seat.wait_for_stage(-1, kStruck);
      for (int repeat = 0; repeat < 3; ++repeat) require_right(without, member);
      require_masked(member, only_victim(settings), next_generation(settings));
      seat.set_stage(kRecovered);
      seat.wait_for_stage(-1, kWokenUp);
      for (int repeat = 0; repeat < 3; ++repeat) require_right(without, member);
    }
    recover_readmitting(member);
    require_masked(member, {}, next_generation(settings) + 1);
    for (int repeat = 0; repeat < 3; ++repeat) require_right(scenario, member);
  };
  RankProcesses ranks = start_ranks("stopped", scenario, settings, act, TERN_ON_TIMEOUT_MASK);
  strike_and_join(ranks, settings, SIGSTOP);
}

void policy_mask_anywhere(const SceneSettings& settings, int signal) {
  constexpr int kBefore = 10, kAfter = 10;
  const Scenario scenario(single_call_case(settings)), without(scenario.c, only_victim(settings));
  const auto is_whole = [](const Member& member) { return member.exchange.state().health == TERN_HEALTH_OK; };
  const auto act = [&](RankSeat& seat, const Member& member) {
    if (seat.rank() == settings.victim()) {
      const std::string text = failing(member, [&] {
        for (int batch = 0;; ++batch) {
          member.trip(scenario).run();
          if (batch == kBefore) seat.set_stage(kReady);
        }
      });
      return require(text.find("TERN_MASKED_OUT") != std::string::npos, text);
    }
    for (int batch = 0, num_after = 0; num_after < kAfter; ++batch) {
      const bool was_whole = is_whole(member);
      RoundTrip trip = member.trip(was_whole ? scenario : without);
      trip.run();
      if (was_whole == is_whole(member)) require_right(trip);  // else somebody was missed somewhere in it
      if (batch == kBefore) seat.set_stage(kReady);
      if (!was_whole) ++num_after;
    }
    require_masked(member, only_victim(settings), 0);
    recover(member);
    require_masked(member, only_victim(settings), 1);
    require_right(without, member);
    seat.set_stage(kRecovered);
    if (signal == SIGSTOP) seat.wait_for_stage(-1, kWokenUp);
  };
  RankProcesses ranks = start_ranks("mask-anywhere", scenario, settings, act, TERN_ON_TIMEOUT_MASK);
  strike_and_join(ranks, settings, signal);
}

void policy_mask_of_a_combine(const SceneSettings& settings, const MissedCombine& missed) {
  Case c = single_call_case(settings);
  c.combine_mode = missed.mode;
  c.weighting = missed.weighting;
  const Scenario scenario(c), without(c, only_victim(settings));
  Scenario lost = scenario;  // the victim has got its rows, and nothing comes of them
  lost.placements[static_cast<size_t>(settings.victim())].rows.clear();
  leave_out_unreached(lost, without.masked);
  const auto act = [&](RankSeat& seat, const Member& member) {
    RoundTrip trip = member.trip(scenario);
    trip.dispatch(0);
    seat.set_stage(kReady);
    if (seat.rank() == settings.victim()) seat.wait_for_stage(-1, kWokenUp);
    seat.wait_for_stage(-1, kStruck);

    CombineCall combine;
    combine.load(lost, 0, {seat.rank(), member.get(), member.device.get(), lost.placements[static_cast<size_t>(seat.rank())].num_tokens});
    const DeviceMemory waits(*member.device, int64_t{settings.num_ranks} * static_cast<int64_t>(sizeof(int64_t)));
    member.device->fill(waits.data(), 0, waits.num_bytes());
    combine.args.wait_ns = waits.as<int64_t>();
    tern_launch launch;
    launch.stream = member.device->stream();
    require_ok(tern_combine(trip.plan(), &combine.args, &launch), "tern_combine");
    member.device->synchronise();
    std::vector<int64_t> wait_ns(static_cast<size_t>(settings.num_ranks));
    member.device->copy_out(wait_ns.data(), waits.data(), waits.num_bytes());
    require(combine.differences(c).empty(), join_lines(combine.differences(c)));
    require_right(trip);
    // It is reported at once, though the generation without it begins with the next operation.
    require_masked(member, only_victim(settings), 0);
    require_one_timeout_at_most(member);
    const int64_t waited_ms = wait_ns[static_cast<size_t>(settings.victim())] / 1'000'000;
    const bool until_deadline = member.exchange.metrics().timeouts > 0;
    // Another block of a GPU may have been at the deadline a moment before the one that counts. Between nodes a rank may hear before it waits,
    // and what the hosts of GPU ranks wait is not counted.
    const bool is_counted = settings.run.device == TERN_DEVICE_CPU || settings.run.ranks_per_node == 0;
    const int64_t least_ms = until_deadline && is_counted ? settings.run.timeout_ms * 9 / 10 : settings.run.ranks_per_node > 0 ? 0 : 1;
    require(waited_ms >= least_ms, fmt::format("{} ms were counted for the missing rank", waited_ms));

    for (int repeat = 0; repeat < 3; ++repeat) require_right(without, member);
    require_masked(member, only_victim(settings), next_generation(settings));
    require_one_timeout_at_most(member);
  };
  RankProcesses ranks = start_ranks("combine", scenario, settings, act, TERN_ON_TIMEOUT_MASK);
  strike_and_join(ranks, settings, SIGKILL);
}

void policy_mask_of_who_was_left_out(const SceneSettings& settings) {
  const Scenario scenario(single_call_case(settings)), without(scenario.c, only_victim(settings));
  const auto act = [&](RankSeat& seat, const Member& member) {
    require_right(scenario, member);
    seat.set_stage(kReady);
    wait_for_all(seat, settings, kReady);
    if (seat.rank() == settings.victim()) {
      wait_for_survivors(seat, settings, kRecovered);
      const std::string text = failing(member, [&] { require_right(scenario, member); });
      require(text.find("TERN_MASKED_OUT") != std::string::npos, text);
    } else {
      recover_without(only_victim(settings), member);
      require_right(without, member);
      seat.set_stage(kRecovered);
    }
  };
  RankProcesses ranks = start_ranks("left", scenario, settings, act, TERN_ON_TIMEOUT_MASK);
  expect_no_complaints(ranks.join());
}

void masked_rank_is_let_in_again(const SceneSettings& settings) {
  Case c = ordinary_case(settings);
  const Scenario plain(c);
  c.window_combine = true;
  const Scenario scenario(c), without(c, only_victim(settings));
  RankProcesses ranks = start_ranks("again", scenario, settings, [&](RankSeat& seat, const Member& member) {
    RoundTrip trip = member.trip(plain);
    trip.run();
    seat.set_stage(kReady);
    if (seat.rank() == settings.victim()) {
      seat.wait_for_stage(-1, kWokenUp);
      // What the others had sent before they failed may be enough for one operation.
      failing(member, [&] {
        for (int batch = 0; batch < 4; ++batch) trip.dispatch(batch);
      });
      require_left_out(member);
    } else {
      seat.wait_for_stage(-1, kStruck);
      require_names_victim(failing(member, [&] { trip.dispatch(0); }), "dispatch", TERN_OP_DISPATCH, member);
      recover_masking(member);
      require_right(without, member);
      seat.set_stage(kRecovered);
      seat.wait_for_stage(-1, kWokenUp);
    }
    recover_readmitting(member);
    require_masked(member, {}, 2);
    require_stale(member, trip);
    for (int repeat = 0; repeat < 3; ++repeat) require_right(scenario, member);
    // Nobody is masked any more: it is an ordinary recovery.
    recover_readmitting(member);
    require_masked(member, {}, 3);
    require_right_again(trip);
  });
  strike_and_join(ranks, settings, SIGSTOP);
}

}  // namespace tern::conformance
