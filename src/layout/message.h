// SPDX-License-Identifier: Apache-2.0
// What lies in a bank: one header, optionally the sender's counts, then slots of equal size.
//
//   | header | counts: int32 [num_counts] | slot 0 | slot 1 | ...
//   slot: | payload | scales | meta: source rank, source token, local experts [num_topk] | weights [num_weights] |
//
// A part that an operation does not need has length zero: rows written straight to their place leave slots with metadata only.
#pragma once

#include <cstdint>

#include "layout/window.h"

namespace tern::layout {

// What all ranks must agree on in one operation; compared on arrival, so that a difference is an error and not garbage.
struct CallShape {
  int64_t row_bytes = 0;
  int64_t scale_bytes = 0;
  int64_t max_tokens = 0;
  int64_t row_capacity = 0;
  int64_t tokens_per_round = 0;
  int32_t num_experts = 0;
  int32_t num_topk = 0;
  int32_t choices = 0;  // layout, extent, dtype, encoding, mode, weights, zero copy: 4 bits each
  int32_t alignment = 0;
  constexpr bool operator==(const CallShape&) const = default;
};

struct alignas(kCacheLine) MessageHeader {
  CallShape shape;
  int32_t num_given_up = 0;  // ranks that the sender has given up; which, stands in the receiver's window
  int32_t num_messages = 0;  // slots filled in this round
};
static_assert(sizeof(MessageHeader) == kCacheLine);

struct SlotLayout {
  int64_t payload_bytes = 0;
  int64_t scale_bytes = 0;
  int32_t num_experts = 0;  // local experts in the metadata: num_topk, or 0 for an operation that carries none
  int32_t num_weights = 0;

  static constexpr int64_t kPartAlignment = 16;

  constexpr int64_t payload() const { return 0; }
  constexpr int64_t scales() const { return align_up(payload_bytes, kPartAlignment); }
  constexpr int64_t source_rank() const { return scales() + align_up(scale_bytes, kPartAlignment); }
  constexpr int64_t source_token() const { return source_rank() + static_cast<int64_t>(sizeof(int32_t)); }
  constexpr int64_t experts() const { return source_token() + static_cast<int64_t>(sizeof(int32_t)); }
  constexpr int64_t weights() const { return experts() + num_experts * static_cast<int64_t>(sizeof(int32_t)); }
  constexpr int64_t stride() const { return align_up(weights() + num_weights * static_cast<int64_t>(sizeof(float)), kCacheLine); }
};

struct BankLayout {
  int64_t num_counts = 0;
  SlotLayout slot;

  constexpr int64_t counts() const { return sizeof(MessageHeader); }
  constexpr int64_t slots() const { return align_up(counts() + num_counts * static_cast<int64_t>(sizeof(int32_t)), kCacheLine); }
  constexpr int64_t slot_at(int64_t slot_idx) const { return slots() + slot_idx * slot.stride(); }
  // Bytes of a bank with this many slots, and how many slots fit (0 if none).
  constexpr int64_t bytes(int64_t num_slots) const { return slot_at(num_slots); }
  constexpr int64_t slots_in(int64_t bank_bytes) const { return bank_bytes < slots() ? 0 : (bank_bytes - slots()) / slot.stride(); }
};

}  // namespace tern::layout
