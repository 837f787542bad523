// SPDX-License-Identifier: Apache-2.0
#include "plan/routing_counts.h"

#include <algorithm>

namespace tern {

RoutingCounts::RoutingCounts(const PlanShape& shape, bool with_rails)
    : received_per_rank(static_cast<size_t>(shape.num_ranks)),
      sent_per_rank(static_cast<size_t>(shape.num_ranks)),
      received_per_expert(static_cast<size_t>(shape.local_experts())),
      pair_counts(static_cast<size_t>(shape.num_ranks) * static_cast<size_t>(shape.num_ranks)),
      rail_tokens(static_cast<size_t>(with_rails && shape.num_nodes > 1 ? shape.num_nodes : 0)),
      rail_token_in_rank(rail_tokens.size() * static_cast<size_t>(shape.max_tokens * shape.ranks_per_node())) {}

void RoutingCounts::set(const RoutingTable& table) {
  const PlanShape& s = table.shape();
  for (int32_t r = 0; r < s.num_ranks; ++r) {
    received_per_rank[static_cast<size_t>(r)] = table.messages_between(r, s.rank);
    sent_per_rank[static_cast<size_t>(r)] = table.messages_between(s.rank, r);
    for (int32_t to = 0; to < s.num_ranks; ++to) pair_counts[static_cast<size_t>(r * s.num_ranks + to)] = table.messages_between(r, to);
  }
  for (int32_t e = 0; e < s.local_experts(); ++e) received_per_expert[static_cast<size_t>(e)] = table.received_entries(e);
  if (!rail_tokens.empty()) set_rails(table);
}

void RoutingCounts::set_rails(const RoutingTable& table) {
  const PlanShape& s = table.shape();
  uint8_t* in_rank = rail_token_in_rank.data();
  for (int32_t node = 0; node < s.num_nodes; ++node) {
    const SourceBatch& batch = table.batch(node);
    int32_t& num_tokens = rail_tokens[static_cast<size_t>(node)] = 0;
    for (int64_t token = 0; token < batch.num_tokens(); ++token) {
      const auto messages = batch.messages_of(token);
      if (messages.empty()) continue;
      std::fill_n(in_rank, s.ranks_per_node(), uint8_t{0});
      for (const Message message : messages) in_rank[message.rank - s.first_rank()] = 1;
      in_rank += s.ranks_per_node();
      ++num_tokens;
    }
  }
}

void RoutingCounts::tell(tern_plan_info& info) const {
  info.received_per_rank = received_per_rank.data();
  info.received_per_expert = received_per_expert.data();
  info.sent_per_rank = sent_per_rank.data();
  info.pair_counts = pair_counts.data();
  if (rail_tokens.empty()) return;
  info.rail_tokens = rail_tokens.data();
  info.rail_token_in_rank = rail_token_in_rank.data();
}

}  // namespace tern
