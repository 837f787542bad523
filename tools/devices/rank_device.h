// SPDX-License-Identifier: Apache-2.0
// The device of one rank, as a caller of Tern has it: memory that operations read and write, and a stream to put them on.
// On a CPU rank that is plain memory and no stream; the same program drives both.
//
//   const std::unique_ptr<RankDevice> device = make_rank_device(TERN_DEVICE_CUDA, rank % num_cuda_devices());
//   tern_exchange_options options{.device = device->type(), .device_index = device->index()};
//   const DeviceMemory tokens(*device, num_bytes);
//   device->copy_in(tokens.data(), host.data(), num_bytes);
//   tern_dispatch(plan, &args, &(tern_launch){.stream = device->stream()});
//   device->synchronise();
//
// Order and visibility: all calls act in the order of the stream. The copies and synchronise() return when they are done,
// so what the host reads afterwards is what the operations on the stream have left; fill() may still be running.
// Nothing waits for other ranks of the same GPU: memory comes from a pool of this rank alone and goes back in stream order
// (cudaMalloc and cudaFree may wait for all that runs on the GPU, and so would block a rank that others are waiting for). Work on other
// streams than this one must have ended before the memory that it uses is freed.
// Make it before the exchange: that loads everything that it needs. Whatever was allocated must be freed before it is destroyed.
// Threads: one at a time. Each call sets the calling thread's CUDA device. All waits end, with TERN_TIMEOUT, after kWaitMs.
#pragma once

#include <tern/tern.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

namespace tern::tools {

// Work of a stream, recorded once, to be run often. Belongs to the device that captured it.
class DeviceGraph {
 public:
  virtual ~DeviceGraph() = default;
  // Puts one run on the device's stream.
  virtual void replay() = 0;
};

class RankDevice {
 public:
  static constexpr int64_t kWaitMs = 120'000;
  static constexpr int64_t kAlignment = 256;

  virtual ~RankDevice() = default;

  // For tern_exchange_options.
  virtual tern_device_type type() const = 0;
  virtual int32_t index() const = 0;
  // A GPU's address on the PCI bus, "0000:1B:00.0"; "" for the CPU.
  virtual std::string pci_address() const = 0;
  // For tern_launch: a non-blocking stream of this rank's own; NULL on the CPU.
  virtual void* stream() const = 0;

  // Aligned to kAlignment; any stream may use it. Zero bytes are allowed, and have an address of their own.
  virtual void* allocate(int64_t num_bytes) = 0;
  virtual void free(void* memory) noexcept = 0;

  // `device_memory` may also be memory of an exchange's window.
  virtual void copy_in(void* device_memory, const void* host_memory, int64_t num_bytes) = 0;
  virtual void copy_out(void* host_memory, const void* device_memory, int64_t num_bytes) = 0;
  virtual void fill(void* device_memory, uint8_t value, int64_t num_bytes) = 0;

  // Waits for all that is on the stream.
  virtual void synchronise() = 0;

  // Records the operations that `work` puts on the stream, without running them; `work` must not use the device in any other way.
  // On the CPU, where there is nothing to record, every replay calls `work` again.
  virtual std::unique_ptr<DeviceGraph> capture(const std::function<void()>& work) = 0;
};

// TERN_DEVICE_AUTO: a GPU where there is one, else the CPU. TERN_UNSUPPORTED without a GPU of that index, or in a build without CUDA.
std::unique_ptr<RankDevice> make_rank_device(tern_device_type type, int32_t device_index);

// The CPU, for callers without a device of their own. Any number of threads.
RankDevice& host_device();

// 0 without a driver, and in a build without CUDA. Initialises CUDA: processes forked from this one afterwards cannot use it.
int32_t num_cuda_devices();
// The same, found out by a child, so that CUDA stays untouched in this process. 0 if CUDA is in use here already.
int32_t count_cuda_devices_in_child();

// Memory of a device, freed with its owner.
class DeviceMemory {
 public:
  DeviceMemory() = default;
  DeviceMemory(RankDevice& device, int64_t num_bytes) : memory_(device.allocate(num_bytes), Free{&device}), num_bytes_(num_bytes) {}

  // NULL while there is none.
  void* data() const { return memory_.get(); }
  template <typename T>
  T* as() const {
    return static_cast<T*>(memory_.get());
  }
  int64_t num_bytes() const { return num_bytes_; }

 private:
  struct Free {
    RankDevice* device = nullptr;
    void operator()(void* memory) const noexcept { device->free(memory); }
  };
  std::unique_ptr<void, Free> memory_{nullptr, Free{}};
  int64_t num_bytes_ = 0;
};

}  // namespace tern::tools
