// SPDX-License-Identifier: Apache-2.0
// The kernel that combines a round of a dispatched batch.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/rail_slots.h"
#include "kernels/sum_ring.h"
#include "kernels/transfer.h"

namespace tern::kernels {

struct CombineArgs {
  TransferArgs transfer;
  PlanView plan;
  WarpRoles roles;
  int32_t dtype = 0;
  int64_t row_bytes = 0;
  bool per_entry = false;        // every entry's row goes to the owner
  bool rows_staged = false;      // this rank's rows go through the staging
  bool own_rows_direct = false;  // those for its own tokens do not, though the others' do
  int32_t stage_run = 1;         // messages in a row that a warp stages
  layout::StagedSlot slot;       // of a token; rows of its entries follow each other in it

  // At the ranks of the experts.
  const std::byte* rows = nullptr;          // in the plan's layout
  const float* entry_weights = nullptr;     // [max_messages, topk_stride] of the entries summed here; nullptr: 1
  const float* returned_weights = nullptr;  // [rows, num_topk] or [rows], handed back
  bool returns_weights = false;

  // At the owners.
  const float* token_weights = nullptr;  // [num_tokens, num_topk] of the entries summed there; nullptr: 1
  const std::byte* bias[2] = {nullptr, nullptr};
  std::byte* out_tokens = nullptr;
  float* out_topk_weights = nullptr;

  // Between nodes: the sums of a batch, or with per_entry all its entries' rows, go into its slots, and not to the outputs.
  RailSlots slots;
  int32_t node = 0;
  constexpr bool returns_slots() const { return slots.banks != nullptr; }
  constexpr int32_t rows_per_token() const { return returns_slots() && per_entry ? plan.num_topk : 1; }

  // Rows go through the staging as they are: there is nothing to sum.
  constexpr bool copies_rows() const { return per_entry || !plan.has_expert_rows(); }

  // A row is summed by several warps if there are more of them than tokens: parts of so many bytes.
  int32_t num_parts = 1;
  int32_t part_bytes = 0;

  // Bulk copies: the ring with which a warp stages, and the one with which it pulls afterwards, in the same memory; and the ring of a warp that
  // pulls from the start.
  SumRingShape stage_ring, joined_ring, pull_ring;
};

// Loads the kernels' code on the current device; `bulk_copies`: also those that use them, which need sm_90.
cudaError_t prepare_combine(bool bulk_copies);
// `num_blocks` blocks; all of them, and those of the peers on the same device, must be able to run at the same time.
cudaError_t launch_combine(const CombineArgs& args, bool bulk_copies, int num_blocks, cudaStream_t stream);

}  // namespace tern::kernels
