// SPDX-License-Identifier: Apache-2.0
// Ranks that die, stop or do not come, with real processes and real signals: all others get an error that names the rank,
// in bounded time; they go on without it, and it harms nobody when it wakes up.
#include <signal.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <optional>
#include <tern/tern.hpp>
#include <thread>

#include "conformance/processes.h"
#include "engine/support.h"

namespace tern::conformance {
namespace {

constexpr int32_t kNumRanks = 4, kVictim = 2;
constexpr uint64_t kReady = 1, kStruck = 1, kRecovered = 2, kWokenUp = 2, kAnswered = 2;

int64_t timeout_ms() { return full_scale() ? 2'000 : 10'000; }

Case ordinary_case(uint64_t seed = 7) {
  Case c;
  c.seed = seed;
  c.num_ranks = kNumRanks;
  c.num_topk = 3;
  c.layout = TERN_LAYOUT_EXPERT_MAJOR;
  c.weighting = TERN_WEIGHTS_DISPATCH;
  return c;
}

std::vector<uint8_t> only(int32_t rank) {
  std::vector<uint8_t> mask(kNumRanks, 0);
  mask[static_cast<size_t>(rank)] = 1;
  return mask;
}

void require(bool condition, const std::string& what) {
  if (!condition) throw std::runtime_error(what);
}

void require_ok(tern_status status, const char* what) {
  require(status == TERN_OK, fmt::format("{}: {}: {}", what, tern_status_name(status), tern_last_error()));
}

// A rank's group and exchange, in its process.
struct Member {
  Member(RankSeat& seat, const std::string& name, tern_exchange_options options)
      : group(Group::from_allgather(seat.rank(), seat.num_ranks(), RankSeat::allgather, &seat, group_options(name))),
        exchange(group, options) {}

  static tern_group_options group_options(const std::string& name) {
    tern_group_options options;
    options.name = name.c_str();
    return options;
  }

  tern_exchange* get() const { return exchange.get(); }

  Group group;
  Exchange exchange;
};

tern_exchange_options exchange_options(const Scenario& scenario, tern_timeout_policy policy = TERN_ON_TIMEOUT_ABORT) {
  tern_exchange_options options = scenario.exchange_options();
  options.device = TERN_DEVICE_CPU;
  options.timeout_ms = timeout_ms();
  options.on_timeout = policy;
  return options;
}

std::string group_name(const char* test) { return fmt::format("failure-{}-{}", test, getpid()); }

// A whole cycle with a new plan must be right.
void require_right(const Scenario& scenario, int32_t rank, tern_exchange* exchange) {
  RoundTrip trip(scenario, rank, exchange);
  trip.run();
  require(trip.differences().empty(), join_lines(trip.differences()));
}

// Runs a step that must fail within reasonable time because of a rank that is gone; returns the text of the error.
template <typename Step>
std::string failing(Step step) {
  const auto start = std::chrono::steady_clock::now();
  std::string text;
  try {
    step();
  } catch (const std::runtime_error& error) {
    text = error.what();
  }
  const auto elapsed = std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::steady_clock::now() - start).count();
  require(!text.empty(), "the operation succeeded without the missing rank");
  require(elapsed < 10 * timeout_ms(), fmt::format("the error took {} ms", elapsed));
  return text;
}

// The error and the record name the rank, the operation and the epoch.
void require_names_victim(const std::string& text, const char* operation, tern_operation recorded, const Exchange& exchange) {
  require(text.find("TERN_TIMEOUT") != std::string::npos || text.find("TERN_ABORTED") != std::string::npos, text);
  for (const std::string& part : {fmt::format("rank {}", kVictim), std::string(operation), std::string("epoch")})
    require(text.find(part) != std::string::npos, fmt::format("\"{}\" is not in: {}", part, text));
  const tern_exchange_state state = exchange.state();
  require(state.health == TERN_HEALTH_FAILED, "health is not FAILED");
  require(state.failure.status == TERN_TIMEOUT, fmt::format("the record's status is {}", tern_status_name(state.failure.status)));
  require(state.failure.awaited == kVictim, fmt::format("the record awaits rank {}", state.failure.awaited));
  require(state.failure.waiter >= 0 && state.failure.waiter < kNumRanks && state.failure.waiter != kVictim, "the waiter is no survivor");
  require(state.failure.operation == recorded, fmt::format("the record's operation is {}", state.failure.operation));
  require(state.failure.expected_epoch > state.failure.seen_epoch, "the record's epochs make no sense");
}

void require_masked(const Exchange& exchange, const std::vector<uint8_t>& mask, uint32_t generation) {
  const tern_exchange_state state = exchange.state();
  const bool any = std::find(mask.begin(), mask.end(), 1) != mask.end();
  require(state.health == (any ? TERN_HEALTH_DEGRADED : TERN_HEALTH_OK), fmt::format("health is {}", static_cast<int>(state.health)));
  require(state.generation == generation, fmt::format("generation is {}, expected {}", state.generation, generation));
  require(state.failure.status == TERN_OK, "the record of the last generation is still there");
  for (int32_t rank = 0; rank < kNumRanks; ++rank)
    require(state.masked[rank] == (mask.empty() ? 0 : mask[static_cast<size_t>(rank)]),
            fmt::format("masked[{}] is {}", rank, state.masked[rank]));
}

void recover_masking(const Exchange& exchange) {
  tern_recover_options options;
  options.allow_mask = 1;
  require_ok(tern_exchange_recover(exchange.get(), &options), "tern_exchange_recover");
}

void expect_no_complaints(const std::vector<RankReport>& reports, std::optional<int32_t> dead) {
  for (size_t rank = 0; rank < reports.size(); ++rank) {
    if (dead.has_value() && static_cast<int32_t>(rank) == *dead) continue;
    EXPECT_TRUE(reports[rank].finished) << "rank " << rank << " left no report";
    EXPECT_EQ(reports[rank].text, "") << "rank " << rank;
  }
}

// What survivors do once the victim is out of action: see the error, recover without it, go on.
void survive(RankSeat& seat, const Member& member, RoundTrip& trip, const Case& c) {
  seat.wait_for_stage(-1, kStruck);
  const std::string text = failing([&] { trip.dispatch(0); });
  require_names_victim(text, "dispatch", TERN_OP_DISPATCH, member.exchange);
  // A failed exchange stays failed until it is recovered.
  require(!failing([&] { trip.combine(0); }).empty(), "");

  recover_masking(member.exchange);
  require_masked(member.exchange, only(kVictim), 1);
  const std::string stale = failing([&] { trip.dispatch(1); });
  require(stale.find("TERN_STALE_PLAN") != std::string::npos, stale);

  const Scenario without(c, only(kVictim));
  for (int repeat = 0; repeat < 3; ++repeat) require_right(without, seat.rank(), member.get());
  seat.set_stage(kRecovered);
}

TEST(Failure, KilledRankIsNamedAndMasked) {
  const std::string name = group_name("killed");
  const Scenario scenario(ordinary_case());
  RankProcesses ranks(kNumRanks, 20 * timeout_ms(), [&](RankSeat& seat) {
    const Member member(seat, name, exchange_options(scenario));
    RoundTrip trip(scenario, seat.rank(), member.get());
    trip.run();
    seat.set_stage(kReady);
    if (seat.rank() == kVictim) seat.wait_for_stage(-1, kWokenUp);
    survive(seat, member, trip, scenario.c);
    // A plan of the old generation lives again once it is routed.
    const Scenario without(scenario.c, only(kVictim));
    RoundTrip again(without, seat.rank(), member.get());
    again.route();
    again.dispatch(2);
    again.combine(2);
    return join_lines(again.differences());
  });
  for (int32_t rank = 0; rank < kNumRanks; ++rank) ranks.wait_for_stage(rank, kReady);
  const std::string victim_pid = std::to_string(ranks.pid(kVictim));
  ASSERT_EQ(kill(ranks.pid(kVictim), SIGKILL), 0);
  ranks.set_stage(kStruck);
  expect_no_complaints(ranks.join(), kVictim);

  for (const auto& entry : std::filesystem::directory_iterator("/dev/shm")) {
    const std::string left = entry.path().filename().string();
    EXPECT_TRUE(left.find(name) == std::string::npos && left.find(victim_pid) == std::string::npos) << left << " was left behind";
  }
}

TEST(Failure, StoppedRankWakesUpAndHarmsNobody) {
  const std::string name = group_name("stopped");
  const Scenario scenario(ordinary_case());
  RankProcesses ranks(kNumRanks, 20 * timeout_ms(), [&](RankSeat& seat) {
    const Member member(seat, name, exchange_options(scenario));
    RoundTrip trip(scenario, seat.rank(), member.get());
    trip.run();
    seat.set_stage(kReady);
    if (seat.rank() == kVictim) {
      seat.wait_for_stage(-1, kWokenUp);
      const std::string text = failing([&] { trip.dispatch(0); });
      require(text.find("returned TERN_OK") == std::string::npos, text);
      const tern_status status = tern_exchange_recover(member.get(), nullptr);
      require(status == TERN_MASKED_OUT, fmt::format("recover of the masked rank: {}: {}", tern_status_name(status), tern_last_error()));
      seat.set_stage(kAnswered);
      return std::string();
    }
    survive(seat, member, trip, scenario.c);
    // Work goes on while the other one wakes up, and afterwards.
    const Scenario without(scenario.c, only(kVictim));
    for (int repeat = 0; repeat < 50; ++repeat) require_right(without, seat.rank(), member.get());
    seat.wait_for_stage(kVictim, kAnswered);
    for (int repeat = 0; repeat < 5; ++repeat) require_right(without, seat.rank(), member.get());
    return std::string();
  });
  for (int32_t rank = 0; rank < kNumRanks; ++rank) ranks.wait_for_stage(rank, kReady);
  ASSERT_EQ(kill(ranks.pid(kVictim), SIGSTOP), 0);
  ranks.set_stage(kStruck);
  ranks.wait_for_stage(0, kRecovered);
  ASSERT_EQ(kill(ranks.pid(kVictim), SIGCONT), 0);
  ranks.set_stage(kWokenUp);
  expect_no_complaints(ranks.join(), std::nullopt);
}

// The victim is stopped wherever it happens to be, in the middle of copying too.
TEST(Failure, StoppedAnywhere) {
  const std::string name = group_name("anywhere");
  const Case c = ordinary_case();
  const Scenario scenario(c), without(c, only(kVictim));
  RankProcesses ranks(kNumRanks, 20 * timeout_ms(), [&](RankSeat& seat) {
    const Member member(seat, name, exchange_options(scenario));
    const std::string text = failing([&] {
      RoundTrip trip(scenario, seat.rank(), member.get());
      for (int batch = 0; batch < 1'000'000; ++batch) {
        if (batch == 10) seat.set_stage(kReady);
        trip.route();
        trip.dispatch(batch);
        trip.combine(batch);
        require(trip.differences().empty(), join_lines(trip.differences()));
      }
    });
    if (seat.rank() == kVictim) return std::string();  // an error is all that it can get
    require(text.find("TERN_TIMEOUT") != std::string::npos || text.find("TERN_ABORTED") != std::string::npos, text);
    recover_masking(member.exchange);
    require_masked(member.exchange, only(kVictim), 1);
    require_right(without, seat.rank(), member.get());
    seat.set_stage(kRecovered);
    for (int repeat = 0; repeat < 50; ++repeat) require_right(without, seat.rank(), member.get());
    return std::string();
  });
  for (int32_t rank = 0; rank < kNumRanks; ++rank) ranks.wait_for_stage(rank, kReady);
  ASSERT_EQ(kill(ranks.pid(kVictim), SIGSTOP), 0);
  for (int32_t rank = 0; rank < kNumRanks; ++rank)
    if (rank != kVictim) ranks.wait_for_stage(rank, kRecovered);
  ASSERT_EQ(kill(ranks.pid(kVictim), SIGCONT), 0);
  expect_no_complaints(ranks.join(), std::nullopt);
}

// One rank leaves out a call; nobody is dead, and all go on together.
TEST(Failure, RecoveryOfAllRanks) {
  const std::string name = group_name("skipped");
  const Scenario scenario(ordinary_case());
  RankProcesses ranks(kNumRanks, 20 * timeout_ms(), [&](RankSeat& seat) {
    const Member member(seat, name, exchange_options(scenario));
    RoundTrip trip(scenario, seat.rank(), member.get());
    trip.run();
    if (seat.rank() == kVictim) {
      for (int32_t rank = 0; rank < kNumRanks; ++rank)
        if (rank != kVictim) seat.wait_for_stage(rank, kReady);
      require(member.exchange.state().health == TERN_HEALTH_FAILED, "the rank that left out a call was not told");
    } else {
      require_names_victim(failing([&] { trip.dispatch(0); }), "dispatch", TERN_OP_DISPATCH, member.exchange);
      seat.set_stage(kReady);
    }
    require_ok(tern_exchange_recover(member.get(), nullptr), "tern_exchange_recover");
    require_masked(member.exchange, {}, 1);
    const std::string stale = failing([&] { trip.dispatch(1); });
    require(stale.find("TERN_STALE_PLAN") != std::string::npos, stale);
    for (int repeat = 0; repeat < 3; ++repeat) require_right(scenario, seat.rank(), member.get());
    trip.route();
    trip.dispatch(3);
    trip.combine(3);
    return join_lines(trip.differences());
  });
  expect_no_complaints(ranks.join(), std::nullopt);
}

TEST(Failure, RecoveryWithoutAMaskNeedsEveryRank) {
  const std::string name = group_name("unmasked");
  const Scenario scenario(ordinary_case());
  RankProcesses ranks(kNumRanks, 20 * timeout_ms(), [&](RankSeat& seat) {
    const Member member(seat, name, exchange_options(scenario));
    if (seat.rank() != kVictim) {
      const tern_status status = tern_exchange_recover(member.get(), nullptr);
      require(status == TERN_TIMEOUT || status == TERN_ABORTED, fmt::format("{}: {}", tern_status_name(status), tern_last_error()));
      require(std::string(tern_last_error()).find(fmt::format("rank {}", kVictim)) != std::string::npos, tern_last_error());
      recover_masking(member.exchange);
      require(member.exchange.state().masked[kVictim] == 1, "the rank is not masked");
      require_right(Scenario(scenario.c, only(kVictim)), seat.rank(), member.get());
    }
    seat.set_stage(kReady);
    for (int32_t rank = 0; rank < kNumRanks; ++rank) seat.wait_for_stage(rank, kReady);
    return std::string();
  });
  expect_no_complaints(ranks.join(), std::nullopt);
}

// A healthy rank that the others leave out on purpose learns of it.
TEST(Failure, ChosenMask) {
  const std::string name = group_name("chosen");
  const Scenario scenario(ordinary_case());
  RankProcesses ranks(kNumRanks, 20 * timeout_ms(), [&](RankSeat& seat) {
    const Member member(seat, name, exchange_options(scenario));
    require_right(scenario, seat.rank(), member.get());
    if (seat.rank() != kVictim) {
      const std::vector<uint8_t> mask = only(kVictim);
      tern_recover_options options;
      options.mask = mask.data();
      require_ok(tern_exchange_recover(member.get(), &options), "tern_exchange_recover");
      require_masked(member.exchange, mask, 1);
      require_right(Scenario(scenario.c, mask), seat.rank(), member.get());
      seat.set_stage(kReady);
      seat.wait_for_stage(kVictim, kAnswered);
      require_right(Scenario(scenario.c, mask), seat.rank(), member.get());
      return std::string();
    }
    for (int32_t rank = 0; rank < kNumRanks; ++rank)
      if (rank != kVictim) seat.wait_for_stage(rank, kReady);
    failing([&] { require_right(scenario, seat.rank(), member.get()); });
    const tern_status status = tern_exchange_recover(member.get(), nullptr);
    require(status == TERN_MASKED_OUT, fmt::format("{}: {}", tern_status_name(status), tern_last_error()));
    seat.set_stage(kAnswered);
    return std::string();
  });
  expect_no_complaints(ranks.join(), std::nullopt);
}

// With the policy MASK the operation itself goes on, and the following ones run without the rank.
TEST(Failure, PolicyMask) {
  const std::string name = group_name("policy");
  const Scenario scenario(ordinary_case()), without(ordinary_case(), only(kVictim));
  RankProcesses ranks(kNumRanks, 20 * timeout_ms(), [&](RankSeat& seat) {
    const Member member(seat, name, exchange_options(scenario, TERN_ON_TIMEOUT_MASK));
    require_right(scenario, seat.rank(), member.get());
    seat.set_stage(kReady);
    if (seat.rank() == kVictim) seat.wait_for_stage(-1, kWokenUp);
    seat.wait_for_stage(-1, kStruck);

    const PlanHandle plan = make_plan(member.get(), scenario.plan_options());
    tern_routing routing;
    const RankRouting& given = scenario.routings[static_cast<size_t>(seat.rank())];
    routing.topk_idx = given.topk_idx.data();
    routing.num_tokens = given.num_tokens;
    require_ok(tern_plan_route(plan.get(), &routing, nullptr, nullptr), "tern_plan_route");
    for (int repeat = 0; repeat < 3; ++repeat) require_right(without, seat.rank(), member.get());
    require_masked(member.exchange, only(kVictim), 1);
    return std::string();
  });
  for (int32_t rank = 0; rank < kNumRanks; ++rank) ranks.wait_for_stage(rank, kReady);
  ASSERT_EQ(kill(ranks.pid(kVictim), SIGKILL), 0);
  ranks.set_stage(kStruck);
  expect_no_complaints(ranks.join(), kVictim);
}

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
