// SPDX-License-Identifier: Apache-2.0
// What each rank puts into an exchange, recomputed from the case wherever it is needed: pure functions, any thread.
// `batch` tells the uses of one plan apart: the same routing, other data.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "conformance/case.h"

namespace tern::conformance {

struct RankRouting {
  int64_t num_tokens = 0;
  std::vector<int64_t> topk_idx;           // [num_tokens, num_topk]
  std::vector<uint8_t> token_in_rank;      // [num_tokens, num_ranks], instead
  std::vector<int32_t> tokens_per_expert;  // [num_experts], with token_in_rank
};

RankRouting make_routing(const Case& c, int32_t rank);

// The row of one token, and its opaque scales.
void make_token(const Case& c, int batch, int32_t rank, int64_t token, std::span<uint8_t> row);
void make_scales(const Case& c, int batch, int32_t rank, int64_t token, std::span<uint8_t> scales);

enum class WeightUse { kDispatch, kOwner, kRow };
// Weight `index` of a rank: of its tokens [num_tokens, num_topk], or of the rows that it hands back.
float make_weight(const Case& c, int batch, int32_t rank, WeightUse use, int64_t index);

// What the experts of `rank` leave in row `row` of the rows given to combine, and the biases of a token.
void make_result(const Case& c, int batch, int32_t rank, int64_t row, std::span<uint8_t> bytes);
void make_bias(const Case& c, int batch, int32_t rank, int bias, int64_t token, std::span<uint8_t> bytes);

}  // namespace tern::conformance
