// SPDX-License-Identifier: Apache-2.0
#include "memory/offset_allocator.h"

#include <algorithm>
#include <iterator>

#include "base/error.h"

namespace tern {

OffsetAllocator::OffsetAllocator(int64_t bytes) {
  bytes = bytes / kAlignment * kAlignment;
  if (bytes > 0) free_[0] = bytes;
}

int64_t OffsetAllocator::allocate(int64_t bytes) {
  // Ranges are multiples of kAlignment: one that holds `bytes` holds them rounded up too, and rounding cannot overflow then.
  const auto fit = std::find_if(free_.begin(), free_.end(), [&](const auto& range) { return range.second >= bytes; });
  if (fit == free_.end()) {
    int64_t left = 0;
    int64_t longest = 0;
    for (const auto& [offset, size] : free_) {
      left += size;
      longest = std::max(longest, size);
    }
    fail(TERN_OUT_OF_MEMORY,
         "window: {} bytes asked for, {} are free, at most {} in one piece; create the exchange with a larger window_bytes", bytes, left,
         longest);
  }
  const int64_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  const auto [offset, size] = *fit;
  free_.erase(fit);
  if (size > rounded) free_[offset + rounded] = size - rounded;
  used_[offset] = rounded;
  return offset;
}

bool OffsetAllocator::release(int64_t offset) {
  const auto used = used_.find(offset);
  if (used == used_.end()) return false;
  int64_t size = used->second;
  used_.erase(used);
  const auto after = free_.find(offset + size);
  if (after != free_.end()) {
    size += after->second;
    free_.erase(after);
  }
  const auto next = free_.lower_bound(offset);
  if (next != free_.begin()) {
    const auto before = std::prev(next);
    if (before->first + before->second == offset) {
      before->second += size;
      return true;
    }
  }
  free_[offset] = size;
  return true;
}

}  // namespace tern
