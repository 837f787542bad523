// SPDX-License-Identifier: Apache-2.0
// Rows moved and made by one warp with ordinary loads and stores of 16 bytes.
#pragma once

#include <type_traits>

#include "device/numbers.cuh"
#include "device/order.cuh"

namespace tern::kernels {

using device::Vec16;

// Copies a row to the address of every destination: for_each(visit) calls visit(std::byte* to). Rows and addresses are multiples of 16 bytes.
// A warp has kUnroll * 512 bytes on their way; `begun` is called when the first of them are.
template <int kUnroll = 8, typename ForEach, typename Begun>
__device__ __forceinline__ void copy_row(const std::byte* from, int64_t row_bytes, ForEach for_each, Begun begun) {
  constexpr int64_t kStep = 32 * sizeof(Vec16);
  for (int64_t first = device::lane_idx() * sizeof(Vec16); first < row_bytes; first += kUnroll * kStep) {
    Vec16 values[kUnroll] = {};  // or registers that are set under a condition would be kept for them from row to row
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (first + u * kStep < row_bytes) values[u] = device::load_vec16(from + first + u * kStep);
    if (first == device::lane_idx() * sizeof(Vec16)) begun();
    for_each([&](std::byte* to) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
        if (first + u * kStep < row_bytes) *reinterpret_cast<Vec16*>(to + first + u * kStep) = values[u];
    });
  }
}

template <int kUnroll = 8, typename ForEach>
__device__ __forceinline__ void copy_row(const std::byte* from, int64_t row_bytes, ForEach for_each) {
  copy_row<kUnroll>(from, row_bytes, for_each, [] {});
}

// 16 bytes of a row of Wire as fp8 e4m3.
template <typename Wire>
struct CastVector {
  static constexpr int kBlock = 128;  // channels that share a scale
  using Values = std::conditional_t<Wire::kElements == 8, uint2, uint32_t>;
  Values values;
  device::BlockScale scale;
};

// Casts a vector of a row for each thread of a warp. The threads of a block of channels are neighbours, and have the same scale.
template <typename Wire>
__device__ __forceinline__ CastVector<Wire> cast_channels(const Vec16& raw, int encoding) {
  constexpr int kLanes = CastVector<Wire>::kBlock / Wire::kElements, kWords = Wire::kElements / 4;
  float values[Wire::kElements];
  Wire::widen(raw, values);
  float amax = 1e-4f;
#pragma unroll
  for (int i = 0; i < Wire::kElements; ++i) amax = fmaxf(amax, fabsf(values[i]));  // fmaxf leaves NaNs out
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, step));
  const device::BlockScale scale = device::scale_of(amax, encoding);
  uint32_t words[kWords];
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    const float* v = values + 4 * i;
    const uint32_t low = device::narrow_e4m3x2(__fmul_rn(v[0], scale.multiplier), __fmul_rn(v[1], scale.multiplier));
    const uint32_t high = device::narrow_e4m3x2(__fmul_rn(v[2], scale.multiplier), __fmul_rn(v[3], scale.multiplier));
    words[i] = low | high << 16;
  }
  if constexpr (kWords == 2)
    return {{words[0], words[1]}, scale};
  else
    return {words[0], scale};
}

// The scale of a block, by one thread.
__device__ __forceinline__ void store_scale(const device::BlockScale& scale, int64_t block, int encoding, std::byte* scales) {
  if (encoding == TERN_ENCODING_FP8_UE8M0)
    scales[block] = static_cast<std::byte>(scale.stored);
  else
    reinterpret_cast<uint32_t*>(scales)[block] = scale.stored;
}

// Casts a row to fp8 e4m3 in blocks of 128 channels, as tern_encoding defines. `row` and `out_values` are aligned to 16 bytes. Loads of several
// vectors are under way together. A function of its own, for the registers that they take.
template <typename Wire>
__device__ __noinline__ void cast_row(const std::byte* row, int64_t hidden, int encoding, std::byte* out_values, std::byte* out_scales) {
  constexpr int kUnroll = 7, kStep = 32 * Wire::kElements, kElementBytes = 16 / Wire::kElements;
  const int lane = static_cast<int>(device::lane_idx());
  for (int64_t first = 0; first < hidden; first += kUnroll * kStep) {
    const int64_t channel = first + lane * Wire::kElements;  // hidden is a multiple of 16, so a vector's channels are all there or none
    Vec16 raw[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      raw[u] = channel + u * kStep < hidden ? device::load_vec16(row + (channel + u * kStep) * kElementBytes) : Vec16{};
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (first + u * kStep >= hidden) break;
      const CastVector<Wire> cast = cast_channels<Wire>(raw[u], encoding);
      const int64_t at = channel + u * kStep;
      if (at >= hidden) continue;
      *reinterpret_cast<typename CastVector<Wire>::Values*>(out_values + at) = cast.values;
      if (at % CastVector<Wire>::kBlock == 0) store_scale(cast.scale, at / CastVector<Wire>::kBlock, encoding, out_scales);
    }
  }
  if (encoding != TERN_ENCODING_FP8_UE8M0) return;
  const int64_t num_blocks = layout::align_up(hidden, 128) / 128;
  if (num_blocks + lane < layout::align_up(num_blocks, 4)) out_scales[num_blocks + lane] = std::byte{0};
}

}  // namespace tern::kernels
