// SPDX-License-Identifier: Apache-2.0
// The number formats of rows, written for checking: by their definition and not by speed, and independent of the
// library's own code.
//
//   const uint16_t bits = to_bf16(1.5f);
//   cast_row_to_fp8(row, TERN_ENCODING_FP8_F32, values, scales);
#pragma once

#include <tern/tern.h>

#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>

namespace tern::tools {

inline float from_bf16(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

// Rounds to nearest even. For finite values.
inline uint16_t to_bf16(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

float from_fp16(uint16_t bits);
uint16_t to_fp16(float value);     // to nearest even, beyond 65504 to infinity
uint8_t to_fp8_e4m3(float value);  // to nearest even, saturated to 448

// The values of a row of bf16, fp16 or fp32.
void load_elements(const std::byte* row, tern_dtype dtype, std::span<float> values);

// Rounds a row of sums to `dtype`.
void store_elements(std::span<const float> values, tern_dtype dtype, std::byte* row);

// Casts a bf16 row as the encoding of tern.h says. `values` is [row.size()], `scales` as many bytes as arrive.
void cast_row_to_fp8(std::span<const uint16_t> row, tern_encoding encoding, std::span<std::byte> values, std::span<std::byte> scales);

}  // namespace tern::tools
