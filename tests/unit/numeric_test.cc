// SPDX-License-Identifier: Apache-2.0
// The scalar conversions of base/numeric.h against the definition of the types, for all short values and around all boundaries.
#include "base/numeric.h"

#include <gtest/gtest.h>

#include <random>

#include "short_floats.h"

namespace tern::test {
namespace {

static_assert(bf16_to_f32(0x3f80) == 1.0f && f32_to_bf16(1.0f) == 0x3f80);
static_assert(f16_to_f32(0x3c00) == 1.0f && f32_to_f16(1.0f) == 0x3c00 && f32_to_f16(1e30f) == 0x7c00);
static_assert(e4m3_to_f32(0x38) == 1.0f && f32_to_e4m3(1.0f) == 0x38 && f32_to_e4m3(-1e30f) == 0xfe);
static_assert(round_up_to_ue8m0(1.0f) == 127 && round_up_to_ue8m0(1.5f) == 128);

struct Conversion {
  const char* name;
  const ShortType& type;
  uint32_t num_patterns;
  float (*widen)(uint32_t);
  uint32_t (*narrow)(float);
};
const Conversion kConversions[] = {
    {"bf16", kBf16, 1 << 16, [](uint32_t bits) { return bf16_to_f32(static_cast<uint16_t>(bits)); },
     [](float x) -> uint32_t { return f32_to_bf16(x); }},
    {"fp16", kF16, 1 << 16, [](uint32_t bits) { return f16_to_f32(static_cast<uint16_t>(bits)); },
     [](float x) -> uint32_t { return f32_to_f16(x); }},
    {"e4m3", kE4m3, 1 << 8, [](uint32_t bits) { return e4m3_to_f32(static_cast<uint8_t>(bits)); },
     [](float x) -> uint32_t { return f32_to_e4m3(x); }},
};

TEST(Numeric, WidensEveryPattern) {
  for (const Conversion& conversion : kConversions) {
    for (uint32_t bits = 0; bits < conversion.num_patterns; ++bits) {
      const float expected = conversion.type.decode(bits);
      const float found = conversion.widen(bits);
      ASSERT_EQ(std::isnan(found), std::isnan(expected)) << conversion.name << " " << bits;
      if (!std::isnan(expected)) {
        ASSERT_EQ(std::bit_cast<uint32_t>(found), std::bit_cast<uint32_t>(expected)) << conversion.name << " " << bits;
      }
      ASSERT_EQ(conversion.narrow(found), std::isnan(expected) ? conversion.type.nan() : bits) << conversion.name << " " << bits;
    }
  }
}

TEST(Numeric, RoundsAroundEveryBoundary) {
  for (const Conversion& conversion : kConversions) {
    for (const float x : conversion.type.boundaries())
      ASSERT_EQ(conversion.narrow(x), conversion.type.encode(x)) << conversion.name << " " << x << " " << std::bit_cast<uint32_t>(x);
  }
}

TEST(Numeric, RoundsRandomPatterns) {
  std::mt19937 random(1);
  for (int i = 0; i < 1'000'000; ++i) {
    const float x = std::bit_cast<float>(static_cast<uint32_t>(random()));
    for (const Conversion& conversion : kConversions)
      ASSERT_EQ(conversion.narrow(x), conversion.type.encode(x)) << conversion.name << " " << x << " " << std::bit_cast<uint32_t>(x);
  }
}

TEST(Numeric, RoundsUpToPowersOfTwo) {
  for (int exponent = -126; exponent <= 127; ++exponent) {
    const float power = std::ldexp(1.0f, exponent);
    EXPECT_EQ(round_up_to_ue8m0(power), static_cast<uint32_t>(exponent + 127));
    EXPECT_EQ(round_up_to_ue8m0(std::nextafterf(power, INFINITY)), static_cast<uint32_t>(exponent + 128));
  }
  EXPECT_EQ(round_up_to_ue8m0(INFINITY), 255u);
}

}  // namespace
}  // namespace tern::test
