// SPDX-License-Identifier: Apache-2.0
// The size of a ring through which a warp sums rows by bulk copies; sums.cuh uses it. Shared by host and device.
#pragma once

#include <cstdint>

#include "layout/device_window.h"

namespace tern::kernels {

// A slot holds a piece of one term. Long pieces cost fewer instructions, but the sums of a piece are kept in registers. Of a row of 7168 channels of
// 2 bytes, staging takes a quarter.
inline constexpr int32_t kStagePieceBytes = 3584, kPullPieceBytes = 2048;
inline constexpr int32_t kSumStepBytes = 1024;  // that a warp adds at a time
// Pieces that arrive together: of so many terms, at the same place of a row.
inline constexpr int32_t kMostSumGroup = 4;
// What each slot has besides: the description of a group, and its arrivals.
inline constexpr int32_t kSumTagBytes = 64;
inline constexpr int32_t kSumSlotSideBytes = kSumTagBytes + static_cast<int32_t>(sizeof(uint64_t));

// | slots [num_slots] | tags [num_slots] | arrivals [num_slots] |; there is at most one group for each slot.
struct SumRingShape {
  int32_t num_slots = 0;
  int32_t piece_bytes = 0;

  constexpr int64_t tags() const { return int64_t{num_slots} * piece_bytes; }
  constexpr int64_t arrivals() const { return tags() + int64_t{num_slots} * kSumTagBytes; }
  constexpr int64_t bytes() const { return layout::align_up(int64_t{num_slots} * (piece_bytes + kSumSlotSideBytes), layout::kBulkLine); }
};

// The ring that a warp has in `bytes` (a multiple of layout::kBulkLine) with slots of `piece_bytes` at the most: shorter ones if there would be fewer
// than `least_slots`, or if rows are shorter.
constexpr SumRingShape sum_ring_shape(int64_t bytes, int64_t row_bytes, int64_t least_slots, int32_t piece_bytes) {
  constexpr int64_t kMostSlots = 64;
  SumRingShape shape;
  const int64_t whole_row = layout::align_up(row_bytes, kSumStepBytes);
  for (int32_t piece = piece_bytes; piece > 0 && shape.num_slots < least_slots; piece = (piece - 1) / kSumStepBytes * kSumStepBytes) {
    shape.piece_bytes = static_cast<int32_t>(whole_row < piece ? whole_row : piece);
    const int64_t fitting = bytes / (shape.piece_bytes + kSumSlotSideBytes);
    shape.num_slots = static_cast<int32_t>(fitting < kMostSlots ? fitting : kMostSlots);
  }
  return shape;
}

}  // namespace tern::kernels
