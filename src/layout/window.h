// SPDX-License-Identifier: Apache-2.0
// Where things lie in a rank's internal window. The same on every rank.
//
//   | failure | given up | begun | lane 0: doorbell, cells [num_ranks] | lane 1 ... | staging: [lane][bank][source rank] |
//
// The bank of (lane, epoch, source) is where that source's messages of the epoch arrive. Two banks alternate: nobody
// writes epoch n before the owner has consumed epoch n - 2.
#pragma once

#include <cstdint>

#include "layout/flags.h"

namespace tern::layout {

constexpr int64_t align_up(int64_t value, int64_t alignment) { return (value + alignment - 1) / alignment * alignment; }

struct WindowLayout {
  int32_t num_ranks = 0;
  int32_t num_lanes = 0;
  int64_t bank_bytes = 0;  // of one (lane, bank, source); a multiple of kCacheLine

  constexpr int64_t failure() const { return 0; }
  constexpr int64_t given_up() const { return sizeof(FailureCell); }
  constexpr int64_t begun() const { return given_up() + static_cast<int64_t>(sizeof(GivenUpCell)); }
  constexpr int64_t doorbell(int lane) const { return begun() + static_cast<int64_t>(sizeof(BegunCell)) + lane * lane_bytes(); }
  constexpr int64_t cell(int lane, int source) const {
    return doorbell(lane) + static_cast<int64_t>(sizeof(Doorbell)) + source * static_cast<int64_t>(sizeof(FlagCell));
  }
  constexpr int64_t bank(int lane, uint64_t epoch, int source) const {
    const auto bank_idx = static_cast<int64_t>(epoch % kNumBanks);
    return control_bytes() + ((lane * kNumBanks + bank_idx) * num_ranks + source) * bank_bytes;
  }
  constexpr int64_t control_bytes() const { return align_up(doorbell(num_lanes), 4096); }
  constexpr int64_t staging_bytes() const { return int64_t{num_lanes} * kNumBanks * num_ranks * bank_bytes; }
  constexpr int64_t total_bytes() const { return control_bytes() + staging_bytes(); }

 private:
  constexpr int64_t lane_bytes() const {
    return static_cast<int64_t>(sizeof(Doorbell)) + num_ranks * static_cast<int64_t>(sizeof(FlagCell));
  }
};

}  // namespace tern::layout
