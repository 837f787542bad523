// SPDX-License-Identifier: Apache-2.0
// What goes over the network between two ranks of a rail in one epoch: one contiguous piece of a bank.
//
//   | header | counts: int32 [num_counts] | slot 0 | slot 1 | ...
//   slot: | payload | scales | words: 4 bytes each [num_words] |
//   words: | routing: the token, then where it goes in the node [num_routing_words] | what else the operation needs, as weights |
//
// Slots follow each other in the order of the source's tokens, so they need not say whose they are.
//
// The memory of a rank that the network writes to and reads from, the same on every rank:
//
//   | failure records [num_nodes] | own failure record | standing words [num_nodes] | own standing words | banks |
//   banks: [lane][bank][out, in][node]
//
// What is put to a node is made in its out-bank and arrives in the in-bank of this rank's node there. A rank's out-bank for its own node
// holds what stays here; its in-bank is not used.
//
// Slots may lie apart, in memory of the rank's GPU: then the banks above hold header and counts alone, and the GPU's memory is banks in which
// slots are where they would be in a whole one. What goes to a node is two pieces then.
#pragma once

#include <cstdint>
#include <type_traits>

#include "layout/message.h"

namespace tern::layout {

// Compared on arrival, as MessageHeader is.
struct alignas(kCacheLine) RailHeader {
  CallShape shape;
  int16_t operation = 0;
  int16_t num_given_up = 0;  // ranks that the sender has given up; which, its standing words say, before or after this
  int32_t num_slots = 0;
};
static_assert(sizeof(RailHeader) == kCacheLine && kMaxRanks <= INT16_MAX);

// Under TERN_ON_TIMEOUT_MASK: what a rank says to its rails outside of all epochs, again and again. Words and sets of bits that only grow.
struct alignas(kCacheLine) StandingWords {
  GivenUpCell given_up;
  uint64_t late_wait;  // how often a wait of this rank has passed its deadline, << 32, and 1 + the rank that it waits for then
  uint64_t begun;      // by all ranks of its node that were not given up: as BegunCell.begun. Told once somebody was given up
  uint64_t reserved[6];
};
static_assert(std::has_unique_object_representations_v<StandingWords>);

struct RailSlotLayout {
  int64_t payload_bytes = 0;
  int64_t scale_bytes = 0;
  int32_t num_words = 0;
  int32_t num_routing_words = 0;  // of them, the first: of a route, and of a dispatch that routes on its way

  constexpr int64_t payload() const { return 0; }
  constexpr int64_t scales() const { return align_up(payload_bytes, SlotLayout::kPartAlignment); }
  constexpr int64_t words() const { return scales() + align_up(scale_bytes, SlotLayout::kPartAlignment); }
  constexpr int64_t weights() const { return words() + num_routing_words * int64_t{4}; }
  constexpr int64_t stride() const { return align_up(words() + num_words * int64_t{4}, SlotLayout::kPartAlignment); }
};

struct RailBankLayout {
  int64_t num_counts = 0;
  RailSlotLayout slot;

  constexpr int64_t counts() const { return sizeof(RailHeader); }
  constexpr int64_t slots() const { return align_up(counts() + num_counts * int64_t{4}, kCacheLine); }
  constexpr int64_t slot_at(int64_t slot_idx) const { return slots() + slot_idx * slot.stride(); }
  constexpr int64_t bytes(int64_t num_slots) const { return slot_at(num_slots); }
  constexpr int64_t slots_in(int64_t bank_bytes) const { return bank_bytes < slots() ? 0 : (bank_bytes - slots()) / slot.stride(); }
};

struct RailBanksLayout {
  int32_t num_nodes = 0;
  int32_t num_lanes = 0;
  int64_t bank_bytes = 0;  // a multiple of kCacheLine

  constexpr int64_t out(int lane, uint64_t epoch, int node) const { return bank(lane, epoch, 0, node); }
  constexpr int64_t in(int lane, uint64_t epoch, int node) const { return bank(lane, epoch, 1, node); }
  constexpr int64_t total_bytes() const { return bank(num_lanes, 0, 0, 0); }

 private:
  constexpr int64_t bank(int lane, uint64_t epoch, int direction, int node) const {
    const int64_t pair = lane * kNumBanks + static_cast<int64_t>(epoch % kNumBanks);
    return ((pair * 2 + direction) * num_nodes + node) * bank_bytes;
  }
};

struct RailMemoryLayout {
  RailBanksLayout banks;

  constexpr int64_t failure(int node) const { return node * static_cast<int64_t>(kCacheLine); }
  constexpr int64_t own_failure() const { return failure(banks.num_nodes); }
  constexpr int64_t standing(int node) const { return failure(banks.num_nodes + 1) + node * static_cast<int64_t>(sizeof(StandingWords)); }
  constexpr int64_t own_standing() const { return standing(banks.num_nodes); }
  constexpr int64_t banks_begin() const { return standing(banks.num_nodes + 1); }
  constexpr int64_t total_bytes() const { return banks_begin() + banks.total_bytes(); }
};

}  // namespace tern::layout
