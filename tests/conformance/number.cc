// SPDX-License-Identifier: Apache-2.0
#include "conformance/number.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

namespace tern::conformance {
namespace {

// A binary format of at most 16 bits. Values above `largest` become `overflow`.
struct SmallFormat {
  int exponent_bits, mantissa_bits;
  uint32_t largest, overflow, nan;
  int min_exponent() const { return 2 - (1 << (exponent_bits - 1)); }  // of the smallest normal number, and of the subnormals
  int sign_shift() const { return exponent_bits + mantissa_bits; }
  int num_bytes() const { return (sign_shift() + 1) / 8; }
};

constexpr SmallFormat kBf16 = {8, 7, 0x7F7F, 0x7F80, 0x7FC0};
constexpr SmallFormat kFp16 = {5, 10, 0x7BFF, 0x7C00, 0x7E00};
constexpr SmallFormat kE4m3 = {4, 3, 0x7E, 0x7E, 0x7F};

uint32_t encode_small(const SmallFormat& format, float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = (bits >> 31) << format.sign_shift();
  const uint32_t exponent_field = (bits >> 23) & 0xFF, fraction = bits & 0x7FFFFF;
  if (exponent_field == 0xFF) return sign | (fraction != 0 ? format.nan : format.overflow);
  // value = significand * 2^(exponent - 23)
  const uint64_t significand = exponent_field == 0 ? fraction : fraction | 0x800000;
  const int exponent = exponent_field == 0 ? -126 : static_cast<int>(exponent_field) - 127;
  // The result is a whole number of 2^(kept_exponent - mantissa_bits).
  const int kept_exponent = exponent < format.min_exponent() ? format.min_exponent() : exponent;
  const int shift = kept_exponent - format.mantissa_bits - (exponent - 23);
  uint64_t rounded = 0;
  if (shift < 40) {
    const uint64_t half = uint64_t{1} << (shift - 1), remainder = significand & (2 * half - 1);
    rounded = significand >> shift;
    if (remainder > half || (remainder == half && (rounded & 1) != 0)) rounded += 1;
  }
  // A carry out of the mantissa runs into the exponent, which is what it should do.
  const uint32_t code =
      (static_cast<uint32_t>(kept_exponent - format.min_exponent()) << format.mantissa_bits) + static_cast<uint32_t>(rounded);
  return sign | (code > format.largest ? format.overflow : code);
}

float decode_small(const SmallFormat& format, uint32_t code) {
  const uint32_t magnitude = code & ((1u << format.sign_shift()) - 1);
  const float sign = (code >> format.sign_shift()) != 0 ? -1.0f : 1.0f;
  if (magnitude > format.largest) return magnitude == format.overflow ? sign * INFINITY : NAN;
  const uint32_t exponent_field = magnitude >> format.mantissa_bits, fraction = magnitude & ((1u << format.mantissa_bits) - 1);
  const uint32_t significand = exponent_field == 0 ? fraction : fraction | (1u << format.mantissa_bits);
  const int exponent = format.min_exponent() + (exponent_field == 0 ? 0 : static_cast<int>(exponent_field) - 1);
  return sign * std::ldexp(static_cast<float>(significand), exponent - format.mantissa_bits);
}

SmallFormat small_format(tern_dtype dtype) {
  switch (dtype) {
    case TERN_DTYPE_BF16: return kBf16;
    case TERN_DTYPE_FP16: return kFp16;
    case TERN_DTYPE_FP8_E4M3: return kE4m3;
    default: throw std::logic_error("conformance: not a small number format");
  }
}

}  // namespace

void round_to_log10bit(std::span<float> row) {
  constexpr int64_t kOctave = 1 << 23, kInfinity = 255 * kOctave;
  const auto magnitude_of = [](float value) { return int64_t{bits_of(value) & 0x7FFFFFFF}; };
  for (size_t first = 0; first < row.size(); first += 128) {
    const size_t end = std::min(first + 128, row.size());
    int64_t top = 17 * kOctave, least = kInfinity;
    for (size_t i = first; i < end; ++i) {
      const int64_t magnitude = magnitude_of(row[i]);
      if (magnitude == 0 || magnitude >= kInfinity) continue;
      top = std::max(top, magnitude);
      least = std::min(least, magnitude);
    }
    const int64_t lowest = std::min(top, std::max(least, top - 16 * kOctave));
    const int64_t step = std::max<int64_t>(2, (top - lowest + 509) / 510);
    for (size_t i = first; i < end; ++i) {
      const int64_t magnitude = magnitude_of(row[i]);
      const int64_t steps = (top - magnitude + step / 2) / step;
      if (magnitude >= kInfinity)
        row[i] = NAN;
      else if (steps > 510)
        row[i] = 0.0f;
      else
        row[i] = std::copysign(float_of(static_cast<uint32_t>(top - steps * step)), row[i]);
    }
  }
}

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

int64_t element_bytes(tern_dtype dtype) {
  switch (dtype) {
    case TERN_DTYPE_BF16:
    case TERN_DTYPE_FP16: return 2;
    case TERN_DTYPE_FP32: return 4;
    case TERN_DTYPE_FP8_E4M3:
    case TERN_DTYPE_BYTES: return 1;
  }
  throw std::logic_error("conformance: not a dtype");
}

float decode(tern_dtype dtype, const uint8_t* array, int64_t index) {
  float value;
  const int64_t size = element_bytes(dtype);
  decode_row(dtype, {array + index * size, static_cast<size_t>(size)}, {&value, 1});
  return value;
}

void encode(tern_dtype dtype, float value, uint8_t* array, int64_t index) {
  const int64_t size = element_bytes(dtype);
  encode_row(dtype, {&value, 1}, {array + index * size, static_cast<size_t>(size)});
}

void decode_row(tern_dtype dtype, std::span<const uint8_t> row, std::span<float> values) {
  if (row.size() != values.size() * static_cast<size_t>(element_bytes(dtype)))
    throw std::logic_error("conformance: not a row of such values");
  if (dtype == TERN_DTYPE_FP32) {
    std::memcpy(values.data(), row.data(), row.size());
    return;
  }
  const SmallFormat format = small_format(dtype);
  for (size_t i = 0; i < values.size(); ++i) {
    uint16_t code;
    if (format.num_bytes() == 2)
      std::memcpy(&code, row.data() + 2 * i, sizeof code);
    else
      code = row[i];
    values[i] = dtype == TERN_DTYPE_BF16 ? float_of(static_cast<uint32_t>(code) << 16) : decode_small(format, code);
  }
}

void encode_row(tern_dtype dtype, std::span<const float> values, std::span<uint8_t> row) {
  if (row.size() != values.size() * static_cast<size_t>(element_bytes(dtype)))
    throw std::logic_error("conformance: not a row of such values");
  if (dtype == TERN_DTYPE_FP32) {
    std::memcpy(row.data(), values.data(), row.size());
    return;
  }
  const SmallFormat format = small_format(dtype);
  for (size_t i = 0; i < values.size(); ++i) {
    const auto code = static_cast<uint16_t>(encode_small(format, values[i]));
    if (format.num_bytes() == 2)
      std::memcpy(row.data() + 2 * i, &code, sizeof code);
    else
      row[i] = static_cast<uint8_t>(code);
  }
}

}  // namespace tern::conformance
