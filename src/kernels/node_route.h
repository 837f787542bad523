// SPDX-License-Identifier: Apache-2.0
// Kernels of a route between nodes. Within the node each batch is routed by the kernel of one node (route.h), as if it were alone; what is around it:
//
//   give      which of this rank's tokens go to which node, in which slots, and its counts; their experts into the slots of the rail's banks
//   take      what has come that way, as the top-k indices of a batch; which slots its tokens have in what this rank returns
//   settle    rows of each batch alone become rows of all, when the host has everybody's counts
//
// Give and take are once for each round of the rail.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/rail.h"

namespace tern::kernels {

// What a batch's route leaves for settle, and what it is made from. By the node of the batch's sources.
struct NodeRouteTables {
  int32_t* batch_tokens = nullptr;      // [num_nodes] of this rank's rail there
  uint8_t* token_in_rank = nullptr;     // with top-k 0: [num_nodes, max_tokens, ranks of the node]
  int32_t* given_entries = nullptr;     // with top-k 0: [num_nodes, experts of the node], as the owners of the tokens said
  int32_t* received_begin = nullptr;    // [num_nodes, ranks of the node + 1]
  int32_t* source_token = nullptr;      // [num_nodes, messages of a batch]
  int32_t* received_experts = nullptr;  // [num_nodes, messages of a batch, topk_stride]
  int32_t* received_rows = nullptr;
  int32_t* group_begin = nullptr;  // not looked at, as the next
  int32_t* source_begin = nullptr;
  // [num_nodes, experts of the node], or in rank_major [num_nodes, ranks of the node]: the first row of the batch. Told by the host.
  int64_t* row_begins = nullptr;
};

// What the host is told, in pinned memory.
struct NodeRouteReport {
  int32_t* entries = nullptr;      // [num_experts] of this rank's tokens
  int32_t* messages = nullptr;     // [num_ranks]
  int32_t* num_tokens = nullptr;   // [1]
  int32_t* round_begin = nullptr;  // [num_nodes, rounds + 1] of the slots that go there
  int32_t* there_begin = nullptr;  // [num_nodes, kMaxChunks + 1] as in RailTables, and what follows
  int32_t* here_begin = nullptr;
  int32_t* entries_here_begin = nullptr;
};

struct NodeRouteArgs {
  ExchangeView exchange;
  PlanView plan;
  RailTables rails;
  NodeRouteTables route;
  NodeRouteReport report;
  const uint8_t* unreachable = nullptr;  // [ranks of the group]; nullptr: none is
  int32_t num_rounds = 1;                // of the rail
  int64_t tokens_per_round = 0;

  // The caller's, as in RouteArgs.
  const void* topk_idx = nullptr;
  bool is_int32 = false;
  const uint8_t* token_in_rank = nullptr;
  const int32_t* tokens_per_expert = nullptr;
  int32_t num_tokens = 0;
  const int32_t* device_num_tokens = nullptr;

  // Of give and take: the banks.
  RailSlots slots;
  RailBanks heads;  // of what has come
  HostSteps steps;
  int64_t counts_at = 0;  // in a bank
  int32_t round = 0;

  constexpr bool reaches(int32_t rank) const { return unreachable == nullptr || unreachable[rank] == 0; }
  constexpr int32_t num_group_ranks() const { return rails.num_nodes * exchange.num_ranks; }
  constexpr int32_t num_group_experts() const { return rails.num_nodes * plan.num_experts; }
  constexpr int64_t batch_messages() const { return exchange.num_ranks * plan.max_tokens; }
  // Of an expert in a batch alone: room for all that may come, also where tokens name it more than once.
  constexpr int64_t batch_group_rows() const { return batch_messages() * (plan.num_topk > 0 ? plan.num_topk : 1); }
};

// Counters of the experts and ranks of a node must fit shared memory.
inline constexpr int64_t kMostNodeCounters = 20'000;

cudaError_t prepare_node_route();
cudaError_t launch_give(const NodeRouteArgs& args, cudaStream_t stream);
cudaError_t launch_take(const NodeRouteArgs& args, cudaStream_t stream);
cudaError_t launch_settle(const NodeRouteArgs& args, cudaStream_t stream);

}  // namespace tern::kernels
