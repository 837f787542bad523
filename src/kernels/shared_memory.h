// SPDX-License-Identifier: Apache-2.0
// Shared memory of kernels, their loading and launch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "layout/device_window.h"

namespace tern::kernels {

// Of a block with bulk copies: what an SM of sm_90 and newer has, less what the system and static variables take.
inline constexpr int64_t kMostSharedBytes = 226 << 10;
// What blocks keep of each rank.
inline constexpr int64_t kSourceViewBytes = 80;
inline constexpr int64_t kMostSourceBytes = layout::kMaxRanks * kSourceViewBytes;

// The dynamic shared memory of a block: sources, then with bulk copies the rings of its pulling warps, whose arrivals stand before the stages.
struct SharedLayout {
  int64_t arrivals, rings, bytes;

  constexpr SharedLayout(int32_t num_ranks, int32_t num_rings, int32_t num_stages, int32_t stage_bytes, bool bulk_copies) {
    const int64_t all_stages = int64_t{num_rings} * num_stages;
    arrivals = layout::align_up(num_ranks * kSourceViewBytes, 16);
    rings = layout::align_up(arrivals + all_stages * static_cast<int64_t>(sizeof(uint64_t)), layout::kBulkLine);
    bytes = bulk_copies ? rings + all_stages * stage_bytes : arrivals;
  }
};

// Loads the kernel, and lets its blocks have `bytes` of dynamic shared memory, or as much as there is on this device: what does not fit is an
// error of the launch.
template <typename Kernel>
cudaError_t allow_shared(Kernel kernel, int64_t bytes) {
  cudaFuncAttributes attributes;
  int device = 0, most = 0;
  cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error == cudaSuccess) error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  const int64_t left = most - static_cast<int64_t>(attributes.sharedSizeBytes);
  if (error != cudaSuccess) return error;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes < left ? bytes : left));
}

struct LaunchShape {
  int num_blocks;
  int num_threads;
  int64_t shared_bytes;
  // Blocks may take their places before the kernel in front has ended, if that one allows it; they wait with device::await_kernel_before().
  // From sm_90 on.
  bool follows_closely;
};

template <typename Args>
cudaError_t launch(void (*kernel)(Args), const LaunchShape& shape, cudaStream_t stream, const Args& args) {
  cudaLaunchAttribute closely;
  closely.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  closely.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(shape.num_blocks));
  config.blockDim = dim3(static_cast<unsigned>(shape.num_threads));
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = stream;
  config.attrs = &closely;
  config.numAttrs = shape.follows_closely ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, args);
}

}  // namespace tern::kernels
