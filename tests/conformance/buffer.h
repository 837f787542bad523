// SPDX-License-Identifier: Apache-2.0
// Memory of operations, where the rank's device reads and writes it.
//
// GuardedBuffer is what an operation writes: filled with kPoison, with guards on both sides, in memory of its own or in the
// exchange's window. Must be destroyed before the exchange. InputArray is what an operation only reads. Both must be
// destroyed before the device. One thread at a time; contents are those that the work on the device's stream has left.
#pragma once

#include <tern/tern.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "conformance/oracle.h"
#include "devices/rank_device.h"

namespace tern::conformance {

using tools::DeviceMemory;
using tools::RankDevice;

class GuardedBuffer {
 public:
  GuardedBuffer() = default;
  // window: the exchange whose window it lies in, or NULL. Throws std::runtime_error if the window has no room.
  GuardedBuffer(int64_t num_bytes, tern_exchange* window, RankDevice& device = tools::host_device());

  // In memory of the device. NULL while there is no buffer.
  uint8_t* data() const { return memory_ == nullptr ? nullptr : memory_.get() + kGuardBytes; }
  int64_t num_bytes() const { return num_bytes_; }
  void poison();
  void write(const Bytes& bytes);

  // A copy on the host, with the guards.
  class Image {
   public:
    std::span<const uint8_t> bytes() const;
    bool guards_intact() const;

   private:
    friend class GuardedBuffer;
    Bytes memory_;
  };
  Image read() const;

  // What one buffer takes of a window.
  static int64_t window_bytes(int64_t num_bytes) { return (num_bytes + 2 * kGuardBytes + 255) / 256 * 256; }

 private:
  static constexpr int64_t kGuardBytes = 64;
  struct Free {
    tern_exchange* window;
    RankDevice* device;
    void operator()(uint8_t* memory) const noexcept;
  };
  std::unique_ptr<uint8_t, Free> memory_{nullptr, Free{nullptr, nullptr}};
  int64_t num_bytes_ = 0;
};

class InputArray {
 public:
  // Copies `values` to the device, or to the window of an exchange, and returns where they lie: at the same address as long as `room`, in
  // elements, does not grow. Room beyond the values holds kPoison. NULL if there is no room.
  template <typename T>
  const T* load(RankDevice& device, const std::vector<T>& values, size_t room, tern_exchange* window = nullptr) {
    make_room(device, static_cast<int64_t>(room * sizeof(T)), window);
    return static_cast<const T*>(load_bytes(device, std::as_bytes(std::span<const T>(values))));
  }

 private:
  void make_room(RankDevice& device, int64_t num_bytes, tern_exchange* window);
  const void* load_bytes(RankDevice& device, std::span<const std::byte> bytes);

  DeviceMemory memory_;
  GuardedBuffer in_window_;
};

}  // namespace tern::conformance
