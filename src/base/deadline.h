// SPDX-License-Identifier: Apache-2.0
// A point in time after which a wait gives up.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <limits>

namespace tern {

// 24 days: longer timeouts ("never") would overflow the clock, remaining_ms(), and sums of them.
inline int64_t bounded_timeout_ms(int64_t timeout_ms) { return std::min<int64_t>(timeout_ms, std::numeric_limits<int32_t>::max()); }

class Deadline {
 public:
  using Clock = std::chrono::steady_clock;

  static Deadline in_ms(int64_t timeout_ms) { return Deadline(Clock::now() + std::chrono::milliseconds(bounded_timeout_ms(timeout_ms))); }

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
