// SPDX-License-Identifier: Apache-2.0
// Short floating-point types for tests, from their definition: magnitudes are a table in the order of their bits, and a value is rounded by
// looking up its neighbours. Nothing is shared with the integer code that is tested.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <vector>

namespace tern::test {

class ShortType {
 public:
  // num_finite: how many magnitudes are finite; the next one in order stands for overflow.
  ShortType(int exponent_bits, int mantissa_bits, uint32_t num_finite, bool saturates)
      : sign_(1u << (exponent_bits + mantissa_bits)), nan_(sign_ - 1), saturates_(saturates) {
    const int bias = (1 << (exponent_bits - 1)) - 1;
    for (uint32_t bits = 0; bits <= num_finite; ++bits) {
      const uint32_t exponent = bits >> mantissa_bits;
      const uint32_t mantissa = bits & ((1u << mantissa_bits) - 1);
      const uint32_t significand = exponent == 0 ? mantissa : mantissa + (1u << mantissa_bits);
      magnitudes_.push_back(std::ldexp(significand, static_cast<int>(std::max(exponent, 1u)) - bias - mantissa_bits));
    }
  }

  uint32_t num_finite() const { return static_cast<uint32_t>(magnitudes_.size()) - 1; }
  uint32_t nan() const { return nan_; }

  float decode(uint32_t bits) const {
    const uint32_t magnitude = bits & (sign_ - 1);
    const double sign = (bits & sign_) != 0 ? -1 : 1;
    if (magnitude < num_finite()) return static_cast<float>(sign * magnitudes_[magnitude]);
    const bool is_inf = magnitude == num_finite() && !saturates_;
    return is_inf ? static_cast<float>(sign * INFINITY) : NAN;
  }

  // To nearest, ties to even.
  uint32_t encode(float value) const {
    if (std::isnan(value)) return nan_;
    const double x = std::fabs(static_cast<double>(value));
    const auto above = std::lower_bound(magnitudes_.begin(), magnitudes_.end(), x);
    auto bits = static_cast<uint32_t>(std::min(above, magnitudes_.end() - 1) - magnitudes_.begin());
    if (bits > 0 && x < magnitudes_[bits]) {
      const double down = x - magnitudes_[bits - 1];
      const double up = magnitudes_[bits] - x;
      if (down < up || (down == up && bits % 2 == 1)) --bits;
    }
    if (saturates_) bits = std::min(bits, num_finite() - 1);
    return (std::signbit(value) ? sign_ : 0) | bits;
  }

  // Every magnitude and every middle between two, with the floats next to them, of both signs, up to overflow and beyond.
  std::vector<float> boundaries() const {
    std::vector<float> result;
    const auto add = [&](double at) {
      const auto x = static_cast<float>(at);
      for (const float near : {std::nextafterf(x, -1e38f), x, std::nextafterf(x, 1e38f)}) result.insert(result.end(), {near, -near});
    };
    for (size_t i = 0; i + 1 < magnitudes_.size(); ++i) {
      add(magnitudes_[i]);
      add((magnitudes_[i] + magnitudes_[i + 1]) / 2);
    }
    for (const uint32_t bits : {0x7f7fffffu, 0x7f800000u, 0x7f800001u, 0x7fbfffffu, 0x7fc00000u, 0x7fffffffu, 1u, 0x007fffffu, 0x00800000u})
      result.insert(result.end(), {std::bit_cast<float>(bits), std::bit_cast<float>(bits | 0x80000000u)});
    return result;
  }

 private:
  uint32_t sign_, nan_;
  bool saturates_;
  std::vector<double> magnitudes_;
};

inline const ShortType kBf16(8, 7, 0x7f80, false);
inline const ShortType kF16(5, 10, 0x7c00, false);
inline const ShortType kE4m3(4, 3, 0x7f, true);

}  // namespace tern::test
