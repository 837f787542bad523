// SPDX-License-Identifier: Apache-2.0
// While one lives, the heap is that of a small machine: what asks for more than a few MiB at once gets std::bad_alloc, also under
// sanitizers, which would end the process. So an absurd size that is not refused before memory is asked for fails alike everywhere.
#pragma once

namespace tern::fuzz {

class SmallHeap {
 public:
  SmallHeap();
  ~SmallHeap();
  SmallHeap(const SmallHeap&) = delete;
  SmallHeap& operator=(const SmallHeap&) = delete;
};

}  // namespace tern::fuzz
