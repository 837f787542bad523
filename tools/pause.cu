// SPDX-License-Identifier: Apache-2.0
#include <cstdint>

#include "device/order.cuh"
#include "tools/cuda_call.h"
#include "tools/pause.h"

namespace tern::tools {
namespace {

__global__ void pause_kernel(uint64_t num_ns) {
  const uint64_t start_ns = device::global_timer_ns();
  while (device::global_timer_ns() - start_ns < num_ns) __nanosleep(500);
}

}  // namespace

void prepare_pause() {
  cudaFuncAttributes attributes;
  check_cuda(cudaFuncGetAttributes(&attributes, pause_kernel), "loading the kernel of pauses");
}

void launch_pause(double us, cudaStream_t stream) {
  pause_kernel<<<1, 1, 0, stream>>>(static_cast<uint64_t>(us * 1e3));
  check_cuda(cudaGetLastError(), "launching a pause");
}

}  // namespace tern::tools
