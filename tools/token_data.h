// SPDX-License-Identifier: Apache-2.0
// What the rows hold while the library is measured and checked: bits that follow from (seed, stream, rank, token), so
// that whoever receives a row can tell whether every byte of it is right without asking the sender.
//
//   fill_row(RowKey{.seed = 1, .stream = kTokenStream, .rank = 0, .token = 7}, TERN_DTYPE_BF16, row);
#pragma once

#include <tern/tern.h>

#include <cstddef>
#include <cstdint>
#include <span>

namespace tern::tools {

enum RowStream : uint64_t { kTokenStream, kScaleStream, kExpertStream, kWeightStream };

struct RowKey {
  uint64_t seed = 0;
  RowStream stream = kTokenStream;
  int32_t rank = 0;   // that owns the token
  int64_t token = 0;  // on that rank
  int32_t slot = 0;   // tells several rows of one token apart
};

// Numbers of magnitude 0.5 to 2 with random signs (bf16, fp16, fp32), any numbers but NaN (fp8), any bytes (bytes).
void fill_row(const RowKey& key, tern_dtype dtype, std::span<std::byte> row);

// The weight of entry k = key.slot, in [0, 1).
float entry_weight(const RowKey& key);

// Position of the first byte in which the two differ, -1 if they are equal.
int64_t first_difference(std::span<const std::byte> expected, std::span<const std::byte> found);

}  // namespace tern::tools
