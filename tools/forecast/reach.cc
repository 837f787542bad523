// SPDX-License-Identifier: Apache-2.0
#include "forecast/reach.h"

#include <fmt/format.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "base/error.h"

namespace tern::tools {
namespace {

constexpr int64_t kSampledTokens = 16384;
constexpr uint64_t kSeed = 1;

void require_possible(const Places& places, const Choices& choices) {
  const int num_ranks = places.num_ranks();
  if (places.num_nodes < 1 || places.ranks_per_node < 1 || choices.num_experts % num_ranks != 0)
    fail(TERN_INVALID_ARGUMENT,
         "plan: {} experts cannot be divided by {} ranks ({} nodes of {}); choose --experts as a multiple of the ranks, copies of experts "
         "counted",
         choices.num_experts, num_ranks, places.num_nodes, places.ranks_per_node);
  if (choices.num_topk < 1 || choices.num_topk > choices.num_experts)
    fail(TERN_INVALID_ARGUMENT, "plan: top-{} needs at least as many experts, there are {}", choices.num_topk, choices.num_experts);
}

double most_by_mean(const std::vector<int64_t>& counts) {
  const auto sum = std::accumulate(counts.begin(), counts.end(), int64_t{0});
  return static_cast<double>(*std::ranges::max_element(counts)) * static_cast<double>(counts.size()) / static_cast<double>(sum);
}

// In a sample the busiest of many equal ranks is above the mean by chance; these routings prefer no expert.
bool is_even(RoutingKind kind) { return kind == RoutingKind::kUniform || kind == RoutingKind::kGroupLimited; }

Reach sample_reach(const Places& places, const Choices& choices, const RoutingOptions& routing) {
  const int num_ranks = places.num_ranks();
  const RoutingShape shape{num_ranks, (kSampledTokens + num_ranks - 1) / num_ranks, choices.num_topk, choices.num_experts};
  RoutingOptions seeded = routing;
  seeded.seed = kSeed;
  const Routing sample = generate_routing(shape, seeded);
  std::vector<int64_t> of_ranks(static_cast<size_t>(num_ranks)), of_nodes(static_cast<size_t>(places.num_nodes));
  std::vector<int64_t> entries_of_ranks(of_ranks.size());
  std::vector<int64_t> last_token_of_rank(of_ranks.size(), -1), last_token_of_node(of_nodes.size(), -1);
  const auto count = [](std::vector<int64_t>& counts, std::vector<int64_t>& last_token, int part, int64_t token) {
    const auto idx = static_cast<size_t>(part);
    counts[idx] += last_token[idx] != token;
    last_token[idx] = token;
  };
  const int64_t num_tokens = shape.num_tokens * num_ranks;
  for (int64_t token = 0; token < num_tokens; ++token) {
    const int32_t* entries = sample.entries(static_cast<int>(token / shape.num_tokens), token % shape.num_tokens);
    for (int k = 0; k < choices.num_topk; ++k) {
      if (entries[k] < 0) continue;
      const int rank = entries[k] / sample.experts_per_rank();
      ++entries_of_ranks[static_cast<size_t>(rank)];
      count(of_ranks, last_token_of_rank, rank, token);
      count(of_nodes, last_token_of_node, rank / places.ranks_per_node, token);
    }
  }
  const auto mean = [&](const std::vector<int64_t>& counts) {
    return static_cast<double>(std::accumulate(counts.begin(), counts.end(), int64_t{0})) / static_cast<double>(num_tokens);
  };
  Reach reach{.ranks = mean(of_ranks), .nodes = mean(of_nodes), .entries = mean(entries_of_ranks)};
  if (!is_even(routing.kind)) {
    reach.busiest_rank = most_by_mean(of_ranks);
    reach.busiest_node = most_by_mean(of_nodes);
    reach.busiest_entries = most_by_mean(entries_of_ranks);
  }
  reach.how = fmt::format("counted in a sample of {} tokens, seed {}", num_tokens, kSeed);
  return reach;
}

}  // namespace

double expect_parts(int num_parts, const Choices& choices) {
  const int elsewhere = choices.num_experts - choices.num_experts / num_parts;
  double none_here = 1;
  for (int k = 0; k < choices.num_topk; ++k)
    none_here *= static_cast<double>(std::max(0, elsewhere - k)) / static_cast<double>(choices.num_experts - k);
  return num_parts * (1 - none_here);
}

Reach expect_reach(const Places& places, const Choices& choices, const RoutingOptions& routing) {
  require_possible(places, choices);
  if (routing.kind != RoutingKind::kUniform) return sample_reach(places, choices, routing);
  const int here = choices.num_experts / places.num_ranks();
  return {.ranks = expect_parts(places.num_ranks(), choices),
          .nodes = expect_parts(places.num_nodes, choices),
          .entries = static_cast<double>(choices.num_topk),
          .how = fmt::format("ranks (1 - C({0} - {1}, {2}) / C({0}, {2})), with {1} experts on a rank; nodes alike", choices.num_experts,
                             here, choices.num_topk)};
}

}  // namespace tern::tools
