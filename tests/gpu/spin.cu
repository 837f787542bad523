// SPDX-License-Identifier: Apache-2.0
#include "spin.h"

#include "device/order.cuh"

namespace tern::conformance {
namespace {

__device__ int64_t nanoseconds() { return static_cast<int64_t>(device::global_timer_ns()); }

__global__ void spin(int64_t duration_ns) {
  const int64_t end = nanoseconds() + duration_ns;
  while (nanoseconds() < end) __nanosleep(1000);
}

// Ends early when the host has released it.
__global__ void hold(const volatile uint32_t* released, int64_t most_ns) {
  const int64_t end = nanoseconds() + most_ns;
  while (*released == 0 && nanoseconds() < end) __nanosleep(1000);
}

}  // namespace

cudaError_t launch_hold(cudaStream_t stream, const uint32_t* released, int64_t most_micros) {
  hold<<<1, 1, 0, stream>>>(released, most_micros * 1000);
  return cudaGetLastError();
}

cudaError_t launch_spin(cudaStream_t stream, int num_blocks, int64_t micros) {
  int device = 0, shared_bytes = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = cudaFuncSetAttribute(spin, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  spin<<<num_blocks, 128, static_cast<size_t>(shared_bytes), stream>>>(micros * 1000);
  return cudaGetLastError();
}

}  // namespace tern::conformance
