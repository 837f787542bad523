// SPDX-License-Identifier: Apache-2.0
// The vector code of rows.cc, compiled once for every kind of vectors that the processor family has (Highway's foreach_target).
// Only operations that round the same everywhere are used: the results do not depend on the kind.

// Toggled by foreach_target, in place of #pragma once.
#if defined(TERN_CPU_ROWS_SIMD) == defined(HWY_TARGET_TOGGLE)
#ifdef TERN_CPU_ROWS_SIMD
#undef TERN_CPU_ROWS_SIMD
#else
#define TERN_CPU_ROWS_SIMD
#endif

#include <hwy/highway.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

#include "base/log_rows.h"
#include "base/numeric.h"
#include "rows/rows.h"

HWY_BEFORE_NAMESPACE();
namespace tern::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// A vector of floats, and vectors with as many elements of other types.
using Floats = hn::ScalableTag<float>;
template <typename Element>
using As = hn::Rebind<Element, Floats>;
template <typename Element>
using Vec = hn::Vec<As<Element>>;

// Of all of these types. (Highway's MaxLanes is too small for the narrower ones on SVE.)
inline constexpr size_t kMaxLanes = hn::MaxLanes(Floats());

inline constexpr size_t kLineBytes = 64;
inline constexpr size_t kScaleBlock = 128;  // channels that share a scale
inline constexpr size_t kSumBlock = 1024;   // channels that are summed in the first-level cache

// ------------------------------------------------------------------------------------------------- loads and stores

// The first elements at `from`: a whole vector, or the `num` that are left, and zeros.
template <typename Element>
HWY_INLINE Vec<Element> load(const Element* from, size_t num) {
  const As<Element> tag;
  if (HWY_LIKELY(num >= hn::Lanes(tag))) return hn::LoadU(tag, from);
  HWY_ALIGN_MAX Element padded[kMaxLanes] = {};
  std::memcpy(padded, from, num * sizeof(Element));
  return hn::Load(tag, padded);
}

template <typename Element>
HWY_INLINE void store(Vec<Element> vector, Element* to, size_t num) {
  const As<Element> tag;
  if (HWY_LIKELY(num >= hn::Lanes(tag))) return hn::StoreU(vector, tag, to);
  HWY_ALIGN_MAX Element padded[kMaxLanes];
  hn::Store(vector, tag, padded);
  std::memcpy(to, padded, num * sizeof(Element));
}

// Whether vectors can be streamed to `to` and on: they must be aligned, and Highway may write more than a shorter one.
template <typename Element>
HWY_INLINE bool can_stream(const Element* to) {
  const size_t vector_bytes = hn::Lanes(As<Element>()) * sizeof(Element);
  return vector_bytes >= HWY_STREAM_MULTIPLE && reinterpret_cast<uintptr_t>(to) % vector_bytes == 0;
}

// Calls step(i, n) for elements i to i + n of `num`: a whole vector each time, then what is left, so that the loop has no other case.
template <typename Step>
HWY_INLINE void for_each_vector(size_t num, const Step& step) {
  const size_t lanes = hn::Lanes(Floats());
  size_t i = 0;
  for (; i + lanes <= num; i += lanes) step(i, lanes);
  if (i < num) step(i, num - i);
}

// ----------------------------------------------------------------------------------------------------- conversions

HWY_INLINE Vec<uint32_t> bits_of(Vec<float> value) { return hn::BitCast(As<uint32_t>(), value); }
HWY_INLINE Vec<uint32_t> all(uint32_t bits) { return hn::Set(As<uint32_t>(), bits); }
HWY_INLINE Vec<float> floats_of(Vec<uint32_t> bits) { return hn::BitCast(Floats(), bits); }
HWY_INLINE Vec<float> all_floats(uint32_t bits) { return floats_of(all(bits)); }

// Magnitudes are compared as signed integers, which every kind of vectors has.
HWY_INLINE Vec<int32_t> magnitude_of(Vec<uint32_t> bits) { return hn::BitCast(As<int32_t>(), hn::And(bits, all(~kF32Sign))); }
HWY_INLINE Vec<int32_t> all_magnitudes(uint32_t bits) { return hn::Set(As<int32_t>(), static_cast<int32_t>(bits)); }
HWY_INLINE Vec<uint32_t> unsigned_of(Vec<int32_t> magnitude) { return hn::BitCast(As<uint32_t>(), magnitude); }

HWY_INLINE Vec<uint32_t> replace_nan(Vec<float> value, uint32_t nan, Vec<uint32_t> converted) {
  return hn::IfThenElse(hn::RebindMask(As<uint32_t>(), hn::IsNaN(value)), all(nan), converted);
}

// The vector twins of round_to_short and widen_short in base/numeric.h.
template <ShortFloat kFormat>
HWY_INLINE Vec<uint32_t> round_to_short(Vec<int32_t> magnitude) {
  const Vec<uint32_t> bits = unsigned_of(magnitude);
  const Vec<uint32_t> subnormal = hn::Sub(bits_of(hn::Add(floats_of(bits), all_floats(kFormat.magic))), all(kFormat.magic));
  const Vec<uint32_t> is_odd = hn::And(hn::ShiftRight<kFormat.shift>(bits), all(1));
  const uint32_t rounding = (1u << (kFormat.shift - 1)) - 1 - kFormat.bias;
  const Vec<uint32_t> normal = hn::ShiftRight<kFormat.shift>(hn::Add(hn::Add(bits, all(rounding)), is_odd));
  const auto is_subnormal = hn::Lt(magnitude, all_magnitudes(kFormat.min_normal));
  return hn::IfThenElse(hn::RebindMask(As<uint32_t>(), is_subnormal), subnormal, normal);
}

template <ShortFloat kFormat>
HWY_INLINE Vec<uint32_t> widen_short(Vec<uint32_t> short_magnitude) {
  const Vec<uint32_t> shifted = hn::ShiftLeft<kFormat.shift>(short_magnitude);
  const Vec<float> min_normal = all_floats(kFormat.min_normal);
  const Vec<uint32_t> subnormal = bits_of(hn::Sub(floats_of(hn::Or(shifted, bits_of(min_normal))), min_normal));
  const auto is_subnormal = hn::Lt(hn::BitCast(As<int32_t>(), shifted), all_magnitudes(1u << 23));
  return hn::IfThenElse(hn::RebindMask(As<uint32_t>(), is_subnormal), subnormal, hn::Add(shifted, all(kFormat.bias)));
}

HWY_INLINE Vec<uint8_t> narrow_e4m3(Vec<float> value) {
  const Vec<uint32_t> bits = bits_of(value);
  const Vec<int32_t> magnitude = hn::Min(magnitude_of(bits), all_magnitudes(kE4m3Saturation));
  const Vec<uint32_t> rounded = hn::OrAnd(round_to_short<kE4m3Format>(magnitude), hn::ShiftRight<24>(bits), all(0x80));
  return hn::TruncateTo(As<uint8_t>(), replace_nan(value, kE4m3NaN, rounded));
}

// The types of rows: their elements, to floats (exact) and from floats (rounded to nearest even; one NaN).
struct Bf16 {
  using Element = uint16_t;
  static HWY_INLINE Vec<float> widen(Vec<uint16_t> element) { return floats_of(hn::ShiftLeft<16>(hn::PromoteTo(As<uint32_t>(), element))); }
  static HWY_INLINE Vec<uint16_t> narrow(Vec<float> value) {
    const Vec<uint32_t> bits = bits_of(value);
    const Vec<uint32_t> is_odd = hn::And(hn::ShiftRight<16>(bits), all(1));
    const Vec<uint32_t> rounded = hn::ShiftRight<16>(hn::Add(hn::Add(bits, all(0x7fff)), is_odd));
    return hn::TruncateTo(As<uint16_t>(), replace_nan(value, kBf16NaN, rounded));
  }
};

struct F16 {
  using Element = uint16_t;
  static HWY_INLINE Vec<float> widen(Vec<uint16_t> element) {
    const Vec<uint32_t> bits = hn::PromoteTo(As<uint32_t>(), element);
    const Vec<uint32_t> magnitude = hn::And(bits, all(0x7fff));
    const Vec<uint32_t> sign = hn::ShiftLeft<16>(hn::Xor(bits, magnitude));
    const Vec<uint32_t> not_finite = hn::Or(hn::ShiftLeft<kF16Format.shift>(magnitude), all(kF32Inf));
    const auto is_finite = hn::Lt(hn::BitCast(As<int32_t>(), magnitude), all_magnitudes(0x7c00));
    const auto widened = hn::IfThenElse(hn::RebindMask(As<uint32_t>(), is_finite), widen_short<kF16Format>(magnitude), not_finite);
    return floats_of(hn::Or(sign, widened));
  }
  static HWY_INLINE Vec<uint16_t> narrow(Vec<float> value) {
    const Vec<uint32_t> bits = bits_of(value);
    const Vec<int32_t> magnitude = hn::Min(magnitude_of(bits), all_magnitudes(kF16Overflow));
    const Vec<uint32_t> rounded = hn::OrAnd(round_to_short<kF16Format>(magnitude), hn::ShiftRight<16>(bits), all(0x8000));
    return hn::TruncateTo(As<uint16_t>(), replace_nan(value, kF16NaN, rounded));
  }
};

struct F32 {
  using Element = float;
  static HWY_INLINE Vec<float> widen(Vec<float> element) { return element; }
  static HWY_INLINE Vec<float> narrow(Vec<float> value) { return floats_of(replace_nan(value, kF32NaN, bits_of(value))); }
};

// ---------------------------------------------------------------------------------------------------------- copies

// Streams whole lines only: a line that is partly streamed and partly stored would be written to memory twice.
inline void stream_row(void* to, const void* from, size_t num_bytes) {
  const hn::ScalableTag<uint8_t> bytes;
  const size_t vector_bytes = hn::Lanes(bytes);
  const size_t step_bytes = std::max(kLineBytes, vector_bytes);
  auto* out = static_cast<uint8_t*>(to);
  const auto* in = static_cast<const uint8_t*>(from);
  const size_t head_bytes = std::min(num_bytes, -reinterpret_cast<uintptr_t>(out) % step_bytes);
  std::memcpy(out, in, head_bytes);
  size_t i = head_bytes;
  for (; i + step_bytes <= num_bytes; i += step_bytes) {
    for (size_t j = i; j < i + step_bytes; j += vector_bytes) hn::Stream(hn::LoadU(bytes, in + j), bytes, out + j);
  }
  std::memcpy(out + i, in + i, num_bytes - i);
}

// ----------------------------------------------------------------------------------------------------------- casts

struct BlockScale {
  float multiplier;  // of the values
  uint32_t stored;   // a float's bits, or a biased exponent
};

HWY_INLINE BlockScale scale_of(float amax, tern_encoding encoding) {
  const float scale = amax * (1.0f / kE4m3Max);
  if (encoding == TERN_ENCODING_FP8_F32) return {kE4m3Max / amax, std::bit_cast<uint32_t>(scale)};
  const uint32_t exponent = round_up_to_ue8m0(scale);
  const bool is_inf = exponent == 255;  // otherwise at most 247, and at least 105 because amax is at least 1e-4
  const float multiplier = is_inf ? 0.0f : std::bit_cast<float>((254 - exponent) << 23);
  return {multiplier, encoding == TERN_ENCODING_FP8_UE8M0 ? exponent : exponent << 23};
}

// Writes the block as floats to `values` and returns its largest magnitude, at least 1e-4, NaNs left out.
template <class Wire>
HWY_INLINE float widen_block(const typename Wire::Element* block, size_t num, float* HWY_RESTRICT values) {
  Vec<int32_t> amax = all_magnitudes(std::bit_cast<uint32_t>(1e-4f));
  for_each_vector(num, [&](size_t i, size_t n) HWY_ATTR {
    const Vec<float> value = Wire::widen(load(block + i, n));
    hn::Store(value, Floats(), values + i);
    const Vec<int32_t> magnitude = magnitude_of(bits_of(value));
    amax = hn::Max(amax, hn::IfThenZeroElse(hn::Gt(magnitude, all_magnitudes(kF32Inf)), magnitude));
  });
  return std::bit_cast<float>(hn::GetLane(hn::MaxOfLanes(As<int32_t>(), amax)));
}

template <class Wire>
void cast_row_of(const void* row, size_t num, tern_encoding encoding, uint8_t* HWY_RESTRICT out_values, uint8_t* HWY_RESTRICT out_scales) {
  const auto* in = static_cast<const typename Wire::Element*>(row);
  const size_t scale_bytes = encoding == TERN_ENCODING_FP8_UE8M0 ? 1 : sizeof(float);
  HWY_ALIGN_MAX float values[kScaleBlock];
  for (size_t first = 0; first < num; first += kScaleBlock) {
    const size_t num_block = std::min(kScaleBlock, num - first);
    const BlockScale scale = scale_of(widen_block<Wire>(in + first, num_block, values), encoding);
    const Vec<float> multiplier = hn::Set(Floats(), scale.multiplier);
    for_each_vector(num_block, [&](size_t i, size_t n) HWY_ATTR {
      store(narrow_e4m3(hn::Mul(hn::Load(Floats(), values + i), multiplier)), out_values + first + i, n);
    });
    const auto exponent = static_cast<uint8_t>(scale.stored);
    if (scale_bytes == 1)
      std::memcpy(out_scales, &exponent, 1);
    else
      std::memcpy(out_scales, &scale.stored, sizeof(float));
    out_scales += scale_bytes;
  }
}

inline void cast_row(const void* row, tern_dtype dtype, size_t num, tern_encoding encoding, uint8_t* out_values, uint8_t* out_scales) {
  if (dtype == TERN_DTYPE_BF16) return cast_row_of<Bf16>(row, num, encoding, out_values, out_scales);
  if (dtype == TERN_DTYPE_FP16) return cast_row_of<F16>(row, num, encoding, out_values, out_scales);
  return cast_row_of<F32>(row, num, encoding, out_values, out_scales);
}

// --------------------------------------------------------------------------------------- the logarithmic encoding

// The scale of a block of floats, behind which there are zeros to a whole vector.
HWY_INLINE LogScale log_scale_of(const float* values, size_t num) {
  Vec<int32_t> most = all_magnitudes(0), least = all_magnitudes(~kF32Sign);
  for_each_vector(num, [&](size_t i, size_t n) HWY_ATTR {
    const Vec<int32_t> magnitude = magnitude_of(bits_of(load(values + i, n)));
    const auto counts = hn::And(hn::Lt(magnitude, all_magnitudes(kF32Inf)), hn::Gt(magnitude, all_magnitudes(0)));
    most = hn::Max(most, hn::IfThenElseZero(counts, magnitude));
    least = hn::Min(least, hn::IfThenElse(counts, magnitude, all_magnitudes(~kF32Sign)));
  });
  const As<int32_t> tag;
  return make_log_scale(static_cast<uint32_t>(hn::GetLane(hn::MaxOfLanes(tag, most))),
                        static_cast<uint32_t>(hn::GetLane(hn::MinOfLanes(tag, least))));
}

// The vector twin of encode_log. The quotient in floats is right or one off, since it is at most 511.
HWY_INLINE Vec<uint32_t> encode_log_codes(LogScale scale, Vec<float> inverse, Vec<float> values) {
  const Vec<int32_t> magnitude = magnitude_of(bits_of(values));
  const Vec<int32_t> step = all_magnitudes(scale.step);
  const Vec<int32_t> distance = hn::Min(hn::Sub(all_magnitudes(scale.top), magnitude), all_magnitudes((kLogSteps + 1) * scale.step));
  const Vec<int32_t> rounded = hn::Add(distance, all_magnitudes(scale.step / 2));
  const Vec<int32_t> guess = hn::ConvertTo(As<int32_t>(), hn::Mul(hn::ConvertTo(Floats(), rounded), inverse));
  const Vec<int32_t> rest = hn::Sub(rounded, hn::Mul(guess, step));
  const Vec<int32_t> one = all_magnitudes(1);
  // code = 511 - steps
  Vec<int32_t> code = hn::Sub(all_magnitudes(kLogSteps + 1), guess);
  code = hn::Sub(code, hn::IfThenElseZero(hn::Not(hn::Lt(rest, step)), one));
  code = hn::Add(code, hn::IfThenElseZero(hn::Lt(rest, all_magnitudes(0)), one));
  const Vec<uint32_t> sign = hn::And(hn::ShiftRight<22>(bits_of(values)), all(kLogNaN));
  const Vec<uint32_t> with_sign = hn::Or(unsigned_of(code), sign);
  const auto is_zero = hn::RebindMask(As<uint32_t>(), hn::Eq(code, all_magnitudes(0)));
  const auto is_finite = hn::RebindMask(As<uint32_t>(), hn::Lt(magnitude, all_magnitudes(kF32Inf)));
  return hn::IfThenElse(is_finite, hn::IfThenZeroElse(is_zero, with_sign), all(kLogNaN));
}

// The vector twin of decode_log.
HWY_INLINE Vec<float> decode_log_codes(LogScale scale, Vec<uint32_t> code) {
  const Vec<uint32_t> magnitude_code = hn::And(code, all(kLogNaN - 1));
  const Vec<uint32_t> steps = hn::Sub(all(kLogSteps + 1), magnitude_code);
  const Vec<uint32_t> magnitude = hn::Sub(all(scale.top), hn::Mul(steps, all(scale.step)));
  const Vec<uint32_t> value = hn::Or(magnitude, hn::ShiftLeft<22>(hn::And(code, all(kLogNaN))));
  const Vec<uint32_t> none = hn::IfThenZeroElse(hn::Eq(code, all(0)), all(kF32NaN));
  return floats_of(hn::IfThenElse(hn::Eq(magnitude_code, all(0)), none, value));
}

// The upper bits of a block's codes, a byte for each, to and from 4 in a byte. Four bytes are a word, the first its lowest (machines are
// little-endian).
struct UpperBits {
  HWY_ALIGN_MAX uint32_t words[kLogBlock / 4 + kMaxLanes];  // a block, and room for a vector behind it
  uint8_t* bytes() { return reinterpret_cast<uint8_t*>(words); }
};

HWY_INLINE void pack_upper_bits(const UpperBits& upper, size_t num, uint8_t* HWY_RESTRICT packed) {
  for_each_vector((num + 3) / 4, [&](size_t j, size_t n) HWY_ATTR {
    const Vec<uint32_t> word = hn::Load(As<uint32_t>(), upper.words + j);
    const Vec<uint32_t> halves = hn::Or(word, hn::ShiftRight<6>(word));
    store(hn::TruncateTo(As<uint8_t>(), hn::Or(halves, hn::ShiftRight<12>(halves))), packed + j, n);
  });
}

HWY_INLINE void unpack_upper_bits(const uint8_t* HWY_RESTRICT packed, size_t num, UpperBits& upper) {
  for_each_vector((num + 3) / 4, [&](size_t j, size_t n) HWY_ATTR {
    const Vec<uint32_t> byte = hn::PromoteTo(As<uint32_t>(), load(packed + j, n));
    const Vec<uint32_t> halves = hn::Or(byte, hn::ShiftLeft<12>(byte));
    hn::Store(hn::And(hn::Or(halves, hn::ShiftLeft<6>(halves)), all(0x03030303)), As<uint32_t>(), upper.words + j);
  });
}

inline void encode_log_block(const float* HWY_RESTRICT values, size_t num, uint8_t* HWY_RESTRICT block) {
  const LogScale scale = log_scale_of(values, num);
  const Vec<float> inverse = hn::Set(Floats(), 1.0f / static_cast<float>(scale.step));
  UpperBits upper = {};
  for_each_vector(num, [&](size_t i, size_t n) HWY_ATTR {
    const Vec<uint32_t> code = encode_log_codes(scale, inverse, load(values + i, n));
    store(hn::TruncateTo(As<uint8_t>(), hn::And(code, all(0xff))), block + i, n);
    hn::StoreU(hn::TruncateTo(As<uint8_t>(), hn::ShiftRight<8>(code)), As<uint8_t>(), upper.bytes() + i);
  });
  // A last vector has codes of zero behind the row, so that the upper bits of channels that there are not are zeros.
  pack_upper_bits(upper, num, block + kLogHighAt);
  std::memcpy(block + kLogScaleAt, &scale, sizeof(scale));
}

// use(i, n, floats) for the vectors of a block.
template <typename Use>
HWY_INLINE void decode_log_block(const uint8_t* HWY_RESTRICT block, size_t num, const Use& use) {
  LogScale scale;
  std::memcpy(&scale, block + kLogScaleAt, sizeof(scale));
  UpperBits upper;
  unpack_upper_bits(block + kLogHighAt, num, upper);
  for_each_vector(num, [&](size_t i, size_t n) HWY_ATTR {
    const Vec<uint32_t> low = hn::PromoteTo(As<uint32_t>(), load(block + i, n));
    const Vec<uint32_t> high = hn::PromoteTo(As<uint32_t>(), hn::LoadU(As<uint8_t>(), upper.bytes() + i));
    use(i, n, decode_log_codes(scale, hn::Or(low, hn::ShiftLeft<8>(high))));
  });
}

// ------------------------------------------------------------------------------------------------------------ sums

// The sum of some rows in one block. Starts at +0 without writing zeros: it would cost a pass, and a memset stalls behind streaming stores.
struct BlockSum {
  HWY_ALIGN_MAX float values[kSumBlock];
  bool is_zero = true;
};

HWY_INLINE Vec<float> load_sum(const float* values, bool is_zero) {
  if (is_zero) return hn::Zero(Floats());
  return hn::Load(Floats(), values);
}

template <class Wire, bool kWeighted>
HWY_INLINE void add_row(const SumTerm& term, size_t first, size_t num, BlockSum& sum) {
  const auto* in = static_cast<const typename Wire::Element*>(term.row) + first;
  const Vec<float> weight = hn::Set(Floats(), term.weight);
  const bool is_zero = std::exchange(sum.is_zero, false);
  for_each_vector(num, [&](size_t i, size_t n) HWY_ATTR {
    Vec<float> value = Wire::widen(load(in + i, n));
    hwy::Prefetch(in + i + kSumBlock);
    if constexpr (kWeighted) value = hn::Mul(weight, value);
    hn::Store(hn::Add(load_sum(sum.values + i, is_zero), value), Floats(), sum.values + i);
  });
}

// The same for a row that is encoded; `first` is a multiple of kLogBlock.
template <bool kWeighted>
HWY_INLINE void add_log_row(const SumTerm& term, size_t first, size_t num, BlockSum& sum) {
  const auto* block = static_cast<const uint8_t*>(term.row) + first / kLogBlock * kLogBlockBytes;
  const Vec<float> weight = hn::Set(Floats(), term.weight);
  const bool is_zero = std::exchange(sum.is_zero, false);
  for (size_t at = 0; at < num; at += kLogBlock, block += kLogBlockBytes) {
    decode_log_block(block, std::min<size_t>(kLogBlock, num - at), [&](size_t i, size_t, Vec<float> value) HWY_ATTR {
      if constexpr (kWeighted) value = hn::Mul(weight, value);
      hn::Store(hn::Add(load_sum(sum.values + at + i, is_zero), value), Floats(), sum.values + at + i);
    });
  }
}

template <class Wire, bool kWeighted>
HWY_INLINE void add_terms(std::span<const SumTerm> terms, size_t first, size_t num, BlockSum& sum) {
  for (const SumTerm& term : terms) add_row<Wire, kWeighted>(term, first, num, sum);
}

// Adds a group's sum, rounded to the wire type, to the total.
template <class Wire>
HWY_INLINE void add_rounded(const BlockSum& sum, size_t num, BlockSum& total) {
  const bool is_zero = std::exchange(total.is_zero, false);
  for_each_vector(num, [&](size_t i, size_t) HWY_ATTR {
    const Vec<float> rounded = Wire::widen(Wire::narrow(hn::Load(Floats(), sum.values + i)));
    hn::Store(hn::Add(load_sum(total.values + i, is_zero), rounded), Floats(), total.values + i);
  });
}

template <class Wire, bool kWeighted>
HWY_INLINE void add_group(std::span<const SumTerm> group, size_t first, size_t num, BlockSum& total) {
  if (group.empty()) return;
  // A row by itself is of the wire type already. (Zeros lose their sign in +0 + x, but in the total, which is never -0, they all do.)
  if (!kWeighted && group.size() == 1) return add_terms<Wire, kWeighted>(group, first, num, total);
  BlockSum sum;
  add_terms<Wire, kWeighted>(group, first, num, sum);
  add_rounded<Wire>(sum, num, total);
}

template <class Wire>
HWY_INLINE void write_vector(Vec<float> sum, size_t n, bool streams, typename Wire::Element* out) {
  using Element = typename Wire::Element;
  const Vec<Element> rounded = Wire::narrow(sum);
  if (streams && n == hn::Lanes(As<Element>()))
    hn::Stream(rounded, As<Element>(), out);
  else
    store(rounded, out, n);
}

template <class Wire>
HWY_INLINE void write_rounded(const BlockSum& total, size_t num, Store how, typename Wire::Element* out) {
  const bool streams = how == Store::kStreaming && can_stream(out);
  for_each_vector(num,
                  [&](size_t i, size_t n) HWY_ATTR { write_vector<Wire>(load_sum(total.values + i, total.is_zero), n, streams, out + i); });
}

inline void write_encoded(BlockSum& total, size_t first, size_t num, void* out) {
  if (total.is_zero) std::fill_n(total.values, num, 0.0f);
  uint8_t* block = static_cast<uint8_t*>(out) + first / kLogBlock * kLogBlockBytes;
  for (size_t at = 0; at < num; at += kLogBlock, block += kLogBlockBytes)
    encode_log_block(total.values + at, std::min<size_t>(kLogBlock, num - at), block);
}

// The same sum of so few rows that it stays in registers.
template <class Wire, bool kWeighted, size_t kNumTerms>
HWY_INLINE void sum_few(const SumArgs& args, size_t first, size_t num) {
  using Element = typename Wire::Element;
  const Element* in[kNumTerms];
  for (size_t t = 0; t < kNumTerms; ++t) in[t] = static_cast<const Element*>(args.terms[t].row) + first;
  Element* out = static_cast<Element*>(args.out) + first;
  const bool streams = args.store == Store::kStreaming && can_stream(out);
  for_each_vector(num, [&](size_t i, size_t n) HWY_ATTR {
    Vec<float> sum = hn::Zero(Floats());
    for (size_t t = 0; t < kNumTerms; ++t) {
      Vec<float> value = Wire::widen(load(in[t] + i, n));
      hwy::Prefetch(in[t] + i + kSumBlock);
      if constexpr (kWeighted) value = hn::Mul(hn::Set(Floats(), args.terms[t].weight), value);
      sum = hn::Add(sum, value);
    }
    write_vector<Wire>(sum, n, streams, out + i);
  });
}

// False: there are too many rows, or there is more to do than to add them.
template <class Wire, bool kWeighted>
bool try_sum_few(const SumArgs& args, size_t first, size_t num) {
  const bool is_plain = args.bias[0] == nullptr && args.bias[1] == nullptr && args.group_ends.empty() &&
                        args.terms_wire == TERN_WIRE_AS_DTYPE && args.out_wire == TERN_WIRE_AS_DTYPE;
  if (!is_plain) return false;
  switch (args.terms.size()) {
    case 1: sum_few<Wire, kWeighted, 1>(args, first, num); return true;
    case 2: sum_few<Wire, kWeighted, 2>(args, first, num); return true;
    case 3: sum_few<Wire, kWeighted, 3>(args, first, num); return true;
    case 4: sum_few<Wire, kWeighted, 4>(args, first, num); return true;
    default: return false;
  }
}

template <class Wire, bool kWeighted>
void sum_block(const SumArgs& args, size_t first, size_t num) {
  if (try_sum_few<Wire, kWeighted>(args, first, num)) return;
  BlockSum total;
  for (const void* bias : args.bias) {
    if (bias != nullptr) add_row<Wire, false>({bias, 1.0f}, first, num, total);
  }
  if (args.terms_wire == TERN_WIRE_LOG10BIT) {
    for (const SumTerm& term : args.terms) add_log_row<kWeighted>(term, first, num, total);
  } else if (args.terms_wire == TERN_WIRE_FP32) {
    add_terms<F32, kWeighted>(args.terms, first, num, total);
  } else if (args.group_ends.empty()) {
    add_terms<Wire, kWeighted>(args.terms, first, num, total);
  }
  size_t begin = 0;
  for (const int32_t end : args.group_ends) {
    add_group<Wire, kWeighted>(args.terms.subspan(begin, end - begin), first, num, total);
    begin = end;
  }
  if (args.out_wire == TERN_WIRE_LOG10BIT) return write_encoded(total, first, num, args.out);
  if (args.out_wire == TERN_WIRE_FP32) return write_rounded<F32>(total, num, args.store, static_cast<float*>(args.out) + first);
  write_rounded<Wire>(total, num, args.store, static_cast<typename Wire::Element*>(args.out) + first);
}

template <class Wire>
void sum_rows_of(const SumArgs& args) {
  const auto hidden = static_cast<size_t>(args.hidden);
  for (size_t first = 0; first < hidden; first += kSumBlock) {
    const size_t num = std::min(kSumBlock, hidden - first);
    if (args.weighted)
      sum_block<Wire, true>(args, first, num);
    else
      sum_block<Wire, false>(args, first, num);
  }
}

inline void sum_row(const SumArgs& args) {
  if (args.dtype == TERN_DTYPE_BF16) return sum_rows_of<Bf16>(args);
  if (args.dtype == TERN_DTYPE_FP16) return sum_rows_of<F16>(args);
  return sum_rows_of<F32>(args);
}

}  // namespace HWY_NAMESPACE
}  // namespace tern::cpu
HWY_AFTER_NAMESPACE();

#endif  // TERN_CPU_ROWS_SIMD
