// SPDX-License-Identifier: Apache-2.0
#include "forecast/forecast.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <set>

#include "base/error.h"

namespace tern::tools {
namespace {

// Goes through all ways to choose topk of a few experts.
double enumerate_parts(int num_parts, const Choices& choices) {
  int64_t num_ways = 0, num_reached = 0;
  for (uint32_t chosen = 0; chosen < 1u << choices.num_experts; ++chosen) {
    if (std::popcount(chosen) != choices.num_topk) continue;
    std::set<int> parts;
    for (int expert = 0; expert < choices.num_experts; ++expert) {
      if ((chosen >> expert & 1) != 0) parts.insert(expert * num_parts / choices.num_experts);
    }
    ++num_ways;
    num_reached += static_cast<int64_t>(parts.size());
  }
  return static_cast<double>(num_reached) / static_cast<double>(num_ways);
}

TEST(Reach, UniformIsTheMeanOverAllChoices) {
  for (const Choices choices : {Choices{8, 3}, Choices{12, 5}, Choices{12, 12}, Choices{6, 1}}) {
    for (int num_parts = 1; num_parts <= choices.num_experts; ++num_parts) {
      if (choices.num_experts % num_parts != 0) continue;
      EXPECT_NEAR(expect_parts(num_parts, choices), enumerate_parts(num_parts, choices), 1e-12)
          << num_parts << " parts, top-" << choices.num_topk << " of " << choices.num_experts;
    }
  }
}

TEST(Reach, OneRankIsReachedByAll) {
  const Reach reach = expect_reach({1, 1}, {256, 8}, {});
  EXPECT_DOUBLE_EQ(reach.ranks, 1);
  EXPECT_DOUBLE_EQ(reach.nodes, 1);
  EXPECT_DOUBLE_EQ(reach.entries, 8);
}

// 4 ranks, top-8 of 256: 4 (1 - C(192, 8) / C(256, 8)) = 3.614.
TEST(Reach, FourRanksOfTheUsualShape) { EXPECT_NEAR(expect_reach({1, 4}, {256, 8}, {}).ranks, 3.614, 0.001); }

TEST(Reach, At2048RanksATokenReachesItsExperts) {
  const Reach reach = expect_reach({256, 8}, {2048, 8}, {});
  EXPECT_DOUBLE_EQ(reach.ranks, 8);  // one expert each
  EXPECT_LT(reach.nodes, 8);
  EXPECT_GT(reach.nodes, 7.8);
}

TEST(Reach, ASampleAgreesWithTheExactMean) {
  const Reach exact = expect_reach({2, 4}, {64, 8}, {}), sampled = expect_reach({2, 4}, {64, 8}, {.kind = RoutingKind::kZipf, .skew = 0});
  EXPECT_NEAR(sampled.ranks, exact.ranks, exact.ranks * 0.01);
  EXPECT_NEAR(sampled.nodes, exact.nodes, exact.nodes * 0.01);
  EXPECT_DOUBLE_EQ(sampled.entries, 8);
}

TEST(Reach, GroupsBoundTheNodes) {
  const RoutingOptions limited{.kind = RoutingKind::kGroupLimited, .num_groups = 8, .max_groups = 2};
  const Reach reach = expect_reach({8, 4}, {256, 8}, limited);
  EXPECT_LE(reach.nodes, 2);
  EXPECT_GT(reach.nodes, 1.9);
  EXPECT_DOUBLE_EQ(reach.busiest_rank, 1);
  EXPECT_EQ(reach.ranks, expect_reach({8, 4}, {256, 8}, limited).ranks);
}

TEST(Reach, OneBusyRankGetsEverything) {
  const Reach reach = expect_reach({2, 2}, {16, 4}, {.kind = RoutingKind::kOneRank});
  EXPECT_DOUBLE_EQ(reach.ranks, 1);
  EXPECT_DOUBLE_EQ(reach.busiest_rank, 4);
  EXPECT_DOUBLE_EQ(reach.busiest_node, 2);
}

TEST(Reach, WhatCannotBeIsRefused) {
  EXPECT_THROW(expect_reach({1, 3}, {256, 8}, {}), Failure);
  EXPECT_THROW(expect_reach({0, 1}, {256, 8}, {}), Failure);
  EXPECT_THROW(expect_reach({1, 1}, {4, 5}, {}), Failure);
  EXPECT_THROW(expect_reach({1, 1}, {12, 2}, {.kind = RoutingKind::kGroupLimited}), Failure);
}

// Every token goes to every rank: top-K of K experts.
ForecastBatch full_batch(const Places& places, int64_t num_tokens, int64_t row_bytes) {
  const Choices choices{places.num_ranks(), places.num_ranks()};
  return {.places = places,
          .choices = choices,
          .reach = expect_reach(places, choices, {}),
          .num_tokens = num_tokens,
          .dispatch_row_bytes = row_bytes,
          .combine_row_bytes = row_bytes};
}

TEST(Load, OneRankKeepsItsRows) {
  const Load load = load_of_dispatch(full_batch({1, 1}, 10, 1600));
  EXPECT_DOUBLE_EQ(load.own, 16000);
  EXPECT_DOUBLE_EQ(load.link, 0);
  EXPECT_DOUBLE_EQ(load.network, 0);
}

TEST(Load, TwoRanksSendHalf) {
  const Load load = load_of_dispatch(full_batch({1, 2}, 10, 1600));
  EXPECT_DOUBLE_EQ(load.own, 16000);
  EXPECT_DOUBLE_EQ(load.link, 16000);
  EXPECT_DOUBLE_EQ(load.network, 0);
}

// 10 tokens to the rail; the rest of a rank's 40 rows comes from within the node, half of it from the rank itself.
TEST(Load, ATokenCrossesTheNetworkOnceForANode) {
  const ForecastBatch batch = full_batch({2, 2}, 10, 1600);
  const Load dispatch = load_of_dispatch(batch), combine = load_of_combine(batch), route = load_of_route(batch);
  EXPECT_DOUBLE_EQ(dispatch.own, 32000);
  EXPECT_DOUBLE_EQ(dispatch.link, 32000);
  EXPECT_DOUBLE_EQ(dispatch.network, 64 + 10 * (1600 + 16));  // header; 4 weights a slot
  EXPECT_DOUBLE_EQ(combine.network, 64 + 10 * 1600);          // header; sums
  EXPECT_DOUBLE_EQ(route.network, 64 + 64 + 10 * 32);         // header; 2 + 4 + 1 counts; source token and 4 experts a slot
}

TEST(Load, ExpertLayoutsHaveARowForEachEntry) {
  ForecastBatch batch = full_batch({1, 2}, 10, 1600);
  batch.choices = {4, 4};  // two experts of each rank
  batch.reach = expect_reach(batch.places, batch.choices, {});
  EXPECT_DOUBLE_EQ(load_of_dispatch(batch).entries, 0);
  batch.layout = TERN_LAYOUT_EXPERT_MAJOR;
  EXPECT_DOUBLE_EQ(load_of_dispatch(batch).entries, (40 - 20) * 1600);  // beyond the first of each message
  EXPECT_DOUBLE_EQ(load_of_combine(batch).entries, 40 * 1600);
}

// 10 GB/s for everything that moves rows, 100 us for every operation: 1 MB takes 100 us.
Costs round_costs() {
  Costs costs;
  costs.workers = 100;
  costs.link_gbps = costs.copy_gbps = costs.spread_gbps = costs.stage_gbps = costs.sum_gbps = costs.net_gbps = costs.small_gbps = 10;
  costs.staged_link_share = 0.5;
  costs.deliver_gbps = 10;
  costs.delivered_link_share = 1;
  costs.memory_gbps = kUnbounded;
  costs.worker_net_gbps = kUnbounded;
  costs.dispatch_us = costs.combine_us = costs.route_us = 100;
  costs.small_dispatch_us = 30;
  costs.small_route_us = 10;
  costs.small_combine_us = 20;
  return costs;
}

Forecaster gpus(const Places& places, int64_t num_tokens, const Costs& costs = round_costs()) {
  return {full_batch(places, num_tokens, 1000), TERN_DEVICE_CUDA, costs};
}

TEST(Forecast, GpuStagesOverlapAndTheSlowestCounts) {
  const Forecaster two = gpus({1, 2}, 10000);  // 10 MB own, 10 MB over the link
  EXPECT_DOUBLE_EQ(two.predict({.op = "dispatch", .num_sms = 1}).us(), 100 + 2000);
  EXPECT_DOUBLE_EQ(two.predict({.op = "dispatch", .num_sms = 2}).us(), 100 + 1000);
  EXPECT_DOUBLE_EQ(two.predict({.op = "dispatch", .num_sms = 50}).us(), 100 + 1000);  // the link
  EXPECT_DOUBLE_EQ(two.predict({.op = "dispatch", .in_windows = false, .num_sms = 1}).us(), 100 + 3000);
  EXPECT_DOUBLE_EQ(two.predict({.op = "combine", .num_sms = 50}).us(), 100 + 1000);
  EXPECT_DOUBLE_EQ(two.predict({.op = "combine", .in_windows = false, .num_sms = 50}).us(), 100 + 2000);
}

// Where the source knows the rows, and reaches them.
TEST(Forecast, RowsFromWindowToWindowHaveRatesOfTheirOwn) {
  Costs costs = round_costs();
  costs.deliver_gbps = 20;
  costs.delivered_link_share = 4;
  const auto predict = [&](const ForecastBatch& batch, const OperationChoice& choice) {
    return Forecaster(batch, TERN_DEVICE_CUDA, costs).predict(choice).us();
  };
  ForecastBatch batch = full_batch({1, 2}, 10000, 1000);
  EXPECT_DOUBLE_EQ(predict(batch, {.op = "dispatch", .num_sms = 1}), 100 + 1000);
  EXPECT_DOUBLE_EQ(predict(batch, {.op = "dispatch", .num_sms = 50}), 100 + 250);
  EXPECT_DOUBLE_EQ(predict(batch, {.op = "dispatch", .in_windows = false, .num_sms = 50}), 100 + 1000);
  EXPECT_DOUBLE_EQ(predict(full_batch({2, 2}, 10000, 1000), {.op = "dispatch", .num_sms = 50}),
                   gpus({2, 2}, 10000).predict({.op = "dispatch", .num_sms = 50}).us());
  batch.layout = TERN_LAYOUT_EXPERT_MAJOR;
  EXPECT_DOUBLE_EQ(predict(batch, {.op = "dispatch", .num_sms = 50}), 100 + 1000);
}

TEST(Forecast, OperationsInARowAddUp) {
  const Forecaster two = gpus({1, 2}, 10000);
  const OperationForecast forecast = two.predict({.op = "round_trip", .num_sms = 50});
  EXPECT_DOUBLE_EQ(forecast.us(), 100 + 1100 + 1100);
  EXPECT_DOUBLE_EQ(forecast.wire_bytes, 2 * 10e6);
  EXPECT_DOUBLE_EQ(two.predict({.op = "plan_dispatch", .num_sms = 50}).us(), 100 + 1100);
}

TEST(Forecast, SmallGpuBatchesTakeTheLatencyPath) {
  const Forecaster two = gpus({1, 2}, 500);  // 500 KB over the link
  EXPECT_TRUE(two.predict({.op = "dispatch"}).small);
  EXPECT_DOUBLE_EQ(two.predict({.op = "dispatch"}).us(), 20 + 50);
  EXPECT_DOUBLE_EQ(two.predict({.op = "route_dispatch", .exact = false}).us(), 30 + 50);
  EXPECT_DOUBLE_EQ(two.predict({.op = "combine"}).us(), 20 + 50);
  EXPECT_FALSE(two.predict({.op = "dispatch", .mode = TERN_MODE_THROUGHPUT}).small);
  EXPECT_FALSE(two.predict({.op = "dispatch", .num_sms = 8}).small);
  EXPECT_FALSE(gpus({1, 2}, 1000).predict({.op = "dispatch"}).small);
  EXPECT_TRUE(gpus({1, 2}, 1000).predict({.op = "route_dispatch", .exact = false}).small);  // a route costs the other path more
  EXPECT_TRUE(gpus({1, 2}, 1024).predict({.op = "dispatch", .mode = TERN_MODE_LATENCY}).small);
  EXPECT_FALSE(gpus({1, 2}, 1025).predict({.op = "dispatch", .mode = TERN_MODE_LATENCY}).small);
  EXPECT_FALSE(gpus({1, 65}, 1).predict({.op = "dispatch", .mode = TERN_MODE_LATENCY}).small);
  const auto of_row = [](int64_t num_tokens, int64_t row_bytes) {
    return Forecaster(full_batch({1, 2}, num_tokens, row_bytes), TERN_DEVICE_CUDA, round_costs())
        .predict({.op = "route_dispatch", .exact = false});
  };
  EXPECT_TRUE(of_row(256, 16 << 10).small);
  EXPECT_FALSE(of_row(256, 18 << 10).small);  // 4 MiB, with 1 KiB of each row to spare, are what there is room for
}

// 100 MB over the network and over the link within the node, in pieces of 1 MiB.
TEST(Forecast, TheNetworkOverlapsButForItsFirstPiece) {
  Costs costs = round_costs();
  costs.net_latency_us = 7;
  const Forecaster nodes = gpus({2, 2}, 100000, costs);
  const double network_us = (64 + 100000 * 1024) * 1e-4;  // 1000 bytes at a multiple of 16, 16 bytes of weights
  const double link_us = 20000;                           // 400000 rows, half of them own
  const double rest_us = network_us + 400 * 100.0 / 50;   // SMs: 400 MB by 50
  const double piece = 1048576.0 / (64 + 100000 * 1024);
  EXPECT_NEAR(nodes.predict({.op = "dispatch", .num_sms = 50}).us(), link_us + 100 + 7 + piece * rest_us, 1e-6);
}

// 10 tokens of 1000 bytes to the rail and as many over the link, in one piece.
TEST(Forecast, SmallGpuBatchesBetweenNodesPassTheHost) {
  Costs costs = round_costs();
  costs.net_latency_us = 7;
  costs.net_host_us = 50;
  costs.net_route_us = 70;
  costs.net_small_route_us = 40;
  costs.host_us = 1000;
  const Forecaster nodes = gpus({2, 2}, 10, costs);
  const double network_us = (64 + 10 * 1024) * 1e-4, link_us = 2 * 10 * 1e-1, route_us = (64 + 64 + 10 * 32) * 1e-4;
  EXPECT_NEAR(nodes.predict({.op = "dispatch"}).us(), 30 - 10 + 50 + 7 + network_us + link_us, 1e-6);
  EXPECT_NEAR(nodes.predict({.op = "plan"}).us(), 100 + 70 + 50 + 7 + route_us, 1e-6);
  const OperationForecast routed = nodes.predict({.op = "route_dispatch", .exact = false});
  EXPECT_TRUE(routed.small);
  EXPECT_NEAR(routed.us(), 40 + 30 + 50 + 7 + (64 + 64 + 10 * (1024 + 32)) * 1e-4 + link_us, 0.5);  // in one trip
  EXPECT_FALSE(nodes.predict({.op = "combine"}).small);
  EXPECT_FALSE(gpus({2, 2}, 1 << 12, costs).predict({.op = "route_dispatch", .exact = false}).small);
}

// They take the tokens of all nodes at once, and what is routed on its way need not be theirs.
TEST(Forecast, KernelsForSmallBatchesBetweenNodesNeedRoomForAllNodes) {
  const auto fixed_us = [](const Places& places, int64_t num_tokens, int64_t row_bytes, const OperationChoice& choice) {
    ForecastBatch batch = full_batch(places, num_tokens, row_bytes);
    batch.choices.num_topk = 4;
    const Forecaster nodes(batch, TERN_DEVICE_CUDA, round_costs());
    return nodes.predict(choice).steps.back().stages.front().us;  // of the kernels for small batches
  };
  const auto is_small = [&](const Places& places, int64_t num_tokens, int64_t row_bytes) {
    return fixed_us(places, num_tokens, row_bytes, {.op = "combine", .num_sms = 1}) == round_costs().small_combine_us;
  };
  EXPECT_TRUE(is_small({2, 2}, 512, 1000));
  EXPECT_FALSE(is_small({2, 2}, 513, 1000));
  EXPECT_TRUE(is_small({8, 8}, 1, 1000));
  EXPECT_FALSE(is_small({9, 8}, 1, 1000));
  EXPECT_TRUE(is_small({2, 2}, 128, 16 << 10));
  EXPECT_FALSE(is_small({2, 2}, 128, 18 << 10));
  const Forecaster nodes = gpus({2, 2}, 1000);
  const OperationForecast routed = nodes.predict({.op = "route_dispatch", .exact = false, .num_sms = 1});
  EXPECT_TRUE(routed.small);  // 1 MB
  EXPECT_NE(routed.steps.back().stages.front().us, round_costs().small_dispatch_us);
}

TEST(Forecast, ScalesDoNotCountWhereABatchIsRoutedOnItsWay) {
  ForecastBatch batch = full_batch({2, 1}, 2048, 1024);
  batch.dispatch_scale_bytes = 32;
  const Forecaster nodes(batch, TERN_DEVICE_CUDA, round_costs());
  EXPECT_TRUE(nodes.predict({.op = "route_dispatch", .exact = false}).small);
}

TEST(Forecast, CpuNetworkTakesTheSameCores) {
  Costs costs = round_costs();
  costs.workers = 2;
  costs.trip_us = 1;
  costs.wake_us = 2;
  costs.net_latency_us = 5;  // hidden by the bytes
  costs.worker_net_gbps = 1;
  const Forecaster ranks(full_batch({2, 4}, 1000, 1600), TERN_DEVICE_CPU, costs);  // two ranks on a core
  const double rows_us = 8 * 1.6 * 100 * 2, network_us = (64 + 1000 * 1632) * 1e-3 * 2;
  EXPECT_NEAR(ranks.predict({.op = "dispatch"}).us(), rows_us + network_us + 100 + 3 * 1 * 2 + 3 * 2 * 2, 1e-6);
  // Staged: what goes to the other three ranks.
  EXPECT_NEAR(ranks.predict({.op = "dispatch", .in_windows = false}).us() - ranks.predict({.op = "dispatch"}).us(), rows_us * 3 / 4, 1e-6);
}

TEST(Forecast, CpuRowsBeyondTheCachesPassTheMemory) {
  Costs costs = round_costs();
  costs.workers = 2;
  costs.cache_mb = 50;
  costs.memory_gbps = 1;
  const auto predict = [&](int64_t num_tokens) {
    return Forecaster(full_batch({1, 2}, num_tokens, 1000), TERN_DEVICE_CPU, costs).predict({.op = "dispatch"}).us();
  };
  EXPECT_DOUBLE_EQ(predict(10000), 100 + 2000);   // 40 MB of both ranks
  EXPECT_DOUBLE_EQ(predict(20000), 100 + 80000);  // 80 MB
}

TEST(Forecast, LibrarySmsFollowTheDocumentedRule) {
  const auto sms = [](int64_t num_tokens, const OperationChoice& choice) { return gpus({1, 2}, num_tokens).library_sms(choice); };
  EXPECT_EQ(sms(100000, {.op = "dispatch"}), 24);
  EXPECT_EQ(sms(5243, {.op = "dispatch"}), 10);  // 5243000 / 524288
  EXPECT_EQ(sms(100, {.op = "dispatch", .mode = TERN_MODE_THROUGHPUT}), 4);
  EXPECT_EQ(sms(40, {.op = "dispatch"}), 81);    // latency path: a block for each message of 2 ranks and one more
  EXPECT_EQ(sms(200, {.op = "dispatch"}), 100);  // at most the GPU
  EXPECT_EQ(sms(640, {.op = "plan"}), 10);
  // Few and long rows go in up to 4 parts: of 8 tokens to 2 ranks, or of the 16 rows that come back.
  ForecastBatch batch = full_batch({1, 2}, 8, 8192);
  const auto small_sms = [&](const char* op) {
    return Forecaster(batch, TERN_DEVICE_CUDA, round_costs()).library_sms({.op = op, .mode = TERN_MODE_LATENCY});
  };
  EXPECT_EQ(small_sms("dispatch"), 8 * 4 + 1);
  EXPECT_EQ(small_sms("combine"), 16 * 4 + 1);
  batch.casts = true;
  EXPECT_EQ(small_sms("dispatch"), 16 + 1);
}

TEST(Forecast, SmsAreThoseThatAreAskedForAsFarAsThereAreAny) {
  EXPECT_EQ(gpus({1, 2}, 10000).predict({.op = "dispatch", .num_sms = 7}).num_sms, 7);
  EXPECT_EQ(gpus({1, 2}, 10000).predict({.op = "dispatch", .num_sms = 1000}).num_sms, 100);
}

TEST(Forecast, BestSmsAreTheFewestThatFillTheLink) {
  Costs costs = round_costs();
  costs.link_gbps = 100;
  const Forecaster two = gpus({1, 2}, 100000, costs);  // 100 MB over the link, 200 MB by SMs: as fast with 20
  EXPECT_EQ(two.best_sms({.op = "dispatch"}), 20);     // 1000 us + 100 us; with 19: 1052 + 100
}

TEST(Forecast, MoreRanksThanAnyLimitOfTheLatencyPath) {
  ForecastBatch batch = full_batch({1, 1}, 128, 14336);
  batch.places = {256, 8};
  batch.choices = {2048, 8};
  batch.reach = expect_reach(batch.places, batch.choices, {});
  const Forecaster many(batch, TERN_DEVICE_CUDA, default_costs(TERN_DEVICE_CUDA));
  const OperationForecast forecast = many.predict({.op = "round_trip"});
  EXPECT_TRUE(std::isfinite(forecast.us()));
  EXPECT_GT(forecast.network_bytes, 2 * 128 * 6 * 14336);  // 8 experts on more than 7 of the other nodes
  EXPECT_LT(forecast.network_bytes, 2 * 128 * 9 * 14400 + 2e6);
}

TEST(Forecast, UnknownOperationsAreRefused) { EXPECT_THROW(gpus({1, 2}, 10).predict({.op = "gather"}), Failure); }

TEST(Costs, EveryFigureInUseHasASource) {
  for (const tern_device_type device : {TERN_DEVICE_CUDA, TERN_DEVICE_CPU}) {
    const Costs costs = default_costs(device);
    for (const CostEntry& entry : cost_table()) {
      const bool neutral = costs.*entry.member == 0 || costs.*entry.member == 1 || costs.*entry.member == kUnbounded;
      EXPECT_TRUE(neutral || entry.of(device).source != nullptr) << entry.name;
    }
  }
}

TEST(Costs, OnlyWhatIsSaidIsOverridden) {
  CostOverrides overrides(cost_table().size());
  overrides[1] = 123;
  ASSERT_STREQ(cost_table()[1].name, "link-gbps");
  const Costs costs = override_costs(default_costs(TERN_DEVICE_CUDA), overrides);
  EXPECT_DOUBLE_EQ(costs.link_gbps, 123);
  EXPECT_DOUBLE_EQ(costs.copy_gbps, default_costs(TERN_DEVICE_CUDA).copy_gbps);
}

}  // namespace
}  // namespace tern::tools
