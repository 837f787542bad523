// SPDX-License-Identifier: Apache-2.0
// The 10-bit logarithmic encoding: its arithmetic, its error, and what it does with numbers that are none.
#include "base/log_rows.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

namespace tern::test {
namespace {

uint32_t bits_of(float value) { return std::bit_cast<uint32_t>(value); }
float float_of(uint32_t bits) { return std::bit_cast<float>(bits); }

std::vector<float> round_trip(const std::vector<float>& values) {
  std::vector<uint8_t> block(kLogBlockBytes, 0xa5);
  encode_log_block(values.data(), static_cast<int64_t>(values.size()), block.data());
  std::vector<float> result(values.size());
  decode_log_block(block.data(), static_cast<int64_t>(values.size()), result.data());
  return result;
}

struct Bound {
  double relative, absolute;
};

// What the contract promises of a block.
Bound error_bound(const std::vector<float>& values) {
  double most = 0x1p-110, least = INFINITY;
  for (const float value : values) {
    const double magnitude = std::fabs(value);
    if (magnitude == 0 || !std::isfinite(magnitude)) continue;
    most = std::max(most, magnitude);
    least = std::min(least, magnitude);
  }
  const auto top = static_cast<double>(bits_of(static_cast<float>(most)));
  const double lowest = std::min(least, most);
  const double octaves = std::min(16.0, (top - bits_of(static_cast<float>(lowest))) / 0x1p23);
  return {octaves / 1020 + 0x1p-23, std::ldexp(most, -16)};
}

void expect_within_bound(const std::vector<float>& values) {
  const std::vector<float> found = round_trip(values);
  const Bound bound = error_bound(values);
  for (size_t i = 0; i < values.size(); ++i) {
    const double x = values[i];
    const double error = std::fabs(x - found[i]);
    const bool is_small = std::fabs(x) < bound.absolute;
    ASSERT_LE(error, is_small ? bound.absolute : bound.relative * std::fabs(x)) << "channel " << i << ": " << x << " became " << found[i];
    ASSERT_TRUE(found[i] == 0 || std::signbit(found[i]) == std::signbit(values[i])) << x << " became " << found[i];
  }
}

class Random {
 public:
  float normal() { return static_cast<float>(normal_(engine_)); }
  uint32_t bits() { return static_cast<uint32_t>(engine_()); }
  size_t below(size_t bound) { return engine_() % bound; }
  // Of a magnitude between 2^-spread and 2^spread.
  float wide(int spread) {
    const int exponent = static_cast<int>(below(static_cast<size_t>(2 * spread))) - spread;
    return std::ldexp(1.0f + static_cast<float>(below(1 << 23)) * 0x1p-23f, exponent) * (below(2) == 0 ? -1.0f : 1.0f);
  }

 private:
  std::mt19937_64 engine_{1};
  std::normal_distribution<double> normal_;
};

TEST(LogRows, RowsAreMultiplesOf16Bytes) {
  EXPECT_EQ(log_row_bytes(7168), 56 * 168);
  EXPECT_EQ(log_row_bytes(128), 176);
  EXPECT_EQ(log_row_bytes(129), 336);
  EXPECT_EQ(log_row_bytes(4), 176);
}

TEST(LogRows, StepsAreDividedExactly) {
  Random random;
  std::vector<uint32_t> steps = {2, 3, 4, 5, 7, 255, 256, 257, 65535, 65536, 263172, 263173};
  for (int i = 0; i < 2000; ++i) steps.push_back(2 + static_cast<uint32_t>(random.below(263172)));
  for (const uint32_t step : steps) {
    const LogScale scale{kF32Inf - 1, step};
    const uint32_t inverse = log_inverse(scale);
    for (uint32_t count = 0; count <= kLogSteps; ++count) {
      // The first and the last distance that are nearest to `count` steps; half-way goes to the larger distance.
      const uint32_t center = count * step;
      const uint32_t first = center - std::min(center, step / 2), last = center + (step - 1) / 2;
      for (const uint32_t distance : {first, center, last})
        ASSERT_EQ(encode_log(scale, inverse, scale.top - distance), kLogSteps + 1 - count) << "step " << step << " distance " << distance;
    }
    ASSERT_EQ(encode_log(scale, inverse, scale.top - (kLogSteps * step + (step - 1) / 2 + 1)), 0u) << step;
    ASSERT_EQ(encode_log(scale, inverse, kF32Sign), 0u) << step;
  }
}

TEST(LogRows, StaysWithinItsBound) {
  Random random;
  for (int repeat = 0; repeat < 2000; ++repeat) {
    std::vector<float> values(1 + random.below(128));
    const int kind = repeat % 5;
    for (float& value : values) {
      if (kind == 0) value = random.normal();
      if (kind == 1) value = random.wide(3);
      if (kind == 2) value = random.wide(60);
      if (kind == 3) value = random.below(4) == 0 ? 0.0f : random.wide(8);
      if (kind == 4) value = std::ldexp(random.normal(), -115);
    }
    expect_within_bound(values);
    if (HasFatalFailure()) return;
  }
}

// The worst case of each span, where the error is half a step at the low end of an octave.
TEST(LogRows, ReachesItsBound) {
  double worst = 0;
  for (uint32_t offset = 0; offset < 300'000; offset += 37) {
    const std::vector<float> values = {65536.0f, float_of(bits_of(4.0f) + offset), 1.0f};
    const float found = round_trip(values)[1];
    worst = std::max(worst, std::fabs(found / static_cast<double>(values[1]) - 1));
  }
  EXPECT_GT(worst, 0.015);
  EXPECT_LE(worst, 16.0 / 1020);
}

TEST(LogRows, ErrorOfNormalNumbers) {
  Random random;
  double squared_error = 0, squares = 0;
  for (int repeat = 0; repeat < 2000; ++repeat) {
    std::vector<float> values(128);
    for (float& value : values) value = random.normal();
    const std::vector<float> found = round_trip(values);
    for (size_t i = 0; i < values.size(); ++i) {
      squared_error += std::pow(found[i] - static_cast<double>(values[i]), 2);
      squares += std::pow(static_cast<double>(values[i]), 2);
    }
  }
  EXPECT_LT(std::sqrt(squared_error / squares), 0.0042);
}

TEST(LogRows, TheLargestIsExactAndSoAreEqualMagnitudes) {
  Random random;
  for (int repeat = 0; repeat < 1000; ++repeat) {
    std::vector<float> values(128);
    for (float& value : values) value = random.wide(40);
    values[random.below(128)] = std::ldexp(1.0f + static_cast<float>(random.below(1 << 23)) * 0x1p-23f, 41);
    const std::vector<float> found = round_trip(values);
    EXPECT_EQ(*std::max_element(found.begin(), found.end()), *std::max_element(values.begin(), values.end()));
    const float same = random.wide(100);
    EXPECT_EQ(round_trip({same, -same, 0.0f, same}), (std::vector<float>{same, -same, 0.0f, same}));
  }
}

TEST(LogRows, NumbersThatAreNone) {
  const std::vector<float> found = round_trip({NAN, INFINITY, -INFINITY, 2.0f, -0.0f, 1.0f, -NAN});
  for (const size_t i : {0, 1, 2, 6}) EXPECT_EQ(bits_of(found[i]), kF32NaN) << i;
  EXPECT_EQ(found[3], 2.0f);
  EXPECT_EQ(bits_of(found[4]), 0u);
  EXPECT_NEAR(found[5], 1.0f, 0.001f);
  for (const float value : round_trip({INFINITY, -INFINITY, NAN})) EXPECT_TRUE(std::isnan(value));
  EXPECT_EQ(round_trip({0.0f, -0.0f, 0x1p-149f, -0x1p-127f}), (std::vector<float>{0.0f, 0.0f, 0.0f, 0.0f}));
}

// Codes of a block are what the header says of memory.
TEST(LogRows, BlockInMemory) {
  std::vector<float> values(128);
  for (size_t i = 0; i < values.size(); ++i) values[i] = (i % 3 == 0 ? -1.0f : 1.0f) * static_cast<float>(i);
  std::vector<uint8_t> block(kLogBlockBytes);
  encode_log_block(values.data(), 128, block.data());
  const LogScale scale = make_log_scale(bits_of(127.0f), bits_of(1.0f));
  LogScale stored;
  std::memcpy(&stored, block.data() + kLogScaleAt, sizeof(stored));
  EXPECT_EQ(stored.top, scale.top);
  EXPECT_EQ(stored.step, scale.step);
  EXPECT_EQ(scale.top, bits_of(127.0f));
  EXPECT_EQ(scale.step, (bits_of(127.0f) - bits_of(1.0f) + 509) / 510);
  for (size_t i = 0; i < values.size(); ++i) {
    const uint32_t code = block[i] | (block[128 + i / 4] >> (2 * (i % 4)) & 3) << 8;
    EXPECT_EQ(code, encode_log(scale, log_inverse(scale), bits_of(values[i]))) << i;
  }
  EXPECT_EQ(block[127] | (block[128 + 31] >> 6 & 3) << 8, 511);
}

}  // namespace
}  // namespace tern::test
