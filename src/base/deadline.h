// SPDX-License-Identifier: Apache-2.0
// A point in time after which a wait gives up.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <limits>

namespace tern {

class Deadline {
 public:
  using Clock = std::chrono::steady_clock;

  // At most 24 days: longer ones ("never") would overflow the clock, and remaining_ms().
  static Deadline in_ms(int64_t timeout_ms) {
    constexpr int64_t kMostMs = std::numeric_limits<int32_t>::max();
    return Deadline(Clock::now() + std::chrono::milliseconds(std::min(timeout_ms, kMostMs)));
  }

  bool passed() const { return Clock::now() >= at_; }
  // Never negative.
  std::chrono::nanoseconds remaining() const { return std::max(std::chrono::nanoseconds(0), std::chrono::nanoseconds(at_ - Clock::now())); }
  int remaining_ms() const { return static_cast<int>(std::chrono::ceil<std::chrono::milliseconds>(remaining()).count()); }
  Clock::time_point time() const { return at_; }

 private:
  explicit Deadline(Clock::time_point at) : at_(at) {}
  Clock::time_point at_;
};

}  // namespace tern
