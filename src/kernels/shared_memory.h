// SPDX-License-Identifier: Apache-2.0
// Shared memory of kernels, and their loading.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "layout/flags.h"

namespace tern::kernels {

// Of a block with bulk copies: what an SM of sm_90 and newer has, less what the system and static variables take.
inline constexpr int64_t kMostSharedBytes = 226 << 10;
// What blocks keep of each rank.
inline constexpr int64_t kSourceViewBytes = 56;
inline constexpr int64_t kMostSourceBytes = layout::kMaxRanks * kSourceViewBytes;

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

}  // namespace tern::kernels
