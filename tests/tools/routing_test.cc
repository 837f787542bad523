// SPDX-License-Identifier: Apache-2.0
#include "routing/routing.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <set>

#include "base/error.h"

namespace tern::tools {
namespace {

constexpr RoutingShape kShape{.num_ranks = 4, .num_tokens = 256, .num_topk = 8, .num_experts = 64};

void for_each_token(const Routing& routing, const std::function<void(const std::vector<int32_t>&)>& visit) {
  for (int rank = 0; rank < routing.num_ranks(); ++rank) {
    for (int64_t token = 0; token < routing.num_tokens(rank); ++token) {
      const int32_t* entries = routing.entries(rank, token);
      visit({entries, entries + routing.num_topk});
    }
  }
}

std::vector<int64_t> count_experts(const Routing& routing) {
  std::vector<int64_t> counts(static_cast<size_t>(routing.num_experts), 0);
  for_each_token(routing, [&](const std::vector<int32_t>& entries) {
    for (const int32_t e : entries) {
      if (e >= 0) ++counts[static_cast<size_t>(e)];
    }
  });
  return counts;
}

TEST(Routing, EveryGeneratorGivesValidEntriesWithoutRepetition) {
  for (const RoutingKind kind :
       {RoutingKind::kUniform, RoutingKind::kZipf, RoutingKind::kGroupLimited, RoutingKind::kOneRank, RoutingKind::kOneExpert}) {
    const Routing routing = generate_routing(kShape, {.kind = kind, .seed = 3});
    EXPECT_NO_THROW(validate_routing(routing));
    EXPECT_EQ(routing.num_ranks(), 4);
    EXPECT_EQ(routing.max_tokens(), 256);
    for_each_token(routing, [](std::vector<int32_t> entries) {
      std::erase(entries, -1);
      EXPECT_EQ(std::set<int32_t>(entries.begin(), entries.end()).size(), entries.size());
    });
  }
}

TEST(Routing, SameSeedSameRoutingOtherSeedAnother) {
  const RoutingOptions options{.kind = RoutingKind::kZipf, .skew = 1.2, .seed = 7};
  EXPECT_EQ(generate_routing(kShape, options).topk_idx, generate_routing(kShape, options).topk_idx);
  EXPECT_NE(generate_routing(kShape, options).topk_idx,
            generate_routing(kShape, {.kind = RoutingKind::kZipf, .skew = 1.2, .seed = 8}).topk_idx);
}

// Files of results name a seed, so what a seed means must not change.
TEST(Routing, SeedsMeanTheSameForEver) {
  const Routing uniform = generate_routing({.num_ranks = 2, .num_tokens = 1, .num_topk = 4, .num_experts = 16}, {.seed = 1});
  EXPECT_EQ(uniform.topk_idx, (std::vector<std::vector<int32_t>>{{14, 6, 12, 8}, {12, 14, 15, 8}}));
  const Routing limited = generate_routing({.num_ranks = 2, .num_tokens = 1, .num_topk = 4, .num_experts = 16},
                                           {.kind = RoutingKind::kGroupLimited, .seed = 1});
  EXPECT_EQ(limited.topk_idx, (std::vector<std::vector<int32_t>>{{9, 5, 0, 2}, {2, 13, 12, 14}}));
}

TEST(Routing, ARanksTokensDoNotDependOnTheNumberOfTokens) {
  RoutingShape fewer = kShape;
  fewer.num_tokens = 16;
  const Routing many = generate_routing(kShape, {.seed = 5}), few = generate_routing(fewer, {.seed = 5});
  for (int rank = 0; rank < 4; ++rank) EXPECT_TRUE(std::equal(few.entries(rank, 0), few.entries(rank, 16), many.entries(rank, 0)));
}

TEST(Routing, UniformUsesAllExpertsAlike) {
  const auto counts = count_experts(generate_routing(kShape, {.seed = 1}));
  const double mean = 4.0 * 256 * 8 / 64;
  for (const int64_t count : counts) EXPECT_NEAR(static_cast<double>(count), mean, mean / 2);
}

TEST(Routing, ZipfPrefersFewExpertsMoreWithSkew) {
  const auto busiest = [](double skew) {
    const auto counts = count_experts(generate_routing(kShape, {.kind = RoutingKind::kZipf, .skew = skew, .seed = 1}));
    auto sorted = counts;
    std::ranges::sort(sorted, std::greater<>());
    return sorted[0] + sorted[1] + sorted[2] + sorted[3];
  };
  EXPECT_LT(busiest(0), busiest(0.7));
  EXPECT_LT(busiest(0.7), busiest(1.5));
}

TEST(Routing, ZipfCanTakeEveryExpertOfATokenWhateverTheSkew) {
  const RoutingShape all{.num_ranks = 1, .num_tokens = 4, .num_topk = 64, .num_experts = 64};
  const auto counts = count_experts(generate_routing(all, {.kind = RoutingKind::kZipf, .skew = 16, .seed = 1}));
  EXPECT_TRUE(std::ranges::all_of(counts, [](int64_t count) { return count == 4; }));
}

TEST(Routing, GroupLimitedStaysInFourOfEightGroups) {
  const Routing routing = generate_routing(kShape, {.kind = RoutingKind::kGroupLimited, .seed = 2});
  size_t most = 0;
  for_each_token(routing, [&](const std::vector<int32_t>& entries) {
    std::set<int32_t> groups;
    for (const int32_t e : entries) groups.insert(e / 8);
    EXPECT_LE(groups.size(), 4u);
    most = std::max(most, groups.size());
  });
  EXPECT_EQ(most, 4u);
}

TEST(Routing, OneRankSendsAllEntriesToRank0AsFarAsItHasExperts) {
  const Routing routing =
      generate_routing({.num_ranks = 4, .num_tokens = 8, .num_topk = 6, .num_experts = 16}, {.kind = RoutingKind::kOneRank, .seed = 1});
  for_each_token(routing, [](const std::vector<int32_t>& entries) {
    EXPECT_EQ(std::set<int32_t>(entries.begin(), entries.end()), (std::set<int32_t>{-1, 0, 1, 2, 3}));
  });
  const auto messages = count_messages(routing);
  for (size_t source = 0; source < 4; ++source) {
    for (size_t destination = 0; destination < 4; ++destination) EXPECT_EQ(messages[source * 4 + destination], destination == 0 ? 8 : 0);
  }
}

TEST(Routing, OneExpertSendsOneEntryToExpert0) {
  const auto counts = count_experts(generate_routing(kShape, {.kind = RoutingKind::kOneExpert, .seed = 1}));
  EXPECT_EQ(counts[0], 4 * 256);
  EXPECT_EQ(std::count(counts.begin() + 1, counts.end(), 0), 63);
}

TEST(Routing, ATokenCountsOncePerRankInMessages) {
  const Routing routing{4, 4, {{0, 1, 0, 3}, {2, -1, -1, -1}}};
  EXPECT_EQ(count_messages(routing), (std::vector<int64_t>{1, 1, 0, 1}));
}

TEST(Routing, ShapesThatCannotBeAreRefused) {
  const auto refused = [](RoutingShape shape, RoutingOptions options) { EXPECT_THROW(generate_routing(shape, options), Failure); };
  refused({.num_ranks = 3, .num_tokens = 1, .num_topk = 1, .num_experts = 4}, {});
  refused({.num_ranks = 1, .num_tokens = 1, .num_topk = 5, .num_experts = 4}, {});
  refused({.num_ranks = 1, .num_tokens = -1, .num_topk = 1, .num_experts = 4}, {});
  refused({.num_ranks = 1, .num_tokens = 1, .num_topk = 1, .num_experts = 12}, {.kind = RoutingKind::kGroupLimited});
  refused({.num_ranks = 1, .num_tokens = 1, .num_topk = 9, .num_experts = 16}, {.kind = RoutingKind::kGroupLimited});
  refused({.num_ranks = 1, .num_tokens = 1, .num_topk = 1, .num_experts = 4}, {.kind = RoutingKind::kZipf, .skew = -1});
}

TEST(Routing, EntriesOutsideTheExpertsAreRefused) {
  EXPECT_THROW(validate_routing({1, 4, {{4}, {0}}}), Failure);
  EXPECT_THROW(validate_routing({1, 4, {{-2}, {0}}}), Failure);
  EXPECT_NO_THROW(validate_routing({1, 4, {{-1}, {}}}));
}

}  // namespace
}  // namespace tern::tools
