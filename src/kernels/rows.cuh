// SPDX-License-Identifier: Apache-2.0
// Rows moved and made by one warp with ordinary loads and stores of 16 bytes.
#pragma once

#include "device/numbers.cuh"
#include "device/order.cuh"

namespace tern::kernels {

using device::Vec16;

// Copies a row to the address of every destination: for_each(visit) calls visit(std::byte* to). Rows and addresses are multiples of 16 bytes.
template <typename ForEach>
__device__ __forceinline__ void copy_row(const std::byte* from, int64_t row_bytes, ForEach for_each) {
  constexpr int kUnroll = 8;
  constexpr int64_t kStep = 32 * sizeof(Vec16);
  for (int64_t first = device::lane_idx() * sizeof(Vec16); first < row_bytes; first += kUnroll * kStep) {
    Vec16 values[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (first + u * kStep < row_bytes) values[u] = device::load_vec16(from + first + u * kStep);
    for_each([&](std::byte* to) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
        if (first + u * kStep < row_bytes) *reinterpret_cast<Vec16*>(to + first + u * kStep) = values[u];
    });
  }
}

// Casts a row to fp8 e4m3 in blocks of 128 channels, as tern_encoding defines. `out_values` is aligned to 4 bytes, `row` to 16.
template <typename Wire>
__device__ void cast_row(const std::byte* row, int64_t hidden, int encoding, std::byte* out_values, std::byte* out_scales) {
  constexpr int kBlock = 128, kPerLane = kBlock / 32;
  constexpr int kElementBytes = 16 / Wire::kElements;
  const int lane = static_cast<int>(device::lane_idx());
  for (int64_t first = 0; first < hidden; first += kBlock) {
    const int64_t channel = first + lane * kPerLane;
    float values[kPerLane] = {};
    if (channel < hidden) {  // hidden is a multiple of 16, so a lane's channels are all there or none
      Vec16 raw = {};
      const std::byte* from = row + channel * kElementBytes;
      if constexpr (kElementBytes == 4)
        raw = device::load_vec16(from);
      else
        *reinterpret_cast<uint2*>(raw.words) = *reinterpret_cast<const uint2*>(from);
      float widened[Wire::kElements];
      Wire::widen(raw, widened);
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) values[i] = widened[i];
    }
    float amax = 1e-4f;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) amax = fmaxf(amax, fabsf(values[i]));  // fmaxf leaves NaNs out
#pragma unroll
    for (int step = 16; step > 0; step /= 2) amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, step));
    const device::BlockScale scale = device::scale_of(amax, encoding);
    if (channel < hidden) {
      const uint32_t low = device::narrow_e4m3x2(__fmul_rn(values[0], scale.multiplier), __fmul_rn(values[1], scale.multiplier));
      const uint32_t high = device::narrow_e4m3x2(__fmul_rn(values[2], scale.multiplier), __fmul_rn(values[3], scale.multiplier));
      *reinterpret_cast<uint32_t*>(out_values + channel) = low | high << 16;
    }
    if (lane != 0) continue;
    if (encoding == TERN_ENCODING_FP8_UE8M0)
      out_scales[first / kBlock] = static_cast<std::byte>(scale.stored);
    else
      reinterpret_cast<uint32_t*>(out_scales)[first / kBlock] = scale.stored;
  }
  if (encoding != TERN_ENCODING_FP8_UE8M0) return;
  const int64_t num_blocks = (hidden + kBlock - 1) / kBlock;
  if (num_blocks + lane < layout::align_up(num_blocks, 4)) out_scales[num_blocks + lane] = std::byte{0};
}

}  // namespace tern::kernels
