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

// Casts a vector of a row for each thread of a warp. Several threads share a block of 128 channels, whose scale the first of them stores.
template <typename Wire>
__device__ __forceinline__ void cast_vector(const Vec16& raw, bool is_in_row, int64_t channel, int encoding, std::byte* out_values,
                                            std::byte* out_scales) {
  constexpr int kBlock = 128, kLanes = kBlock / Wire::kElements, kWords = Wire::kElements / 4;
  float values[Wire::kElements];
  Wire::widen(raw, values);
  float amax = 1e-4f;
#pragma unroll
  for (int i = 0; i < Wire::kElements; ++i) amax = fmaxf(amax, fabsf(values[i]));  // fmaxf leaves NaNs out
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, step));
  const device::BlockScale scale = device::scale_of(amax, encoding);
  if (!is_in_row) return;
  uint32_t words[kWords];
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    const float* v = values + 4 * i;
    const uint32_t low = device::narrow_e4m3x2(__fmul_rn(v[0], scale.multiplier), __fmul_rn(v[1], scale.multiplier));
    const uint32_t high = device::narrow_e4m3x2(__fmul_rn(v[2], scale.multiplier), __fmul_rn(v[3], scale.multiplier));
    words[i] = low | high << 16;
  }
  if constexpr (kWords == 2)
    *reinterpret_cast<uint2*>(out_values + channel) = {words[0], words[1]};
  else
    *reinterpret_cast<uint32_t*>(out_values + channel) = words[0];
  if (channel % kBlock != 0) return;
  if (encoding == TERN_ENCODING_FP8_UE8M0)
    out_scales[channel / kBlock] = static_cast<std::byte>(scale.stored);
  else
    reinterpret_cast<uint32_t*>(out_scales)[channel / kBlock] = scale.stored;
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
      cast_vector<Wire>(raw[u], channel + u * kStep < hidden, channel + u * kStep, encoding, out_values, out_scales);
    }
  }
  if (encoding != TERN_ENCODING_FP8_UE8M0) return;
  const int64_t num_blocks = layout::align_up(hidden, 128) / 128;
  if (num_blocks + lane < layout::align_up(num_blocks, 4)) out_scales[num_blocks + lane] = std::byte{0};
}

}  // namespace tern::kernels
