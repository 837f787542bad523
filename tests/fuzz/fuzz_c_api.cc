// SPDX-License-Identifier: Apache-2.0
// What libFuzzer, and replay.cc, call with each input. session.h says what is tried and checked.
#include <cstddef>
#include <cstdint>

#include "input.h"
#include "session.h"
#include "small_heap.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const tern::fuzz::SmallHeap small_heap;
  tern::fuzz::Input input(data, size);
  tern::fuzz::Session(input).run();
  return 0;
}
