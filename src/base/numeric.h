// SPDX-License-Identifier: Apache-2.0
// Conversions between float and the short types that rows are made of, by integer code, the same on every machine:
//
//   uint16_t bits = f32_to_bf16(x);       // rounds to nearest, ties to even
//   float y = bf16_to_f32(bits);          // exact
//
// All are constexpr. To a short type, every NaN becomes one NaN, the one that GPUs make too (bf16 and fp16 0x7fff, e4m3 0x7f).
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

namespace tern {

constexpr uint32_t kF32Sign = 0x80000000;
constexpr uint32_t kF32Inf = 0x7f800000;  // magnitudes above it are NaNs
constexpr uint32_t kF32NaN = 0x7fffffff;
constexpr uint16_t kBf16NaN = 0x7fff;
constexpr uint16_t kF16NaN = 0x7fff;
constexpr uint8_t kE4m3NaN = 0x7f;
constexpr float kE4m3Max = 448.0f;

// How a type with fewer exponent and mantissa bits lies in a float. A magnitude shifted left by `shift` has its fields where a float has
// them, only its exponent is too small by `bias`. Adding `magic` to a subnormal leaves it, rounded, in the sum's low bits.
struct ShortFloat {
  int shift;
  uint32_t bias;        // difference of the exponents' biases, as bits of a float
  uint32_t min_normal;  // the smallest normal number, as bits of a float
  uint32_t magic;       // the power of two whose unit in the last place is the smallest subnormal, as bits of a float
};
constexpr ShortFloat kF16Format = {13, (127 - 15) << 23, (127 - 14) << 23, (127 - 24 + 23) << 23};
constexpr ShortFloat kE4m3Format = {20, (127 - 7) << 23, (127 - 6) << 23, (127 - 9 + 23) << 23};
constexpr uint32_t kF16Overflow = (127 + 16) << 23;  // 2^16 as bits of a float: rounds to the bits of infinity
constexpr uint32_t kE4m3Saturation = std::bit_cast<uint32_t>(kE4m3Max);

// From the bits of a float's magnitude, not above the format's range, to the short magnitude.
constexpr uint32_t round_to_short(ShortFloat format, uint32_t magnitude) {
  if (magnitude < format.min_normal)
    return std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + std::bit_cast<float>(format.magic)) - format.magic;
  const uint32_t half = (1u << (format.shift - 1)) - 1 + ((magnitude >> format.shift) & 1);
  return (magnitude - format.bias + half) >> format.shift;
}

// From a finite short magnitude to the float's.
constexpr uint32_t widen_short(ShortFloat format, uint32_t short_magnitude) {
  const uint32_t shifted = short_magnitude << format.shift;
  if (shifted >= 1u << 23) return shifted + format.bias;
  return std::bit_cast<uint32_t>(std::bit_cast<float>(shifted | format.min_normal) - std::bit_cast<float>(format.min_normal));
}

constexpr float bf16_to_f32(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

constexpr uint16_t f32_to_bf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & ~kF32Sign) > kF32Inf) return kBf16NaN;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

constexpr float f16_to_f32(uint16_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16;
  const uint32_t magnitude = bits & 0x7fffu;
  if (magnitude >= 0x7c00) return std::bit_cast<float>(sign | kF32Inf | magnitude << kF16Format.shift);
  return std::bit_cast<float>(sign | widen_short(kF16Format, magnitude));
}

// What is too large becomes infinity.
constexpr uint16_t f32_to_f16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t magnitude = bits & ~kF32Sign;
  if (magnitude > kF32Inf) return kF16NaN;
  return static_cast<uint16_t>((bits & kF32Sign) >> 16 | round_to_short(kF16Format, std::min(magnitude, kF16Overflow)));
}

constexpr float e4m3_to_f32(uint8_t bits) {
  const uint32_t sign = (bits & 0x80u) << 24;
  const uint32_t magnitude = bits & 0x7fu;
  return std::bit_cast<float>(sign | (magnitude == kE4m3NaN ? kF32NaN : widen_short(kE4m3Format, magnitude)));
}

// What is too large, infinity included, becomes 448 of its sign.
constexpr uint8_t f32_to_e4m3(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t magnitude = bits & ~kF32Sign;
  if (magnitude > kF32Inf) return kE4m3NaN;
  return static_cast<uint8_t>((bits & kF32Sign) >> 24 | round_to_short(kE4m3Format, std::min(magnitude, kE4m3Saturation)));
}

// The biased exponent (a byte, UE8M0) of the smallest power of two that is not less than `value`: a positive normal number, or
// infinity, which gives 255.
constexpr uint32_t round_up_to_ue8m0(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return (bits >> 23) + ((bits & 0x007fffff) != 0 ? 1 : 0);
}

}  // namespace tern
