// SPDX-License-Identifier: Apache-2.0
// Calls of the CUDA runtime in the command: an error becomes a failure that says what was tried.
//
//   check_cuda(cudaEventCreate(&event), "an event for times");
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <type_traits>

namespace tern::tools {

[[noreturn]] void fail_cuda(cudaError_t error, const char* asked);

inline void check_cuda(cudaError_t error, const char* asked) {
  if (error != cudaSuccess) fail_cuda(error, asked);
}

// Own an event, a stream, or memory. The device that they belong to is current when they go.
template <typename Handle, cudaError_t (*destroy)(Handle)>
struct DestroyCuda {
  void operator()(Handle handle) const noexcept { destroy(handle); }
};
template <typename Handle, cudaError_t (*destroy)(Handle)>
using OwnedCuda = std::unique_ptr<std::remove_pointer_t<Handle>, DestroyCuda<Handle, destroy>>;
using CudaEvent = OwnedCuda<cudaEvent_t, cudaEventDestroy>;
using CudaStream = OwnedCuda<cudaStream_t, cudaStreamDestroy>;

struct FreeCuda {
  void operator()(std::byte* memory) const noexcept { cudaFree(memory); }
};
using CudaMemory = std::unique_ptr<std::byte, FreeCuda>;

inline CudaEvent make_cuda_event(unsigned flags = cudaEventDefault) {
  cudaEvent_t event = nullptr;
  check_cuda(cudaEventCreateWithFlags(&event, flags), "an event");
  return CudaEvent(event);
}

inline CudaStream make_cuda_stream() {
  cudaStream_t stream = nullptr;
  check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "a stream");
  return CudaStream(stream);
}

// Of the current device, apart from any pool, so that it can be shared and copied between GPUs.
inline CudaMemory make_cuda_memory(int64_t num_bytes) {
  void* memory = nullptr;
  check_cuda(cudaMalloc(&memory, static_cast<size_t>(num_bytes)), "memory for copies");
  return CudaMemory(static_cast<std::byte*>(memory));
}

}  // namespace tern::tools
