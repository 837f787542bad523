// SPDX-License-Identifier: Apache-2.0
// A kernel that only takes its time: compute work beside communication, as far as the GPU's scheduler can tell.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace tern::conformance {

// Puts `num_blocks` blocks on the stream that run for `micros` microseconds each. A block takes more than half of an SM's shared memory,
// so that an SM runs one at a time. Returns what the launch returned. The first launch on a GPU loads the kernel.
cudaError_t launch_spin(cudaStream_t stream, int num_blocks, int64_t micros);

// Puts one small block on the stream that runs until the host writes 1 to `released`, in pinned memory, but no longer than that.
cudaError_t launch_hold(cudaStream_t stream, const uint32_t* released, int64_t most_micros);

}  // namespace tern::conformance
