// SPDX-License-Identifier: Apache-2.0
// How operations follow one another: phases, rounds, sends in flight, ranks that run ahead, lanes and exchanges side by side.
#include <algorithm>
#include <chrono>
#include <tern/tern.hpp>
#include <thread>

#include "engine/support.h"

namespace tern::conformance {
namespace {

#ifdef __SANITIZE_THREAD__
constexpr bool kUnderThreadSanitizer = true;
#else
constexpr bool kUnderThreadSanitizer = false;
#endif

// Staging that holds about `num_tokens` tokens of the case, and at least its counts.
int64_t staging_for(const Case& c, int64_t num_tokens) {
  const int64_t row_bytes = Scenario(c).exchange_options().max_row_bytes;
  const int64_t token_bytes =
      (row_bytes + 16 * c.num_topk + 256) * (c.combine_mode == TERN_COMBINE_EXACT ? c.num_topk : std::min(c.num_topk, c.num_ranks));
  const int64_t count_bytes = 8 * (c.num_experts() + c.num_ranks) + 1024;
  return 2 * c.num_lanes * c.num_ranks * std::max(num_tokens * token_bytes, count_bytes);
}

TEST(Phases, EveryLayoutAndMemory) {
  for (const tern_layout layout : {TERN_LAYOUT_RANK_MAJOR, TERN_LAYOUT_EXPERT_MAJOR, TERN_LAYOUT_EXPERT_PADDED})
    for (const tern_extent extent : {TERN_EXTENT_EXACT, TERN_EXTENT_WORST})
      for (const bool window : {false, true})
        for (const tern_combine_mode mode : {TERN_COMBINE_HIERARCHICAL, TERN_COMBINE_EXACT}) {
          Case c = ordinary_case(31);
          c.layout = layout;
          c.extent = extent;
          c.phases = c.delays = true;
          c.fused = extent == TERN_EXTENT_WORST && window;
          c.window_tokens = c.window_dispatch = c.window_combine = window;
          c.combine_mode = mode;
          expect_right_as_threads(c.normalized());
        }
}

// tern.h: staging computed from the shapes lets a dispatch and a combine of them run in one round, as phases need it; with mode EXACT each
// token counts once for each of its entries.
TEST(Phases, StagingComputedFromTheShapesSuffices) {
  for (const tern_combine_mode mode : {TERN_COMBINE_HIERARCHICAL, TERN_COMBINE_EXACT}) {
    Case c = ordinary_case(33);
    c.phases = true;
    c.combine_mode = mode;
    const Scenario scenario(c);
    tern_exchange_options options = scenario.exchange_options();
    options.max_tokens = mode == TERN_COMBINE_EXACT ? c.max_tokens * c.num_topk : c.max_tokens;
    expect_right(c, run_threads(c.num_ranks, options, {}, [&](int32_t rank, tern_exchange* exchange, RankDevice&) {
                   RoundTrip trip(scenario, rank, exchange);
                   trip.run();
                   return trip.differences();
                 }));
  }
}

TEST(Rounds, BatchesLargerThanTheStaging) {
  for (const tern_layout layout : {TERN_LAYOUT_RANK_MAJOR, TERN_LAYOUT_EXPERT_MAJOR, TERN_LAYOUT_EXPERT_PADDED})
    for (const Routing routing : {Routing::kUniform, Routing::kOneExpert, Routing::kHoles})
      for (const int64_t tokens_in_staging : {1, 4}) {
        Case c = ordinary_case(41);
        c.layout = layout;
        c.routing = routing;
        c.max_tokens = 50;
        c.combine_mode = tokens_in_staging == 1 ? TERN_COMBINE_EXACT : TERN_COMBINE_HIERARCHICAL;
        c = c.normalized();
        c.staging_bytes = staging_for(c, tokens_in_staging);
        expect_right_as_threads(c);
      }
}

TEST(Rounds, RanksWithUnequalNumbersOfTokens) {
  for (const Spread spread : {Spread::kRandom, Spread::kEmpty, Spread::kNothing}) {
    Case c = ordinary_case(43);
    c.max_tokens = 40;
    c.spread = spread;
    c.delays = true;
    c.encoding = TERN_ENCODING_FP8_UE8M0;
    c.staging_bytes = staging_for(c, 3);
    expect_right_as_threads(c.normalized());
    expect_right_as_processes(c.normalized());
  }
}

TEST(Rounds, AreCounted) {
  Case c = ordinary_case(44);
  c.max_tokens = 50;
  c.staging_bytes = staging_for(c, 2);
  const Scenario scenario(c);
  expect_right(c, run_threads(c.num_ranks, scenario.exchange_options(), {}, [&](int32_t rank, tern_exchange* exchange, RankDevice&) {
                 RoundTrip trip(scenario, rank, exchange);
                 trip.run();
                 tern_metrics metrics;
                 EXPECT_EQ(tern_exchange_get_metrics(exchange, &metrics), TERN_OK);
                 EXPECT_GT(metrics.rounds, 4u);
                 EXPECT_EQ(metrics.num_routes, 1u);
                 EXPECT_EQ(metrics.num_dispatches, 2u);
                 EXPECT_EQ(metrics.num_combines, 2u);
                 return trip.differences();
               }));
}

// Two sends under way before the first is received, along two plans.
void run_two_plans(const Scenario& a, const Scenario& b, bool receive_in_order, int32_t rank, tern_exchange* exchange,
                   std::vector<std::string>& differences) {
  RoundTrip first(a, rank, exchange), second(b, rank, exchange);
  if (!a.c.fused) first.route();
  if (!b.c.fused) second.route();
  run_two_in_flight(first, second, {receive_in_order, receive_in_order});
  for (const RoundTrip* trip : {&first, &second})
    differences.insert(differences.end(), trip->differences().begin(), trip->differences().end());
}

TEST(Phases, TwoSendsInFlight) {
  for (const bool fused : {false, true}) {
    for (const bool window : {false, true}) {
      for (const bool receive_in_order : {true, false}) {
        Case c = ordinary_case(51);
        c.delays = true;
        c.weighting = TERN_WEIGHTS_DISPATCH;  // the owner's weights would need a round of their own
        c.extent = TERN_EXTENT_WORST;
        c.fused = fused;
        c.window_dispatch = c.window_combine = window;
        const Scenario a(c);
        c.seed = 52;
        const Scenario b(c);
        expect_right(c, run_threads(c.num_ranks, a.exchange_options(2), {}, [&](int32_t rank, tern_exchange* exchange, RankDevice&) {
                       std::vector<std::string> differences;
                       run_two_plans(a, b, receive_in_order, rank, exchange, differences);
                       return differences;
                     }));
      }
    }
  }
}

// Ranks that sleep at different places are several operations apart in host time.
TEST(Delays, RanksRunAhead) {
  for (uint64_t seed = 60; seed < 60 + static_cast<uint64_t>(scaled(20)); ++seed) {
    Case c = ordinary_case(seed);
    c.delays = true;
    c.window_dispatch = seed % 2 == 0;
    c.window_combine = seed % 3 == 0;
    const Scenario scenario(c);
    const RankBody body = [&](int32_t rank, tern_exchange* exchange, RankDevice&) {
      RoundTrip trip(scenario, rank, exchange);
      for (int batch = 0; batch < 4; ++batch) {
        trip.route();
        trip.dispatch(batch);
        trip.combine(batch);
      }
      return trip.differences();
    };
    expect_right(c, run_threads(c.num_ranks, scenario.exchange_options(), {}, body));
    if (seed % 4 == 0) expect_right(c, run_processes(c.num_ranks, scenario.exchange_options(), {}, body));
  }
}

TEST(Epochs, Thousands) {
  Case c = ordinary_case(71);
  c.num_ranks = 3;
  c.max_tokens = 2;
  c.hidden = 8;
  const Scenario scenario(c);
  expect_right(c, run_threads(c.num_ranks, scenario.exchange_options(), {}, [&](int32_t rank, tern_exchange* exchange, RankDevice&) {
                 RoundTrip trip(scenario, rank, exchange);
                 for (int64_t batch = 0; batch < scaled(3000); ++batch) {
                   if (batch % 3 == 0) trip.route();
                   trip.dispatch(static_cast<int>(batch));
                   trip.combine(static_cast<int>(batch));
                 }
                 return trip.differences();
               }));
}

// Two lanes of one exchange, each driven by a thread of its own.
TEST(Lanes, TwoOnTwoThreads) {
  for (const bool window : {false, true}) {
    Case c = ordinary_case(81);
    c.num_lanes = 2;
    c.window_dispatch = c.window_combine = window;
    const Scenario a(c);
    c.seed = 82;
    c.lane = 1;
    c.delays = true;
    c.phases = true;
    const Scenario b(c);
    const RankBody body = [&](int32_t rank, tern_exchange* exchange, RankDevice&) {
      std::vector<std::string> differences[2];
      const auto drive = [&](const Scenario& scenario, std::vector<std::string>& found) {
        try {
          RoundTrip trip(scenario, rank, exchange);
          for (int repeat = 0; repeat < 5; ++repeat) trip.run();
          found = trip.differences();
        } catch (const std::exception& error) {
          found.push_back(fmt::format("rank {}, lane {}: {}", rank, scenario.c.lane, error.what()));
        }
      };
      std::thread other([&] { drive(b, differences[1]); });
      drive(a, differences[0]);
      other.join();
      differences[0].insert(differences[0].end(), differences[1].begin(), differences[1].end());
      return differences[0];
    };
    // The lanes take and give back pieces of one window in any order, so there must be room between the pieces.
    tern_exchange_options options = a.exchange_options(2);
    options.window_bytes = 2 * std::max(options.window_bytes, b.exchange_options(2).window_bytes);
    expect_right(c, run_threads(c.num_ranks, options, {}, body));
    // Window memory passes from lane to lane at its owner. For the two threads of another process that write to it, what puts the one
    // behind the other is in the owner's process, where ThreadSanitizer does not see it. With ranks as threads it sees all.
    if (window && kUnderThreadSanitizer) continue;
    expect_right(c, run_processes(c.num_ranks, options, {}, body));
  }
}

// Two exchanges of one group, used in turns; their operations do not disturb each other.
TEST(Exchanges, TwoOfOneGroup) {
  Case c = ordinary_case(91);
  c.delays = true;
  const Scenario a(c);
  c.seed = 92;
  c.layout = TERN_LAYOUT_EXPERT_PADDED;
  const Scenario b(c);
  const std::vector<Group> groups = Group::local(c.num_ranks);
  std::vector<std::vector<std::string>> differences(groups.size());
  std::vector<std::thread> threads;
  for (int32_t rank = 0; rank < c.num_ranks; ++rank) {
    threads.emplace_back([&, rank] {
      const auto self = static_cast<size_t>(rank);
      try {
        const Exchange first(groups[self], a.exchange_options()), second(groups[self], b.exchange_options());
        RoundTrip trip_a(a, rank, first.get()), trip_b(b, rank, second.get());
        // Ranks take them in different orders: exchanges are independent of each other only if nobody waits in between,
        // so the sends come first.
        trip_a.route();
        trip_b.route();
        RoundTrip& earlier = rank % 2 == 0 ? trip_a : trip_b;
        RoundTrip& later = rank % 2 == 0 ? trip_b : trip_a;
        earlier.begin_dispatch(0, TERN_PHASE_SEND);
        later.begin_dispatch(0, TERN_PHASE_SEND);
        earlier.finish_dispatch(0, TERN_PHASE_RECEIVE);
        later.finish_dispatch(0, TERN_PHASE_RECEIVE);
        trip_a.combine(0);
        trip_b.combine(0);
        for (const RoundTrip* trip : {&trip_a, &trip_b})
          differences[self].insert(differences[self].end(), trip->differences().begin(), trip->differences().end());
      } catch (const std::exception& error) {
        differences[self].push_back(fmt::format("rank {}: {}", rank, error.what()));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const auto& of_rank : differences) expect_right(c, of_rank);
}

// Groups in one process, each with its own ranks and threads, at the same time.
TEST(Groups, SeveralInOneProcess) {
  constexpr int kNumGroups = 3;
  std::vector<std::vector<std::string>> differences(kNumGroups);
  std::vector<std::thread> threads;
  for (int group = 0; group < kNumGroups; ++group) {
    threads.emplace_back([&, group] {
      Case c = ordinary_case(101 + static_cast<uint64_t>(group));
      c.num_ranks = 2 + group;
      differences[static_cast<size_t>(group)] = run_as_threads(c);
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const auto& of_group : differences) expect_right({}, of_group);
}

// Destroying the group leaves its exchanges as they are.
TEST(Groups, ExchangesOutliveThem) {
  const Case c = ordinary_case(111);
  const Scenario scenario(c);
  std::vector<std::vector<std::string>> differences(static_cast<size_t>(c.num_ranks));
  std::vector<Group> groups = Group::local(c.num_ranks);
  std::vector<std::thread> threads;
  for (int32_t rank = 0; rank < c.num_ranks; ++rank) {
    threads.emplace_back([&, rank, group = std::move(groups[static_cast<size_t>(rank)])]() mutable {
      const Exchange exchange(group, scenario.exchange_options());
      {
        const Group gone = std::move(group);
      }
      RoundTrip trip(scenario, rank, exchange.get());
      trip.run();
      differences[static_cast<size_t>(rank)] = trip.differences();
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const auto& of_rank : differences) expect_right(c, of_rank);
}

}  // namespace
}  // namespace tern::conformance
