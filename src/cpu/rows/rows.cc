// SPDX-License-Identifier: Apache-2.0
#include "rows/rows.h"

#include <hwy/cache_control.h>

#include <cstring>

#include "base/error.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "rows/rows_simd-inl.h"
#include <hwy/foreach_target.h>  // includes that file for every kind of vectors but one

#include "rows/rows_simd-inl.h"  // and here for that one

namespace tern::cpu {
namespace {

HWY_EXPORT(stream_row);
HWY_EXPORT(cast_row);
HWY_EXPORT(sum_row);

int64_t num_blocks(int64_t hidden) { return (hidden + 127) / 128; }

void check_float(const char* what, tern_dtype dtype) {
  if (dtype == TERN_DTYPE_BF16 || dtype == TERN_DTYPE_FP16 || dtype == TERN_DTYPE_FP32) return;
  fail(TERN_INVALID_ARGUMENT, "{}: dtype is {}, must be bf16, fp16 or fp32", what, static_cast<int>(dtype));
}

}  // namespace

void copy_row(void* out, const void* in, size_t bytes, Store store) {
  if (store == Store::kStreaming)
    HWY_DYNAMIC_DISPATCH(stream_row)(out, in, bytes);
  else
    std::memcpy(out, in, bytes);
}

void store_fence() { hwy::FlushStream(); }

int64_t num_scale_bytes(tern_encoding encoding, int64_t hidden) {
  switch (encoding) {
    case TERN_ENCODING_AS_GIVEN: return 0;
    case TERN_ENCODING_FP8_F32:
    case TERN_ENCODING_FP8_F32_POW2: return 4 * num_blocks(hidden);
    case TERN_ENCODING_FP8_UE8M0: return (num_blocks(hidden) + 3) / 4 * 4;
  }
  fail(TERN_INVALID_ARGUMENT, "encoding is {}, must be a tern_encoding", static_cast<int>(encoding));
}

void cast_row_fp8(const void* row, tern_dtype dtype, int64_t hidden, tern_encoding encoding, void* out_values, void* out_scales) {
  check_float("cast to fp8", dtype);
  auto* scales = static_cast<uint8_t*>(out_scales);
  HWY_DYNAMIC_DISPATCH(cast_row)(row, dtype, static_cast<size_t>(hidden), encoding, static_cast<uint8_t*>(out_values), scales);
  if (encoding != TERN_ENCODING_FP8_UE8M0) return;
  const int64_t written = num_blocks(hidden);
  std::memset(scales + written, 0, static_cast<size_t>(num_scale_bytes(encoding, hidden) - written));
}

void sum_rows(const SumArgs& args) {
  check_float("sum of rows", args.dtype);
  HWY_DYNAMIC_DISPATCH(sum_row)(args);
}

}  // namespace tern::cpu
