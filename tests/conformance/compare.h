// SPDX-License-Identifier: Apache-2.0
// Comparing what was found with what the oracle says, as text for people.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include <tern/tern.h>

namespace tern::conformance {

// "" if equal, else where the first difference is, what stands there and how many bytes differ.
std::string compare_bytes(std::span<const uint8_t> found, std::span<const uint8_t> expected, int64_t row_bytes);

// The same for numbers: any NaN equals any other, all else must have equal bits.
std::string compare_numbers(tern_dtype dtype, std::span<const uint8_t> found, std::span<const uint8_t> expected, int64_t row_elements);

}  // namespace tern::conformance
