// SPDX-License-Identifier: Apache-2.0
#include "tools/numbers.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "tools/row_format.h"

namespace tern::tools {
namespace {

// The code of a finite value >= 0 in a format with `mantissa_bits` and `exponent_bias`. Relies on the default rounding
// mode, to nearest even; a mantissa that rounds up to the next power of two carries into the exponent by itself.
int magnitude_code(float value, int mantissa_bits, int exponent_bias) {
  const int least_exponent = 1 - exponent_bias;
  const int exponent = value == 0 ? least_exponent : std::max(std::ilogb(value), least_exponent);
  const int quotient = static_cast<int>(std::nearbyint(std::ldexp(value, mantissa_bits - exponent)));
  return ((exponent - least_exponent) << mantissa_bits) + quotient;
}

// The converter is a template parameter so that the loop is compiled around it.
template <typename Convert>
void load_16_bit(const std::byte* row, std::span<float> values, Convert convert) {
  for (size_t i = 0; i < values.size(); ++i) {
    uint16_t bits = 0;
    std::memcpy(&bits, row + i * sizeof bits, sizeof bits);
    values[i] = convert(bits);
  }
}

template <typename Convert>
void store_16_bit(std::span<const float> values, std::byte* row, Convert convert) {
  for (size_t i = 0; i < values.size(); ++i) {
    const uint16_t bits = convert(values[i]);
    std::memcpy(row + i * sizeof bits, &bits, sizeof bits);
  }
}

struct BlockScale {
  float stored = 0;      // what arrives as the scale
  float multiplier = 0;  // FP8_F32: x * multiplier; otherwise unused
};

BlockScale block_scale(float amax, tern_encoding encoding) {
  const float scale = amax * (1.0f / 448.0f);
  if (encoding == TERN_ENCODING_FP8_F32) return {scale, 448.0f / amax};
  int exponent = 0;
  const float mantissa = std::frexp(scale, &exponent);  // scale = mantissa * 2^exponent, mantissa in [0.5, 1)
  return {std::ldexp(1.0f, mantissa == 0.5f ? exponent - 1 : exponent), 0};
}

}  // namespace

float from_fp16(uint16_t bits) {
  const int exponent = bits >> 10 & 0x1F, mantissa = bits & 0x3FF;
  float value = 0;
  if (exponent == 0x1F)
    value = mantissa == 0 ? INFINITY : NAN;
  else
    value = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24) : std::ldexp(static_cast<float>(mantissa + 0x400), exponent - 25);
  return (bits & 0x8000) != 0 ? -value : value;
}

uint16_t to_fp16(float value) {
  const int sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return static_cast<uint16_t>(sign | 0x7E00);
  const float magnitude = std::min(std::fabs(value), 65536.0f);
  return static_cast<uint16_t>(sign | std::min(magnitude_code(magnitude, 10, 15), 0x7C00));
}

uint8_t to_fp8_e4m3(float value) {
  const int sign = std::signbit(value) ? 0x80 : 0;
  if (std::isnan(value)) return static_cast<uint8_t>(sign | 0x7F);
  return static_cast<uint8_t>(sign | magnitude_code(std::min(std::fabs(value), 448.0f), 3, 7));
}

void load_elements(const std::byte* row, tern_dtype dtype, std::span<float> values) {
  if (dtype == TERN_DTYPE_FP32) {
    std::memcpy(values.data(), row, values.size_bytes());
  } else if (dtype == TERN_DTYPE_BF16) {
    load_16_bit(row, values, [](uint16_t bits) { return from_bf16(bits); });
  } else {
    load_16_bit(row, values, [](uint16_t bits) { return from_fp16(bits); });
  }
}

void store_elements(std::span<const float> values, tern_dtype dtype, std::byte* row) {
  if (dtype == TERN_DTYPE_FP32) {
    std::memcpy(row, values.data(), values.size_bytes());
  } else if (dtype == TERN_DTYPE_BF16) {
    store_16_bit(values, row, [](float value) { return to_bf16(value); });
  } else {
    store_16_bit(values, row, [](float value) { return to_fp16(value); });
  }
}

void cast_row_to_fp8(std::span<const uint16_t> row, tern_encoding encoding, std::span<std::byte> values, std::span<std::byte> scales) {
  std::ranges::fill(scales, std::byte{0});
  for (size_t first = 0; first < row.size(); first += kScaleBlock) {
    const auto block = row.subspan(first, std::min<size_t>(kScaleBlock, row.size() - first));
    float amax = 1e-4f;
    for (const uint16_t bits : block) amax = std::max(amax, std::fabs(from_bf16(bits)));
    const BlockScale scale = block_scale(amax, encoding);
    for (size_t i = 0; i < block.size(); ++i) {
      const float value = from_bf16(block[i]);
      values[first + i] = std::byte{to_fp8_e4m3(encoding == TERN_ENCODING_FP8_F32 ? value * scale.multiplier : value / scale.stored)};
    }
    const size_t block_idx = first / kScaleBlock;
    if (encoding == TERN_ENCODING_FP8_UE8M0)
      scales[block_idx] = static_cast<std::byte>(std::ilogb(scale.stored) + 127);
    else
      std::memcpy(scales.data() + block_idx * sizeof(float), &scale.stored, sizeof(float));
  }
}

}  // namespace tern::tools
