// SPDX-License-Identifier: Apache-2.0
// Nodes that are declared on this host, with ranks as threads: the same cases as within a node, over the network's loopback.
#include "engine/nodes.h"

#include "conformance/random.h"
#include "engine/support.h"

// libfabric 1.17's provider "net" loses a few hundred bytes with each endpoint, also when it is closed.
extern "C" __attribute__((visibility("default"))) const char* __lsan_default_suppressions() { return "leak:libfabric.so.1"; }

namespace tern::conformance {
namespace {

Case case_on_nodes(uint64_t seed) {
  Case c = ordinary_case(seed);
  c.ranks_per_node = 2;
  return c;
}

class Nodes : public ::testing::Test {
 protected:
  void SetUp() override {
    const std::string problem = missing_network(run_as_threads(smallest_case_on_nodes()));
    if (!problem.empty()) GTEST_SKIP() << problem;
  }

  static std::vector<std::string> run(const Case& c, const RankBody& body) {
    RunOptions options;
    options.ranks_per_node = c.ranks_per_node;
    return run_threads(c.num_ranks, Scenario(c).exchange_options(2), options, body);
  }
};

TEST_F(Nodes, RandomCases) {
  for (int64_t seed = 1; seed <= scaled(300); ++seed) expect_right_as_threads(random_case_on_nodes(static_cast<uint64_t>(seed)));
}

TEST_F(Nodes, EveryLayoutExtentEncodingAndOrderOfScales) {
  for (Case c : layout_cases()) {
    c.num_ranks = 4;
    c.ranks_per_node = 2;
    expect_right_as_threads(c);
  }
}

TEST_F(Nodes, BatchesLargerThanTheStaging) {
  for (int64_t seed = 1001; seed <= 1000 + scaled(100); ++seed) {
    Case c = random_case_on_nodes(static_cast<uint64_t>(seed));
    c.max_tokens = 40;
    c.row_capacity = 0;
    c.phases = false;
    c = c.normalized();
    c.staging_bytes = staging_for_rounds(c, 1 + seed % 4);
    expect_right_as_threads(c);
  }
}

// Combine sums the own node's rows where they are: in windows and in the caller's memory, in several rounds too.
TEST_F(Nodes, OneRankOnEachNode) {
  for (const tern_layout layout : {TERN_LAYOUT_RANK_MAJOR, TERN_LAYOUT_EXPERT_MAJOR, TERN_LAYOUT_EXPERT_PADDED})
    for (const tern_weighting weighting : {TERN_WEIGHTS_NONE, TERN_WEIGHTS_DISPATCH, TERN_WEIGHTS_OWNER})
      for (const bool in_windows : {false, true}) {
        const bool has_expert_rows = layout != TERN_LAYOUT_RANK_MAJOR;
        if (has_expert_rows ? !in_windows : weighting != TERN_WEIGHTS_NONE) continue;
        Case c = case_on_nodes(77);
        c.num_ranks = 3;
        c.ranks_per_node = 1;
        c.layout = layout;
        c.weighting = weighting;
        c.return_weights = false;
        c.max_tokens = full_scale() ? 200 : 40;
        c.hidden = 1544;
        c.routing = Routing::kHoles;
        c.num_biases = in_windows ? 2 : 0;
        c.window_combine = c.window_dispatch = in_windows;
        c.mode = TERN_MODE_THROUGHPUT;
        c = c.normalized();
        if (!full_scale()) c.staging_bytes = staging_for_rounds(c, 10);  // fewer tokens, and several rounds all the same
        expect_right_as_threads(c);
      }
}

// Some ranks are left out by choice, whole nodes among them: nothing goes to them, and nothing over their rails.
TEST_F(Nodes, RandomCasesWithoutSomeRanks) {
  for (int64_t seed = 4001; seed <= 4000 + scaled(40); ++seed) {
    Case c = random_case_on_nodes(static_cast<uint64_t>(seed));
    c.row_capacity = 0;
    const Draw draw(static_cast<uint64_t>(seed), 0x6D61736B);
    std::vector<uint8_t> mask(static_cast<size_t>(c.num_ranks));
    for (size_t rank = 0; rank < mask.size(); ++rank) mask[rank] = draw.one_in(static_cast<int64_t>(rank), 3) ? 1 : 0;
    mask[static_cast<size_t>(draw.below(99, c.num_ranks))] = 0;
    const Scenario all(c), without(c, mask);
    expect_right(c, run(c, [&](int32_t rank, tern_exchange* exchange, RankDevice& device) {
                   RoundTrip together(all, rank, exchange, device);
                   together.run();
                   if (!together.differences().empty()) return together.differences();
                   if (mask[static_cast<size_t>(rank)] != 0) return std::vector<std::string>();
                   tern_recover_options options;
                   options.mask = mask.data();
                   EXPECT_EQ(tern_exchange_recover(exchange, &options), TERN_OK) << tern_last_error();
                   RoundTrip trip(without, rank, exchange, device);
                   trip.run();
                   return trip.differences();
                 }));
  }
}

TEST_F(Nodes, TwoSendsUnderWay) {
  for (const bool in_order : {true, false})
    for (const tern_combine_mode mode : {TERN_COMBINE_HIERARCHICAL, TERN_COMBINE_EXACT}) {
      Case c = case_on_nodes(51);
      c.extent = TERN_EXTENT_WORST;
      c.fused = in_order == (mode == TERN_COMBINE_EXACT);
      c.phases = c.delays = true;
      c.combine_mode = mode;
      c.weighting = TERN_WEIGHTS_DISPATCH;
      const Scenario a(c);
      c.seed = 52;
      const Scenario b(c);
      expect_right(c, run(c, [&](int32_t rank, tern_exchange* exchange, RankDevice& device) {
                     RoundTrip first(a, rank, exchange, device), second(b, rank, exchange, device);
                     if (!c.fused) {
                       first.route();
                       second.route();
                     }
                     run_two_in_flight(first, second, {in_order, in_order});
                     std::vector<std::string> differences = first.differences();
                     differences.insert(differences.end(), second.differences().begin(), second.differences().end());
                     return differences;
                   }));
    }
}

TEST_F(Nodes, ManyOperations) {
  Case c = case_on_nodes(71);
  c.max_tokens = 2;
  c.hidden = 8;
  const Scenario scenario(c);
  expect_right(c, run(c, [&](int32_t rank, tern_exchange* exchange, RankDevice& device) {
                 RoundTrip trip(scenario, rank, exchange, device);
                 for (int64_t batch = 0; batch < scaled(500); ++batch) {
                   if (batch % 3 == 0) trip.route();
                   trip.dispatch(static_cast<int>(batch));
                   trip.combine(static_cast<int>(batch));
                 }
                 return trip.differences();
               }));
}

// ------------------------------------------------------------------------------------------------------------------ bytes

int64_t align(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// Tokens of `source` that go to that node.
int64_t tokens_to_node(const Scenario& s, int32_t source, int32_t node) {
  const std::vector<int64_t>& topk_idx = s.placements[static_cast<size_t>(source)].topk_idx;
  int64_t count = 0;
  for (size_t token = 0; token * static_cast<size_t>(s.c.num_topk) < topk_idx.size(); ++token) {
    const auto first = topk_idx.begin() + static_cast<int64_t>(token) * s.c.num_topk;
    count += std::any_of(first, first + s.c.num_topk, [&](int64_t expert) {
      return expert >= 0 && s.c.node_of(static_cast<int32_t>(expert) / s.c.experts_per_rank) == node;
    });
  }
  return count;
}

// A token crosses the network once for each node, there and back; besides there are only a header for each rank, and the counts.
TEST_F(Nodes, NetworkBytesAreWhatTheRoutingPredicts) {
  for (const Routing routing : {Routing::kUniform, Routing::kGroupLimited, Routing::kOneRank, Routing::kNothing}) {
    Case c = case_on_nodes(81);
    c.num_ranks = 6;
    c.extent = TERN_EXTENT_WORST;
    c.routing = routing;
    c.return_weights = false;
    const Scenario scenario(c);
    expect_right(c, run(c, [&](int32_t rank, tern_exchange* exchange, RankDevice& device) {
                   int64_t there = 0, back = 0;
                   for (int32_t node = 0; node < c.num_nodes(); ++node) {
                     const int32_t rail = node * c.ranks_per_node + rank % c.ranks_per_node;
                     if (rail == rank) continue;
                     there += tokens_to_node(scenario, rank, node);
                     back += tokens_to_node(scenario, rail, c.node_of(rank));
                   }
                   const int64_t num_others = c.num_nodes() - 1;
                   const int64_t counts = c.num_experts() / c.num_nodes() + c.num_ranks + 1;
                   const int64_t topk_bytes = align(4 * c.num_topk, 16);
                   // A dispatch that routes has all of it in one put.
                   const int64_t routed_on_its_way =
                       num_others * align(64 + 4 * counts, 64) + there * (c.token_bytes() + align(4 * (1 + 2 * c.num_topk), 16));
                   const int64_t expected[] = {
                       num_others * align(64 + 4 * counts, 64) + there * align(4 * (1 + c.num_topk), 16),
                       num_others * 64 + there * (c.token_bytes() + topk_bytes),
                       // The owner's weights go ahead.
                       num_others * 64 + there * topk_bytes + num_others * 64 + back * c.combine_row_bytes(),
                       routed_on_its_way,
                   };
                   RoundTrip trip(scenario, rank, exchange, device), routing_trip(scenario, rank, exchange, device);
                   uint64_t before = 0;
                   for (int step = 0; step < 4; ++step) {
                     if (step == 0) trip.route();
                     if (step == 1) trip.dispatch(0);
                     if (step == 2) trip.combine(0);
                     if (step == 3) routing_trip.dispatch(0);
                     tern_metrics metrics;
                     EXPECT_EQ(tern_exchange_get_metrics(exchange, &metrics), TERN_OK);
                     EXPECT_EQ(metrics.network_bytes - before, static_cast<uint64_t>(expected[step]))
                         << "rank " << rank << ", step " << step;
                     before = metrics.network_bytes;
                   }
                   return trip.differences();
                 }));
  }
}

// ----------------------------------------------------------------------------------------------------------------- errors

// Runs `body` with an exchange on each of four ranks on two nodes; the errors of all ranks.
std::vector<std::string> errors_of(const RankBody& body, tern_exchange_options exchange_options = {}) {
  RunOptions options;
  options.ranks_per_node = 2;
  options.timeout_ms = full_scale() ? 5'000 : 30'000;
  return run_threads(4, exchange_options, options, body);
}

void expect_all_contain(const std::vector<std::string>& errors, size_t count, const std::string& part) {
  EXPECT_EQ(errors.size(), count);
  for (const std::string& error : errors) EXPECT_NE(error.find(part), std::string::npos) << error;
}

TEST_F(Nodes, DifferentOperationsAreAMismatch) {
  const Scenario scenario(case_on_nodes(91));
  // Rank 3 combines where the others dispatch: all hear of it, on both nodes.
  const auto errors = errors_of(
      [&](int32_t rank, tern_exchange* exchange, RankDevice& device) {
        RoundTrip trip(scenario, rank, exchange, device);
        trip.route();
        trip.dispatch(0);
        if (rank == 3)
          trip.combine(1);
        else
          trip.dispatch(1);
        return std::vector<std::string>{"it went through"};
      },
      scenario.exchange_options());
  expect_all_contain(errors, 4, "TERN_");
  EXPECT_TRUE(std::ranges::any_of(errors, [](const std::string& error) { return error.find("TERN_MISMATCH") != std::string::npos; }));
  for (const std::string& error : errors) EXPECT_EQ(error.find("TERN_TIMEOUT"), std::string::npos) << error;
}

TEST_F(Nodes, UnevenNodesAreRefused) {
  tern_group_options options;
  options.ranks_per_node = 2;
  tern_group* groups[3] = {};
  EXPECT_EQ(tern_group_create_local(&options, 3, groups), TERN_INVALID_ARGUMENT);
  EXPECT_NE(std::string(tern_last_error()).find("3 ranks do not fill nodes of 2"), std::string::npos) << tern_last_error();
}

}  // namespace
}  // namespace tern::conformance
