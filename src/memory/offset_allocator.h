// SPDX-License-Identifier: Apache-2.0
// Hands out ranges of a window: first fit, neighbours merged when they are given back. Knows offsets only, so it serves
// memory of any device. Threads: one at a time.
#pragma once

#include <cstdint>
#include <map>

namespace tern {

class OffsetAllocator {
 public:
  static constexpr int64_t kAlignment = 256;

  explicit OffsetAllocator(int64_t bytes);

  // Offset of a free range, a multiple of kAlignment. TERN_OUT_OF_MEMORY says how much is left. `bytes` > 0.
  int64_t allocate(int64_t bytes);
  // Gives the range that starts at `offset` back; false if none does.
  bool release(int64_t offset);

 private:
  std::map<int64_t, int64_t> free_;  // offset -> bytes
  std::map<int64_t, int64_t> used_;
};

}  // namespace tern
