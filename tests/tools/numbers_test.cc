// SPDX-License-Identifier: Apache-2.0
#include "tools/numbers.h"

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "tools/row_format.h"
#include "tools/token_data.h"

namespace tern::tools {
namespace {

TEST(Numbers, Bf16RoundsToNearestEven) {
  EXPECT_EQ(to_bf16(1.0f), 0x3F80);
  EXPECT_EQ(to_bf16(1.0f + 0x1p-8f), 0x3F80);      // a tie, down to even
  EXPECT_EQ(to_bf16(1.0f + 3 * 0x1p-8f), 0x3F82);  // a tie, up to even
  EXPECT_EQ(to_bf16(1.0f + 0x1p-8f + 0x1p-20f), 0x3F81);
  EXPECT_EQ(to_bf16(-2.0f), 0xC000);
}

TEST(Numbers, Fp16KeepsItsOwnNumbersAndRoundsOthers) {
  for (uint32_t bits = 0; bits < 0x7C00; ++bits) EXPECT_EQ(to_fp16(from_fp16(static_cast<uint16_t>(bits))), bits);
  EXPECT_EQ(to_fp16(1.0f + 0x1p-11f), 0x3C00);
  EXPECT_EQ(to_fp16(1.0f + 3 * 0x1p-11f), 0x3C02);
  EXPECT_EQ(to_fp16(65504.0f), 0x7BFF);
  EXPECT_EQ(to_fp16(65520.0f), 0x7C00);
  EXPECT_EQ(to_fp16(-1e30f), 0xFC00);
  EXPECT_EQ(to_fp16(0x1p-25f), 0);  // half of the least number, a tie to zero
  EXPECT_EQ(to_fp16(0x1p-25f * 1.5f), 1);
}

TEST(Numbers, Fp8RoundsToNearestEvenAndSaturates) {
  EXPECT_EQ(to_fp8_e4m3(0.0f), 0x00);
  EXPECT_EQ(to_fp8_e4m3(-0.0f), 0x80);
  EXPECT_EQ(to_fp8_e4m3(1.0f), 0x38);
  EXPECT_EQ(to_fp8_e4m3(1.0625f), 0x38);  // a tie, down to even
  EXPECT_EQ(to_fp8_e4m3(1.1875f), 0x3A);  // a tie, up to even
  EXPECT_EQ(to_fp8_e4m3(1.9999f), 0x40);  // carries into the exponent
  EXPECT_EQ(to_fp8_e4m3(448.0f), 0x7E);
  EXPECT_EQ(to_fp8_e4m3(1e9f), 0x7E);
  EXPECT_EQ(to_fp8_e4m3(-1e9f), 0xFE);
  EXPECT_EQ(to_fp8_e4m3(0x1p-9f), 0x01);  // the least number
  EXPECT_EQ(to_fp8_e4m3(0x1p-10f), 0x00);
  EXPECT_EQ(to_fp8_e4m3(0x1p-6f), 0x08);  // the least normal number
  EXPECT_EQ(to_fp8_e4m3(NAN), 0x7F);
}

// 130 channels: a whole block whose greatest magnitude is 448, and a short one whose greatest is 3.
std::vector<uint16_t> two_blocks() {
  std::vector<uint16_t> row(130, to_bf16(1.0f));
  row[5] = to_bf16(-448.0f);
  row[129] = to_bf16(3.0f);
  return row;
}

TEST(Numbers, CastToFp8GivesOneScalePerBlock) {
  const auto row = two_blocks();
  std::vector<std::byte> values(130);
  std::array<float, 2> scales{};
  cast_row_to_fp8(row, TERN_ENCODING_FP8_F32, values, std::as_writable_bytes(std::span(scales)));
  EXPECT_EQ(scales[0], 448.0f * (1.0f / 448.0f));
  EXPECT_EQ(scales[1], 3.0f * (1.0f / 448.0f));
  EXPECT_EQ(values[0], std::byte{0x38});
  EXPECT_EQ(values[5], std::byte{0xFE});
  EXPECT_EQ(values[129], std::byte{0x7E});
}

TEST(Numbers, CastWithPowersOfTwoRoundsScalesUp) {
  const auto row = two_blocks();
  std::vector<std::byte> values(130), exponents(4, std::byte{0xFF});
  std::array<float, 2> scales{};
  cast_row_to_fp8(row, TERN_ENCODING_FP8_F32_POW2, values, std::as_writable_bytes(std::span(scales)));
  EXPECT_EQ(scales[1], 0x1p-7f);  // 3 / 448 is between 2^-8 and 2^-7
  EXPECT_EQ(values[129], std::byte{to_fp8_e4m3(3.0f * 128)});
  cast_row_to_fp8(row, TERN_ENCODING_FP8_UE8M0, values, exponents);
  EXPECT_EQ(exponents[1], std::byte{127 - 7});
  EXPECT_EQ(exponents[2], std::byte{0});  // padding
  EXPECT_EQ(exponents[3], std::byte{0});
}

TEST(Numbers, RowBytesFollowFromFormatAndHidden) {
  const RowFormat cast = parse_row_format("fp8-cast"), ue8m0 = parse_row_format("fp8-ue8m0"), given = parse_row_format("fp8");
  EXPECT_EQ(cast.given_row_bytes(7168), 14336);
  EXPECT_EQ(cast.arriving_row_bytes(7168), 7168);
  EXPECT_EQ(cast.arriving_scale_bytes(7168), 56 * 4);
  EXPECT_EQ(cast.arriving_scale_bytes(144), 2 * 4);
  EXPECT_EQ(ue8m0.arriving_scale_bytes(144), 4);
  EXPECT_EQ(given.given_scale_bytes(7168), 56 * 4);
  EXPECT_EQ(given.combine_row_bytes(7168), 14336);
  EXPECT_THROW(parse_row_format("int4"), std::exception);
}

TEST(TokenData, RowsDifferByEveryPartOfTheirKey) {
  const auto row = [](const RowKey& key) {
    std::vector<std::byte> bytes(64);
    fill_row(key, TERN_DTYPE_BYTES, bytes);
    return bytes;
  };
  const auto base = row({1, kTokenStream, 0, 0, 0});
  EXPECT_EQ(base, row({1, kTokenStream, 0, 0, 0}));
  for (const RowKey& other : {RowKey{2, kTokenStream, 0, 0, 0}, RowKey{1, kExpertStream, 0, 0, 0}, RowKey{1, kTokenStream, 1, 0, 0},
                              RowKey{1, kTokenStream, 0, 1, 0}, RowKey{1, kTokenStream, 0, 0, 1}})
    EXPECT_NE(base, row(other));
}

TEST(TokenData, FloatsAreOrdinaryNumbers) {
  for (const tern_dtype dtype : {TERN_DTYPE_BF16, TERN_DTYPE_FP16, TERN_DTYPE_FP32}) {
    std::vector<std::byte> bytes(4096);
    fill_row({.seed = 1}, dtype, bytes);
    std::vector<float> values(bytes.size() / static_cast<size_t>(element_bytes(dtype)));
    load_elements(bytes.data(), dtype, values);
    for (const float value : values) {
      EXPECT_GE(std::fabs(value), 0.5f);
      EXPECT_LT(std::fabs(value), 2.0f);
    }
  }
}

TEST(TokenData, FirstDifferenceIsFound) {
  std::vector<std::byte> a(100, std::byte{1}), b = a;
  EXPECT_EQ(first_difference(a, b), -1);
  b[57] = std::byte{2};
  EXPECT_EQ(first_difference(a, b), 57);
  EXPECT_EQ(first_difference({}, {}), -1);
}

}  // namespace
}  // namespace tern::tools
