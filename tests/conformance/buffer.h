// SPDX-License-Identifier: Apache-2.0
// Memory that an operation writes: filled with kPoison, with guards on both sides, in the process's own memory or in the
// exchange's window. Must be destroyed before the exchange. One thread at a time.
#pragma once

#include <tern/tern.h>

#include <cstdint>
#include <memory>
#include <span>

#include "conformance/oracle.h"

namespace tern::conformance {

class GuardedBuffer {
 public:
  GuardedBuffer() = default;
  // window: the exchange whose window it lies in, or NULL. Throws std::runtime_error if the window has no room.
  GuardedBuffer(int64_t num_bytes, tern_exchange* window);

  // NULL while there is no buffer.
  uint8_t* data() const { return memory_ == nullptr ? nullptr : memory_.get() + kGuardBytes; }
  std::span<const uint8_t> bytes() const { return {data(), static_cast<size_t>(num_bytes_)}; }
  void poison();
  bool guards_intact() const;

  // What one buffer takes of a window.
  static int64_t window_bytes(int64_t num_bytes) { return (num_bytes + 2 * kGuardBytes + 255) / 256 * 256; }

 private:
  static constexpr int64_t kGuardBytes = 64;
  struct Free {
    tern_exchange* window;
    void operator()(uint8_t* memory) const noexcept;
  };
  std::unique_ptr<uint8_t, Free> memory_{nullptr, Free{nullptr}};
  int64_t num_bytes_ = 0;
};

}  // namespace tern::conformance
