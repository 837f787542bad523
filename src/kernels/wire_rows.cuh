// SPDX-License-Identifier: Apache-2.0
// Rows in the forms in which they travel, and sums over them, by one warp: a thread has Wire::kElements channels, those of 16 bytes of a row of Wire.
// A form says how a thread loads its channels, adds them to a sum, and stores a sum:
//
//   GivenRow<Wire>   as the caller has them      F32Row<Wire>   FP32      LogRow<Wire>   the 10-bit encoding (log_rows.cuh)
//
// `Rows` is that of sums.cuh, but for next_row() and row_done().
#pragma once

#include "kernels/log_rows.cuh"
#include "kernels/sums.cuh"

namespace tern::kernels {

template <typename Wire>
struct GivenRow {
  using Codes = Vec16;
  static constexpr int kChannels = Wire::kElements;

  __device__ static void store(const float (&values)[kChannels], bool valid, int32_t channel, std::byte* row) {
    if (valid) *reinterpret_cast<Vec16*>(row + bytes(channel)) = Wire::narrow(values);
  }
  __device__ static Codes load(const std::byte* row, int32_t channel) { return device::load_vec16(row + bytes(channel)); }
  __device__ static void add(float (&sum)[kChannels], const Codes& codes, float weight) { add_term<Wire>(sum, codes, weight); }

 private:
  __device__ static int64_t bytes(int32_t channel) { return int64_t{channel} * static_cast<int64_t>(sizeof(Vec16)) / kChannels; }
};

template <typename Wire>
struct F32Row {
  static constexpr int kChannels = Wire::kElements;
  static constexpr int kVecs = kChannels / device::F32::kElements;
  struct Codes {
    Vec16 vecs[kVecs];
  };

  __device__ static void store(const float (&values)[kChannels], bool valid, int32_t channel, std::byte* row) {
    if (!valid) return;
#pragma unroll
    for (int v = 0; v < kVecs; ++v) {
      Vec16 vec;
#pragma unroll
      for (int i = 0; i < 4; ++i) vec.words[i] = __float_as_uint(values[4 * v + i]);
      at(row, channel)[v] = vec;
    }
  }
  __device__ static Codes load(const std::byte* row, int32_t channel) {
    Codes codes;
#pragma unroll
    for (int v = 0; v < kVecs; ++v)
      codes.vecs[v] = device::load_vec16(row + int64_t{channel} * 4 + v * static_cast<int64_t>(sizeof(Vec16)));
    return codes;
  }
  __device__ static void add(float (&sum)[kChannels], const Codes& codes, float weight) {
#pragma unroll
    for (int i = 0; i < kChannels; ++i) sum[i] = __fadd_rn(sum[i], __fmul_rn(weight, __uint_as_float(codes.vecs[i / 4].words[i % 4])));
  }

 private:
  __device__ static Vec16* at(std::byte* row, int32_t channel) { return reinterpret_cast<Vec16*>(row + int64_t{channel} * 4); }
};

// Makes the bytes [row.begin, row.end) of a row of Wire, which are whole blocks of channels, from terms of one form in another one. All threads.
template <typename Wire, typename From, typename To, typename Rows>
__device__ void make_row(const Rows& rows, const SumRow& row) {
  constexpr int kVecs = 4, kStep = 32 * sizeof(Vec16);
#pragma unroll 1
  for (int place = row.begin; place < row.end; place += kVecs * kStep) {
    const int first = place + static_cast<int>(device::lane_idx() * sizeof(Vec16));
    const auto channel = [&](int v) { return (first + v * kStep) / static_cast<int>(sizeof(Vec16)) * Wire::kElements; };
    float sums[kVecs][Wire::kElements] = {};
#pragma unroll
    for (int v = 0; v < kVecs; ++v)
      if (rows.has_biases() && first + v * kStep < row.end) add_biases<Wire>(rows, row, first + v * kStep, sums[v]);
#pragma unroll 1
    for (int batch = 0; batch < rows.num_batches(); ++batch) {
      Terms terms;
      rows.get_terms(row, batch, terms);
#pragma unroll 1
      while (terms.valid != 0) {
        const Term term = take_term(terms);
        typename From::Codes codes[kVecs];
#pragma unroll
        for (int v = 0; v < kVecs; ++v)
          if (first + v * kStep < row.end) codes[v] = From::load(term.address, channel(v));
#pragma unroll
        for (int v = 0; v < kVecs; ++v)
          if (first + v * kStep < row.end) From::add(sums[v], codes[v], term.weight);
      }
    }
#pragma unroll
    for (int v = 0; v < kVecs; ++v)
      if (place + v * kStep < row.end) To::store(sums[v], first + v * kStep < row.end, channel(v), rows.out(row));
  }
}

}  // namespace tern::kernels
