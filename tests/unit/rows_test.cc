// SPDX-License-Identifier: Apache-2.0
// The row arithmetic, with every kind of vectors that this machine has, bit for bit against plain loops.
#include "rows/rows.h"

#include <gtest/gtest.h>
#include <hwy/targets.h>

#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/log_rows.h"
#include "base/numeric.h"
#include "short_floats.h"

namespace tern::test {
namespace {

using cpu::Store;
using cpu::SumTerm;

constexpr tern_dtype kDtypes[] = {TERN_DTYPE_BF16, TERN_DTYPE_FP16, TERN_DTYPE_FP32};
constexpr tern_encoding kCasts[] = {TERN_ENCODING_FP8_F32, TERN_ENCODING_FP8_F32_POW2, TERN_ENCODING_FP8_UE8M0};
constexpr Store kStores[] = {Store::kCached, Store::kStreaming};

void for_each_target(const std::function<void()>& body) {
  for (const int64_t target : hwy::SupportedAndGeneratedTargets()) {
    SCOPED_TRACE(hwy::TargetName(target));
    hwy::SetSupportedTargetsForTest(target);
    body();
  }
  hwy::SetSupportedTargetsForTest(0);
}

// Memory that begins `misalignment` bytes after a multiple of 64, and ends where it ends, so that a sanitizer sees what goes beyond.
class Bytes {
 public:
  explicit Bytes(size_t size, size_t misalignment = 0)
      : size_(size), misalignment_(misalignment), memory_(static_cast<uint8_t*>(::operator new(size + misalignment, kAlignment))) {
    std::memset(memory_.get(), 0xa5, size + misalignment);
  }
  uint8_t* data() const { return memory_.get() + misalignment_; }
  size_t size() const { return size_; }
  bool operator==(const Bytes& other) const { return size_ == other.size_ && std::memcmp(data(), other.data(), size_) == 0; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(uint8_t* memory) const { ::operator delete(memory, kAlignment); }
  };
  size_t size_, misalignment_;
  std::unique_ptr<uint8_t, Free> memory_;
};

std::string first_difference(const Bytes& found, const Bytes& expected) {
  for (size_t i = 0; i < expected.size(); ++i) {
    if (found.data()[i] != expected.data()[i])
      return fmt::format("byte {} of {}: found {:#04x}, expected {:#04x}", i, expected.size(), found.data()[i], expected.data()[i]);
  }
  return "";
}

size_t element_bytes(tern_dtype dtype) { return dtype == TERN_DTYPE_FP32 ? 4 : 2; }

float get(tern_dtype dtype, const void* row, size_t i) {
  if (dtype == TERN_DTYPE_FP32) return static_cast<const float*>(row)[i];
  return (dtype == TERN_DTYPE_BF16 ? kBf16 : kF16).decode(static_cast<const uint16_t*>(row)[i]);
}

float one_nan(float x) { return std::isnan(x) ? std::bit_cast<float>(0x7fffffffu) : x; }

void set(tern_dtype dtype, void* row, size_t i, float x) {
  if (dtype == TERN_DTYPE_FP32)
    static_cast<float*>(row)[i] = one_nan(x);
  else
    static_cast<uint16_t*>(row)[i] = static_cast<uint16_t>((dtype == TERN_DTYPE_BF16 ? kBf16 : kF16).encode(x));
}

float rounded(tern_dtype dtype, float x) {
  if (dtype == TERN_DTYPE_FP32) return x;
  const ShortType& type = dtype == TERN_DTYPE_BF16 ? kBf16 : kF16;
  return type.decode(type.encode(x));
}

class Random {
 public:
  size_t below(size_t bound) { return engine_() % bound; }
  // Between -2 and 2.
  float value() { return static_cast<float>(static_cast<int32_t>(engine_())) * 0x1p-30f; }
  uint32_t bits() { return static_cast<uint32_t>(engine_()); }

  // Ordinary values, or any patterns: NaNs, infinities and subnormals among them.
  void fill(tern_dtype dtype, Bytes& row, bool any_pattern) {
    for (size_t i = 0; i < row.size() / element_bytes(dtype); ++i) {
      const uint32_t pattern = bits();
      if (any_pattern)
        std::memcpy(row.data() + i * element_bytes(dtype), &pattern, element_bytes(dtype));
      else
        set(dtype, row.data(), i, value());
    }
  }

 private:
  std::mt19937_64 engine_{1};
};

std::vector<size_t> test_sizes() {
  std::vector<size_t> sizes;
  for (size_t size = 1; size <= 600; ++size) sizes.push_back(size);
  sizes.insert(sizes.end(), {1023, 1024, 1025, 2880, 7168, 8192});
  return sizes;
}

// ---------------------------------------------------------------------------------------------------------- copies

TEST(Rows, CopyAnySizeAndAlignment) {
  Random random;
  std::vector<size_t> sizes = test_sizes();
  sizes.push_back(0);
  for (const size_t size : sizes) {
    for (const size_t to : {0, 1, 16, 32, 63}) {
      for (const size_t from : {0, 3, 16}) {
        Bytes in(size, from);
        random.fill(TERN_DTYPE_BF16, in, true);
        for_each_target([&] {
          for (const Store store : kStores) {
            const Bytes out(size, to);
            cpu::copy_row(out.data(), in.data(), size, store);
            cpu::store_fence();
            ASSERT_TRUE(out == in) << size << " bytes from " << from << " to " << to << ": " << first_difference(out, in);
            ASSERT_TRUE(to == 0 || out.data()[-1] == 0xa5);
          }
        });
      }
    }
  }
}

// ----------------------------------------------------------------------------------------------------------- casts

struct Cast {
  Bytes values, scales;
};

Cast cast(const Bytes& row, tern_dtype dtype, tern_encoding encoding) {
  const auto hidden = static_cast<int64_t>(row.size() / element_bytes(dtype));
  Cast out = {Bytes(hidden), Bytes(cpu::num_scale_bytes(encoding, hidden), 1)};
  cpu::cast_row_fp8(row.data(), dtype, hidden, encoding, out.values.data(), out.scales.data());
  return out;
}

Cast expected_cast(const Bytes& row, tern_dtype dtype, tern_encoding encoding) {
  const size_t hidden = row.size() / element_bytes(dtype);
  Cast out = {Bytes(hidden), Bytes(cpu::num_scale_bytes(encoding, hidden), 1)};
  std::memset(out.scales.data(), 0, out.scales.size());
  for (size_t block = 0; block * 128 < hidden; ++block) {
    const size_t end = std::min(hidden, block * 128 + 128);
    float amax = 1e-4f;
    for (size_t i = block * 128; i < end; ++i) {
      const float magnitude = std::fabs(get(dtype, row.data(), i));
      if (magnitude > amax) amax = magnitude;  // not a NaN
    }
    float scale = amax * (1.0f / 448.0f);
    int exponent = 128;
    if (std::isfinite(scale)) {
      const float fraction = std::frexp(scale, &exponent);
      if (fraction == 0.5f) --exponent;
    }
    if (encoding != TERN_ENCODING_FP8_F32) scale = std::ldexp(1.0f, exponent);
    for (size_t i = block * 128; i < end; ++i) {
      const float x = get(dtype, row.data(), i);
      const float value = encoding == TERN_ENCODING_FP8_F32 ? x * (448.0f / amax) : x / scale;
      out.values.data()[i] = static_cast<uint8_t>(kE4m3.encode(value));
    }
    if (encoding == TERN_ENCODING_FP8_UE8M0)
      out.scales.data()[block] = static_cast<uint8_t>(exponent + 127);
    else
      std::memcpy(out.scales.data() + 4 * block, &scale, 4);
  }
  return out;
}

void check_cast(const Bytes& row, tern_dtype dtype, tern_encoding encoding) {
  const Cast expected = expected_cast(row, dtype, encoding);
  for_each_target([&] {
    const Cast found = cast(row, dtype, encoding);
    ASSERT_TRUE(found.values == expected.values) << "values: " << first_difference(found.values, expected.values);
    ASSERT_TRUE(found.scales == expected.scales) << "scales: " << first_difference(found.scales, expected.scales);
  });
}

TEST(Rows, ScaleBytes) {
  EXPECT_EQ(cpu::num_scale_bytes(TERN_ENCODING_AS_GIVEN, 7168), 0);
  EXPECT_EQ(cpu::num_scale_bytes(TERN_ENCODING_FP8_F32, 7168), 224);
  EXPECT_EQ(cpu::num_scale_bytes(TERN_ENCODING_FP8_F32_POW2, 129), 8);
  EXPECT_EQ(cpu::num_scale_bytes(TERN_ENCODING_FP8_UE8M0, 7168), 56);
  EXPECT_EQ(cpu::num_scale_bytes(TERN_ENCODING_FP8_UE8M0, 2880), 24);
  EXPECT_EQ(cpu::num_scale_bytes(TERN_ENCODING_FP8_UE8M0, 1), 4);
}

TEST(Rows, CastAnySize) {
  Random random;
  for (const size_t hidden : test_sizes()) {
    for (const tern_dtype dtype : kDtypes) {
      for (const tern_encoding encoding : kCasts) {
        SCOPED_TRACE(fmt::format("hidden {} dtype {} encoding {}", hidden, static_cast<int>(dtype), static_cast<int>(encoding)));
        Bytes row(hidden * element_bytes(dtype), random.below(4) * 4);
        random.fill(dtype, row, random.below(4) == 0);
        check_cast(row, dtype, encoding);
        if (HasFatalFailure()) return;
      }
    }
  }
}

// With a 448 in the block the multiplier is 1, so that values are rounded as they are.
TEST(Rows, CastRoundsLikeTheScalarTwin) {
  std::vector<float> values = kE4m3.boundaries();
  std::erase_if(values, [](float x) { return std::fabs(x) > 448.0f; });
  Random random;
  for (int i = 0; i < 100'000; ++i) values.push_back(random.value() * 0x1p-12f * static_cast<float>(1 << random.below(19)));
  Bytes row((values.size() + values.size() / 127 + 1) * 4);
  auto* const floats = reinterpret_cast<float*>(row.data());
  size_t next = 0;
  for (size_t i = 0; i < row.size() / 4; ++i) floats[i] = i % 128 == 0 || next == values.size() ? 448.0f : values[next++];
  ASSERT_EQ(next, values.size());
  for_each_target([&] {
    const Cast found = cast(row, TERN_DTYPE_FP32, TERN_ENCODING_FP8_F32);
    for (size_t i = 0; i < row.size() / 4; ++i) ASSERT_EQ(found.values.data()[i], f32_to_e4m3(floats[i])) << floats[i];
  });
  check_cast(row, TERN_DTYPE_FP32, TERN_ENCODING_FP8_F32);
}

TEST(Rows, CastSpecialBlocks) {
  const float inf = INFINITY;
  const std::vector<float> rows[] = {
      {0, -0.0f, 0},   {NAN, 0, -NAN},      {NAN, 2, -1},      {inf, 1, -inf, NAN},    {1e-5f, -1e-4f},
      {448, -448, 17}, {-3.4028234e38f, 1}, {1e-40f, -1e-45f}, {57344, 3.5f, 0.4375f},
  };
  for (const std::vector<float>& values : rows) {
    for (const tern_dtype dtype : kDtypes) {
      Bytes row(values.size() * element_bytes(dtype));
      for (size_t i = 0; i < values.size(); ++i) set(dtype, row.data(), i, values[i]);
      for (const tern_encoding encoding : kCasts) check_cast(row, dtype, encoding);
    }
  }
  Bytes row(16);
  const float infinite[] = {inf, 1, -2, NAN};
  std::memcpy(row.data(), infinite, 16);
  const Cast found = cast(row, TERN_DTYPE_FP32, TERN_ENCODING_FP8_UE8M0);
  EXPECT_EQ(std::vector(found.values.data(), found.values.data() + 4), (std::vector<uint8_t>{0x7f, 0, 0x80, 0x7f}));
  EXPECT_EQ(std::vector(found.scales.data(), found.scales.data() + 4), (std::vector<uint8_t>{255, 0, 0, 0}));
}

// ------------------------------------------------------------------------------------------------------------ sums

void expected_sum(const cpu::SumArgs& args, void* out) {
  for (size_t i = 0; i < static_cast<size_t>(args.hidden); ++i) {
    const auto value = [&](const SumTerm& term) {
      const float x = get(args.dtype, term.row, i);
      return args.weighted ? term.weight * x : x;
    };
    float total = 0;
    for (const void* bias : args.bias) total = bias == nullptr ? total : total + get(args.dtype, bias, i);
    if (args.group_ends.empty()) {
      for (const SumTerm& term : args.terms) total = total + value(term);
    }
    int32_t begin = 0;
    for (const int32_t end : args.group_ends) {
      float sum = 0;
      for (; begin < end; ++begin) sum = sum + value(args.terms[begin]);
      total = total + rounded(args.dtype, sum);
    }
    set(args.dtype, out, i, total);
  }
}

void check_sum(cpu::SumArgs args, size_t misalignment) {
  const size_t bytes = static_cast<size_t>(args.hidden) * element_bytes(args.dtype);
  const Bytes expected(bytes);
  expected_sum(args, expected.data());
  for_each_target([&] {
    for (const Store store : kStores) {
      const Bytes out(bytes, misalignment);
      args.out = out.data();
      args.store = store;
      cpu::sum_rows(args);
      cpu::store_fence();
      ASSERT_TRUE(out == expected) << first_difference(out, expected);
      ASSERT_TRUE(misalignment == 0 || out.data()[-1] == 0xa5);
    }
  });
}

// Terms, groups (empty ones too), biases, weights and alignments by chance.
void check_random_sum(Random& random, tern_dtype dtype, size_t hidden) {
  const bool any_pattern = random.below(4) == 0;
  const float weights[] = {0.0f, -0.0f, 1.0f, -1.5f, 1e30f, -1e-30f, 1e-42f, INFINITY, NAN, 0.3f};
  std::vector<Bytes> rows;
  for (size_t i = 0; i < 2 + random.below(9); ++i) {
    rows.emplace_back(hidden * element_bytes(dtype), random.below(8) * 4);
    random.fill(dtype, rows.back(), any_pattern);
  }
  std::vector<SumTerm> terms;
  for (size_t i = 2; i < rows.size(); ++i) {
    const float weight = random.below(4) == 0 ? weights[random.below(std::size(weights))] : random.value();
    terms.push_back({rows[i].data(), weight});
  }
  std::vector<int32_t> group_ends;
  while (group_ends.empty() || group_ends.back() < static_cast<int32_t>(terms.size())) {
    const int32_t begin = group_ends.empty() ? 0 : group_ends.back();
    group_ends.push_back(std::min(begin + static_cast<int32_t>(random.below(4)), static_cast<int32_t>(terms.size())));
  }
  if (random.below(3) == 0) group_ends.clear();
  const bool weighted = random.below(2) == 0;
  SCOPED_TRACE(fmt::format("hidden {} dtype {} terms {} groups {} weighted {} any pattern {}", hidden, static_cast<int>(dtype),
                           terms.size(), group_ends.size(), weighted, any_pattern));
  check_sum({.dtype = dtype,
             .hidden = static_cast<int64_t>(hidden),
             .weighted = weighted,
             .terms = terms,
             .group_ends = group_ends,
             .bias = {random.below(2) == 0 ? nullptr : rows[0].data(), random.below(3) == 0 ? rows[1].data() : nullptr},
             .out = nullptr,
             .store = Store::kCached},
            random.below(4) == 0 ? 4 * random.below(16) : 0);
}

TEST(Rows, SumAnySize) {
  Random random;
  for (const size_t hidden : test_sizes()) {
    for (const tern_dtype dtype : kDtypes) {
      for (int repeat = 0; repeat < 3; ++repeat) {
        check_random_sum(random, dtype, hidden);
        if (HasFatalFailure()) return;
      }
    }
  }
}

// Every pattern of bf16 and fp16 as a row's element, widened, weighted and rounded again.
TEST(Rows, SumOfEveryPattern) {
  for (const tern_dtype dtype : {TERN_DTYPE_BF16, TERN_DTYPE_FP16}) {
    Bytes row(2 << 16);
    for (uint32_t bits = 0; bits < 1 << 16; ++bits) reinterpret_cast<uint16_t*>(row.data())[bits] = static_cast<uint16_t>(bits);
    for (const float weight : {1.0f, 0.3f, -3.0f, 0x1p-12f, 0x1p14f}) {
      const SumTerm terms[] = {{row.data(), weight}};
      check_sum(
          {.dtype = dtype, .hidden = 1 << 16, .weighted = true, .terms = terms, .group_ends = {}, .bias = {}, .out = nullptr, .store = {}},
          0);
    }
  }
}

// Rounding to the short types around every boundary: rows of 1 and -1, with the value to be rounded as their weight.
TEST(Rows, SumRoundsLikeTheScalarTwin) {
  constexpr size_t kHidden = 19;
  const auto check = [&](tern_dtype dtype, const ShortType& type, uint16_t (*narrow)(float)) {
    uint16_t row[kHidden], out[kHidden];
    for (size_t i = 0; i < kHidden; ++i) set(dtype, row, i, i % 3 == 0 ? -1.0f : 1.0f);
    for (const float x : type.boundaries()) {
      const SumTerm terms[] = {{row, x}};
      cpu::sum_rows({dtype, kHidden, true, terms, {}, {}, out, Store::kCached});
      const uint16_t expected[] = {narrow(0.0f + -x), narrow(0.0f + x)};
      for (size_t i = 0; i < kHidden; ++i)
        if (out[i] != expected[i % 3 == 0 ? 0 : 1]) FAIL() << x << " at " << i << ": " << out[i];
    }
  };
  for_each_target([&] {
    check(TERN_DTYPE_BF16, kBf16, f32_to_bf16);
    check(TERN_DTYPE_FP16, kF16, f32_to_f16);
  });
}

// ------------------------------------------------------------------------------------------- logarithmic encoding

Bytes encoded(const Bytes& row) {
  const auto hidden = static_cast<int64_t>(row.size() / sizeof(float));
  Bytes result(static_cast<size_t>(log_row_bytes(hidden)));
  for (int64_t first = 0; first < hidden; first += kLogBlock)
    encode_log_block(reinterpret_cast<const float*>(row.data()) + first, std::min(kLogBlock, hidden - first),
                     result.data() + first / kLogBlock * kLogBlockBytes);
  return result;
}

Bytes decoded(const Bytes& row, int64_t hidden) {
  Bytes result(static_cast<size_t>(hidden) * sizeof(float));
  for (int64_t first = 0; first < hidden; first += kLogBlock)
    decode_log_block(row.data() + first / kLogBlock * kLogBlockBytes, std::min(kLogBlock, hidden - first),
                     reinterpret_cast<float*>(result.data()) + first);
  return result;
}

// Ordinary values, any patterns, or magnitudes of many octaves with zeros between.
Bytes row_of_any_kind(Random& random, size_t hidden) {
  Bytes row(hidden * sizeof(float));
  const size_t kind = random.below(4);
  random.fill(TERN_DTYPE_FP32, row, kind == 0);
  auto* values = reinterpret_cast<float*>(row.data());
  for (size_t i = 0; kind == 1 && i < hidden; ++i)
    values[i] = random.below(5) == 0 ? 0.0f : std::ldexp(values[i], static_cast<int>(random.below(40)) - 20);
  return row;
}

TEST(Rows, EncodesLikeTheScalarTwin) {
  Random random;
  for (const size_t hidden : test_sizes()) {
    SCOPED_TRACE(fmt::format("hidden {}", hidden));
    const Bytes row = row_of_any_kind(random, hidden);
    const SumTerm terms[] = {{row.data(), 1.0f}};
    cpu::SumArgs args{TERN_DTYPE_FP32, static_cast<int64_t>(hidden), false, terms, {}, {}, nullptr, Store::kCached};
    args.out_wire = TERN_WIRE_LOG10BIT;
    const Bytes expected = encoded(row);
    for_each_target([&] {
      const Bytes out(expected.size());
      args.out = out.data();
      cpu::sum_rows(args);
      ASSERT_TRUE(out == expected) << first_difference(out, expected);
    });
    if (HasFatalFailure()) return;
  }
}

TEST(Rows, SumsOfEncodedRows) {
  Random random;
  for (const size_t hidden : test_sizes()) {
    std::vector<Bytes> rows, floats;
    for (int i = 0; i < 3; ++i) {
      rows.push_back(encoded(row_of_any_kind(random, hidden)));
      floats.push_back(decoded(rows.back(), static_cast<int64_t>(hidden)));
    }
    std::vector<SumTerm> terms, expected_terms;
    for (size_t i = 0; i < rows.size(); ++i) {
      const float weight = random.value();
      terms.push_back({rows[i].data(), weight});
      expected_terms.push_back({floats[i].data(), weight});
    }
    Bytes bias(hidden * sizeof(float));
    random.fill(TERN_DTYPE_FP32, bias, false);
    SCOPED_TRACE(fmt::format("hidden {}", hidden));
    const bool weighted = hidden % 2 == 0;
    cpu::SumArgs args{TERN_DTYPE_FP32, static_cast<int64_t>(hidden), weighted, expected_terms, {}, {bias.data()}, nullptr, Store::kCached};
    const Bytes expected(hidden * sizeof(float));
    expected_sum(args, expected.data());
    args.terms = terms;
    args.terms_wire = TERN_WIRE_LOG10BIT;
    for_each_target([&] {
      const Bytes out(expected.size());
      args.out = out.data();
      cpu::sum_rows(args);
      ASSERT_TRUE(out == expected) << first_difference(out, expected);
    });
    if (HasFatalFailure()) return;
  }
}

TEST(Rows, SumOfNothingIsTheBiasOrZero) {
  Random random;
  for (const tern_dtype dtype : kDtypes) {
    Bytes bias(100 * element_bytes(dtype));
    random.fill(dtype, bias, false);
    const int32_t empty_groups[] = {0, 0};
    for (const void* given : {static_cast<const void*>(nullptr), static_cast<const void*>(bias.data())}) {
      for (const std::span<const int32_t> groups : {std::span<const int32_t>(), std::span<const int32_t>(empty_groups)})
        check_sum({.dtype = dtype,
                   .hidden = 100,
                   .weighted = true,
                   .terms = {},
                   .group_ends = groups,
                   .bias = {given, nullptr},
                   .out = nullptr,
                   .store = {}},
                  0);
    }
  }
}

// 1 + 2^-12 squared is rounded before 1 is taken away: a fused multiply-add would leave 2^-24 more.
TEST(Rows, ProductsAreRoundedBeforeTheyAreAdded) {
  const float near_one = 1.0f + 0x1p-12f;
  const std::vector<float> ones(40, -1.0f), row(40, near_one);
  const SumTerm terms[] = {{ones.data(), 1.0f}, {row.data(), near_one}};
  for_each_target([&] {
    std::vector<float> out(40);
    cpu::sum_rows({TERN_DTYPE_FP32, 40, true, terms, {}, {}, out.data(), Store::kCached});
    for (const float x : out) ASSERT_EQ(x, 0x1p-11f);
  });
}

TEST(Rows, OtherTypesAreRefused) {
  uint8_t row[16] = {}, out[16], scales[4];
  EXPECT_THROW(cpu::cast_row_fp8(row, TERN_DTYPE_BYTES, 16, TERN_ENCODING_FP8_F32, out, scales), Failure);
  EXPECT_THROW(cpu::sum_rows({TERN_DTYPE_FP8_E4M3, 16, false, {}, {}, {}, out, Store::kCached}), Failure);
}

}  // namespace
}  // namespace tern::test
