// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "conformance/oracle.h"

namespace tern::conformance {
namespace {

// One (token, k) entry, or with rank_major one message.
using Kind = Origin::Kind;

struct Routes {
  const Case& c;
  const std::vector<Placement>& placements;
  const std::vector<RankRouting>& routings;
  const std::vector<uint8_t>& masked;

  bool is_masked(int32_t rank) const { return !masked.empty() && masked[static_cast<size_t>(rank)] != 0; }
  bool are_cut(int32_t source, int32_t target) const { return !reaches(c, masked, source, target); }

  int64_t expert(int32_t rank, int64_t token, int32_t k) const {
    return placements[static_cast<size_t>(rank)].topk_idx[static_cast<size_t>(token * c.num_topk + k)];
  }

  bool goes_to(int32_t source, int64_t token, int32_t target) const {
    if (are_cut(source, target)) return false;
    if (c.masks_ranks()) return routings[static_cast<size_t>(source)].token_in_rank[static_cast<size_t>(token * c.num_ranks + target)] != 0;
    for (int32_t k = 0; k < c.num_topk; ++k) {
      const int64_t e = expert(source, token, k);
      if (e >= 0 && e / c.experts_per_rank == target) return true;
    }
    return false;
  }

  int64_t num_tokens(int32_t source) const { return is_masked(source) ? 0 : placements[static_cast<size_t>(source)].num_tokens; }
};

void place_messages(const Routes& routes, int32_t rank, Placement& result) {
  const Case& c = routes.c;
  result.received_per_rank.assign(static_cast<size_t>(c.num_ranks), 0);
  result.sent_per_rank.assign(static_cast<size_t>(c.num_ranks), 0);
  for (int32_t peer = 0; peer < c.num_ranks; ++peer) {
    for (int64_t token = 0; token < routes.num_tokens(peer); ++token) {
      if (!routes.goes_to(peer, token, rank)) continue;
      result.received_per_rank[static_cast<size_t>(peer)] += 1;
      result.num_received += 1;
      if (c.layout == TERN_LAYOUT_RANK_MAJOR) result.rows.push_back({Kind::kToken, peer, static_cast<int32_t>(token), -1, -1});
    }
    for (int64_t token = 0; token < routes.num_tokens(rank); ++token)
      if (routes.goes_to(rank, token, peer)) result.sent_per_rank[static_cast<size_t>(peer)] += 1;
  }
}

// Rows of one local expert, in order, and how many of them come from each rank.
void place_expert(const Routes& routes, int32_t rank, int32_t local_expert, Placement& result) {
  const Case& c = routes.c;
  const int64_t wanted = static_cast<int64_t>(rank) * c.experts_per_rank + local_expert;
  int64_t count = 0;
  for (int32_t source = 0; source < c.num_ranks; ++source) {
    const int64_t first = count;
    for (int64_t token = 0; token < routes.num_tokens(source); ++token) {
      for (int32_t k = 0; k < c.num_topk; ++k) {
        if (routes.is_masked(rank) || routes.expert(source, token, k) != wanted) continue;
        count += 1;
        if (c.layout != TERN_LAYOUT_RANK_MAJOR) result.rows.push_back({Kind::kToken, source, static_cast<int32_t>(token), k, local_expert});
      }
    }
    if (c.layout != TERN_LAYOUT_RANK_MAJOR) result.expert_rank_ranges.push_back(first << 32 | (count - first));
  }
  result.received_per_expert.push_back(static_cast<int32_t>(count));
}

void add_rows(Placement& result, Kind kind, int64_t up_to) {
  while (static_cast<int64_t>(result.rows.size()) < up_to) result.rows.push_back({kind, -1, -1, -1, -1});
}

void place_experts(const Routes& routes, int32_t rank, Placement& result) {
  const Case& c = routes.c;
  for (int32_t local = 0; local < c.experts_per_rank; ++local) {
    const auto first = static_cast<int64_t>(result.rows.size());
    if (c.layout != TERN_LAYOUT_RANK_MAJOR) result.expert_offsets.push_back(first);
    place_expert(routes, rank, local, result);
    if (c.layout == TERN_LAYOUT_EXPERT_MAJOR) {
      const int64_t count = static_cast<int64_t>(result.rows.size()) - first;
      add_rows(result, Kind::kPadding, first + (count + c.expert_alignment - 1) / c.expert_alignment * c.expert_alignment);
    } else if (c.layout == TERN_LAYOUT_EXPERT_PADDED) {
      add_rows(result, Kind::kPadding, (local + 1) * c.num_ranks * c.max_tokens);
    }
  }
  if (c.layout != TERN_LAYOUT_RANK_MAJOR) result.expert_offsets.push_back(static_cast<int64_t>(result.rows.size()));
}

// token_in_rank routing has no entries; its counts per expert are whatever the sources say.
void take_reported_counts(const Routes& routes, int32_t rank, Placement& result) {
  const Case& c = routes.c;
  result.received_per_expert.assign(static_cast<size_t>(c.experts_per_rank), 0);
  for (int32_t source = 0; source < c.num_ranks; ++source) {
    if (routes.are_cut(source, rank)) continue;
    for (int32_t local = 0; local < c.experts_per_rank; ++local)
      result.received_per_expert[static_cast<size_t>(local)] +=
          routes.routings[static_cast<size_t>(source)].tokens_per_expert[static_cast<size_t>(rank * c.experts_per_rank + local)];
  }
}

void apply_extent(const Case& c, Placement& result) {
  if (c.extent == TERN_EXTENT_EXACT || c.layout == TERN_LAYOUT_EXPERT_PADDED) return;
  const int64_t capacity = c.capacity();
  add_rows(result, Kind::kUnused, capacity);
  for (size_t row = static_cast<size_t>(capacity); row < result.rows.size(); ++row)
    result.overflow = result.overflow || result.rows[row].kind == Kind::kToken;
  result.rows.resize(static_cast<size_t>(capacity));
}

}  // namespace

bool reaches(const Case& c, const std::vector<uint8_t>& masked, int32_t source, int32_t target) {
  if (masked.empty()) return true;
  const auto takes_part = [&](int32_t rank) { return masked[static_cast<size_t>(rank)] == 0; };
  const int32_t rail = c.node_of(source) == c.node_of(target) ? source : c.node_of(target) * c.ranks_per_node + source % c.ranks_per_node;
  return takes_part(source) && takes_part(target) && takes_part(rail);
}

std::vector<Placement> place(const Case& c, const std::vector<RankRouting>& routings, const std::vector<uint8_t>& masked) {
  std::vector<Placement> placements(static_cast<size_t>(c.num_ranks));
  const Routes routes{c, placements, routings, masked};
  for (size_t rank = 0; rank < placements.size(); ++rank) {
    placements[rank].num_tokens = routings[rank].num_tokens;
    placements[rank].topk_idx = routings[rank].topk_idx;
    for (int64_t& expert : placements[rank].topk_idx)
      if (expert >= 0 && routes.are_cut(static_cast<int32_t>(rank), static_cast<int32_t>(expert / c.experts_per_rank))) expert = -1;
  }
  for (int32_t rank = 0; rank < c.num_ranks; ++rank) {
    Placement& result = placements[static_cast<size_t>(rank)];
    place_messages(routes, rank, result);
    if (c.masks_ranks())
      take_reported_counts(routes, rank, result);
    else
      place_experts(routes, rank, result);
    apply_extent(c, result);
  }
  return placements;
}

RailCounts rail_oracle(const Case& c, const std::vector<Placement>& placements, const std::vector<RankRouting>& routings,
                       const std::vector<uint8_t>& masked, int32_t rank) {
  const Routes routes{c, placements, routings, masked};
  const int32_t first = c.node_of(rank) * c.ranks_per_node;
  RailCounts result;
  for (int32_t owner = rank % c.ranks_per_node; owner < c.num_ranks; owner += c.ranks_per_node) {
    int32_t count = 0;
    for (int64_t token = 0; token < routes.num_tokens(owner); ++token) {
      std::vector<uint8_t> in_rank;
      for (int32_t target = first; target < first + c.ranks_per_node; ++target)
        in_rank.push_back(routes.goes_to(owner, token, target) ? 1 : 0);
      if (std::find(in_rank.begin(), in_rank.end(), 1) == in_rank.end()) continue;
      result.token_in_rank.insert(result.token_in_rank.end(), in_rank.begin(), in_rank.end());
      ++count;
    }
    result.tokens.push_back(count);
  }
  return result;
}

}  // namespace tern::conformance
