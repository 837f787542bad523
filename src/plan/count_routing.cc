// SPDX-License-Identifier: Apache-2.0
#include "plan/count_routing.h"

#include <algorithm>
#include <vector>

#include "plan/routing_table.h"

namespace tern {
namespace {

// [num_ranks] 1: the token goes there. Entries are added to per_expert.
void find_ranks(const PlanShape& shape, const tern_routing& routing, int64_t token, std::vector<uint8_t>& in_rank,
                std::vector<int32_t>& per_expert) {
  for (int32_t rank = 0; rank < shape.num_ranks; ++rank)
    in_rank[rank] = shape.num_topk == 0 && routing.token_in_rank[token * shape.num_ranks + rank] != 0 ? 1 : 0;
  for (int32_t k = 0; k < shape.num_topk; ++k) {
    const int64_t expert = topk_at(routing, token * shape.num_topk + k);
    if (expert < 0) continue;
    in_rank[shape.rank_of_expert(static_cast<int32_t>(expert))] = 1;
    ++per_expert[expert];
  }
}

template <typename T>
void hand_out(const std::vector<T>& from, T* to) {
  if (to != nullptr) std::copy(from.begin(), from.end(), to);
}

}  // namespace

void count_routing(const PlanShape& shape, const tern_routing& routing, const tern_routing_counts& counts) {
  check_routing(shape, routing);
  const auto num_ranks = static_cast<size_t>(shape.num_ranks);
  std::vector<int32_t> per_rank(num_ranks), per_node(shape.num_nodes), per_expert(shape.num_experts);
  if (shape.num_topk == 0 && routing.tokens_per_expert != nullptr)
    std::copy_n(routing.tokens_per_expert, shape.num_experts, per_expert.begin());
  std::vector<uint8_t> in_rank(num_ranks);
  for (int64_t token = 0; token < routing.num_tokens; ++token) {
    find_ranks(shape, routing, token, in_rank, per_expert);
    for (size_t rank = 0; rank < num_ranks; ++rank) per_rank[rank] += in_rank[rank];
    for (auto first = in_rank.begin(); first != in_rank.end(); first += shape.ranks_per_node())
      per_node[(first - in_rank.begin()) / shape.ranks_per_node()] += *std::max_element(first, first + shape.ranks_per_node());
    if (counts.token_in_rank != nullptr) std::copy(in_rank.begin(), in_rank.end(), counts.token_in_rank + token * shape.num_ranks);
  }
  hand_out(per_rank, counts.tokens_per_rank);
  hand_out(per_node, counts.tokens_per_node);
  hand_out(per_expert, counts.tokens_per_expert);
}

}  // namespace tern
