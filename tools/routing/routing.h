// SPDX-License-Identifier: Apache-2.0
// The routing of one batch on all ranks, and generators of it. A routing is a pure function of its shape, options and
// seed, so every rank can make the whole of it and knows what to expect from the others without any communication.
//
//   const Routing routing = generate_routing({.num_ranks = 4, .num_tokens = 128, .num_topk = 8, .num_experts = 256},
//                                            {.kind = RoutingKind::kGroupLimited, .seed = 1});
//   const int32_t* idx = routing.topk_idx[rank].data();  // [num_tokens, num_topk]
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace tern::tools {

enum class RoutingKind {
  kUniform,       // random experts, each at most once per token
  kZipf,          // the same with the popularity of experts falling as 1 / position^skew; positions are a random permutation
  kGroupLimited,  // DeepSeek-V3: random scores; the best groups by the sum of their two best; the best experts in these
  kOneRank,       // all entries at experts of rank 0, as many as it has; further entries are -1
  kOneExpert      // one entry at expert 0, the others -1
};

struct RoutingShape {
  int num_ranks = 1;
  int64_t num_tokens = 0;  // on each rank
  int num_topk = 1;
  int num_experts = 1;
};

struct RoutingOptions {
  RoutingKind kind = RoutingKind::kUniform;
  double skew = 1.0;   // kZipf
  int num_groups = 8;  // kGroupLimited
  int max_groups = 4;  // kGroupLimited: a token's experts lie in at most this many groups
  uint64_t seed = 0;
};

struct Routing {
  int num_topk = 0;
  int num_experts = 0;
  std::vector<std::vector<int32_t>> topk_idx;  // [rank][token * num_topk + k], -1: none

  int num_ranks() const { return static_cast<int>(topk_idx.size()); }
  int64_t num_tokens(int rank) const { return static_cast<int64_t>(topk_idx[static_cast<size_t>(rank)].size()) / num_topk; }
  int64_t max_tokens() const;
  int experts_per_rank() const { return num_experts / num_ranks(); }
  const int32_t* entries(int rank, int64_t token) const { return topk_idx[static_cast<size_t>(rank)].data() + token * num_topk; }
  bool goes_to(int rank, int64_t token, int destination) const;
};

// Throws TERN_INVALID_ARGUMENT for a shape that cannot be.
Routing generate_routing(const RoutingShape& shape, const RoutingOptions& options);

// Throws TERN_INVALID_ARGUMENT unless every entry is -1 or an expert, and the experts divide by the ranks.
void validate_routing(const Routing& routing);

// [num_ranks, num_ranks] tokens that row rank sends to column rank, each counted once per destination.
std::vector<int64_t> count_messages(const Routing& routing);
// The same of entries: a token counts for each of its experts there.
std::vector<int64_t> count_entries(const Routing& routing);

}  // namespace tern::tools
