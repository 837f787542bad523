// SPDX-License-Identifier: Apache-2.0
// Owners of what CUDA hands out. Each frees what it owns when it goes, never throws then, and can be moved.
//
//   DeviceGuard guard(device);
//   Stream stream(device, StreamPriority::kHighest);
//   DeviceBuffer<uint64_t> epochs(device, num_lanes);     // zeroed
//   check(cudaMemcpyAsync(..., stream.get()), "...");
//   stream.wait(Deadline::in_ms(1000), "copying the epochs");
//
// Threads: making and destroying in any thread; the thread's current device stays what it was.
#pragma once

#include <cstddef>
#include <exception>
#include <type_traits>
#include <utility>

#include "base/deadline.h"
#include "cuda/driver.h"

namespace tern::cuda {

// Owns a handle: it goes to `destroy`, whose result is of no interest, when the owner goes.
template <typename Handle, auto destroy>
class Owned {
 public:
  Owned() = default;
  explicit Owned(Handle handle) : handle_(handle) {}
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
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  CUcontext before_ = nullptr;
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

 private:
  OwnedOnDevice<cudaEvent_t, &cudaEventDestroy> event_;
};

// Bytes of zeros; the templates below give them a type.
using DeviceBytes = OwnedOnDevice<void*, &cudaFree>;
using PinnedBytes = OwnedOnDevice<void*, &cudaFreeHost>;
DeviceBytes allocate_device(int device, size_t num_bytes);
PinnedBytes allocate_pinned(int device, size_t num_bytes);

// `size` elements in a GPU's memory, zeroed. Freeing it waits for the work of the whole device (cudaFree): for set-up and the end.
template <typename T>
class DeviceBuffer {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  DeviceBuffer() = default;
  DeviceBuffer(int device, size_t size) : bytes_(allocate_device(device, size * sizeof(T))), size_(size) {}
  T* data() const { return static_cast<T*>(bytes_.get().handle); }
  size_t size() const { return size_; }

 private:
  DeviceBytes bytes_;
  size_t size_ = 0;
};

// `size` elements in host memory that every GPU can read and write at the same address, zeroed.
template <typename T>
class PinnedBuffer {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  PinnedBuffer() = default;
  // `device`: where the context is made that the memory belongs to.
  PinnedBuffer(int device, size_t size) : bytes_(allocate_pinned(device, size * sizeof(T))), size_(size) {}
  T* data() const { return static_cast<T*>(bytes_.get().handle); }
  size_t size() const { return size_; }
  T& operator[](size_t i) const { return data()[i]; }
  T* begin() const { return data(); }
  T* end() const { return data() + size_; }

 private:
  PinnedBytes bytes_;
  size_t size_ = 0;
};

}  // namespace tern::cuda
