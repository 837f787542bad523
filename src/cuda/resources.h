// SPDX-License-Identifier: Apache-2.0
// Owners of what CUDA hands out. Each frees what it owns when it goes, never throws then, and can be moved.
//
//   DeviceGuard guard(device);
//   Stream stream(device, StreamPriority::kHighest);
//   check(cudaMemcpyAsync(..., stream.get()), "...");
//   stream.wait(Deadline::in_ms(1000), "copying the epochs");
//
// Threads: making and destroying in any thread; the thread's current device stays what it was.
#pragma once

#include <cstddef>
#include <exception>
#include <utility>

#include "base/deadline.h"
#include "cuda/driver.h"

namespace tern::cuda {

// Owns a handle: it goes to `destroy`, whose result is of no interest, when the owner goes.
template <typename Handle, auto destroy>
class Owned {
 public:
  Owned() = default;
  explicit Owned(Handle handle) : handle_(std::move(handle)) {}
  Owned(Owned&& other) noexcept : handle_(std::exchange(other.handle_, Handle{})) {}
  Owned& operator=(Owned&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Owned() {
    if (handle_ != Handle{}) destroy(handle_);
  }

  Handle get() const { return handle_; }
  explicit operator bool() const { return handle_ != Handle{}; }

 private:
  Handle handle_{};
};

// Makes `device` the thread's current one for a while. What it restores is the context, also none at all: going back to "device 0" would
// start a context there that nobody asked for.
// While it lives CUDA refuses nothing because some thread captures a graph: the engine's own streams are no part of it. Otherwise memory that
// is taken, or an event that is looked at, would end the capture.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  CUcontext before_ = nullptr;
  cudaStreamCaptureMode mode_before_ = cudaStreamCaptureModeRelaxed;
};

// For operations, of which every call counts: makes a device's context the thread's current one for a while, if it is not already. What an
// operation asks of CUDA is allowed while some thread captures a graph.
class CurrentContext {
 public:
  explicit CurrentContext(CUcontext context);
  ~CurrentContext();
  CurrentContext(const CurrentContext&) = delete;
  CurrentContext& operator=(const CurrentContext&) = delete;

  // TERN_SYSTEM_ERROR if the driver does not say.
  static CUcontext get();

 private:
  CUcontext before_;
  bool is_another_;
};

// What CUDA hands out, and the device it belongs to.
template <typename Handle>
struct OnDevice {
  Handle handle{};
  int device = 0;
  bool operator==(const OnDevice&) const = default;
};

// With the device current: in a thread without a context the runtime would start one on device 0. What cannot be freed is lost with its
// context.
template <auto destroy, typename Handle>
void destroy_on_device(const OnDevice<Handle>& resource) noexcept {
  try {
    const DeviceGuard guard(resource.device);
    destroy(resource.handle);
  } catch (const std::exception&) {
  }
}

template <typename Handle, auto destroy>
using OwnedOnDevice = Owned<OnDevice<Handle>, &destroy_on_device<destroy, Handle>>;

enum class StreamPriority { kNormal, kHighest };

// A stream that does not wait for the legacy default stream, nor makes it wait.
class Stream {
 public:
  explicit Stream(int device, StreamPriority priority = StreamPriority::kNormal);
  cudaStream_t get() const { return stream_.get().handle; }

  // Returns when all work enqueued so far has run. TERN_TIMEOUT, or what went wrong in the work; `asked` says what the work is.
  void wait(Deadline deadline, std::string_view asked) const;

 private:
  OwnedOnDevice<cudaStream_t, &cudaStreamDestroy> stream_;
};

enum class EventTiming { kOff, kOn };

class Event {
 public:
  explicit Event(int device, EventTiming timing = EventTiming::kOff);
  cudaEvent_t get() const { return event_.get().handle; }

  // Whether the work has run that it was last recorded behind, also if it went wrong. Never recorded: there is none, true.
  bool passed() const;

 private:
  OwnedOnDevice<cudaEvent_t, &cudaEventDestroy> event_;
};

}  // namespace tern::cuda
