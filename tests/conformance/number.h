// SPDX-License-Identifier: Apache-2.0
// The number formats, written out once more: conversions by integer code, one general routine for every small format, so
// that nothing is shared with the engines that are checked against it.
#pragma once

#include <tern/tern.h>

#include <cstddef>
#include <cstdint>
#include <span>

namespace tern::conformance {

int64_t element_bytes(tern_dtype dtype);

// Element `index` of an array of bf16, fp16, fp32 or fp8 e4m3 numbers, exactly.
float decode(tern_dtype dtype, const uint8_t* array, int64_t index);

// Rounds to nearest even; fp16 and bf16 overflow to infinity, fp8 e4m3 saturates to 448. A NaN stays a NaN (quiet).
void encode(tern_dtype dtype, float value, uint8_t* array, int64_t index);

// The same for whole rows, of as many elements as there are values.
void decode_row(tern_dtype dtype, std::span<const uint8_t> row, std::span<float> values);
void encode_row(tern_dtype dtype, std::span<const float> values, std::span<uint8_t> row);

// What is left of rows that travel as TERN_WIRE_LOG10BIT.
void round_to_log10bit(std::span<float> row);

uint32_t bits_of(float value);
float float_of(uint32_t bits);

}  // namespace tern::conformance
