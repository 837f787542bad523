// SPDX-License-Identifier: Apache-2.0
// The kernel that dispatches a round of a routed batch.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/rail_slots.h"
#include "kernels/transfer.h"

namespace tern::kernels {

// What goes out.
struct DispatchInputs {
  const std::byte* tokens = nullptr;
  int64_t token_stride_bytes = 0;
  int64_t hidden = 0;
  int32_t dtype = 0;
  int32_t encoding = 0;
  const std::byte* scales = nullptr;
  int64_t scale_token_stride_bytes = 0;
  int64_t scale_element_stride_bytes = 0;
  const float* weights = nullptr;
  // Between nodes: rows, scales and weights as they arrive, in the slots of the batch of a node; instead of all above.
  RailSlots slots = {};
  int32_t node = 0;
  constexpr bool is_packed() const { return slots.banks != nullptr; }
};

// What comes in; names as in tern_dispatch_args.
struct DispatchOutputs {
  std::byte* tokens = nullptr;
  std::byte* scales = nullptr;
  int32_t* topk_idx = nullptr;
  float* topk_weights = nullptr;
  int32_t* source_token = nullptr;
  int32_t* source_rank = nullptr;
  int32_t* row_expert = nullptr;
  int64_t* expert_offsets = nullptr;
  int32_t* expert_counts = nullptr;
  int32_t* rank_counts = nullptr;
  int64_t* expert_rank_ranges = nullptr;
  float* plan_weights = nullptr;  // [max_messages, topk_stride]
  int64_t num_rows = 0;
  bool zero_padding = false;
  bool scales_by_column = false;

  // Bytes of a row's scales, and of an element of them.
  struct ScaleSizes {
    int64_t row_bytes, element_bytes;
  };
  // Where element `element_idx` of a row's scales goes. Row-major: [rows, elements]. Column-major: [elements, rows], in expert_padded for
  // each expert by itself.
  constexpr std::byte* scale_address(const PlanView& plan, ScaleSizes sizes, int64_t row, int64_t element_idx) const {
    if (!scales_by_column) return scales + row * sizes.row_bytes + element_idx * sizes.element_bytes;
    int64_t column_rows = num_rows, group = 0;
    if (plan.layout == TERN_LAYOUT_EXPERT_PADDED) {
      column_rows = plan.padded_group_rows;
      group = row / column_rows;
      row %= column_rows;
    }
    return scales + ((group * (sizes.row_bytes / sizes.element_bytes) + element_idx) * column_rows + row) * sizes.element_bytes;
  }
};

// Bulk copies: a row travels in pieces, each pulling warp has a ring of shared memory for them. What a message needs besides its row comes with the
// last piece. Offsets in a stage of a ring, 16 bytes aligned.
struct RowPieces {
  int32_t num_pieces = 1;
  int32_t piece_bytes = 0;
  int32_t scales = 0;
  int32_t weights = 0;
  int32_t entries = 0;  // rows or experts of the message's entries; where a row is delivered, its MessageRefs
  int32_t stage_bytes = 0;
  int32_t num_stages = 0;
};

inline constexpr int32_t kPieceTagBytes = 16;   // at the end of a stage
inline constexpr int32_t kMostDelivered = 64;   // ranks that a row is delivered to
inline constexpr int32_t kMostScaleWords = 64;  // of 4 bytes, of a row that is delivered with scales that are not in place

struct DispatchArgs {
  TransferArgs transfer;
  PlanView plan;
  WarpRoles roles;
  DispatchInputs in;
  DispatchOutputs out;
  layout::StagedSlot slot;  // parts with bytes are staged
  int32_t stage_run = 1;    // tokens in a row that a warp stages; divides the tokens of a chunk
  int32_t pull_run = 0;   // messages of a source in a row that a warp takes: 1, 2, 4, ..., or 32; 0: each warp has its messages beforehand
  int64_t row_bytes = 0;  // as it arrives
  int64_t scale_bytes = 0;  // as they arrive
  int32_t scale_element_bytes = 0;
  int32_t scale_word_bytes = 1;  // 4: scales and their places are aligned to it, and elements are multiples of it
  bool carries_weights = false;
  bool writes_outputs = false;   // everything but rows, scales and weights: by the first round that receives
  bool follows_closely = false;  // the kernel may begin while the one in front ends
  int32_t route_blocks = 0;      // then: of the one in front, if that is the route of the same call

  RowPieces pieces;

  // The rows that are delivered to this rank come without their weights.
  constexpr bool takes_weights() const { return transfer.takes_rows_at >= 0 && carries_weights; }
};

// Loads the kernels' code on the current device; `bulk_copies`: also those that use them, which need sm_90.
cudaError_t prepare_dispatch(bool bulk_copies);
// `num_blocks` blocks; all of them, and those of the peers on the same device, must be able to run at the same time.
cudaError_t launch_dispatch(const DispatchArgs& args, bool bulk_copies, int num_blocks, cudaStream_t stream);

}  // namespace tern::kernels
