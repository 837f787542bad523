// SPDX-License-Identifier: Apache-2.0
// What a thread looks at until it is there: rows that show themselves, since nothing has been written where they still hold kUnwritten.
#pragma once

#include "kernels/operation.cuh"
#include "kernels/rows.cuh"

namespace tern::kernels {

__device__ __forceinline__ bool looks_unwritten(const Vec16& vec) {
  return (vec.words[0] == layout::kUnwritten) | (vec.words[1] == layout::kUnwritten) | (vec.words[2] == layout::kUnwritten) |
         (vec.words[3] == layout::kUnwritten);
}
__device__ __forceinline__ bool looks_unwritten(const uint2& vec) { return vec.x == layout::kUnwritten || vec.y == layout::kUnwritten; }
__device__ __forceinline__ bool looks_unwritten(uint32_t word) { return word == layout::kUnwritten; }

// What a thread looks at until it is there: 16 bytes of a row, or 4.
__device__ __forceinline__ Vec16 look_at(const Vec16* at) { return device::load_vec16_relaxed_sys(reinterpret_cast<const std::byte*>(at)); }
__device__ __forceinline__ uint32_t look_at(const uint32_t* at) { return load_relaxed_sys(at); }

constexpr Vec16 kUnwrittenVec = {{layout::kUnwritten, layout::kUnwritten, layout::kUnwritten, layout::kUnwritten}};

// A part of a token's row that is on its way from a source.
struct ArrivingRow {
  int source;
  int32_t token;
  int part;
};

// For take_vecs(): what a thread takes of one, kStep bytes apart.
template <int kStep>
struct RowVecs {
  std::byte* begin;
  int32_t num_bytes;  // of the row, from there on
  ArrivingRow row;

  __device__ bool has(int v) const { return v * kStep < num_bytes; }
  __device__ std::byte* at(int v) const { return begin + v * kStep; }
  __device__ const ArrivingRow& row_of(const std::byte*) const { return row; }
};

}  // namespace tern::kernels
