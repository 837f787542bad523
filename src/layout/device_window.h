// SPDX-License-Identifier: Apache-2.0
// Where things lie in a GPU rank's internal window. The same on every rank.
//
//   | abort | records [num_ranks] | lane 0: cells [num_ranks], calls [bank][num_ranks], staged [num_ranks][chunk] | lane 1 ...
//   | routing: [lane][bank][source rank] | staging: [lane][bank] |
//
// Rows are pulled: a rank puts what it sends into its own staging (or leaves it where it is, if that is window memory), tells its peers where,
// and raises a flag for each chunk of tokens that is complete. Routing is small and is pushed into the receiver's routing bank.
#pragma once

#include <cstdint>

#include "layout/flags.h"
#include "layout/message.h"
#include "layout/window.h"

namespace tern::layout {

// A batch is staged and pulled in at most this many chunks of tokens, each with a flag of its own.
inline constexpr int kMaxChunks = 64;

// Why a rank gave up; written by its GPU into every window, and to its host.
struct alignas(kCacheLine) FailureRecord {
  int32_t status = 0;  // a tern_status; 0: none
  int32_t waiter = 0;
  int32_t awaited = 0;
  int32_t lane = 0;
  int32_t operation = 0;
  int32_t reserved = 0;
  uint64_t expected_epoch = 0;
  uint64_t seen_epoch = 0;
};

// What rank `src` tells the owner of the window about how far it is, on one lane; written by `src` alone.
struct alignas(kCacheLine) ProgressCell {
  uint64_t ready;     // epoch: src's call of this epoch is described in its CallCell; route: its counts and messages are all there
  uint64_t consumed;  // epoch: src no longer needs anything of the owner's, nor what the owner wrote to it, up to here
};

// Bytes of a rank that others pull: where the part of token 0 begins, and the step from token to token.
struct PulledPart {
  int64_t offset = 0;  // in the rank's window, or in its heap
  int64_t stride = 0;
  int32_t in_heap = 0;
  int32_t staged = 0;  // 1: complete for a chunk's tokens when the chunk's flag says so; 0: complete already
};

// What rank `src` says of its operation in one epoch.
struct alignas(kCacheLine) CallCell {
  CallShape shape;  // compared with the owner's own
  uint64_t epoch = 0;
  int32_t operation = 0;
  int32_t num_tokens = 0;
  PulledPart rows, scales, weights;
};

struct DeviceWindowLayout {
  int32_t num_ranks = 0;
  int32_t num_lanes = 0;
  int64_t routing_bytes = 0;  // of one (lane, bank, source); a multiple of kCacheLine
  int64_t staging_bytes = 0;  // of one (lane, bank); a multiple of kCacheLine

  constexpr int64_t abort() const { return 0; }
  constexpr int64_t record(int rank) const { return static_cast<int64_t>(kCacheLine) + rank * static_cast<int64_t>(sizeof(FailureRecord)); }
  constexpr int64_t progress(int lane, int source) const {
    return record(num_ranks) + lane * lane_bytes() + source * static_cast<int64_t>(sizeof(ProgressCell));
  }
  constexpr int64_t call(int lane, uint64_t epoch, int source) const {
    const auto cell_idx = static_cast<int64_t>(epoch % kNumBanks) * num_ranks + source;
    return progress(lane, num_ranks) + cell_idx * static_cast<int64_t>(sizeof(CallCell));
  }
  constexpr int64_t staged(int lane, int source) const {
    return progress(lane, num_ranks) + int64_t{kNumBanks} * num_ranks * static_cast<int64_t>(sizeof(CallCell)) +
           source * kMaxChunks * static_cast<int64_t>(sizeof(uint64_t));
  }
  constexpr int64_t control_bytes() const { return align_up(record(num_ranks) + num_lanes * lane_bytes(), 4096); }
  constexpr int64_t routing(int lane, uint64_t epoch, int source) const {
    return control_bytes() + ((lane * kNumBanks + static_cast<int64_t>(epoch % kNumBanks)) * num_ranks + source) * routing_bytes;
  }
  constexpr int64_t staging(int lane, uint64_t epoch) const {
    return control_bytes() + int64_t{num_lanes} * kNumBanks * num_ranks * routing_bytes +
           (lane * kNumBanks + static_cast<int64_t>(epoch % kNumBanks)) * staging_bytes;
  }
  constexpr int64_t total_bytes() const { return staging(num_lanes, 0); }

 private:
  constexpr int64_t lane_bytes() const {
    return num_ranks * static_cast<int64_t>(sizeof(ProgressCell) + kNumBanks * sizeof(CallCell) + kMaxChunks * sizeof(uint64_t));
  }
};

// Bulk copies between addresses that differ in where they begin in a line of this many bytes take twice the requests.
inline constexpr int64_t kBulkLine = 128;

// A token's place in its rank's staging; parts that are not staged have length zero.
struct StagedSlot {
  int64_t row_bytes = 0;
  int64_t scale_bytes = 0;
  int64_t weight_bytes = 0;

  constexpr int64_t row() const { return 0; }
  constexpr int64_t scales() const { return align_up(row_bytes, 16); }
  constexpr int64_t weights() const { return scales() + align_up(scale_bytes, 16); }
  constexpr int64_t stride() const { return align_up(weights() + align_up(weight_bytes, 16), kBulkLine); }
};

// What one source writes into its routing bank: its counts, then one slot for each message in the order of its tokens.
struct RoutingBankLayout {
  int64_t num_counts = 0;
  int32_t num_topk = 0;

  // Where an entry of the message goes; expert -1: not here.
  struct Entry {
    int32_t expert;    // local
    int32_t position;  // among the source's entries of this expert
  };

  constexpr int64_t counts() const { return 0; }
  constexpr int64_t source_tokens() const { return align_up(counts() + num_counts * static_cast<int64_t>(sizeof(int32_t)), kCacheLine); }
  constexpr int64_t entries(int64_t max_messages) const {
    return align_up(source_tokens() + max_messages * static_cast<int64_t>(sizeof(int32_t)), kCacheLine);
  }
  constexpr int64_t bytes(int64_t max_messages) const {
    return align_up(entries(max_messages) + max_messages * num_topk * static_cast<int64_t>(sizeof(Entry)), kCacheLine);
  }
};

}  // namespace tern::layout
