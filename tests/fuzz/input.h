// SPDX-License-Identifier: Apache-2.0
// The bytes that a fuzzer gives, as the choices of a test:
//
//   Input input(data, size);
//   options.hidden = input.number(16, 64);        // usually in the range; in a wild call sometimes anything
//
// An input that is used up gives zeros, and zeros mean the first, valid choice everywhere.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>

namespace tern::fuzz {

class Input {
 public:
  Input(const uint8_t* data, size_t size_bytes) : data_(data), end_(data + size_bytes) {}

  bool used_up() const { return data_ == end_; }
  uint8_t byte() { return used_up() ? uint8_t{0} : *data_++; }
  uint64_t word() {
    uint64_t result = 0;
    for (int i = 0; i < 8; ++i) result = result << 8 | byte();
    return result;
  }

  // Half of the calls are tame: all their arguments are in range.
  void start_call() { wild_ = byte() % 2 != 0; }
  bool is_wild() const { return wild_; }

  // True for one byte value in n.
  bool one_in(int n) { return byte() % n == n - 1; }
  // The same, in a wild call only.
  bool odd_one_in(int n) { return wild_ && one_in(n); }

  int64_t in_range(int64_t low, int64_t high) { return low + byte() % (high - low + 1); }

  // Usually in [low, high]; in a wild call sometimes a number at the edges of what integers can hold, or any.
  int64_t number(int64_t low, int64_t high) {
    if (!odd_one_in(8)) return in_range(low, high);
    switch (byte() % 10) {
      case 0: return 0;
      case 1: return -1;
      case 2: return std::numeric_limits<int64_t>::max();
      case 3: return std::numeric_limits<int64_t>::min();
      case 4: return std::numeric_limits<int32_t>::max();
      case 5: return std::numeric_limits<int32_t>::min();
      case 6: return int64_t{1} << byte() % 63;
      case 7: return high + 1;
      case 8: return byte();
      default: return static_cast<int64_t>(word());
    }
  }
  // A number from the range times `unit`; what leaves the integers comes back at their other end.
  int64_t multiple(int64_t low, int64_t high, uint64_t unit) {
    return static_cast<int64_t>(static_cast<uint64_t>(number(low, high)) * unit);
  }
  int32_t small_number(int32_t low, int32_t high) { return static_cast<int32_t>(number(low, high)); }

  // One of the first `count` values of an enum, in a wild call sometimes a number that is none.
  template <typename Enum>
  Enum value_of(int count) {
    return static_cast<Enum>(odd_one_in(8) ? static_cast<int32_t>(word()) : static_cast<int32_t>(in_range(0, count - 1)));
  }

 private:
  const uint8_t* data_;
  const uint8_t* end_;
  bool wild_ = false;
};

}  // namespace tern::fuzz
