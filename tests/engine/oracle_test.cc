// SPDX-License-Identifier: Apache-2.0
// The oracle itself, against cases small enough to work out by hand.
#include "conformance/oracle.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "conformance/compare.h"
#include "conformance/number.h"
#include "conformance/scenario.h"
#include "conformance/sweep.h"

namespace tern::conformance {
namespace {

uint32_t code_of(tern_dtype dtype, float value) {
  uint8_t bytes[4] = {};
  encode(dtype, value, bytes, 0);
  uint32_t code;
  std::memcpy(&code, bytes, sizeof code);
  return code;
}

template <typename T>
std::vector<T> values_of(const Bytes& bytes) {
  std::vector<T> result(bytes.size() / sizeof(T));
  if (!result.empty()) std::memcpy(result.data(), bytes.data(), bytes.size());
  return result;
}

// The rows of a placement as "rank:token" or "rank:token:k"; "-" padding, "." unused.
std::string text_of(const Placement& placement) {
  std::string text;
  for (const Origin& row : placement.rows) {
    if (!text.empty()) text += ' ';
    if (row.kind == Origin::Kind::kPadding) text += '-';
    if (row.kind == Origin::Kind::kUnused) text += '.';
    if (row.kind != Origin::Kind::kToken) continue;
    text += fmt::format("{}:{}", row.source_rank, row.source_token);
    if (row.k >= 0) text += fmt::format(":{}", row.k);
  }
  return text;
}

TEST(Number, Bf16RoundsToNearestEven) {
  EXPECT_EQ(code_of(TERN_DTYPE_BF16, 1.0f), 0x3F80u);
  EXPECT_EQ(code_of(TERN_DTYPE_BF16, float_of(0x3F808000)), 0x3F80u);  // a tie goes to the even one: down
  EXPECT_EQ(code_of(TERN_DTYPE_BF16, float_of(0x3F818000)), 0x3F82u);  // and up
  EXPECT_EQ(code_of(TERN_DTYPE_BF16, float_of(0x3F808001)), 0x3F81u);
  EXPECT_EQ(code_of(TERN_DTYPE_BF16, float_of(0x7F7FFFFF)), 0x7F80u);  // the largest float becomes infinity
  EXPECT_EQ(code_of(TERN_DTYPE_BF16, float_of(0x00018000)), 0x0002u);  // subnormal
  EXPECT_EQ(code_of(TERN_DTYPE_BF16, -0.0f), 0x8000u);
  EXPECT_EQ(code_of(TERN_DTYPE_BF16, NAN), 0x7FC0u);
}

TEST(Number, Log10bitDividesTheWayToTheSmallest) {
  // An octave is 2^23 = 510 steps of 16449 but for a rest; 0.75 is half an octave of bits, nearest to 255 steps from the top.
  std::vector<float> row = {1.0f, -0.75f, 0.5f, -0.0f, INFINITY};
  round_to_log10bit(row);
  EXPECT_EQ(row[0], 1.0f);
  EXPECT_EQ(row[1], -float_of(bits_of(1.0f) - 255 * 16449));
  EXPECT_EQ(row[2], float_of(bits_of(1.0f) - 510 * 16449));
  EXPECT_EQ(bits_of(row[3]), 0u);
  EXPECT_TRUE(std::isnan(row[4]));

  // Blocks of 128 have scales of their own; what is more than 16 octaves below is lost.
  row.assign(130, 1024.0f);
  row[5] = 0.01f;
  row[128] = 1.0f;
  row[129] = 0.01f;
  round_to_log10bit(row);
  EXPECT_EQ(row[4], 1024.0f);
  EXPECT_EQ(row[5], 0.0f);
  EXPECT_NEAR(row[129], 0.01f, 0.01f * 7 / 1020);
}

TEST(Number, Fp16RoundsAndOverflows) {
  EXPECT_EQ(code_of(TERN_DTYPE_FP16, 1.0f), 0x3C00u);
  EXPECT_EQ(code_of(TERN_DTYPE_FP16, 65504.0f), 0x7BFFu);
  EXPECT_EQ(code_of(TERN_DTYPE_FP16, 65519.0f), 0x7BFFu);
  EXPECT_EQ(code_of(TERN_DTYPE_FP16, 65520.0f), 0x7C00u);
  EXPECT_EQ(code_of(TERN_DTYPE_FP16, 0x1p-24f), 0x0001u);
  EXPECT_EQ(code_of(TERN_DTYPE_FP16, 0x1p-25f), 0x0000u);
  EXPECT_EQ(code_of(TERN_DTYPE_FP16, 0x1.8p-24f), 0x0002u);
  EXPECT_EQ(code_of(TERN_DTYPE_FP16, -INFINITY), 0xFC00u);
}

TEST(Number, Fp8RoundsAndSaturates) {
  EXPECT_EQ(code_of(TERN_DTYPE_FP8_E4M3, 1.0f), 0x38u);
  EXPECT_EQ(code_of(TERN_DTYPE_FP8_E4M3, 448.0f), 0x7Eu);
  EXPECT_EQ(code_of(TERN_DTYPE_FP8_E4M3, 1e9f), 0x7Eu);
  EXPECT_EQ(code_of(TERN_DTYPE_FP8_E4M3, -500.0f), 0xFEu);
  EXPECT_EQ(code_of(TERN_DTYPE_FP8_E4M3, 0x1p-9f), 0x01u);
  EXPECT_EQ(code_of(TERN_DTYPE_FP8_E4M3, 0x1p-10f), 0x00u);
  EXPECT_EQ(code_of(TERN_DTYPE_FP8_E4M3, 0x1.8p-9f), 0x02u);
  EXPECT_EQ(code_of(TERN_DTYPE_FP8_E4M3, 17.0f), 0x58u);  // between 16 and 18: even
  EXPECT_EQ(code_of(TERN_DTYPE_FP8_E4M3, 19.0f), 0x5Au);
}

TEST(Number, EveryCodeSurvivesTheRoundTrip) {
  for (const tern_dtype dtype : {TERN_DTYPE_BF16, TERN_DTYPE_FP16, TERN_DTYPE_FP8_E4M3}) {
    const uint32_t num_codes = element_bytes(dtype) == 2 ? 0x10000 : 0x100;
    for (uint32_t code = 0; code < num_codes; ++code) {
      uint8_t bytes[4];
      std::memcpy(bytes, &code, sizeof code);
      const float value = decode(dtype, bytes, 0);
      if (!std::isnan(value)) {
        ASSERT_EQ(code_of(dtype, value), code) << value;
      }
    }
  }
}

// Rank 0 has tokens for experts {0, 3} and {1, none}; rank 1 one token for {3, 2}. Experts 0 and 1 live on rank 0.
Case small_case(tern_layout layout) {
  Case c;
  c.num_ranks = 2;
  c.max_tokens = 2;
  c.experts_per_rank = 2;
  c.layout = layout;
  return c;
}

std::vector<RankRouting> small_routing() {
  RankRouting first, second;
  first.num_tokens = 2;
  first.topk_idx = {0, 3, 1, -1};
  second.num_tokens = 1;
  second.topk_idx = {3, 2};
  return {first, second};
}

TEST(Place, RankMajor) {
  const auto placements = place(small_case(TERN_LAYOUT_RANK_MAJOR), small_routing(), {});
  EXPECT_EQ(text_of(placements[0]), "0:0 0:1");
  EXPECT_EQ(text_of(placements[1]), "0:0 1:0");
  EXPECT_EQ(placements[0].received_per_rank, (std::vector<int32_t>{2, 0}));
  EXPECT_EQ(placements[1].received_per_rank, (std::vector<int32_t>{1, 1}));
  EXPECT_EQ(placements[0].sent_per_rank, (std::vector<int32_t>{2, 1}));
  EXPECT_EQ(placements[1].sent_per_rank, (std::vector<int32_t>{0, 1}));
  EXPECT_EQ(placements[0].received_per_expert, (std::vector<int32_t>{1, 1}));
  EXPECT_EQ(placements[1].received_per_expert, (std::vector<int32_t>{1, 2}));
}

TEST(Place, ExpertMajorIsPaddedToTheAlignment) {
  Case c = small_case(TERN_LAYOUT_EXPERT_MAJOR);
  c.expert_alignment = 3;
  const auto placements = place(c, small_routing(), {});
  EXPECT_EQ(text_of(placements[0]), "0:0:0 - - 0:1:0 - -");
  EXPECT_EQ(text_of(placements[1]), "1:0:1 - - 0:0:1 1:0:0 -");
  EXPECT_EQ(placements[1].expert_offsets, (std::vector<int64_t>{0, 3, 6}));
  const int64_t one_from_second = 1, first_row = int64_t{1} << 32 | 1;
  EXPECT_EQ(placements[1].expert_rank_ranges, (std::vector<int64_t>{0, one_from_second, 1, first_row}));
}

TEST(Place, ExpertPaddedLeavesRoomForEveryToken) {
  const auto placements = place(small_case(TERN_LAYOUT_EXPERT_PADDED), small_routing(), {});
  EXPECT_EQ(text_of(placements[1]), "1:0:1 - - - 0:0:1 1:0:0 - -");
}

TEST(Place, WorstCutsAtTheCapacity) {
  Case c = small_case(TERN_LAYOUT_RANK_MAJOR);
  c.extent = TERN_EXTENT_WORST;
  EXPECT_EQ(text_of(place(c, small_routing(), {})[0]), "0:0 0:1 . .");
  c.row_capacity = 1;
  const auto placements = place(c, small_routing(), {});
  EXPECT_EQ(text_of(placements[0]), "0:0");
  EXPECT_TRUE(placements[0].overflow);
  EXPECT_EQ(placements[0].num_received, 2);
}

TEST(Place, MaskedRanksTakeNoPart) {
  const auto placements = place(small_case(TERN_LAYOUT_EXPERT_MAJOR), small_routing(), {0, 1});
  EXPECT_EQ(text_of(placements[0]), "0:0:0 0:1:0");
  EXPECT_EQ(text_of(placements[1]), "");
  EXPECT_EQ(placements[0].sent_per_rank, (std::vector<int32_t>{2, 0}));
  EXPECT_EQ(placements[0].topk_idx, (std::vector<int64_t>{0, -1, 1, -1}));
}

TEST(Dispatch, MarksAndPoison) {
  Case c = small_case(TERN_LAYOUT_EXPERT_MAJOR);
  c.expert_alignment = 2;
  c.hidden = 8;
  const auto placements = place(c, small_routing(), {});
  const DispatchBytes out = dispatch_oracle(c, placements, 0, 1);
  EXPECT_EQ(values_of<int32_t>(out.source_rank), (std::vector<int32_t>{1, -1, 0, 1}));
  EXPECT_EQ(values_of<int32_t>(out.source_token), (std::vector<int32_t>{0, -1, 0, 0}));
  EXPECT_EQ(values_of<int32_t>(out.row_expert), (std::vector<int32_t>{0, -1, 1, 1}));
  EXPECT_EQ(values_of<float>(out.topk_weights)[2], make_weight(c, 0, 0, WeightUse::kDispatch, 1));
  Bytes token(16);
  make_token(c, 0, 0, 0, token);
  EXPECT_EQ(Bytes(out.tokens.begin() + 32, out.tokens.begin() + 48), token);
  EXPECT_EQ(Bytes(out.tokens.begin() + 16, out.tokens.begin() + 32), Bytes(16, kPoison));
}

TEST(Dispatch, ColumnMajorScales) {
  Case c = small_case(TERN_LAYOUT_RANK_MAJOR);
  c.scale_bytes = 8;
  c.scale_order = TERN_SCALES_COLUMN_MAJOR;
  const DispatchBytes out = dispatch_oracle(c, place(c, small_routing(), {}), 0, 1);
  Bytes first(8), second(8);
  make_scales(c, 0, 0, 0, first);
  make_scales(c, 0, 1, 0, second);
  Bytes expected;
  for (const int part : {0, 4})
    for (const Bytes& scales : {first, second}) expected.insert(expected.end(), scales.begin() + part, scales.begin() + part + 4);
  EXPECT_EQ(out.scales, expected);
}

Case cast_case(tern_encoding encoding) {
  Case c;
  c.hidden = 144;
  c.dtype = TERN_DTYPE_FP32;
  c.encoding = encoding;
  return c;
}

// One block with a largest value of 3, and a short one of zeros.
Bytes cast_row() {
  Bytes row(144 * 4, 0);
  encode(TERN_DTYPE_FP32, -3.0f, row.data(), 5);
  encode(TERN_DTYPE_FP32, 1.0f, row.data(), 6);
  return row;
}

TEST(Cast, OneScaleForEachBlock) {
  Bytes values, scales;
  cast_oracle(cast_case(TERN_ENCODING_FP8_F32), cast_row(), values, scales);
  EXPECT_EQ(values[5], 0xFE);                                         // -448
  EXPECT_EQ(values[6], code_of(TERN_DTYPE_FP8_E4M3, 448.0f / 3.0f));  // about 149.3: 144
  EXPECT_EQ(values[6], 0x71);
  EXPECT_EQ(values_of<float>(scales), (std::vector<float>{3.0f * (1.0f / 448.0f), 1e-4f * (1.0f / 448.0f)}));
}

TEST(Cast, ScalesRoundedUpToPowersOfTwo) {
  Bytes values, scales;
  cast_oracle(cast_case(TERN_ENCODING_FP8_F32_POW2), cast_row(), values, scales);
  // 3 / 448 = 0.0067 lies between 2^-8 and 2^-7; 1e-4 / 448 = 2.2e-7 between 2^-23 and 2^-22.
  EXPECT_EQ(values_of<float>(scales), (std::vector<float>{0x1p-7f, 0x1p-22f}));
  EXPECT_EQ(values[5], code_of(TERN_DTYPE_FP8_E4M3, -384.0f));
  cast_oracle(cast_case(TERN_ENCODING_FP8_UE8M0), cast_row(), values, scales);
  EXPECT_EQ(scales, (Bytes{120, 105, 0, 0}));
}

float result_of(const Case& c, int32_t rank, int64_t row) {
  Bytes bytes(static_cast<size_t>(c.combine_row_bytes()));
  make_result(c, 0, rank, row, bytes);
  return decode(c.combine_dtype, bytes.data(), 3);
}

float rounded(tern_dtype dtype, float value) {
  uint8_t bytes[4];
  encode(dtype, value, bytes, 0);
  return decode(dtype, bytes, 0);
}

TEST(Combine, SumsInTheOrderOfTheContract) {
  Case c = small_case(TERN_LAYOUT_EXPERT_MAJOR);
  c.weighting = TERN_WEIGHTS_OWNER;
  c.num_biases = 1;
  const auto placements = place(c, small_routing(), {});
  const auto weight = [&](int64_t entry) { return make_weight(c, 0, 1, WeightUse::kOwner, entry); };
  Bytes bias(static_cast<size_t>(c.combine_row_bytes()));
  make_bias(c, 0, 1, 0, 0, bias);
  const float first = decode(TERN_DTYPE_BF16, bias.data(), 3);
  // Rank 1's token has entry k = 0 in row 2 and k = 1 in row 0 of rank 1.
  const float by_k0 = weight(0) * result_of(c, 1, 2), by_k1 = weight(1) * result_of(c, 1, 0);

  const CombineBytes hierarchical = combine_oracle(c, placements, 0, 1);
  EXPECT_EQ(decode(TERN_DTYPE_BF16, hierarchical.tokens.data(), 3),
            rounded(TERN_DTYPE_BF16, first + rounded(TERN_DTYPE_BF16, by_k0 + by_k1)));
  c.combine_mode = TERN_COMBINE_EXACT;
  const CombineBytes exact = combine_oracle(c, placements, 0, 1);
  EXPECT_EQ(decode(TERN_DTYPE_BF16, exact.tokens.data(), 3), rounded(TERN_DTYPE_BF16, (first + by_k0) + by_k1));
}

TEST(Combine, WeightsComeBackSummedOverRanks) {
  Case c = small_case(TERN_LAYOUT_RANK_MAJOR);
  c.return_weights = true;
  const CombineBytes out = combine_oracle(c, place(c, small_routing(), {}), 0, 0);
  const auto row_weight = [&](int32_t rank, int64_t index) { return make_weight(c, 0, rank, WeightUse::kRow, index); };
  // Token 0 is row 0 of both ranks, token 1 row 1 of rank 0.
  EXPECT_EQ(values_of<float>(out.weights), (std::vector<float>{row_weight(0, 0) + row_weight(1, 0), row_weight(0, 1) + row_weight(1, 1),
                                                               row_weight(0, 2), row_weight(0, 3)}));
}

TEST(Compare, SaysWhereAndHowMuch) {
  EXPECT_EQ(compare_bytes(Bytes{1, 2}, Bytes{1, 2}, 2), "");
  EXPECT_EQ(compare_bytes(Bytes{1, 2, 3, 4}, Bytes{1, 2, 9, 9}, 2),
            "2 of 4 bytes differ, first in row 1 at byte 0: found 0304, expected 0909");
  const Bytes one_nan = {0xC0, 0x7F}, other_nan = {0xC1, 0xFF}, one = {0x80, 0x3F};
  EXPECT_EQ(compare_numbers(TERN_DTYPE_BF16, one_nan, other_nan, 1), "");
  EXPECT_NE(compare_numbers(TERN_DTYPE_BF16, one_nan, one, 1), "");
}

TEST(Sweep, RandomCasesAreNormalAndCoverTheOptions) {
  int num_overflows = 0, num_fused = 0, num_phases = 0, num_encoded = 0, num_unrounded = 0;
  for (uint64_t seed = 1; seed <= 300; ++seed) {
    const Case c = random_case(seed);
    EXPECT_EQ(c.name(), c.normalized().name());
    EXPECT_EQ(c.arriving_token_bytes() % 16, 0) << c.name();
    num_fused += c.fused ? 1 : 0;
    num_phases += c.phases ? 1 : 0;
    num_encoded += c.wire == TERN_WIRE_LOG10BIT ? 1 : 0;
    num_unrounded += c.wire == TERN_WIRE_FP32 ? 1 : 0;
    for (const Placement& placement : Scenario(c).placements) num_overflows += placement.overflow ? 1 : 0;
  }
  EXPECT_GT(num_overflows, 10);
  EXPECT_GT(num_fused, 30);
  EXPECT_GT(num_phases, 50);
  EXPECT_GT(num_encoded, 50);
  EXPECT_GT(num_unrounded, 50);
}

}  // namespace
}  // namespace tern::conformance
