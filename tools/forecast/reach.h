// SPDX-License-Identifier: Apache-2.0
// How far tokens are expected to travel: on how many ranks and nodes a token has at least one of its experts.
//
//   const Reach reach = expect_reach({.num_nodes = 2, .ranks_per_node = 8}, {.num_experts = 256, .num_topk = 8}, {});
//   reach.ranks;  // 6.6 of 16
#pragma once

#include <cstdint>
#include <string>

#include "routing/routing.h"

namespace tern::tools {

struct Places {
  int num_nodes = 1;
  int ranks_per_node = 1;

  int num_ranks() const { return num_nodes * ranks_per_node; }
};

struct Choices {
  int num_experts = 1;
  int num_topk = 1;
};

// Mean numbers for a token whose own rank is any of them.
struct Reach {
  double ranks = 1;         // own one included
  double nodes = 1;         // own one included
  double entries = 1;       // experts that it goes to
  double busiest_rank = 1;  // tokens that come to the rank that gets most, by the mean
  double busiest_node = 1;
  double busiest_entries = 1;  // the same for entries: tokens and their experts
  std::string how = {};
};

// Exact where a token's experts are drawn evenly; else from a sample that is the same on every run. Throws TERN_INVALID_ARGUMENT for numbers
// that cannot be.
Reach expect_reach(const Places& places, const Choices& choices, const RoutingOptions& routing);

// Of `num_parts` equal parts of the experts, those with at least one of a token's different experts: n (1 - C(E - E/n, K) / C(E, K)).
double expect_parts(int num_parts, const Choices& choices);

}  // namespace tern::tools
