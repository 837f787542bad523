// SPDX-License-Identifier: Apache-2.0
// The 10-bit logarithmic encoding of a row (TERN_WIRE_LOG10BIT), by integer code, the same on every machine and on GPUs:
//
//   const LogScale scale = make_log_scale(most, least);                          // of a block of 128 channels
//   const uint32_t code = encode_log(scale, log_inverse(scale), bits_of(x));     // 10 bits
//   float y = std::bit_cast<float>(decode_log(scale, code));
//
// Exponent and mantissa bits of a float, read as one integer, are a logarithm of its magnitude: 2^23 to the octave, linear within each.
// A block keeps the largest of its magnitudes, `top`, and the `step` that divides the way from there to the smallest that is not zero, at most
// 16 octaves, into 510 equal parts. A code says how many steps below the top a magnitude lies, rounded to nearest, ties to the smaller
// magnitude:
//
//   code = sign << 9 | 511 - steps      0: zero, and what is below the last step      512, a negative zero: NaN
//
// Error: at most half a step, and half a step of R octaves is R / 1020 of the value: 1.6 % where a block spans 16 octaves or more, less where it
// spans less, and nothing for the largest magnitude. Magnitudes that are more than 16 octaves below the block's largest may become zero.
// So they do below 2^-126; a block whose largest is below 2^-110 is treated as if that were its largest.
// Infinities and NaNs do not count for a block's scale, and both come out as NaNs; zeros come out as +0.
//
// A block in memory, also a short one at the end of a row (kLogBlockBytes; blocks follow each other, a row is a multiple of 16 bytes):
//
//   | low [128]: codes' low 8 bits, a byte for each channel | high [32]: their upper 2 bits, channel 4 j + i at bit 2 i of byte j | LogScale |
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "base/numeric.h"

namespace tern {

inline constexpr int64_t kLogBlock = 128;   // channels
inline constexpr int64_t kLogHighAt = 128;  // offsets in a block
inline constexpr int64_t kLogScaleAt = 160;
inline constexpr int64_t kLogBlockBytes = 168;  // a multiple of 8; two blocks are one of 16

inline constexpr uint32_t kLogSteps = 510;
inline constexpr uint32_t kLogRange = 16u << 23;     // 16 octaves
inline constexpr uint32_t kLogLeastTop = 17u << 23;  // 2^-110: whatever lies within the range is a normal number
inline constexpr uint32_t kLogNaN = 512;

constexpr int64_t num_log_blocks(int64_t hidden) { return (hidden + kLogBlock - 1) / kLogBlock; }
constexpr int64_t log_row_bytes(int64_t hidden) { return (num_log_blocks(hidden) * kLogBlockBytes + 15) / 16 * 16; }

// Of the floats' magnitudes: their bits without the sign.
struct LogScale {
  uint32_t top;
  uint32_t step;  // 2 .. 263173
};
static_assert(kLogScaleAt + sizeof(LogScale) == kLogBlockBytes);

// `most`, `least`: the largest finite magnitude of a block (0 if there is none), and the smallest that is not zero (any larger number if
// there is none).
constexpr LogScale make_log_scale(uint32_t most, uint32_t least) {
  const uint32_t top = most > kLogLeastTop ? most : kLogLeastTop;
  const uint32_t lowest = least > top - kLogRange ? least : top - kLogRange;
  const uint32_t span = lowest < top ? top - lowest : 0;
  const uint32_t step = (span + kLogSteps - 1) / kLogSteps;
  return {top, step > 2 ? step : 2};
}

// For encode_log: of this number's upper product with n, what is left of n / step is right or one too large.
constexpr uint32_t log_inverse(LogScale scale) { return 0xffffffffu / scale.step + 1; }

// From the bits of a float to its code.
constexpr uint32_t encode_log(LogScale scale, uint32_t inverse, uint32_t bits) {
  const uint32_t magnitude = bits & ~kF32Sign;
  if (magnitude >= kF32Inf) return kLogNaN;
  const uint32_t furthest = (kLogSteps + 1) * scale.step;
  const uint32_t distance = scale.top - magnitude;
  const uint32_t rounded = (distance < furthest ? distance : furthest) + scale.step / 2;
  uint32_t steps = static_cast<uint32_t>(uint64_t{rounded} * inverse >> 32);
  steps -= steps * scale.step > rounded ? 1 : 0;
  const uint32_t code = kLogSteps + 1 - steps;
  return code == 0 ? 0 : code | (bits & kF32Sign) >> 22;
}

// From a code to the bits of a float.
constexpr uint32_t decode_log(LogScale scale, uint32_t code) {
  const uint32_t magnitude_code = code & (kLogNaN - 1);
  if (magnitude_code == 0) return code == 0 ? 0 : kF32NaN;
  return (scale.top - (kLogSteps + 1 - magnitude_code) * scale.step) | (code & kLogNaN) << 22;
}

// A whole block, of `num` channels. At the end of a row the bytes of channels that there are not are left alone; the upper bits of up to 4
// channels share a byte.
inline void encode_log_block(const float* values, int64_t num, uint8_t* block) {
  uint32_t most = 0, least = ~0u;
  for (int64_t i = 0; i < num; ++i) {
    const uint32_t magnitude = std::bit_cast<uint32_t>(values[i]) & ~kF32Sign;
    if (magnitude >= kF32Inf || magnitude == 0) continue;
    most = std::max(most, magnitude);
    least = std::min(least, magnitude);
  }
  const LogScale scale = make_log_scale(most, least);
  for (int64_t i = 0; i < num; ++i) {
    const uint32_t code = encode_log(scale, log_inverse(scale), std::bit_cast<uint32_t>(values[i]));
    block[i] = static_cast<uint8_t>(code);
    uint8_t& high = block[kLogHighAt + i / 4];
    high = static_cast<uint8_t>((i % 4 == 0 ? 0 : high) | code >> 8 << (2 * (i % 4)));
  }
  std::memcpy(block + kLogScaleAt, &scale, sizeof(scale));
}

inline void decode_log_block(const uint8_t* block, int64_t num, float* values) {
  LogScale scale;
  std::memcpy(&scale, block + kLogScaleAt, sizeof(scale));
  for (int64_t i = 0; i < num; ++i) {
    const uint32_t upper = block[kLogHighAt + i / 4] >> (2 * (i % 4)) & 3u;
    values[i] = std::bit_cast<float>(decode_log(scale, block[i] | upper << 8));
  }
}

}  // namespace tern
