// SPDX-License-Identifier: Apache-2.0
// Where kernels find a rail's banks and the slots in them (layout/rail.h), which are in pinned host memory; slots may be in the GPU's. Shared by
// host and device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "layout/device_window.h"
#include "layout/rail.h"

namespace tern::kernels {

// Those that leave, or that have come: a bank for each node.
struct RailBanks {
  std::byte* banks = nullptr;  // of the first of a pair; nullptr: there are none
  int64_t node_bytes = 0;      // from one node's to the next
  int64_t pair_bytes = 0;      // to the second of the pair
  int32_t own_node = 0;
  int64_t own_bytes = 0;           // from where the own node's would be to where it is
  const uint64_t* pair = nullptr;  // HostTalk::bank

  constexpr std::byte* bank(int32_t node) const {
    return banks + static_cast<int64_t>(*pair) * pair_bytes + node * node_bytes + (node == own_node ? own_bytes : 0);
  }
};

// With what is in them.
struct RailSlots : RailBanks {
  int64_t slots_at = 0;  // in a bank
  layout::RailSlotLayout layout;

  // Slots of places, which are tokens, or entries of tokens; -1: none. Counted from the batch's first; the round's first follows from its chunk.
  const int32_t* slot_of = nullptr;      // [num_nodes, num_places]
  const int32_t* chunk_begin = nullptr;  // [num_nodes, kMaxChunks + 1]
  int64_t num_places = 0;                // 0: all nodes have the same
  int32_t first_chunk = 0;

  // nullptr: the place has none there.
  constexpr std::byte* of(int32_t node, int64_t place) const {
    const int32_t slot = slot_of[node * num_places + place];
    if (slot < 0) return nullptr;
    return nth(node, slot - chunk_begin[node * (layout::kMaxChunks + 1) + first_chunk]);
  }
  // Of the round.
  constexpr std::byte* nth(int32_t node, int64_t slot) const { return bank(node) + slots_at + slot * layout.stride(); }
};
static_assert(std::is_trivially_copyable_v<RailSlots>);

}  // namespace tern::kernels
