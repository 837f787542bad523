// SPDX-License-Identifier: Apache-2.0
// Where things lie in a GPU rank's internal window. The same on every rank.
//
//   | abort | records [num_ranks] | lane 0: cells [num_ranks], calls [bank][num_ranks], staged [num_ranks][chunk] | lane 1 ...
//   | routing: [lane][bank][source rank] | words: [lane][bank][source rank] | row flags: [lane][source rank] | slots: [lane][bank] |
//   | staging: [lane][bank] |
//
// Rows of large batches are pulled: a rank puts what it sends into its own staging (or leaves it where it is, if that is window memory), tells
// its peers where, and raises a flag for each chunk of tokens that is complete. Routing is small and is pushed into the receiver's routing bank.
//
// Rows of small batches, of the latency path, are pushed into slots of the receiver, and show themselves that they are there; or into slots of its
// staging, each with a flag of its own. What is smaller still goes into words.
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
  uint64_t ready;  // epoch: src's call of this epoch is described in its CallCell; of a route too, whose messages have flags of their own
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
  // Of a dispatch in rank_major. Where src's outputs begin in its heap, if others may write there; -1: they may not, or there are none.
  int64_t takes_rows_at = -1;
  int64_t takes_scales_at = -1;
  int32_t delivers = 0;  // 1: src writes its rows and scales into the outputs of all ranks that take rows
};

// Bulk copies between addresses that differ in where they begin in a line of this many bytes take twice the requests.
inline constexpr int64_t kBulkLine = 128;

// The latency path takes batches of up to this many tokens of a rank, each with up to this many entries (a warp has one in each thread), among
// up to this many ranks.
inline constexpr int64_t kMostLatencyTokens = 1024;
inline constexpr int32_t kMostLatencyTopk = 32;
inline constexpr int32_t kMostLatencyRanks = 64;
// Parts of a row that travel by themselves, each with a flag; a power of two.
inline constexpr int32_t kMostRowPartsLog2 = 2, kMostRowParts = 1 << kMostRowPartsLog2;

// What a source tells the owner of the window in words of 8 bytes: the value in the lower half, in the upper half the lower half of the epoch.
// A word is complete as soon as it is there, with no flag behind it. Nothing else is ever written where words are, so one that is left over
// from another operation shows another epoch. Between nodes a source sends several batches (kernels::LatencyBatches).
struct LatencyWords {
  int64_t num_counts = 0;  // of a batch
  int64_t max_tokens = 0;  // of a batch
  int32_t num_topk = 0;
  int32_t num_batches = 1;

  constexpr int64_t call() const { return 0; }  // a hash of the operation and its shape
  constexpr int64_t num_tokens() const { return 1; }
  // Of a dispatch that routes, a batch after the other: entries by expert, messages by rank; which tokens send a message here, a bit each.
  constexpr int64_t counts() const { return num_tokens() + num_batches; }
  constexpr int64_t presence() const { return counts() + num_batches * num_counts; }
  constexpr int64_t num_presence() const { return (max_tokens + 31) / 32; }  // of a batch
  constexpr int64_t num_routing_words() const { return presence() + num_batches * num_presence(); }
  // [num_batches, max_tokens, num_topk] of a dispatch: what an entry of the source's is (LatencyEntry), if it routes. Of a combine: the weights that
  // go back to the owner of the tokens, as bits.
  constexpr int64_t entries() const { return num_routing_words(); }
  constexpr int64_t returned() const { return entries(); }
  // [num_batches, max_tokens, num_topk] the weights of the source's tokens, as bits.
  constexpr int64_t weights() const { return entries() + num_entries(); }
  constexpr int64_t num_words() const { return weights() + num_entries(); }
  constexpr int64_t num_entries() const { return num_batches * max_tokens * num_topk; }
};

// An entry of a token, as it travels.
struct LatencyEntry {
  int32_t expert = -1;   // of all ranks' experts; -1: none
  int32_t position = 0;  // among the source's entries of this expert

  static constexpr uint32_t kNoExpert = 0xffff;
  constexpr uint32_t packed() const { return static_cast<uint32_t>(position) << 16 | (static_cast<uint32_t>(expert) & kNoExpert); }
  static constexpr LatencyEntry unpacked(uint32_t word) {
    const uint32_t expert = word & kNoExpert;
    return {expert == kNoExpert ? -1 : static_cast<int32_t>(expert), static_cast<int32_t>(word >> 16)};
  }
};
static_assert(kMostLatencyTokens * kMostLatencyTopk <= 0x10000);

// Four bytes of a slot that nothing has been written to. A receiver puts it back wherever it has read; so a row needs no flag, but where it holds
// this itself. In fp8, bf16 and fp32 that is NaNs which no computation makes.
inline constexpr uint8_t kUnwrittenByte = 0xff;
inline constexpr uint32_t kUnwritten = 0xffffffff;

// A row pushed by the latency path. Parts that an operation lacks have length zero.
struct LatencySlot {
  int64_t row_bytes = 0;
  int64_t scale_bytes = 0;

  constexpr int64_t row() const { return 0; }
  constexpr int64_t scales() const { return align_up(row_bytes, 16); }
  constexpr int64_t end() const { return scales() + align_up(scale_bytes, 16); }
  constexpr int64_t stride() const { return align_up(end(), kBulkLine); }
};

struct DeviceWindowLayout {
  int32_t num_ranks = 0;
  int32_t num_lanes = 0;
  int64_t routing_bytes = 0;   // of one (lane, bank, source); a multiple of kCacheLine
  int64_t staging_bytes = 0;   // of one (lane, bank); a multiple of kCacheLine
  int64_t slot_bytes = 0;      // of one (lane, bank), for rows that need no flags; a multiple of kCacheLine
  int64_t latency_words = 0;   // of one (lane, bank, source)
  int64_t latency_tokens = 0;  // that have row flags; 0: there is no latency path

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
  constexpr int64_t words(int lane, uint64_t epoch, int source) const {
    return routing(num_lanes, 0, 0) + ((lane * kNumBanks + static_cast<int64_t>(epoch % kNumBanks)) * num_ranks + source) * latency_words *
                                          static_cast<int64_t>(sizeof(uint64_t));
  }
  constexpr int64_t row_flags(int lane, int source) const {
    return words(num_lanes, 0, 0) + (int64_t{lane} * num_ranks + source) * num_row_flags() * static_cast<int64_t>(sizeof(uint64_t));
  }
  constexpr int64_t num_row_flags() const { return latency_tokens * kMostRowParts; }  // of one (lane, source)
  constexpr int64_t slots(int lane, uint64_t epoch) const {
    return align_up(row_flags(num_lanes, 0), 4096) + (lane * kNumBanks + static_cast<int64_t>(epoch % kNumBanks)) * slot_bytes;
  }
  constexpr int64_t staging(int lane, uint64_t epoch) const {
    return align_up(slots(num_lanes, 0), 4096) + (lane * kNumBanks + static_cast<int64_t>(epoch % kNumBanks)) * staging_bytes;
  }
  constexpr int64_t total_bytes() const { return staging(num_lanes, 0); }

 private:
  constexpr int64_t lane_bytes() const {
    return num_ranks * static_cast<int64_t>(sizeof(ProgressCell) + kNumBanks * sizeof(CallCell) + kMaxChunks * sizeof(uint64_t));
  }
};

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

// What one source writes into its routing bank. Its tokens are in kGroups groups that follow each other, whole chunks each, and what it says of a
// group needs nothing of another one: how many entries and messages there are, and a slot for each message in the order of its tokens.
struct RoutingBankLayout {
  int64_t num_counts = 0;
  int32_t num_topk = 0;
  int32_t local_experts = 0;
  int64_t max_tokens = 0;

  static constexpr int32_t kGroups = 16;
  static constexpr int32_t kGroupChunks = kMaxChunks / kGroups;
  static constexpr int32_t kEntryQuad = 4;  // a message's entries are moved four at a time

  constexpr int32_t group_tokens() const { return static_cast<int32_t>((max_tokens + kMaxChunks - 1) / kMaxChunks) * kGroupChunks; }
  constexpr int32_t entry_stride() const { return (num_topk + kEntryQuad - 1) / kEntryQuad * kEntryQuad; }

  // Where an entry of a message goes, in a word: the local expert, above it the position among the group's entries of this expert.
  static constexpr uint32_t kNotHere = ~0u;
  constexpr int32_t expert_bits() const {
    int32_t bits = 0;
    while ((local_experts - 1) >> bits != 0) ++bits;
    return bits;
  }
  constexpr bool fits_entries() const { return (int64_t{group_tokens()} * num_topk) << expert_bits() <= int64_t{kNotHere}; }

  constexpr int64_t counts() const { return 0; }  // [kGroups, num_counts]
  constexpr int64_t source_tokens() const {       // [kGroups, group_tokens]
    return align_up(counts() + kGroups * num_counts * static_cast<int64_t>(sizeof(int32_t)), kCacheLine);
  }
  constexpr int64_t entries() const {  // [kGroups, group_tokens, entry_stride]
    return align_up(source_tokens() + int64_t{kGroups} * group_tokens() * static_cast<int64_t>(sizeof(int32_t)), kCacheLine);
  }
  constexpr int64_t bytes() const {
    return align_up(entries() + int64_t{kGroups} * group_tokens() * entry_stride() * static_cast<int64_t>(sizeof(uint32_t)), kCacheLine);
  }
};

}  // namespace tern::layout
