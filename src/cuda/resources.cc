// SPDX-License-Identifier: Apache-2.0
#include "cuda/resources.h"

#include <algorithm>
#include <thread>

#include "base/error.h"

namespace tern::cuda {

CUcontext CurrentContext::get() {
  CUcontext context = nullptr;
  check(driver().ctx_get_current(&context), "asking for the current CUDA context");
  return context;
}

CurrentContext::CurrentContext(CUcontext context) : before_(get()), is_another_(before_ != context) {
  if (is_another_) check(driver().ctx_set_current(context), "making the context of an exchange the current one");
}

CurrentContext::~CurrentContext() {
  if (is_another_) driver().ctx_set_current(before_);
}

DeviceGuard::DeviceGuard(int device) : before_(CurrentContext::get()) {
  const cudaError_t result = cudaSetDevice(device);
  if (result != cudaSuccess) fail_cuda(result, fmt::format("making device {} the current one", device));
  check(cudaThreadExchangeStreamCaptureMode(&mode_before_), "allowing calls while a graph is captured");
}

DeviceGuard::~DeviceGuard() {
  cudaThreadExchangeStreamCaptureMode(&mode_before_);
  driver().ctx_set_current(before_);
}

Stream::Stream(int device, StreamPriority priority) {
  const DeviceGuard guard(device);
  int lowest = 0, highest = 0;
  check(cudaDeviceGetStreamPriorityRange(&lowest, &highest), "asking for the priorities of streams");
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, priority == StreamPriority::kHighest ? highest : lowest),
        "creating a stream");
  stream_ = decltype(stream_)({stream, device});
}

void Stream::wait(Deadline deadline, std::string_view asked) const {
  const DeviceGuard guard(stream_.get().device);
  std::chrono::microseconds pause(0);
  constexpr std::chrono::microseconds kLongestPause(200);
  while (true) {
    const cudaError_t result = cudaStreamQuery(get());
    if (result == cudaSuccess) return;
    if (result != cudaErrorNotReady) fail_cuda(result, asked);
    cudaGetLastError();
    if (deadline.passed())
      fail(TERN_TIMEOUT, "CUDA: {}: the GPU has not come to it until the deadline; is another kernel occupying it?", asked);
    std::this_thread::sleep_for(pause);
    pause = std::min(2 * pause + std::chrono::microseconds(1), kLongestPause);
  }
}

Event::Event(int device, EventTiming timing) {
  const DeviceGuard guard(device);
  cudaEvent_t event = nullptr;
  check(cudaEventCreateWithFlags(&event, timing == EventTiming::kOn ? cudaEventDefault : cudaEventDisableTiming), "creating an event");
  event_ = decltype(event_)({event, device});
}

bool Event::passed() const {
  const DeviceGuard guard(event_.get().device);
  if (cudaEventQuery(get()) != cudaErrorNotReady) return true;
  cudaGetLastError();
  return false;
}

}  // namespace tern::cuda
