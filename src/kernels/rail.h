// SPDX-License-Identifier: Apache-2.0
// What kernels do between nodes. The network moves slots of banks in pinned host memory, or in that of the GPU (layout/rail.h), which
// are this rank's GPU's and its host's. A thread of the host sends them, and hears of those that arrive (cuda/node_lane.h); with it the GPU talks in steps:
//
//   GPU asks     "begin this", "the banks are filled", "what came has been read"     and goes on
//   host answers "the rows of all nodes are here", "the banks of the next round are free"
//   host grants  "the banks of this epoch are free"                                  of an operation's first one, as a rule before it begins
//
// Which step means what follows from the operation alone, so both sides count, and a replayed graph counts on.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/dispatch.h"
#include "kernels/exchange_view.h"
#include "kernels/rail_slots.h"

namespace tern::kernels {

// What this rank's GPU has of a HostCell in its own memory.
struct HostTalk {
  uint64_t asked;
  uint64_t num_commands;
  uint64_t answered;
  uint64_t epoch;  // of the rail, the last one that an operation has taken
  uint64_t bank;
  uint64_t absent_nodes;  // HostCell::absent_nodes, as the last answer or grant found it
  uint64_t num_awaited;   // by the kernels before
  uint64_t seen;          // the same, and 1 more when the first block of the running one has seen what it awaits
  uint32_t blocks_done;   // of the running kernel
};

// The steps of a kernel, around its work (host_steps.cuh).
struct HostSteps {
  HostCell* cell = nullptr;
  HostTalk* talk = nullptr;
  uint64_t command = 0;      // 0: the step begins none
  bool asks_first = false;   // before its work; and it goes on
  int32_t takes_epochs = 0;  // of the rail, of an operation that sends: before its work the kernel awaits the grant of the first
  bool awaits = false;       // the next answer, before what that is about
  bool asks_last = false;    // when all blocks are done
};
static_assert(std::is_trivially_copyable_v<HostSteps>);

// A kernel of one warp that does nothing else.
struct TalkArgs {
  ExchangeView exchange = {};
  int32_t operation = 0;  // tern_operation
  HostSteps steps;
};

// Tables of a batch between nodes, beside those of its PlanView; made by the kernels of a route. Batches are by the node of their source: of this
// rank's own tokens, and of those that its rail in each other node sends here.
struct RailTables {
  int32_t num_nodes = 1;
  int32_t own_node = 0;
  // Of the batches, in this node.
  int32_t* experts = nullptr;      // [num_nodes, max_tokens, num_topk]
  int32_t* entry_rows = nullptr;   // [num_nodes, max_tokens, num_topk]
  MessageRef* messages = nullptr;  // [num_nodes, max_tokens, messages_per_token]
  int32_t* here = nullptr;         // [num_nodes, max_tokens] slots of tokens that have messages here
  int32_t* here_begin = nullptr;   // [num_nodes, kMaxChunks + 1]
  int32_t* entries_here = nullptr;
  int32_t* entries_here_begin = nullptr;
  // Of this rank's tokens, in all nodes.
  int32_t* node_of_entry = nullptr;  // [max_tokens, num_topk] -1: none
  int32_t* there = nullptr;          // [num_nodes, max_tokens] slots of tokens that go there
  int32_t* there_begin = nullptr;    // [num_nodes, kMaxChunks + 1]
  int32_t* entries_there = nullptr;  // [max_tokens, num_topk] slots of entries in their nodes
  int32_t* entries_there_begin = nullptr;
  float* owner_weights = nullptr;  // [num_nodes, max_tokens, num_topk] of all batches, as the owners gave them to the running combine
};
static_assert(std::is_trivially_copyable_v<RailTables>);

// This rank's tokens, as they arrive, into the slots of the nodes that they go to.
struct PackArgs {
  DispatchArgs dispatch;  // what is to be packed, of which chunks
  RailSlots slots;
  HostSteps steps;
  int32_t num_nodes = 0;
  bool packs_own = false;  // those of the own node too
  // Of rows that are as they are given, a warp takes a part.
  int32_t num_parts = 1;
  int32_t part_bytes = 0;
};

// What the host tells, from pinned memory.
struct CopyArgs {
  ExchangeView exchange = {};
  int32_t operation = 0;  // tern_operation
  HostSteps steps;
  std::byte* to = nullptr;
  const std::byte* from = nullptr;
  int64_t num_bytes = 0;  // a multiple of 16, as are the addresses
};

// Weights that only the owners know, of all batches, when the rail has brought them.
struct TakeWeightsArgs {
  ExchangeView exchange;
  RailTables rails;
  RailSlots slots;  // that have come
  HostSteps steps;
  int64_t max_tokens = 0;
  int32_t num_topk = 0;
  const float* own = nullptr;  // [num_tokens, num_topk] of this rank's tokens
};

// The sums of this rank's tokens over what the nodes have returned.
struct NodeSumArgs {
  ExchangeView exchange;
  PlanView plan;
  RailSlots slots;
  HostSteps steps;
  int32_t num_nodes = 0;
  int32_t dtype = 0;
  int64_t row_bytes = 0;
  int32_t wire = 0;  // tern_wire
  bool per_entry = false;
  const int32_t* node_of_entry = nullptr;
  const float* token_weights = nullptr;  // as in CombineArgs, and what follows
  const std::byte* bias[2] = {nullptr, nullptr};
  std::byte* out_tokens = nullptr;
  float* out_topk_weights = nullptr;
  bool returns_weights = false;
  int32_t first_token = 0, end_token = 0;
  int32_t num_parts = 1;
  int32_t part_bytes = 0;
};

// Loads the kernels' code on the current device.
cudaError_t prepare_rail();
cudaError_t launch_talk(const TalkArgs& args, cudaStream_t stream);
cudaError_t launch_copy(const CopyArgs& args, cudaStream_t stream);
cudaError_t launch_pack(const PackArgs& args, int num_blocks, cudaStream_t stream);
cudaError_t launch_take_weights(const TakeWeightsArgs& args, cudaStream_t stream);
cudaError_t launch_node_sums(const NodeSumArgs& args, int num_blocks, cudaStream_t stream);

}  // namespace tern::kernels
