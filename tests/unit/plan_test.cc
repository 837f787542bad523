// SPDX-License-Identifier: Apache-2.0
// The arithmetic of a routing on all ranks against lists that are made by brute force.
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <map>
#include <random>
#include <set>
#include <tuple>
#include <vector>

#include "base/error.h"
#include "plan/count_routing.h"
#include "plan/plan_shape.h"
#include "plan/routing_table.h"

namespace tern::test {
namespace {

constexpr int64_t kMost64 = std::numeric_limits<int64_t>::max();
constexpr int32_t kMost32 = std::numeric_limits<int32_t>::max();

tern_status status_of(const auto& action) {
  try {
    action();
  } catch (const Failure& failure) {
    EXPECT_FALSE(std::string(failure.what()).empty());
    return failure.status();
  }
  return TERN_OK;
}

// One batch on all ranks.
struct Batch {
  tern_plan_options options;
  int32_t num_ranks = 0;
  std::vector<uint8_t> masked;
  std::vector<int64_t> num_tokens;                  // [rank]
  std::vector<std::vector<int64_t>> topk_idx;       // [rank][token, k]
  std::vector<std::vector<uint8_t>> token_in_rank;  // [rank][token, rank], with num_topk 0

  int32_t local_experts() const { return options.num_experts / num_ranks; }
  tern_routing routing_of(int32_t rank) const {
    const auto r = static_cast<size_t>(rank);
    tern_routing routing;
    routing.num_tokens = num_tokens[r];
    if (options.num_topk > 0)
      routing.topk_idx = topk_idx[r].data();
    else
      routing.token_in_rank = token_in_rank[r].data();
    return routing;
  }
};

Batch random_batch(unsigned seed) {
  std::mt19937 random(seed);
  const auto below = [&](unsigned n) { return static_cast<int32_t>(random() % n); };
  Batch b;
  b.num_ranks = 1 + below(8);
  auto& o = b.options;
  o.layout = static_cast<tern_layout>(below(3));
  o.extent = static_cast<tern_extent>(below(2));
  o.num_experts = b.num_ranks * (1 + below(5));
  o.num_topk = o.layout == TERN_LAYOUT_RANK_MAJOR && below(4) == 0 ? 0 : 1 + below(below(8) == 0 ? 64 : 8);
  o.max_tokens = 1 + below(12);
  o.expert_alignment = below(6);
  o.row_capacity = below(2) == 0 ? 0 : 1 + below(40);
  const int skew = below(3);  // 0: even, 1: few experts, 2: one expert for all
  for (int32_t r = 0; r < b.num_ranks; ++r) {
    b.masked.push_back(b.num_ranks > 1 && below(8) == 0);
    b.num_tokens.push_back(below(3) == 0 ? 0 : below(static_cast<unsigned>(o.max_tokens) + 1));
    std::vector<int64_t> experts;
    for (int64_t i = 0; i < b.num_tokens.back() * o.num_topk; ++i)
      experts.push_back(below(5) == 0 ? -1 : skew == 2 ? o.num_experts - 1 : below(skew == 1 ? std::min(3, o.num_experts) : o.num_experts));
    b.topk_idx.push_back(experts);
    std::vector<uint8_t> mask;
    for (int64_t i = 0; i < b.num_tokens.back() * b.num_ranks; ++i) mask.push_back(static_cast<uint8_t>(below(3)));
    b.token_in_rank.push_back(mask);
  }
  return b;
}

// The table of every rank that goes on, with the counts handed over.
std::map<int32_t, RoutingTable> make_tables(const Batch& b) {
  std::map<int32_t, RoutingTable> tables;
  for (int32_t r = 0; r < b.num_ranks; ++r) {
    if (b.masked[static_cast<size_t>(r)] != 0) continue;
    RoutingTable& table = tables.emplace(r, make_plan_shape(b.options, r, b.num_ranks)).first->second;
    const tern_routing routing = b.routing_of(r);
    check_routing(table.shape(), routing);
    table.set_routing(routing, b.masked);
  }
  for (auto& [to, table] : tables)
    for (const auto& [from, other] : tables) {
      if (from == to) continue;
      std::ranges::copy(other.counts_of(from), table.counts_of(from).begin());
    }
  for (auto& [rank, table] : tables) table.finish();
  return tables;
}

struct Entry {
  int32_t source;
  int64_t token;
  int32_t k;
  auto operator<=>(const Entry&) const = default;
};

// What one rank receives, as lists in the order of the contract.
struct Arrivals {
  std::vector<Entry> messages;              // k = -1
  std::vector<std::vector<Entry>> entries;  // [local expert]
};

Arrivals arrivals_at(const Batch& b, int32_t destination) {
  Arrivals a;
  a.entries.resize(static_cast<size_t>(b.local_experts()));
  for (int32_t source = 0; source < b.num_ranks; ++source) {
    const auto s = static_cast<size_t>(source);
    if (b.masked[s] != 0) continue;
    for (int64_t token = 0; token < b.num_tokens[s]; ++token) {
      bool comes = b.options.num_topk == 0 && b.token_in_rank[s][static_cast<size_t>(token * b.num_ranks + destination)] != 0;
      for (int32_t k = 0; k < b.options.num_topk; ++k) {
        const int64_t expert = b.topk_idx[s][static_cast<size_t>(token * b.options.num_topk + k)];
        if (expert < 0 || expert / b.local_experts() != destination) continue;
        comes = true;
        a.entries[static_cast<size_t>(expert % b.local_experts())].push_back({source, token, k});
      }
      if (comes) a.messages.push_back({source, token, -1});
    }
  }
  return a;
}

// Rows of a rank's outputs, as the lists have them; -1 beyond the capacity.
struct ExpectedRows {
  std::map<Entry, int64_t> of;
  std::vector<int64_t> group_begin;
  int64_t num_rows = 0;
  bool exceeds = false;
};

ExpectedRows expected_rows(const Batch& b, const Arrivals& a) {
  ExpectedRows rows;
  const bool is_padded = b.options.layout == TERN_LAYOUT_EXPERT_PADDED;
  const bool is_bounded = b.options.extent == TERN_EXTENT_WORST && b.options.row_capacity > 0 && !is_padded;
  const int64_t capacity = is_bounded ? b.options.row_capacity : kMost64;
  const int64_t group_rows = b.num_ranks * b.options.max_tokens;
  const auto add = [&](const Entry& entry, int64_t row, bool fits) {
    rows.of[entry] = fits ? row : -1;
    rows.exceeds = rows.exceeds || !fits;
  };
  if (b.options.layout == TERN_LAYOUT_RANK_MAJOR) {
    for (size_t i = 0; i < a.messages.size(); ++i) add(a.messages[i], static_cast<int64_t>(i), static_cast<int64_t>(i) < capacity);
    rows.num_rows = static_cast<int64_t>(a.messages.size());
  } else {
    const int64_t alignment = std::max(1, b.options.expert_alignment);
    for (const auto& group : a.entries) {
      rows.group_begin.push_back(rows.num_rows);
      const auto count = static_cast<int64_t>(group.size());
      for (int64_t i = 0; i < count; ++i) {
        const int64_t row = rows.num_rows + i;
        add(group[static_cast<size_t>(i)], row, is_padded ? i < group_rows : row < capacity);
      }
      rows.num_rows += is_padded ? group_rows : (count + alignment - 1) / alignment * alignment;
    }
    rows.group_begin.push_back(rows.num_rows);
  }
  if (b.options.extent == TERN_EXTENT_WORST && !is_padded) rows.num_rows = is_bounded ? capacity : -1;
  return rows;
}

void check_receiver(const Batch& b, RoutingTable& table, int32_t rank) {
  const Arrivals a = arrivals_at(b, rank);
  const ExpectedRows rows = expected_rows(b, a);
  ASSERT_EQ(table.num_received(), static_cast<int64_t>(a.messages.size()));
  ASSERT_EQ(table.exceeds_capacity(), rows.exceeds);
  ASSERT_EQ(table.num_rows(), rows.num_rows < 0 ? table.shape().row_capacity : rows.num_rows);
  ASSERT_GE(table.shape().row_capacity, rows.num_rows);
  for (int32_t source = 0; source < b.num_ranks; ++source) {
    const auto from_here = [&](const Entry& e) { return e.source == source; };
    ASSERT_EQ(table.messages_between(source, rank), std::ranges::count_if(a.messages, from_here));
    ASSERT_EQ(table.received_begin(source), std::ranges::count_if(a.messages, [&](const Entry& e) { return e.source < source; }));
    for (int32_t e = 0; e < b.local_experts() && b.options.num_topk > 0; ++e) {
      const auto& group = a.entries[static_cast<size_t>(e)];
      ASSERT_EQ(table.received_entries(e), static_cast<int32_t>(group.size()));
      ASSERT_EQ(table.source_entries(source, e), std::ranges::count_if(group, from_here));
      if (!table.shape().has_expert_rows()) continue;
      ASSERT_EQ(table.source_begin(source, e), std::ranges::count_if(group, [&](const Entry& x) { return x.source < source; }));
      ASSERT_EQ(table.group_begin(e), rows.group_begin[static_cast<size_t>(e)]);
    }
  }
  // Messages of one source come in their order, sources in any.
  for (int32_t from_last = 0; from_last < b.num_ranks; ++from_last) {
    const int32_t source = b.num_ranks - 1 - from_last;
    int64_t expected_message = table.received_begin(source);
    for (const Entry& message : a.messages) {
      if (message.source != source) continue;
      std::vector<int32_t> experts(static_cast<size_t>(b.options.num_topk), -1);
      for (int32_t e = 0; e < b.local_experts(); ++e)
        for (const Entry& entry : a.entries[static_cast<size_t>(e)])
          if (entry.source == source && entry.token == message.token) experts[static_cast<size_t>(entry.k)] = e;
      const int64_t index = table.place_message(source, static_cast<int32_t>(message.token), experts);
      ASSERT_EQ(index, expected_message++);
      ASSERT_EQ(table.source_token(index), message.token);
      if (!table.shape().has_expert_rows()) {
        ASSERT_EQ(table.received_row(index), rows.of.at(message));
      }
      for (int32_t k = 0; k < b.options.num_topk; ++k) {
        const Entry entry{source, message.token, table.shape().has_expert_rows() ? k : -1};
        ASSERT_EQ(table.placed_row(index, k), experts[static_cast<size_t>(k)] < 0 ? -1 : rows.of.at(entry));
      }
    }
  }
}

void check_sender(const Batch& b, const RoutingTable& table, int32_t rank) {
  std::vector<ExpectedRows> rows;
  for (int32_t r = 0; r < b.num_ranks; ++r)
    rows.push_back(b.masked[static_cast<size_t>(r)] != 0 ? ExpectedRows{} : expected_rows(b, arrivals_at(b, r)));
  const auto s = static_cast<size_t>(rank);
  ASSERT_EQ(table.num_tokens(), b.num_tokens[s]);
  for (int64_t token = 0; token < b.num_tokens[s]; ++token) {
    std::vector<int32_t> destinations;
    for (int32_t k = 0; k < b.options.num_topk; ++k) {
      const auto expert = static_cast<int32_t>(b.topk_idx[s][static_cast<size_t>(token * b.options.num_topk + k)]);
      const int32_t to = expert < 0 ? -1 : expert / b.local_experts();
      const bool is_gone = to < 0 || b.masked[static_cast<size_t>(to)] != 0;
      ASSERT_EQ(table.expert_of(token, k), is_gone ? -1 : expert);
      if (!is_gone) destinations.push_back(to);
      if (table.shape().has_expert_rows()) {
        ASSERT_EQ(table.own().entry_row(token, k), is_gone ? -1 : rows[static_cast<size_t>(to)].of.at({rank, token, k}));
      }
    }
    for (int32_t to = 0; to < b.num_ranks && b.options.num_topk == 0; ++to)
      if (b.token_in_rank[s][static_cast<size_t>(token * b.num_ranks + to)] != 0 && b.masked[static_cast<size_t>(to)] == 0)
        destinations.push_back(to);
    std::ranges::sort(destinations);
    destinations.erase(std::unique(destinations.begin(), destinations.end()), destinations.end());
    const auto messages = table.own().messages_of(token);
    ASSERT_EQ(messages.size(), destinations.size());
    for (size_t i = 0; i < messages.size(); ++i) {
      ASSERT_EQ(messages[i].rank, destinations[i]);
      if (table.shape().has_expert_rows()) continue;
      ASSERT_EQ(table.own().message_row(messages[i]), rows[static_cast<size_t>(destinations[i])].of.at({rank, token, -1}));
    }
  }
}

TEST(RoutingTable, AgreesWithListsMadeByBruteForce) {
  for (unsigned seed = 0; seed < 600; ++seed) {
    const Batch batch = random_batch(seed);
    auto tables = make_tables(batch);
    for (auto& [rank, table] : tables) {
      check_receiver(batch, table, rank);
      check_sender(batch, table, rank);
      // A plan is placed again for every dispatch along it.
      table.restart_placing();
      check_receiver(batch, table, rank);
      ASSERT_FALSE(testing::Test::HasFatalFailure()) << "seed " << seed << ", rank " << rank;
    }
  }
}

TEST(RoutingTable, IsRoutedAgainFromNothing) {
  for (unsigned seed = 0; seed < 100; ++seed) {
    const Batch next = random_batch(seed);
    if (next.num_ranks != 1) continue;
    auto tables = make_tables(next);
    RoutingTable& table = tables.at(0);
    tern_routing nothing;
    table.set_routing(nothing, next.masked);
    table.finish();
    EXPECT_EQ(table.num_received(), 0);
    EXPECT_FALSE(table.exceeds_capacity());
    table.set_routing(next.routing_of(0), next.masked);
    table.finish();
    check_receiver(next, table, 0);
    check_sender(next, table, 0);
  }
}

// Of rank 0, by sets.
void check_counts(const Batch& batch, const PlanShape& shape) {
  const auto num_ranks = static_cast<size_t>(shape.num_ranks);
  const int64_t num_tokens = batch.num_tokens[0];
  std::vector<int32_t> per_rank(num_ranks, -1), per_node(shape.num_nodes, -1), per_expert(shape.num_experts, -1);
  std::vector<uint8_t> in_rank(num_ranks * num_tokens, 7);
  count_routing(shape, batch.routing_of(0),
                {.tokens_per_rank = per_rank.data(),
                 .tokens_per_node = per_node.data(),
                 .tokens_per_expert = per_expert.data(),
                 .token_in_rank = in_rank.data()});
  std::map<int64_t, int32_t> ranks, nodes, experts;
  for (int64_t token = 0; token < num_tokens; ++token) {
    std::set<int32_t> goes_to;
    for (int32_t k = 0; k < shape.num_topk; ++k) {
      const int64_t expert = batch.topk_idx[0][token * shape.num_topk + k];
      if (expert < 0) continue;
      ++experts[expert];
      goes_to.insert(shape.rank_of_expert(static_cast<int32_t>(expert)));
    }
    for (int32_t rank = 0; rank < shape.num_ranks && shape.num_topk == 0; ++rank)
      if (batch.token_in_rank[0][token * shape.num_ranks + rank] != 0) goes_to.insert(rank);
    std::set<int32_t> goes_to_nodes;
    for (const int32_t rank : goes_to) goes_to_nodes.insert(shape.node_of_rank(rank));
    for (const int32_t rank : goes_to) ++ranks[rank];
    for (const int32_t node : goes_to_nodes) ++nodes[node];
    for (int32_t rank = 0; rank < shape.num_ranks; ++rank)
      EXPECT_EQ(in_rank[token * shape.num_ranks + rank], goes_to.contains(rank) ? 1 : 0);
  }
  for (size_t rank = 0; rank < num_ranks; ++rank) EXPECT_EQ(per_rank[rank], ranks[static_cast<int64_t>(rank)]);
  for (size_t node = 0; node < per_node.size(); ++node) EXPECT_EQ(per_node[node], nodes[static_cast<int64_t>(node)]);
  for (size_t expert = 0; expert < per_expert.size(); ++expert) EXPECT_EQ(per_expert[expert], experts[static_cast<int64_t>(expert)]);
}

TEST(CountRouting, CountsRanksNodesAndExperts) {
  for (unsigned seed = 0; seed < 60; ++seed) {
    SCOPED_TRACE(seed);
    const Batch batch = random_batch(seed);
    PlanShape shape = make_plan_shape(batch.options, 0, batch.num_ranks);
    for (shape.num_nodes = 1; shape.num_nodes <= shape.num_ranks; ++shape.num_nodes)
      if (shape.num_ranks % shape.num_nodes == 0) check_counts(batch, shape);
  }
}

TEST(CountRouting, GivenCountsOfExpertsAreHandedOut) {
  const PlanShape shape = make_plan_shape({.max_tokens = 2, .num_experts = 4, .num_topk = 0}, 0, 2);
  const std::vector<int32_t> given = {5, 0, 2, 1};
  std::vector<int32_t> told(4, -1);
  count_routing(shape, {.tokens_per_expert = given.data()}, {.tokens_per_expert = told.data()});
  EXPECT_EQ(told, given);
  count_routing(shape, {}, {.tokens_per_expert = told.data()});
  EXPECT_EQ(told, std::vector<int32_t>(4));
}

TEST(RoutingTable, RefusesRoutingsThatDoNotFit) {
  const PlanShape topk = make_plan_shape({.max_tokens = 4, .num_experts = 6, .num_topk = 2}, 0, 2);
  const PlanShape by_mask = make_plan_shape({.max_tokens = 4, .num_experts = 6, .num_topk = 0}, 0, 2);
  const std::vector<int64_t> good = {0, 5, -1, -1, 3, 3, 1, 2};
  const std::vector<uint8_t> mask(8);
  const auto check = [&](const PlanShape& shape, tern_routing routing) { return status_of([&] { check_routing(shape, routing); }); };
  EXPECT_EQ(check(topk, {.topk_idx = good.data(), .num_tokens = 4}), TERN_OK);
  EXPECT_EQ(check(topk, {}), TERN_OK);
  EXPECT_EQ(check(by_mask, {}), TERN_OK);
  EXPECT_EQ(check(by_mask, {.num_tokens = 4, .token_in_rank = mask.data()}), TERN_OK);
  const auto index_type = [](int value) { return static_cast<tern_index_type>(value); };
  const std::vector<tern_routing> bad_for_topk = {
      {.topk_idx = good.data(), .num_tokens = -1},
      {.topk_idx = good.data(), .num_tokens = 5},
      {.topk_idx = good.data(), .num_tokens = kMost64},
      {.topk_idx = nullptr, .num_tokens = 1},
      {.num_tokens = 4, .token_in_rank = mask.data()},
      {.topk_idx = good.data(), .num_tokens = 4, .token_in_rank = mask.data()},
      {.topk_idx = good.data(), .topk_idx_type = index_type(2), .num_tokens = 4},
  };
  for (const tern_routing& routing : bad_for_topk) EXPECT_EQ(check(topk, routing), TERN_INVALID_ARGUMENT);
  EXPECT_EQ(check(by_mask, {.num_tokens = 1}), TERN_INVALID_ARGUMENT);
  const std::vector<int32_t> counts = {0, 1, 2, 3, 4, -1};
  EXPECT_EQ(check(by_mask, {.num_tokens = 4, .token_in_rank = mask.data(), .tokens_per_expert = counts.data()}), TERN_INVALID_ARGUMENT);
  for (const int64_t wrong : {int64_t{-2}, int64_t{6}, int64_t{1} << 32, std::numeric_limits<int64_t>::min()}) {
    std::vector<int64_t> bad = good;
    bad[7] = wrong;
    EXPECT_EQ(check(topk, {.topk_idx = bad.data(), .num_tokens = 4}), TERN_INVALID_ARGUMENT);
    EXPECT_EQ(check(topk, {.topk_idx = bad.data(), .num_tokens = 3}), TERN_OK);
  }
}

// The capacity that a plan has by default is what the worst routing needs, and no more.
// 2 nodes of 2 ranks, 8 experts; seen by rank 2, whose node has experts 4 to 7, two on each of its ranks.
TEST(RoutingTable, RowsOfANodesSourcesFollowFromTheCounts) {
  const auto begins_of = [](tern_layout layout, int32_t node) {
    tern_plan_options options{.max_tokens = 10, .num_experts = 8, .num_topk = 2, .layout = layout, .expert_alignment = 4};
    if (layout == TERN_LAYOUT_RANK_MAJOR) options.expert_alignment = 0;
    PlanShape shape = make_plan_shape(options, 2, 4);
    shape.num_nodes = 2;
    RoutingTable table(shape);
    table.begin_counts(std::vector<uint8_t>(4));
    for (int32_t source = 0; source < 4; ++source) {
      const int32_t s = source + 1;
      const std::vector<int32_t> counts{s, 2 * s, 0, 3, /* messages to the ranks */ 1, 1, 2 * s, s, /* tokens */ 10};
      std::copy(counts.begin(), counts.end(), table.counts_of(source).begin());
    }
    table.finish();
    std::vector<int64_t> begins(static_cast<size_t>(shape.num_row_begins()));
    table.get_row_begins(node, begins);
    return begins;
  };
  using Begins = std::vector<int64_t>;
  EXPECT_EQ(begins_of(TERN_LAYOUT_RANK_MAJOR, 0), (Begins{0, 0}));
  EXPECT_EQ(begins_of(TERN_LAYOUT_RANK_MAJOR, 1), (Begins{6, 3}));
  EXPECT_EQ(begins_of(TERN_LAYOUT_EXPERT_MAJOR, 0), (Begins{0, 12, 0, 0}));  // 10 entries, a group of 12 rows
  EXPECT_EQ(begins_of(TERN_LAYOUT_EXPERT_MAJOR, 1), (Begins{3, 12 + 6, 0, 6}));
  EXPECT_EQ(begins_of(TERN_LAYOUT_EXPERT_PADDED, 1), (Begins{3, 40 + 6, 0, 40 + 6}));
}

TEST(PlanShape, CapacityIsWhatCanArrive) {
  const auto capacity = [](tern_layout layout, int32_t alignment, int64_t given = 0) {
    return make_plan_shape({.max_tokens = 3,
                            .num_experts = 4,
                            .num_topk = 2,
                            .layout = layout,
                            .extent = TERN_EXTENT_WORST,
                            .expert_alignment = alignment,
                            .row_capacity = given},
                           0, 2)
        .row_capacity;
  };
  EXPECT_EQ(capacity(TERN_LAYOUT_RANK_MAJOR, 8), 6);
  EXPECT_EQ(capacity(TERN_LAYOUT_EXPERT_PADDED, 8), 12);
  EXPECT_EQ(capacity(TERN_LAYOUT_EXPERT_PADDED, 8, 5), 12);
  EXPECT_EQ(capacity(TERN_LAYOUT_EXPERT_MAJOR, 1), 12);
  EXPECT_EQ(capacity(TERN_LAYOUT_EXPERT_MAJOR, 0, 5), 5);
  // 12 entries in two groups: 11 and 1, each 7 short of a multiple of 8 at the most.
  EXPECT_EQ(capacity(TERN_LAYOUT_EXPERT_MAJOR, 8), 12 + 2 * 7);
}

TEST(PlanShape, RefusesWhatCannotBe) {
  const tern_plan_options good{.max_tokens = 4, .num_experts = 6, .num_topk = 2, .layout = TERN_LAYOUT_EXPERT_MAJOR};
  const auto with = [&](auto change) {
    tern_plan_options o = good;
    change(o);
    return status_of([&] { make_plan_shape(o, 0, 2); });
  };
  EXPECT_EQ(with([](auto&) {}), TERN_OK);
  for (const int64_t tokens : {int64_t{0}, int64_t{-1}, int64_t{kMost32}, int64_t{kMost32} + 1, kMost64, -kMost64})
    EXPECT_EQ(with([&](auto& o) { o.max_tokens = tokens; }), TERN_INVALID_ARGUMENT) << tokens;
  for (const int32_t experts : {0, -2, 5, kMost32, -kMost32})
    EXPECT_EQ(with([&](auto& o) { o.num_experts = experts; }), TERN_INVALID_ARGUMENT) << experts;
  for (const int32_t topk : {-1, 65, kMost32, 0}) EXPECT_EQ(with([&](auto& o) { o.num_topk = topk; }), TERN_INVALID_ARGUMENT) << topk;
  for (const int value : {-1, 3, kMost32})
    EXPECT_EQ(with([&](auto& o) { o.layout = static_cast<tern_layout>(value); }), TERN_INVALID_ARGUMENT) << value;
  for (const int value : {-1, 2, kMost32})
    EXPECT_EQ(with([&](auto& o) { o.extent = static_cast<tern_extent>(value); }), TERN_INVALID_ARGUMENT) << value;
  for (const int32_t alignment : {-1, kMost32})
    EXPECT_EQ(with([&](auto& o) { o.expert_alignment = alignment; }), TERN_INVALID_ARGUMENT) << alignment;
  for (const int64_t capacity : {int64_t{-1}, int64_t{kMost32} + 1, kMost64})
    EXPECT_EQ(with([&](auto& o) { o.row_capacity = capacity; }), TERN_INVALID_ARGUMENT) << capacity;
}

// Row numbers are 32 bits wide: the largest plan that has that many is allowed, one token more is not.
TEST(PlanShape, AllowsAsManyRowsAsRowNumbersCanName) {
  tern_plan_options o{.max_tokens = kMost32 / 8, .num_experts = 4, .num_topk = 2};
  EXPECT_EQ(make_plan_shape(o, 0, 4).row_capacity, 4 * (kMost32 / 8));
  ++o.max_tokens;
  EXPECT_EQ(status_of([&] { make_plan_shape(o, 0, 4); }), TERN_INVALID_ARGUMENT);
  o = {.max_tokens = kMost32 / 16, .num_experts = 16, .num_topk = 1, .layout = TERN_LAYOUT_EXPERT_PADDED};
  EXPECT_EQ(make_plan_shape(o, 0, 1).row_capacity, 16 * int64_t{kMost32 / 16});
  ++o.max_tokens;
  EXPECT_EQ(status_of([&] { make_plan_shape(o, 0, 1); }), TERN_INVALID_ARGUMENT);
}

}  // namespace
}  // namespace tern::test
