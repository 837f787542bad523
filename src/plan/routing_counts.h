// SPDX-License-Identifier: Apache-2.0
// The counts of a routed batch as tern_plan_info hands them out: arrays that stay where they are from routing to routing.
//
// All memory is taken by the constructor. Threads: one at a time.
#pragma once

#include <cstdint>
#include <vector>

#include "plan/routing_table.h"

namespace tern {

struct RoutingCounts {
  // `with_rails`: tables have batches, and not counts alone.
  RoutingCounts(const PlanShape& shape, bool with_rails);

  // Of a finished table.
  void set(const RoutingTable& table);
  // Points `info` at them.
  void tell(tern_plan_info& info) const;

  std::vector<int32_t> received_per_rank, sent_per_rank;  // [num_ranks]
  std::vector<int32_t> received_per_expert;               // [local_experts]
  std::vector<int32_t> pair_counts;                       // [num_ranks, num_ranks]
  std::vector<int32_t> rail_tokens;                       // [num_nodes], none with one node, or without rails
  std::vector<uint8_t> rail_token_in_rank;                // [num_nodes * max_tokens, ranks of the node]

 private:
  void set_rails(const RoutingTable& table);
};

}  // namespace tern
