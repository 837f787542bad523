// SPDX-License-Identifier: Apache-2.0
// For tests that use CUDA themselves, in this process.
#pragma once

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <cstdint>
#include <stdexcept>

#include "gpu/spin.h"

namespace tern::conformance {

inline void require_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(fmt::format("{}: {}", what, cudaGetErrorString(error)));
}

// A stream of a thread's own, on its current device.
class Stream {
 public:
  Stream() { require_cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreateWithFlags"); }
  ~Stream() { cudaStreamDestroy(stream_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

class Event {
 public:
  Event() { require_cuda(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), "cudaEventCreateWithFlags"); }
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  cudaEvent_t get() const { return event_; }

  void record(cudaStream_t stream) const { require_cuda(cudaEventRecord(event_, stream), "cudaEventRecord"); }
  void await(cudaStream_t stream) const { require_cuda(cudaStreamWaitEvent(stream, event_), "cudaStreamWaitEvent"); }

 private:
  cudaEvent_t event_ = nullptr;
};

inline int num_sms_of(int32_t device) {
  int count = 0;
  require_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  return count;
}

inline void spin(cudaStream_t stream, int num_blocks, int64_t micros) {
  require_cuda(launch_spin(stream, num_blocks, micros), "launch_spin");
}

// Loading a kernel may wait for the GPU: not in the middle of a test.
inline void load_spin(int32_t num_devices) {
  for (int32_t device = 0; device < num_devices; ++device) {
    require_cuda(cudaSetDevice(device), "cudaSetDevice");
    const Stream stream;
    spin(stream.get(), 1, 1);
    require_cuda(cudaStreamSynchronize(stream.get()), "cudaStreamSynchronize");
  }
}

}  // namespace tern::conformance
