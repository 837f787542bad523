// SPDX-License-Identifier: Apache-2.0
// The kernel that routes a batch: from top-k indices to the plan's tables on every rank.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/exchange_view.h"

namespace tern::kernels {

// What the host of an exact plan wants to know of each source, in words of pinned host memory: the value, and above it which routing of the plan
// it is of. So a word is there when its number is, and none is written behind another one.
struct HostCountsView {
  uint64_t* words = nullptr;  // [num_ranks, num_columns]; nullptr: worst extent, the host learns nothing
  uint64_t ticket = 0;        // of this routing; 32 bits
  uint32_t local_experts = 0;
  uint32_t num_ranks = 0;

  // Entries of this rank's experts, messages to each rank, tokens.
  constexpr uint32_t messages_to(uint32_t rank) const { return local_experts + rank; }
  constexpr uint32_t num_tokens() const { return local_experts + num_ranks; }
  constexpr uint32_t num_columns() const { return local_experts + num_ranks + 1; }
};

inline constexpr int kRouteWarps = 32;
inline constexpr int kRouteGroups = layout::RoutingBankLayout::kGroups;
inline constexpr int kCountingWarps = 16;  // the first of a block
static_assert(kCountingWarps >= kRouteGroups, "a block may have all groups");

// Groups that a block counts: its number, and every num_blocks-th behind it.
constexpr int32_t route_groups_of(int32_t block, int32_t num_blocks) {
  return block < kRouteGroups ? (kRouteGroups - 1 - block) / num_blocks + 1 : 0;
}

// What a block works in; offsets in elements of int32_t.
struct RouteMemory {
  static constexpr int64_t kSharedBytes = 96 << 10;  // every GPU has it

  int32_t num_blocks = 0;
  // Of what is received, the counters that rows or slots follow from: entries of each expert here, in the expert layouts; then messages.
  int32_t num_columns = 0;
  int32_t windows = 0;          // std::byte* [num_ranks]
  int32_t counters = 0;         // [kCountingWarps, num_counts]
  int32_t totals = 0;           // [num_ranks, num_counts]
  int32_t own_before = 0;       // [groups of the block, num_counts] of this rank, in lower groups
  int32_t received_before = 0;  // [num_ranks, kRouteGroups + 1, num_columns] of each source, in lower groups
  int32_t received_begin = 0;   // [num_ranks + 1]
  int32_t own_begin = 0;        // [num_ranks] where this rank's messages begin at each rank
  // The expert layouts:
  int32_t group_begin = 0;     // [num_experts]
  int32_t own_first = 0;       // [num_experts] first row of this rank's entries
  int32_t received_first = 0;  // [num_ranks, local experts] first row of each source's entries
  int32_t size = 0;

  RouteMemory() = default;
  constexpr RouteMemory(const PlanView& plan, int32_t num_ranks, int32_t blocks) : num_blocks(blocks) {
    const int32_t num_counts = plan.num_counts(num_ranks);
    num_columns = (plan.has_expert_rows() ? plan.local_experts : 0) + 1;
    const auto take = [this](int32_t elements) {
      const int32_t at = size;
      size += elements;
      return at;
    };
    windows = take(num_ranks * static_cast<int32_t>(sizeof(std::byte*) / sizeof(int32_t)));
    counters = take(kCountingWarps * num_counts);
    totals = take(num_ranks * num_counts);
    own_before = take(route_groups_of(0, blocks) * num_counts);
    received_before = take(num_ranks * (kRouteGroups + 1) * num_columns);
    received_begin = take(num_ranks + 1);
    own_begin = take(num_ranks);
    const int32_t num_experts = plan.has_expert_rows() ? plan.num_experts : 0;
    group_begin = take(num_experts);
    own_first = take(num_experts);
    received_first = take(num_experts);
    size = static_cast<int32_t>(layout::align_up(size, 4));
  }
  // Or else it is in the GPU's memory.
  constexpr bool fits_shared() const { return size * static_cast<int64_t>(sizeof(int32_t)) <= kSharedBytes; }
};

// Offsets in a window, of what this kernel uses of it; worked out by the host.
struct RouteOffsets {
  int64_t banks = 0;                // those of even epochs, of source 0
  int64_t odd_banks = 0;            // from there to those of odd epochs
  int64_t bank_bytes = 0;           // from a source's to the next one's
  int64_t tokens = 0, entries = 0;  // in a bank
};

struct RouteArgs {
  ExchangeView exchange;
  PlanView plan;
  layout::CallShape shape;
  HostCountsView host;
  RouteOffsets offsets;
  RouteMemory memory;
  int32_t* workspace = nullptr;  // [blocks, memory.size] where shared memory is too small; else nullptr

  int32_t group_tokens = 0;
  int32_t expert_bits = 0;
  uint64_t inverse_experts = 0;  // RankOfExpert

  const void* topk_idx = nullptr;  // [num_tokens, num_topk], int64 or int32
  bool is_int32 = false;
  const uint8_t* token_in_rank = nullptr;      // instead: [num_tokens, num_ranks]
  const int32_t* tokens_per_expert = nullptr;  // [num_experts], with token_in_rank
  int32_t num_tokens = 0;
  const int32_t* device_num_tokens = nullptr;  // the number of tokens, if not NULL

  RouteArgs() = default;
  // All but the caller's routing, the host's view and the workspace.
  RouteArgs(const ExchangeView& exchange, const PlanView& plan, int32_t num_blocks);
};

// Loads the kernel's code on the current device, so that no launch has to.
cudaError_t prepare_route();
// Its blocks must be able to run at the same time.
cudaError_t launch_route(const RouteArgs& args, cudaStream_t stream);

}  // namespace tern::kernels
