// SPDX-License-Identifier: Apache-2.0
// What dispatch and combine have in common as arguments: one round of rows that ranks pull from each other.
#pragma once

#include <type_traits>

#include "kernels/exchange_view.h"

namespace tern::kernels {

struct TransferArgs {
  ExchangeView exchange;
  layout::CallShape shape;
  int32_t operation = 0;       // tern_operation
  bool sends = false;          // tells the peers where this rank's rows are, and stages them
  bool receives = false;       // pulls the peers' rows
  bool in_place = false;       // peers pull from the caller's window memory: ends when all have pulled
  uint64_t* ticket = nullptr;  // keeps the epoch from a send to its receive
  int64_t* wait_ns = nullptr;  // [num_ranks] what this rank waits for the calls of the others is added; nullptr: not counted

  // Chunks of the owners' tokens that this round carries, and the token that comes first in the staging.
  int32_t first_chunk = 0;
  int32_t end_chunk = 0;
  int32_t tokens_per_chunk = 0;

  // What this rank offers. Offsets in the staging are those of the bank for the epoch: of this rank's own bank, or if it pushes, of every reader's;
  // there rank s has the part that begins at s * sender_bytes.
  layout::PulledPart rows, scales, weights;
  bool pushes = false;
  int64_t sender_bytes = 0;

  // Of a dispatch: see CallCell.
  int64_t takes_rows_at = -1;
  int64_t takes_scales_at = -1;
  bool delivers = false;

  constexpr int64_t first_token() const { return int64_t{first_chunk} * tokens_per_chunk; }
};
static_assert(std::is_trivially_copyable_v<TransferArgs>);

// How a kernel divides its blocks: some warps put rows into the staging, the others pull.
struct WarpRoles {
  int32_t num_stage_warps = 0;
  int32_t num_pull_warps = 0;
  constexpr int32_t num_threads() const { return 32 * (num_stage_warps + num_pull_warps); }
};

}  // namespace tern::kernels
