// SPDX-License-Identifier: Apache-2.0
// Rows in the 10-bit logarithmic encoding (base/log_rows.h), made and added up by one warp: a thread has Wire::kElements channels of a block, those
// that it has of 16 bytes of a row of Wire.
#pragma once

#include "base/log_rows.h"
#include "device/numbers.cuh"
#include "device/order.cuh"

namespace tern::kernels {

template <typename Wire>
struct LogRow {
  static constexpr int kChannels = Wire::kElements;
  static constexpr int kThreads = kLogBlock / kChannels;  // of a block of channels
  using Low = std::conditional_t<kChannels == 8, uint2, uint32_t>;
  using High = std::conditional_t<kChannels == 8, uint16_t, uint8_t>;

  // What a thread has of a row.
  struct Codes {
    Low low;
    High high;
    uint2 scale;
  };

  // All threads of the warp; the channels of those that are not `valid` are beyond the row's end.
  __device__ static void store(const float (&values)[kChannels], bool valid, int32_t channel, std::byte* row) {
    uint32_t most = 0, least = ~0u;
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      const uint32_t magnitude = __float_as_uint(values[i]) & ~kF32Sign;
      if (!valid || magnitude >= kF32Inf || magnitude == 0) continue;
      most = max(most, magnitude);
      least = min(least, magnitude);
    }
#pragma unroll
    for (int step = kThreads / 2; step > 0; step /= 2) {
      most = max(most, __shfl_xor_sync(~0u, most, step));
      least = min(least, __shfl_xor_sync(~0u, least, step));
    }
    if (!valid) return;
    const LogScale scale = make_log_scale(most, least);
    const uint32_t inverse = log_inverse(scale);
    uint32_t low[kChannels / 4] = {}, high = 0;
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      const uint32_t code = encode_log(scale, inverse, __float_as_uint(values[i]));
      low[i / 4] |= (code & 0xff) << (8 * (i % 4));
      high |= code >> 8 << (2 * i);
    }
    std::byte* block = row + channel / kLogBlock * kLogBlockBytes;
    const int32_t nth = channel % kLogBlock;
    if constexpr (kChannels == 8)
      *reinterpret_cast<uint2*>(block + nth) = {low[0], low[1]};
    else
      *reinterpret_cast<uint32_t*>(block + nth) = low[0];
    *reinterpret_cast<High*>(block + kLogHighAt + nth / 4) = static_cast<High>(high);
    if (nth == 0) *reinterpret_cast<uint2*>(block + kLogScaleAt) = {scale.top, scale.step};
  }

  __device__ static Codes load(const std::byte* row, int32_t channel) {
    const std::byte* block = row + channel / kLogBlock * kLogBlockBytes;
    const int32_t nth = channel % kLogBlock;
    return {*reinterpret_cast<const Low*>(block + nth), *reinterpret_cast<const High*>(block + kLogHighAt + nth / 4),
            *reinterpret_cast<const uint2*>(block + kLogScaleAt)};
  }

  __device__ static void add(float (&sum)[kChannels], const Codes& codes, float weight) {
    const LogScale scale{codes.scale.x, codes.scale.y};
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      uint32_t low;
      if constexpr (kChannels == 8)
        low = i < 4 ? codes.low.x : codes.low.y;
      else
        low = codes.low;
      const uint32_t code = (low >> (8 * (i % 4)) & 0xff) | (uint32_t{codes.high} >> (2 * i) & 3) << 8;
      sum[i] = __fadd_rn(sum[i], __fmul_rn(weight, __uint_as_float(decode_log(scale, code))));
    }
  }
};

}  // namespace tern::kernels
