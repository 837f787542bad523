// SPDX-License-Identifier: Apache-2.0
#include "routing/routing.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <span>

#include "base/error.h"
#include "routing/random.h"

namespace tern::tools {
namespace {

// Draws entries.size() different experts with chances proportional to their weights.
void draw_without_replacement(const std::vector<uint32_t>& weights, Random& random, std::span<int32_t> entries) {
  std::vector<uint32_t> left = weights;
  uint64_t total = std::accumulate(left.begin(), left.end(), uint64_t{0});
  for (int32_t& entry : entries) {
    uint64_t point = random.below(total);
    size_t expert = 0;
    while (point >= left[expert]) point -= left[expert++];
    entry = static_cast<int32_t>(expert);
    total -= left[expert];
    left[expert] = 0;
  }
}

// Rounded to 24 bits, so that C libraries whose pow() differs in its last digit give the same routing.
std::vector<uint32_t> zipf_weights(int num_experts, double skew, uint64_t seed) {
  std::vector<uint32_t> weights(static_cast<size_t>(num_experts));
  for (size_t i = 0; i < weights.size(); ++i) {
    const double share = std::pow(static_cast<double>(i + 1), -skew);
    weights[i] = std::max(1u, static_cast<uint32_t>(std::llround(share * double{1 << 24})));
  }
  Random random(key_of(seed, 0x5A1Fu));
  for (size_t i = weights.size(); i > 1; --i) std::swap(weights[i - 1], weights[random.below(i)]);
  return weights;
}

// The positions of the `count` greatest values, greatest first; of equal ones the first.
std::vector<int32_t> top_positions(std::span<const uint64_t> values, int count) {
  std::vector<int32_t> positions(values.size());
  std::iota(positions.begin(), positions.end(), 0);
  const auto greater = [&](int32_t a, int32_t b) {
    const uint64_t va = values[static_cast<size_t>(a)], vb = values[static_cast<size_t>(b)];
    return va != vb ? va > vb : a < b;
  };
  std::partial_sort(positions.begin(), positions.begin() + count, positions.end(), greater);
  positions.resize(static_cast<size_t>(count));
  return positions;
}

void draw_group_limited(const RoutingOptions& options, int num_experts, Random& random, std::span<int32_t> entries) {
  std::vector<uint64_t> scores(static_cast<size_t>(num_experts));
  for (uint64_t& score : scores) score = random.next() >> 32;
  const size_t group_size = scores.size() / static_cast<size_t>(options.num_groups);
  std::vector<uint64_t> group_scores;
  for (size_t first = 0; first < scores.size(); first += group_size) {
    const std::span<const uint64_t> group(scores.data() + first, group_size);
    uint64_t sum = 0;
    for (const int32_t i : top_positions(group, static_cast<int>(std::min<size_t>(2, group_size)))) sum += group[static_cast<size_t>(i)];
    group_scores.push_back(sum);
  }
  std::vector<uint64_t> allowed(scores.size(), 0);
  for (const int32_t group : top_positions(group_scores, options.max_groups)) {
    const size_t first = static_cast<size_t>(group) * group_size;
    // One more than the score, so that an expert of a chosen group always beats those of the others.
    for (size_t i = first; i < first + group_size; ++i) allowed[i] = scores[i] + 1;
  }
  std::ranges::copy(top_positions(allowed, static_cast<int>(entries.size())), entries.begin());
}

void require_drawable(const RoutingShape& shape, const RoutingOptions& options) {
  if (shape.num_ranks < 1 || shape.num_tokens < 0 || shape.num_topk < 1 || shape.num_experts < 1)
    fail(TERN_INVALID_ARGUMENT, "routing: {} ranks, {} tokens, top-{} of {} experts cannot be", shape.num_ranks, shape.num_tokens,
         shape.num_topk, shape.num_experts);
  if (shape.num_experts % shape.num_ranks != 0)
    fail(TERN_INVALID_ARGUMENT, "routing: {} experts do not divide by {} ranks", shape.num_experts, shape.num_ranks);
  const bool draws_all = options.kind != RoutingKind::kOneRank && options.kind != RoutingKind::kOneExpert;
  if (draws_all && shape.num_topk > shape.num_experts)
    fail(TERN_INVALID_ARGUMENT, "routing: top-{} needs at least as many experts, there are {}", shape.num_topk, shape.num_experts);
  if (options.kind == RoutingKind::kZipf && !(options.skew >= 0 && options.skew <= 16))
    fail(TERN_INVALID_ARGUMENT, "routing: skew {} must be between 0 and 16", options.skew);
  if (options.kind != RoutingKind::kGroupLimited) return;
  if (options.num_groups < 1 || options.max_groups < 1 || options.max_groups > options.num_groups ||
      shape.num_experts % options.num_groups != 0)
    fail(TERN_INVALID_ARGUMENT,
         "routing: {} experts in {} groups, {} of them chosen, cannot be: take experts that divide by the groups, or --routing uniform",
         shape.num_experts, options.num_groups, options.max_groups);
  const int reachable = shape.num_experts / options.num_groups * options.max_groups;
  if (shape.num_topk > reachable)
    fail(TERN_INVALID_ARGUMENT, "routing: top-{} needs more experts than the {} in {} groups", shape.num_topk, reachable,
         options.max_groups);
}

}  // namespace

int64_t Routing::max_tokens() const {
  int64_t result = 0;
  for (int rank = 0; rank < num_ranks(); ++rank) result = std::max(result, num_tokens(rank));
  return result;
}

bool Routing::goes_to(int rank, int64_t token, int destination) const {
  const int32_t* row = entries(rank, token);
  return std::any_of(row, row + num_topk, [&](int32_t e) { return e >= 0 && e / experts_per_rank() == destination; });
}

Routing generate_routing(const RoutingShape& shape, const RoutingOptions& options) {
  require_drawable(shape, options);
  Routing routing{shape.num_topk, shape.num_experts, {}};
  const auto topk = static_cast<size_t>(shape.num_topk);
  routing.topk_idx.assign(static_cast<size_t>(shape.num_ranks), std::vector<int32_t>(static_cast<size_t>(shape.num_tokens) * topk, -1));

  std::vector<uint32_t> weights(static_cast<size_t>(shape.num_experts), 1);
  if (options.kind == RoutingKind::kZipf) weights = zipf_weights(shape.num_experts, options.skew, options.seed);
  size_t drawn = topk;  // entries of a token that are not -1
  if (options.kind == RoutingKind::kOneRank) {
    weights.resize(static_cast<size_t>(shape.num_experts / shape.num_ranks));
    drawn = std::min(topk, weights.size());
  }
  if (options.kind == RoutingKind::kOneExpert) {
    weights.resize(1);
    drawn = 1;
  }
  for (size_t rank = 0; rank < routing.topk_idx.size(); ++rank) {
    for (size_t token = 0; token < static_cast<size_t>(shape.num_tokens); ++token) {
      Random random(key_of(options.seed, rank, token));
      const std::span<int32_t> entries(routing.topk_idx[rank].data() + token * topk, drawn);
      if (options.kind == RoutingKind::kGroupLimited)
        draw_group_limited(options, shape.num_experts, random, entries);
      else
        draw_without_replacement(weights, random, entries);
    }
  }
  return routing;
}

void validate_routing(const Routing& routing) {
  if (routing.num_ranks() < 1 || routing.num_topk < 1 || routing.num_experts < 1 || routing.num_experts % routing.num_ranks() != 0)
    fail(TERN_INVALID_ARGUMENT, "routing: {} ranks, top-{} of {} experts cannot be: experts must divide by the ranks", routing.num_ranks(),
         routing.num_topk, routing.num_experts);
  for (int rank = 0; rank < routing.num_ranks(); ++rank) {
    const auto& entries = routing.topk_idx[static_cast<size_t>(rank)];
    for (size_t i = 0; i < entries.size(); ++i) {
      if (entries[i] < -1 || entries[i] >= routing.num_experts)
        fail(TERN_INVALID_ARGUMENT, "routing: rank {}, token {}, k {}: entry {} is neither -1 nor one of {} experts", rank,
             i / static_cast<size_t>(routing.num_topk), i % static_cast<size_t>(routing.num_topk), entries[i], routing.num_experts);
    }
  }
}

std::vector<int64_t> count_messages(const Routing& routing) {
  const int num_ranks = routing.num_ranks();
  std::vector<int64_t> counts(static_cast<size_t>(num_ranks) * static_cast<size_t>(num_ranks), 0);
  for (int source = 0; source < num_ranks; ++source) {
    for (int64_t token = 0; token < routing.num_tokens(source); ++token) {
      for (int destination = 0; destination < num_ranks; ++destination)
        counts[static_cast<size_t>(source * num_ranks + destination)] += routing.goes_to(source, token, destination);
    }
  }
  return counts;
}

std::vector<int64_t> count_entries(const Routing& routing) {
  const int num_ranks = routing.num_ranks();
  std::vector<int64_t> counts(static_cast<size_t>(num_ranks) * static_cast<size_t>(num_ranks), 0);
  for (int source = 0; source < num_ranks; ++source) {
    for (int64_t token = 0; token < routing.num_tokens(source); ++token) {
      const int32_t* entries = routing.entries(source, token);
      for (int32_t k = 0; k < routing.num_topk; ++k)
        if (entries[k] >= 0) ++counts[static_cast<size_t>(source * num_ranks + entries[k] / routing.experts_per_rank())];
    }
  }
  return counts;
}

}  // namespace tern::tools
