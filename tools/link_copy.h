// SPDX-License-Identifier: Apache-2.0
// A plain copy by a chosen number of SMs: what the links give to a kernel that does nothing else. On sm_90 and newer with bulk copies through
// a ring in shared memory, else with loads and stores of 16 bytes. It waits for nobody, so it always ends.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace tern::tools {

struct LinkCopy {
  static constexpr int kMostParts = 64;
  struct Part {
    const std::byte* from;
    std::byte* to;
  };
  Part parts[kMostParts];  // of equal size, copied side by side
  uint32_t num_parts;
  uint32_t chunk_bytes;
  uint32_t chunks_per_part;
};

// How this device copies. `chunk_bytes` is for LinkCopy.
struct LinkCopyShape {
  bool bulk = false;
  uint32_t chunk_bytes = 0;
};
LinkCopyShape link_copy_shape(int device);

// Puts the copy on the stream, one block on each of `num_sms` SMs.
void launch_link_copy(const LinkCopy& copy, const LinkCopyShape& shape, int num_sms, cudaStream_t stream);

}  // namespace tern::tools
