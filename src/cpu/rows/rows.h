// SPDX-License-Identifier: Apache-2.0
// The CPU engine's arithmetic on rows: copies, casts to fp8 and sums, with the widest vectors of the machine that it runs on.
//
//   copy_row(slot, token, hidden_bytes, Store::kStreaming);
//   store_fence();
//   flag.store(epoch, std::memory_order_release);
//
// The results are bit for bit the same on every machine and with every vector width: products and sums are rounded separately, conversions
// are integer code (base/numeric.h is their scalar twin), and a NaN comes out as the one NaN of its type (fp32 0x7fffffff).
// Rounding must be to nearest and subnormals must not be flushed: the state in which every thread starts.
//
// Threads: every function may run on any number of threads at once. Nothing is kept between calls and nothing is allocated.
// Memory: out must not overlap an input. Streaming stores are weakly ordered: call store_fence() between them and the release store
// that publishes them. Rows of elements are aligned to their element; 64 bytes are fastest.
#pragma once

#include <tern/tern.h>

#include <cstddef>
#include <cstdint>
#include <span>

namespace tern::cpu {

enum class Store {
  kCached,    // ordinary stores
  kStreaming  // past the caches, for rows that this core will not read again
};

// Any size, any alignment.
void copy_row(void* out, const void* in, size_t bytes, Store store);

// Orders this thread's streaming stores before a later release store.
void store_fence();

// Bytes of scales that cast_row_fp8 writes for one row; 0 for AS_GIVEN.
int64_t num_scale_bytes(tern_encoding encoding, int64_t hidden);

// Casts a row of bf16, fp16 or fp32 to fp8 e4m3 as tern_encoding (not AS_GIVEN) defines, in blocks of 128 channels.
// out_values: [hidden] bytes; out_scales: [num_scale_bytes(encoding, hidden)] bytes, any alignment.
// A NaN does not count for its block's scale and comes out as a NaN (0x7f). Infinity does count: the block's scale is infinity
// (UE8M0: 255), its finite values come out as zeros and the infinities as NaNs.
void cast_row_fp8(const void* row, tern_dtype dtype, int64_t hidden, tern_encoding encoding, void* out_values, void* out_scales);

struct SumTerm {
  const void* row;
  float weight;
};

// Sums rows in FP32, in the order that tern_combine promises: a total that starts at +0, then bias[0], bias[1], then the groups.
struct SumArgs {
  tern_dtype dtype;  // bf16, fp16 or fp32: of the rows, the biases and out, and the wire type
  int64_t hidden;
  bool weighted;  // false: weights are not looked at
  std::span<const SumTerm> terms;
  // Group g is terms [group_ends[g - 1], group_ends[g]): summed from +0, rounded once to dtype, and added to the total.
  // Empty: the terms are added to the total one by one, with no rounding in between.
  std::span<const int32_t> group_ends;
  const void* bias[2];  // each may be nullptr
  void* out;
  Store store;
  // TERN_WIRE_LOG10BIT: rows as base/log_rows.h encodes them, [log_row_bytes(hidden)] at multiples of 8 bytes, instead of dtype. The terms are
  // then added one by one, and NaNs of the sum are encoded as NaNs. TERN_WIRE_FP32: rows of floats; the same holds for terms.
  tern_wire terms_wire = TERN_WIRE_AS_DTYPE;
  tern_wire out_wire = TERN_WIRE_AS_DTYPE;
};
void sum_rows(const SumArgs& args);

}  // namespace tern::cpu
