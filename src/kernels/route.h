// SPDX-License-Identifier: Apache-2.0
// The kernel that routes a batch: from top-k indices to the plan's tables on every rank.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/exchange_view.h"

namespace tern::kernels {

// Where the host of an exact plan finds the counts of all ranks; pinned host memory, written once per route.
struct HostCountsView {
  int32_t* counts = nullptr;      // [num_ranks, num_counts]; nullptr: worst extent, the host learns nothing
  int32_t* num_tokens = nullptr;  // [num_ranks]
  uint64_t* ticket = nullptr;     // written last
  uint64_t awaited_ticket = 0;
};

struct RouteArgs {
  ExchangeView exchange;
  PlanView plan;
  layout::CallShape shape;
  layout::RoutingBankLayout bank;
  HostCountsView host;

  const void* topk_idx = nullptr;  // [num_tokens, num_topk], int64 or int32
  bool is_int32 = false;
  const uint8_t* token_in_rank = nullptr;      // instead: [num_tokens, num_ranks]
  const int32_t* tokens_per_expert = nullptr;  // [num_experts], with token_in_rank
  int32_t num_tokens = 0;
  const int32_t* device_num_tokens = nullptr;  // the number of tokens, if not NULL

  int32_t num_counting_warps = 0;   // warps of a block that count
  int32_t* block_counts = nullptr;  // [blocks, num_counts]
  int32_t* workspace = nullptr;     // [blocks, route_workspace] where shared memory is too small; else nullptr
};

inline constexpr int kMostRouteBlocks = 32;
inline constexpr int kMostRouteWarps = 16;

// Of the tables from which rows follow (row_tables.cuh), in elements of int32_t.
constexpr int64_t row_tables_size(int64_t num_experts, int64_t num_ranks) { return 3 * num_experts + 2 * num_ranks + 1; }

// A pair of ranks has two routing banks: what this rank says to the other, in the other's window, and what it hears.
struct BankPair {
  std::byte* there = nullptr;  // nullptr: the rank is masked
  const std::byte* here = nullptr;
};
constexpr int64_t bank_table_size(int64_t num_ranks) { return num_ranks * static_cast<int64_t>(sizeof(BankPair) / sizeof(int32_t)); }

// What a block works in, in elements of int32_t: banks of all ranks, counters of its warps, and tables of rows.
constexpr int64_t route_workspace(int32_t num_experts, int32_t num_ranks, int32_t num_counting_warps) {
  const int64_t size =
      bank_table_size(num_ranks) + int64_t{num_counting_warps} * (num_experts + num_ranks) + row_tables_size(num_experts, num_ranks);
  return layout::align_up(size, 4);
}

// How many warps count, for a workspace in shared memory if that is possible.
int32_t route_counting_warps(int32_t num_experts, int32_t num_ranks);
bool route_fits_shared(int64_t workspace);

// Loads the kernel's code on the current device, so that no launch has to.
cudaError_t prepare_route();
// `num_blocks` blocks must be able to run at the same time.
cudaError_t launch_route(const RouteArgs& args, int num_blocks, cudaStream_t stream);

}  // namespace tern::kernels
