// SPDX-License-Identifier: Apache-2.0
#include "conformance/inputs.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "conformance/number.h"
#include "conformance/random.h"

namespace tern::conformance {
namespace {

enum Stream : uint64_t { kTopk = 1, kRankMask, kExpertCounts, kToken, kScales, kWeight, kResult, kBias };

// A float with a magnitude of about 2^-spread to 2^spread.
float ordinary_value(uint64_t word, uint32_t spread) {
  const uint32_t exponent = 127 - spread + static_cast<uint32_t>(word >> 32) % (2 * spread);
  return float_of((static_cast<uint32_t>(word) & 0x807FFFFF) | (exponent << 23));
}

constexpr float kSpecials[] = {0.0f,    -0.0f,  INFINITY, -INFINITY, NAN,     3.38e38f, -3.38e38f, 1e-40f,
                               -1e-40f, 1e-45f, 65504.0f, 65520.0f,  6.1e-5f, 6e-8f,    448.0f,    464.0f};

// One row in 8 gets some words with all bits set, by which receivers of small batches tell what nobody has written yet.
void set_all_bits(const Draw& draw, std::span<uint8_t> row) {
  constexpr size_t kWord = 4;
  if (!draw.one_in(-2, 8)) return;
  for (size_t i = 0; i + kWord <= row.size(); i += kWord)
    if (draw.one_in(-3 - static_cast<int64_t>(i), 64)) std::memset(row.data() + i, 0xff, kWord);
}

// Mostly numbers like those of a network; one row in 16 has some that make trouble.
void fill_numbers(tern_dtype dtype, const Draw& draw, std::span<uint8_t> row) {
  std::vector<float> values(row.size() / static_cast<size_t>(element_bytes(dtype)));
  const bool specials = draw.one_in(-1, 16);
  for (size_t i = 0; i < values.size(); ++i) {
    const uint64_t word = draw.word(static_cast<int64_t>(i));
    const bool special = specials && (word >> 56) % 32 == 0;
    values[i] = special ? kSpecials[(word >> 40) % std::size(kSpecials)] : ordinary_value(word, 8);
  }
  encode_row(dtype, values, row);
  if (specials) set_all_bits(draw, row);
}

// Finite numbers, in blocks of 128 that differ much in magnitude; some blocks are zero or below the smallest scale.
void fill_castable(tern_dtype dtype, const Draw& draw, std::span<uint8_t> row) {
  std::vector<float> values(row.size() / static_cast<size_t>(element_bytes(dtype)));
  for (size_t i = 0; i < values.size(); ++i) {
    const auto position = static_cast<int64_t>(i);
    const int64_t kind = draw.below(-1 - position / 128, 8);
    const float magnitude = kind == 0 ? 0.0f : kind == 1 ? 1e-6f : kind == 2 ? 100.0f : 1.0f;
    values[i] = magnitude * ordinary_value(draw.word(position), 8);
  }
  encode_row(dtype, values, row);
}

void fill_bytes(const Draw& draw, std::span<uint8_t> bytes) {
  for (size_t i = 0; i < bytes.size(); i += 8) {
    const uint64_t word = draw.word(static_cast<int64_t>(i));
    std::memcpy(bytes.data() + i, &word, std::min<size_t>(8, bytes.size() - i));
  }
  set_all_bits(draw, bytes);
}

// Chooses num_topk distinct experts of `allowed`, earlier ones more often with `zipf`.
std::vector<int64_t> choose_distinct(const Draw& draw, std::vector<int64_t> allowed, int32_t num_topk, bool zipf) {
  std::vector<int64_t> chosen;
  for (int32_t k = 0; k < num_topk; ++k) {
    if (allowed.empty()) {
      chosen.push_back(-1);
      continue;
    }
    const auto left = static_cast<int64_t>(allowed.size());
    const double uniform = static_cast<double>(draw.word(k) >> 11) * 0x1p-53;
    // Drawing left^u - 1 gives position i with probability about 1 / (i + 1).
    const int64_t drawn = zipf ? static_cast<int64_t>(std::pow(static_cast<double>(left), uniform)) - 1 : draw.below(k, left);
    const int64_t position = std::clamp<int64_t>(drawn, 0, left - 1);
    chosen.push_back(allowed[static_cast<size_t>(position)]);
    allowed.erase(allowed.begin() + position);
  }
  return chosen;
}

std::vector<int64_t> range(int64_t first, int64_t count) {
  std::vector<int64_t> result(static_cast<size_t>(count));
  std::iota(result.begin(), result.end(), first);
  return result;
}

// Experts of 4 of 8 groups (of all experts where there are fewer than 8).
std::vector<int64_t> experts_of_half(const Case& c, const Draw& draw) {
  if (c.num_experts() % 8 != 0) return range(0, c.num_experts());
  const int64_t group_size = c.num_experts() / 8;
  std::vector<int64_t> result;
  for (const int64_t group : choose_distinct(draw, range(0, 8), 4, false))
    for (int64_t e = 0; e < group_size; ++e) result.push_back(group * group_size + e);
  return result;
}

std::vector<int64_t> choose_experts(const Case& c, const Draw& draw) {
  const Draw shared(c.seed, kTopk);  // what all tokens have in common
  std::vector<int64_t> chosen(static_cast<size_t>(c.num_topk), -1);
  switch (c.routing) {
    case Routing::kUniform: return choose_distinct(draw, range(0, c.num_experts()), c.num_topk, false);
    case Routing::kZipf: return choose_distinct(draw, range(0, c.num_experts()), c.num_topk, true);
    case Routing::kGroupLimited: return choose_distinct(draw, experts_of_half(c, Draw(draw.word(1000))), c.num_topk, false);
    case Routing::kOneExpert: chosen[static_cast<size_t>(draw.below(0, c.num_topk))] = shared.below(1, c.num_experts()); return chosen;
    case Routing::kOneRank: {
      const int64_t target = shared.below(1, c.num_ranks);
      return choose_distinct(draw, range(target * c.experts_per_rank, c.experts_per_rank), c.num_topk, false);
    }
    case Routing::kHoles:
      chosen = choose_distinct(draw, range(0, c.num_experts()), c.num_topk, false);
      for (size_t k = 0; k < chosen.size(); ++k)
        if (draw.one_in(2000 + static_cast<int64_t>(k), 3)) chosen[k] = -1;
      return chosen;
    case Routing::kDuplicates:
      for (size_t k = 0; k < chosen.size(); ++k) chosen[k] = draw.below(static_cast<int64_t>(k), c.num_experts());
      return chosen;
    case Routing::kNothing:
    case Routing::kRankMask: return chosen;
  }
  return chosen;
}

}  // namespace

RankRouting make_routing(const Case& c, int32_t rank) {
  RankRouting result;
  result.num_tokens = c.num_tokens(rank);
  if (c.masks_ranks()) {
    const Draw mask(c.seed, kRankMask, rank), counts(c.seed, kExpertCounts, rank);
    for (int64_t i = 0; i < result.num_tokens * c.num_ranks; ++i) {
      const int64_t value = mask.below(i, 6);  // any nonzero value means yes
      result.token_in_rank.push_back(static_cast<uint8_t>(value < 3 ? 0 : value));
    }
    for (int32_t e = 0; e < c.num_experts(); ++e) result.tokens_per_expert.push_back(static_cast<int32_t>(counts.below(e, 100)));
    return result;
  }
  for (int64_t token = 0; token < result.num_tokens; ++token) {
    const std::vector<int64_t> chosen = choose_experts(c, Draw(c.seed, kTopk, rank, token));
    result.topk_idx.insert(result.topk_idx.end(), chosen.begin(), chosen.end());
  }
  return result;
}

void make_token(const Case& c, int batch, int32_t rank, int64_t token, std::span<uint8_t> row) {
  const Draw draw(c.seed, kToken, batch, rank, token);
  if (c.casts())
    fill_castable(c.dtype, draw, row);
  else
    fill_bytes(draw, row);
}

void make_scales(const Case& c, int batch, int32_t rank, int64_t token, std::span<uint8_t> scales) {
  fill_bytes(Draw(c.seed, kScales, batch, rank, token), scales);
}

float make_weight(const Case& c, int batch, int32_t rank, WeightUse use, int64_t index) {
  const uint64_t word = Draw(c.seed, kWeight, batch, rank, static_cast<int>(use)).word(index);
  return (word >> 50) % 64 == 0 ? 0.0f : ordinary_value(word, 4);
}

void make_result(const Case& c, int batch, int32_t rank, int64_t row, std::span<uint8_t> bytes) {
  fill_numbers(c.combine_dtype, Draw(c.seed, kResult, batch, rank, row), bytes);
}

void make_bias(const Case& c, int batch, int32_t rank, int bias, int64_t token, std::span<uint8_t> bytes) {
  fill_numbers(c.combine_dtype, Draw(c.seed, kBias, batch, rank, bias, token), bytes);
}

}  // namespace tern::conformance
