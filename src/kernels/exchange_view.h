// SPDX-License-Identifier: Apache-2.0
// What a kernel sees of an exchange and of a plan. Trivially copyable views; src/cuda owns what they point to. Shared by host and device.
#pragma once

#include <tern/tern.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "layout/device_window.h"

namespace tern::kernels {

// What a rank's GPU tells its host; pinned host memory, written by the GPU alone (the host clears it between generations).
struct Mailbox {
  layout::FailureRecord failure;  // why the exchange failed; complete once failure_set is 1
  layout::FailureRecord notice;   // what the last incomplete operation left out: TERN_CAPACITY_EXCEEDED, TERN_INVALID_ARGUMENT; status last
  uint64_t failure_set;
  uint32_t given_up[layout::kMostLatencyRanks];  // 1: as in Attendance
};

// Under TERN_ON_TIMEOUT_MASK, in this rank's own device memory: who has been missed, and who has a part in an operation. Zero at the start of a
// generation.
struct Attendance {
  // Not 0: the epoch in which this rank has waited for that one until the deadline; it is not waited for again.
  uint64_t given_up[layout::kMostLatencyRanks];
  // Of the last operation whose receiving side has begun: 2 * epoch, + 1 if it goes on without the rank. All blocks go by the first one's word.
  uint64_t decided[layout::kMostLatencyRanks];
};

inline constexpr int kMostRouteBlocks = 32;

// The state of one lane, in this rank's own device memory. Zero at the start of a generation.
struct LaneState {
  uint64_t epoch;        // of the last operation that was begun
  uint32_t blocks_done;  // of the running kernel
  uint32_t blocks_sent;
  uint32_t blocks_begun;
  uint32_t runs_taken;                // by the staging warps of all blocks
  uint32_t parts_taken;               // by the pulling warps
  uint64_t routed[kMostRouteBlocks];  // of each block of a route: the last one in which it had everybody's counts
};

// Between nodes: one lane's words in pinned memory, in which the GPU talks with its host (rail.h).
struct HostCell {
  static constexpr uint64_t kGaveUp = ~uint64_t{0};  // an answer to all questions
  // The last answer, and which bank of each pair it is about: one word, since each is a trip over PCIe.
  static constexpr uint64_t answer(uint64_t step, uint64_t bank) { return step * layout::kNumBanks + bank; }
  static constexpr uint64_t step_of(uint64_t answered) { return answered / layout::kNumBanks; }
  static constexpr uint64_t bank_of(uint64_t answered) { return answered % layout::kNumBanks; }

  layout::FailureRecord failure;                  // why the host has given up
  uint64_t commands[2];                           // what an operation begins there, in turn, written before its first step is asked
  alignas(layout::kCacheLine) uint64_t asked;     // steps, by the GPU
  alignas(layout::kCacheLine) uint64_t answered;  // by the host: answer()
  uint64_t granted;                               // the last epoch of the rail whose banks may be filled, by the host, perhaps unasked
  // Under TERN_ON_TIMEOUT_MASK, by the host before it answers or grants; a bit each, which stays.
  uint64_t gone_ranks;    // of the node, that were given up
  uint64_t absent_nodes;  // that nothing comes from, since this rank's rail there has gone
};

// Ranks are those of the node, numbered from 0, but in records of failures.
struct ExchangeView {
  int32_t rank = 0;
  int32_t num_ranks = 0;
  int32_t first_rank = 0;  // of the node, in the group
  int32_t lane = 0;
  // Epochs by which `consumed` stays behind the lane's epoch after this operation, because sends are open.
  int32_t consumed_lag = 0;
  // The same before this operation.
  int32_t consumed_lag_before = 0;
  layout::DeviceWindowLayout layout;
  // Of each rank; nullptr: masked. As parameters of the kernel they cost no load; more ranks than that have theirs in device memory.
  static constexpr int kInlineRanks = layout::kMostLatencyRanks, kInlineHeaps = 16;
  std::byte* inline_windows[kInlineRanks] = {};
  std::byte* inline_heaps[kInlineHeaps] = {};
  std::byte* const* far_windows = nullptr;  // [num_ranks]
  std::byte* const* far_heaps = nullptr;
  LaneState* state = nullptr;
  uint32_t* staged_counters = nullptr;  // [num_ranks, kMaxChunks] zero between operations
  uint32_t* failed = nullptr;           // of all lanes: 1: a kernel of this rank has recorded a failure
  Mailbox* mailbox = nullptr;
  Attendance* attendance = nullptr;  // nullptr: a wait that reaches its deadline ends the generation
  const HostCell* host = nullptr;    // between nodes
  uint64_t timeout_ns = 0;           // of a wait for a rank of the node
  uint64_t host_timeout_ns = 0;      // for this rank's host

  constexpr std::byte* window(int r) const { return num_ranks <= kInlineRanks ? inline_windows[r] : far_windows[r]; }
  constexpr std::byte* heap(int r) const { return num_ranks <= kInlineHeaps ? inline_heaps[r] : far_heaps[r]; }
};
static_assert(std::is_trivially_copyable_v<ExchangeView>);

// One row of a token on its way to a rank.
struct MessageRef {
  int32_t rank;  // where it goes, ascending within a token; -1: no further message
  int32_t row;   // rank_major: its row there, -1: beyond the capacity
};

// The routing of one batch in this rank's device memory: what RoutingTable is to a CPU rank. Ranks and experts are those of the node; sources
// are all ranks of the group, of which this batch has those of one node.
struct PlanView {
  int64_t max_tokens = 0;
  int32_t num_sources = 0;
  int32_t first_source = 0;  // of the batch
  int32_t num_experts = 0;
  int32_t local_experts = 0;
  int32_t num_topk = 0;
  int32_t topk_stride = 0;         // num_topk, rounded up to 16 bytes of int32_t or float: of the tables of received messages
  int32_t messages_per_token = 0;  // at most
  int32_t tokens_per_chunk = 0;
  int32_t num_chunks = 0;
  int32_t layout = 0;  // tern_layout
  int32_t alignment = 0;
  int64_t row_capacity = 0;
  int64_t padded_group_rows = 0;

  // Of all sources.
  int32_t* num_tokens = nullptr;  // [num_sources]
  int32_t* counts = nullptr;      // [num_sources, num_experts + num_ranks] entries by expert, messages by destination

  // Of this rank's tokens; between nodes, of those of the batch.
  int32_t* experts = nullptr;      // [max_tokens, num_topk] -1: none
  int32_t* entry_rows = nullptr;   // [max_tokens, num_topk] expert layouts: row at the expert's rank, -1: none or beyond the capacity
  MessageRef* messages = nullptr;  // [max_tokens, messages_per_token]

  // Of the messages received, ordered by (source rank, source token).
  int32_t* received_begin = nullptr;    // [num_sources + 1]
  int32_t* chunk_begin = nullptr;       // [num_sources, kMaxChunks + 1] index among the source's messages
  int32_t* source_token = nullptr;      // [max_messages]
  int32_t* received_experts = nullptr;  // [max_messages, topk_stride] local, -1: not here
  int32_t* received_rows = nullptr;     // [max_messages, topk_stride] -1: not here, or beyond the capacity
  int32_t* group_begin = nullptr;       // [local_experts + 1]
  int32_t* source_begin = nullptr;      // [local_experts, num_sources] first row of the source in the expert's group

  // Weights: as the last dispatch carried them, and as the owners gave them to the running combine.
  float* weights_sent = nullptr;        // [max_tokens, num_topk]
  float* weights_received = nullptr;    // [max_messages, topk_stride]
  float* weights_from_owner = nullptr;  // [max_messages, topk_stride]

  uint64_t* dispatch_ticket = nullptr;  // epoch of the last send
  uint64_t* combine_ticket = nullptr;

  constexpr int32_t num_counts(int32_t num_ranks) const { return num_experts + num_ranks; }
  constexpr layout::RoutingBankLayout routing_bank(int32_t num_ranks) const {
    return {.num_counts = num_counts(num_ranks), .num_topk = num_topk, .local_experts = local_experts, .max_tokens = max_tokens};
  }
  // Of the batch: its tokens at a rank of the node, and what has come from there.
  constexpr int32_t tokens_at(int32_t rank) const { return num_tokens[first_source + rank]; }
  constexpr int32_t received_from(int32_t rank) const { return received_begin[first_source + rank]; }
  constexpr const int32_t* chunks_from(int32_t rank) const { return chunk_begin + int64_t{first_source + rank} * (layout::kMaxChunks + 1); }
  // Of a message's row in the tables of weights, experts or rows.
  constexpr int64_t topk_bytes() const { return topk_stride * static_cast<int64_t>(sizeof(float)); }
  constexpr bool has_expert_rows() const { return layout != TERN_LAYOUT_RANK_MAJOR; }
};
static_assert(std::is_trivially_copyable_v<PlanView>);

}  // namespace tern::kernels
