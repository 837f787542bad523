// SPDX-License-Identifier: Apache-2.0
// TERN_ON_TIMEOUT_MASK on nodes that are declared on this host: the operation that misses a rank ends without its share, alike on all others,
// and the next ones leave it out until it is let in again.
#include <chrono>
#include <csignal>
#include <thread>

#include "conformance/runner.h"
#include "engine/failure_steps.h"
#include "engine/nodes.h"
#include "engine/support.h"

namespace tern::conformance {
namespace {

// How ranks go missing, and what the others are about to do then.
enum class Strike { kKill, kStop, kSkip };
enum class Missed { kRoute, kDispatch, kCombine };

struct MaskScene {
  Strike strike = Strike::kKill;
  Missed missed = Missed::kRoute;
  int32_t num_nodes = 2;
  int32_t ranks_per_node = 2;
  std::vector<int32_t> victims = {2};
  bool late_mate = false;  // the last rank comes late to the operation that misses somebody
  Case c;                  // without the shape of nodes

  SceneSettings settings() const {
    SceneSettings result;
    result.num_ranks = num_nodes * ranks_per_node;
    result.run.timeout_ms = full_scale() ? 2'000 : 10'000;
    result.run.ranks_per_node = ranks_per_node;
    result.process_timeout_ms = 30 * result.run.timeout_ms;
    return result;
  }
  Case on_nodes() const {
    Case result = c;
    result.num_ranks = num_nodes * ranks_per_node;
    result.ranks_per_node = ranks_per_node;
    result.num_topk = 3;
    return result.normalized();
  }
  bool is_victim(int32_t rank) const { return std::ranges::count(victims, rank) != 0; }
  std::vector<uint8_t> mask() const {
    std::vector<uint8_t> result(static_cast<size_t>(num_nodes * ranks_per_node));
    for (const int32_t victim : victims) result[static_cast<size_t>(victim)] = 1;
    return result;
  }
};

// Where the plan has its rows, of which those that must cross a masked rank are zero: only the marks of padding are left.
Scenario with_rows_missing(const Scenario& scenario, const std::vector<uint8_t>& mask) {
  Scenario result = scenario;
  for (int32_t rank = 0; rank < scenario.c.num_ranks; ++rank)
    for (Origin& row : result.placements[static_cast<size_t>(rank)].rows)
      if (row.kind == Origin::Kind::kToken && !reaches(scenario.c, mask, row.source_rank, rank)) row = {.kind = Origin::Kind::kPadding};
  result.c.zero_padding = true;
  return result;
}

void require_one_timeout_for_each(const MaskScene& scene, const Member& member) {
  const auto timeouts = member.exchange.metrics().timeouts;
  require(timeouts <= scene.victims.size(), fmt::format("{} waits have ended at their deadline", timeouts));
}

// The operation that misses somebody, along a plan of all ranks. It is reported at once; then the plan is stale.
void miss(const MaskScene& scene, const Member& member, RoundTrip& trip) {
  if (scene.missed == Missed::kDispatch) trip.dispatch(2);
  if (scene.missed == Missed::kCombine) trip.combine(2);
  require_right(trip);
  require_masked(member, scene.mask(), 0);
  require_one_timeout_for_each(scene, member);
  require_stale(member, trip);
}

// Whole batches until one goes through: where the plan is stale all survivors route again. False: not this time.
bool do_batch(RoundTrip& trip, const Case& c, int batch) {
  try {
    if (!c.fused) trip.route();
    trip.dispatch(batch);
    trip.combine(batch);
    return true;
  } catch (const std::runtime_error& error) {
    if (std::string(error.what()).find("TERN_STALE_PLAN") == std::string::npos) throw;
    return false;
  }
}

void survive(const MaskScene& scene, RankSeat& seat, const Member& member, RoundTrip& trip) {
  const Scenario without(scene.on_nodes(), scene.mask());
  if (scene.missed != Missed::kRoute) miss(scene, member, trip);
  // Halves are not done again: the plan of a send that somebody missed is stale behind its receive.
  if (without.c.fused && without.c.phases) {
    RoundTrip halves = member.trip(without);
    require(!do_batch(halves, without.c, 0), "the plan was not stale");
  }
  for (int repeat = 0; repeat < 2; ++repeat) require_right(without, member);
  require_masked(member, scene.mask(), 1);
  require_one_timeout_for_each(scene, member);
  seat.set_stage(kRecovered);
  if (scene.strike == Strike::kKill) return;
  seat.wait_for_stage(-1, kWokenUp);
  for (int repeat = 0; repeat < 5; ++repeat) require_right(without, member);
}

// A victim that lives learns that the others have gone on, and does nothing else.
void learn(const Member& member, RoundTrip& trip) {
  const std::string text = failing(member, [&] {
    for (int batch = 0; batch < 4; ++batch) trip.dispatch(batch);
  });
  require(text.find("TERN_MASKED_OUT") != std::string::npos, text);
}

void come_back(const Scenario& scenario, const Member& member) {
  recover_readmitting(member);
  require_masked(member, {}, 2);
  for (int repeat = 0; repeat < 2; ++repeat) require_right(scenario, member);
}

void run_rank(const MaskScene& scene, const Scenario& scenario, RankSeat& seat, const Member& member) {
  Scenario current = scenario;
  RoundTrip trip = member.trip(current);
  trip.run();
  if (scene.missed == Missed::kCombine) trip.dispatch(2);
  require_right(trip);
  seat.set_stage(kReady);
  if (scene.is_victim(seat.rank())) {
    seat.wait_for_stage(-1, kWokenUp);
    learn(member, trip);
  } else {
    seat.wait_for_stage(-1, kStruck);
    if (scene.late_mate && seat.rank() + 1 == seat.num_ranks()) std::this_thread::sleep_for(std::chrono::milliseconds(300));
    current = with_rows_missing(scenario, scene.mask());
    survive(scene, seat, member, trip);
    if (scene.strike == Strike::kKill) return;
  }
  come_back(scenario, member);
}

void expect_right(const MaskScene& scene) {
  const SceneSettings settings = scene.settings();
  const Scenario scenario(scene.on_nodes());
  const auto act = [&](RankSeat& seat, const Member& member) { run_rank(scene, scenario, seat, member); };
  RankProcesses ranks = start_ranks("nodes-mask", scenario, settings, act, TERN_ON_TIMEOUT_MASK);
  const auto signal_victims = [&](int signal) {
    for (const int32_t victim : scene.victims) ASSERT_EQ(kill(ranks.pid(victim), signal), 0);
  };
  wait_for_all(ranks, settings, kReady);
  if (scene.strike == Strike::kKill) signal_victims(SIGKILL);
  if (scene.strike == Strike::kStop) signal_victims(SIGSTOP);
  ranks.set_stage(kStruck);
  for (int32_t rank = 0; rank < settings.num_ranks; ++rank)
    if (!scene.is_victim(rank)) ranks.wait_for_stage(rank, kRecovered);
  if (scene.strike == Strike::kStop) signal_victims(SIGCONT);
  ranks.set_stage(kWokenUp);
  expect_no_complaints(ranks.join(), scene.strike == Strike::kKill ? scene.victims : std::vector<int32_t>());
}

Case exact_rows() {
  Case c;
  c.layout = TERN_LAYOUT_EXPERT_MAJOR;
  c.weighting = TERN_WEIGHTS_DISPATCH;
  return c;
}

Case single_call() {
  Case c;
  c.layout = TERN_LAYOUT_EXPERT_PADDED;
  c.extent = TERN_EXTENT_WORST;
  c.fused = true;
  c.mode = TERN_MODE_LATENCY;
  c.encoding = TERN_ENCODING_FP8_F32;
  c.hidden = 256;
  return c;
}

Case by_phases(Case c) {
  c.phases = true;
  return c;
}

class NodesMask : public ::testing::Test {
 protected:
  void SetUp() override {
    const std::string problem = missing_network(run_as_processes(smallest_case_on_nodes()));
    if (!problem.empty()) GTEST_SKIP() << problem;
  }
};

TEST_F(NodesMask, RouteWithoutAStoppedRank) { expect_right({.strike = Strike::kStop, .missed = Missed::kRoute, .c = exact_rows()}); }
TEST_F(NodesMask, DispatchWithoutAKilledRank) { expect_right({.strike = Strike::kKill, .missed = Missed::kDispatch, .c = exact_rows()}); }
TEST_F(NodesMask, DispatchByPhasesWithoutAStoppedRank) {
  expect_right({.strike = Strike::kStop, .missed = Missed::kDispatch, .c = by_phases(exact_rows())});
}
TEST_F(NodesMask, DispatchFromWindowToWindowWithoutAStoppedRank) {
  Case c = exact_rows();
  c.layout = TERN_LAYOUT_RANK_MAJOR;
  c.weighting = TERN_WEIGHTS_NONE;
  c.window_dispatch = true;
  c.max_tokens = 100;  // several rounds
  c = c.normalized();
  c.staging_bytes = 300'000;
  expect_right({.strike = Strike::kStop, .missed = Missed::kDispatch, .c = c});
}
// The others are through with the combine before the last one begins it, since nothing comes to them over the missing rank.
TEST_F(NodesMask, CombineWithoutAKilledRankAndWithALateOne) {
  expect_right({.strike = Strike::kKill, .missed = Missed::kCombine, .late_mate = true, .c = exact_rows()});
}
TEST_F(NodesMask, CombineWithWeightsOfTheOwnerWithoutARankThatSkipsIt) {
  Case c = exact_rows();
  c.weighting = TERN_WEIGHTS_OWNER;
  c.return_weights = true;
  expect_right({.strike = Strike::kSkip, .missed = Missed::kCombine, .c = c});
}
TEST_F(NodesMask, ExactCombineByPhasesWithoutAStoppedRank) {
  Case c = by_phases(exact_rows());
  c.combine_mode = TERN_COMBINE_EXACT;
  expect_right({.strike = Strike::kStop, .missed = Missed::kCombine, .c = c});
}
TEST_F(NodesMask, PulledCombineWithoutAStoppedRank) {
  Case c = exact_rows();
  c.window_combine = true;
  c.mode = TERN_MODE_THROUGHPUT;
  expect_right({.strike = Strike::kStop, .missed = Missed::kCombine, .c = c});
}
TEST_F(NodesMask, NodesOfOneRank) {
  expect_right({.strike = Strike::kStop, .missed = Missed::kCombine, .ranks_per_node = 1, .victims = {1}, .c = exact_rows()});
}
TEST_F(NodesMask, SingleCallsOnThreeNodesOfOneRank) {
  expect_right({.strike = Strike::kSkip, .num_nodes = 3, .ranks_per_node = 1, .victims = {1}, .c = single_call()});
  expect_right({.strike = Strike::kKill, .num_nodes = 3, .ranks_per_node = 1, .victims = {1}, .c = by_phases(single_call())});
}
// The first rank's rail misses both, while the second one waits for the first.
TEST_F(NodesMask, TwoRanksOfARailSkipIt) {
  expect_right({.strike = Strike::kSkip, .missed = Missed::kCombine, .num_nodes = 3, .victims = {2, 4}, .c = exact_rows()});
}
TEST_F(NodesMask, TwoNodesOfOneRankSkipIt) {
  expect_right(
      {.strike = Strike::kSkip, .missed = Missed::kDispatch, .num_nodes = 4, .ranks_per_node = 1, .victims = {1, 2}, .c = exact_rows()});
}
TEST_F(NodesMask, ANodeVanishes) {
  expect_right({.strike = Strike::kKill, .missed = Missed::kCombine, .victims = {2, 3}, .c = exact_rows()});
  expect_right({.strike = Strike::kStop, .num_nodes = 3, .victims = {2, 3}, .c = single_call()});
}

bool routes(RoundTrip trip) {
  try {
    trip.route();
    return true;
  } catch (const std::runtime_error&) {
    return false;
  }
}

int64_t num_masked(const Member& member) {
  const tern_exchange_state state = member.exchange.state();
  return std::count(std::begin(state.masked), std::end(state.masked), 1);
}

// All go on without a rank that is gone, and one gets no memory for its windows then: operations fail until it does.
TEST_F(NodesMask, ARankWithoutMemoryForTheNextGeneration) {
  MaskScene scene;
  scene.c = exact_rows();
  const SceneSettings settings = scene.settings();
  const Scenario scenario(scene.on_nodes()), without(scene.on_nodes(), scene.mask());
  const auto act = [&](RankSeat& seat, const Member& member) {
    RoundTrip trip = member.trip(scenario);
    trip.run();
    seat.set_stage(kReady);
    if (scene.is_victim(seat.rank())) seat.wait_for_stage(-1, kWokenUp);  // never
    seat.wait_for_stage(-1, kStruck);
    trip.dispatch(2);  // misses the rank
    int num_failed = 0;
    if (seat.rank() == 1) {
      const NoSharedMemory none(true);
      for (; num_failed < 2; ++num_failed) failing(member, [&] { member.trip(without).route(); });
    }
    while (!routes(member.trip(without))) require(++num_failed < 10, "no generation begins");
    // Each attempt has a number; who is slow joins a later one.
    require(member.exchange.state().generation > 1, "the generation began without a rank's windows");
    require_right(without, member);
    require(member.exchange.state().masked[settings.victim()] == 1 && num_masked(member) == 1, "others are masked out");
  };
  RankProcesses ranks = start_ranks("nodes-mask-memory", scenario, settings, act, TERN_ON_TIMEOUT_MASK);
  strike_and_join(ranks, settings, SIGKILL);
}

// In the middle of whatever it does.
void go_on_anywhere(RankSeat& seat, const Member& member, const Scenario& scenario, const Scenario& without) {
  const auto generation = [&] { return member.exchange.state().generation; };
  for (int batch = 0, num_after = 0; num_after < 30; ++batch) {
    const uint32_t before = generation();
    RoundTrip trip = member.trip(before == 0 ? scenario : without);
    if (!do_batch(trip, scenario.c, batch)) {
      --batch;
      continue;
    }
    // What somebody was missed in is looked at elsewhere.
    const bool is_whole = before > 0 || member.exchange.state().health == TERN_HEALTH_OK;
    if (is_whole) require_right(trip);
    if (batch == 10) seat.set_stage(kReady);
    if (generation() > 0) ++num_after;
  }
  require_masked(member, without.masked, 1);
  seat.set_stage(kRecovered);
}

void expect_right_anywhere(int signal, const Case& c) {
  MaskScene scene;
  scene.c = c;
  const SceneSettings settings = scene.settings();
  const Scenario scenario(scene.on_nodes()), without(scene.on_nodes(), scene.mask());
  const auto act = [&](RankSeat& seat, const Member& member) {
    if (!scene.is_victim(seat.rank())) return go_on_anywhere(seat, member, scenario, without);
    const std::string text = failing(member, [&] { go_on_anywhere(seat, member, scenario, without); });
    require(text.find("TERN_MASKED_OUT") != std::string::npos, text);
  };
  RankProcesses ranks = start_ranks("nodes-mask-anywhere", scenario, settings, act, TERN_ON_TIMEOUT_MASK);
  strike_and_join(ranks, settings, signal);
}

TEST_F(NodesMask, StoppedAnywhere) { expect_right_anywhere(SIGSTOP, exact_rows()); }
TEST_F(NodesMask, KilledAnywhere) {
  expect_right_anywhere(SIGKILL, exact_rows());
  expect_right_anywhere(SIGKILL, single_call());
}

}  // namespace
}  // namespace tern::conformance
