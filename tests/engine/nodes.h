// SPDX-License-Identifier: Apache-2.0
// What the tests between nodes share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <string>

#include "conformance/scenario.h"
#include "conformance/sweep.h"

namespace tern::conformance {

// All options mixed, on nodes of 2 x 1, 2 x 2, 3 x 2 and 4 x 1 ranks.
inline Case random_case_on_nodes(uint64_t seed) {
  struct Shape {
    int32_t num_nodes, ranks_per_node;
  };
  constexpr Shape kShapes[] = {{2, 1}, {2, 2}, {3, 2}, {4, 1}};
  Case c = random_case(seed);
  const Shape shape = kShapes[seed % std::size(kShapes)];
  c.num_ranks = shape.num_nodes * shape.ranks_per_node;
  c.ranks_per_node = shape.ranks_per_node;
  if (c.row_capacity > 0) c.row_capacity = std::min<int64_t>(c.row_capacity, c.num_ranks * c.max_tokens);
  return c.normalized();
}

// Staging that holds few tokens of the case, in the node's banks and in the network's.
inline int64_t staging_for_rounds(const Case& c, int64_t num_tokens) {
  const int64_t slots = num_tokens * (c.combine_mode == TERN_COMBINE_EXACT ? std::max(c.num_topk, 1) : 1) * c.num_nodes();
  const int64_t bank_bytes = slots * (Scenario(c).exchange_options().max_row_bytes + 16 * c.num_topk + 256) +
                             8 * c.num_nodes() * (c.num_experts() + c.num_ranks + 64);
  return c.num_lanes * 4 * c.num_ranks * bank_bytes;
}

// Why what a run reports means that ranks on different nodes cannot reach each other on this machine; "": it does not.
inline std::string missing_network(const std::vector<std::string>& differences) {
  for (const std::string& difference : differences)
    if (difference.find("TERN_UNSUPPORTED") != std::string::npos && difference.find("transport:") != std::string::npos) return difference;
  return "";
}

inline Case smallest_case_on_nodes() {
  Case c;
  c.ranks_per_node = 1;
  return c;
}

}  // namespace tern::conformance
