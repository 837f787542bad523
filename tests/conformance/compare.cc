// SPDX-License-Identifier: Apache-2.0
#include "conformance/compare.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "conformance/number.h"

namespace tern::conformance {
namespace {

std::string hex(std::span<const uint8_t> bytes) {
  std::string text;
  for (const uint8_t byte : bytes) text += fmt::format("{:02x}", byte);
  return text;
}

}  // namespace

std::string compare_bytes(std::span<const uint8_t> found, std::span<const uint8_t> expected, int64_t row_bytes) {
  if (found.size() != expected.size()) return fmt::format("{} bytes, expected {}", found.size(), expected.size());
  if (found.empty() || std::memcmp(found.data(), expected.data(), found.size()) == 0) return "";
  const auto at = static_cast<size_t>(std::mismatch(found.begin(), found.end(), expected.begin()).first - found.begin());
  size_t num_different = 0;
  for (size_t i = 0; i < found.size(); ++i) num_different += found[i] != expected[i] ? 1 : 0;
  const size_t shown = std::min<size_t>(8, found.size() - at), row = static_cast<size_t>(std::max<int64_t>(row_bytes, 1));
  return fmt::format("{} of {} bytes differ, first in row {} at byte {}: found {}, expected {}", num_different, found.size(), at / row,
                     at % row, hex(found.subspan(at, shown)), hex(expected.subspan(at, shown)));
}

std::string compare_numbers(tern_dtype dtype, std::span<const uint8_t> found, std::span<const uint8_t> expected, int64_t row_elements) {
  if (found.size() != expected.size()) return fmt::format("{} bytes, expected {}", found.size(), expected.size());
  const int64_t size = element_bytes(dtype), num_elements = static_cast<int64_t>(found.size()) / size;
  constexpr int64_t kBlock = 64;  // most are equal to the bit, which is told fastest of many elements at once
  const auto equal = [&](int64_t element, int64_t count) {
    return std::memcmp(found.data() + element * size, expected.data() + element * size, static_cast<size_t>(count * size)) == 0;
  };
  int64_t num_different = 0, first = -1;
  for (int64_t i = 0; i < num_elements; ++i) {
    if (i % kBlock == 0 && equal(i, std::min(kBlock, num_elements - i))) {
      i += kBlock - 1;
      continue;
    }
    if (equal(i, 1)) continue;
    if (std::isnan(decode(dtype, found.data(), i)) && std::isnan(decode(dtype, expected.data(), i))) continue;
    if (num_different++ == 0) first = i;
  }
  if (num_different == 0) return "";
  const auto at = static_cast<size_t>(first * size), width = static_cast<size_t>(size);
  return fmt::format("{} of {} elements differ, first in row {} at element {}: found {} ({}), expected {} ({})", num_different,
                     num_elements, first / std::max<int64_t>(row_elements, 1), first % std::max<int64_t>(row_elements, 1),
                     decode(dtype, found.data(), first), hex(found.subspan(at, width)), decode(dtype, expected.data(), first),
                     hex(expected.subspan(at, width)));
}

}  // namespace tern::conformance
