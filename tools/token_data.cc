// SPDX-License-Identifier: Apache-2.0
#include "tools/token_data.h"

#include <algorithm>
#include <cstring>

#include "routing/random.h"

namespace tern::tools {
namespace {

// Random bits are masked and the rest set, so that every element is a number: the top exponent bits are fixed.
struct Pattern {
  uint64_t random_bits = 0;
  uint64_t fixed_bits = 0;
};

Pattern pattern_of(tern_dtype dtype) {
  switch (dtype) {
    case TERN_DTYPE_BF16: return {0x80FF80FF80FF80FFu, 0x3F003F003F003F00u};
    case TERN_DTYPE_FP16: return {0x87FF87FF87FF87FFu, 0x3800380038003800u};
    case TERN_DTYPE_FP32: return {0x80FFFFFF80FFFFFFu, 0x3F0000003F000000u};
    case TERN_DTYPE_FP8_E4M3: return {0xBFBFBFBFBFBFBFBFu, 0};
    case TERN_DTYPE_BYTES: break;
  }
  return {~uint64_t{0}, 0};
}

uint64_t number_of(const RowKey& key) { return key_of(key.seed, key.stream, key.rank, key.token, key.slot); }

}  // namespace

void fill_row(const RowKey& key, tern_dtype dtype, std::span<std::byte> row) {
  const Pattern pattern = pattern_of(dtype);
  Random random(number_of(key));
  for (size_t at = 0; at < row.size(); at += sizeof(uint64_t)) {
    const uint64_t word = (random.next() & pattern.random_bits) | pattern.fixed_bits;
    std::memcpy(row.data() + at, &word, std::min(sizeof word, row.size() - at));
  }
}

float entry_weight(const RowKey& key) { return static_cast<float>(number_of(key) >> 40) * 0x1p-24f; }

int64_t first_difference(std::span<const std::byte> expected, std::span<const std::byte> found) {
  if (expected.empty() || std::memcmp(expected.data(), found.data(), expected.size()) == 0) return -1;
  return std::ranges::mismatch(expected, found).in1 - expected.begin();
}

}  // namespace tern::tools
