// SPDX-License-Identifier: Apache-2.0
#include "tools/row_format.h"

#include <fmt/ranges.h>

#include "base/error.h"

namespace tern::tools {
namespace {

const std::vector<RowFormat>& formats() {
  static const std::vector<RowFormat> table = {
      {.name = "bf16"},
      {.name = "fp16", .dtype = TERN_DTYPE_FP16, .combine_dtype = TERN_DTYPE_FP16},
      {.name = "fp32", .dtype = TERN_DTYPE_FP32, .combine_dtype = TERN_DTYPE_FP32},
      {.name = "fp8", .dtype = TERN_DTYPE_FP8_E4M3, .gives_scales = true},
      {.name = "bytes", .dtype = TERN_DTYPE_BYTES},
      {.name = "fp8-cast", .encoding = TERN_ENCODING_FP8_F32},
      {.name = "fp8-pow2", .encoding = TERN_ENCODING_FP8_F32_POW2},
      {.name = "fp8-ue8m0", .encoding = TERN_ENCODING_FP8_UE8M0},
  };
  return table;
}

int64_t num_scales(int64_t hidden) { return (hidden + kScaleBlock - 1) / kScaleBlock; }

constexpr const char* kLayouts[] = {"rank_major", "expert_major", "expert_padded"};

}  // namespace

int64_t element_bytes(tern_dtype dtype) {
  switch (dtype) {
    case TERN_DTYPE_FP32: return 4;
    case TERN_DTYPE_BF16:
    case TERN_DTYPE_FP16: return 2;
    case TERN_DTYPE_FP8_E4M3:
    case TERN_DTYPE_BYTES: return 1;
  }
  return 1;
}

int64_t RowFormat::given_row_bytes(int64_t hidden) const { return hidden * element_bytes(dtype); }

int64_t RowFormat::given_scale_bytes(int64_t hidden) const { return gives_scales ? num_scales(hidden) * int64_t{sizeof(float)} : 0; }

int64_t RowFormat::arriving_row_bytes(int64_t hidden) const { return casts() ? hidden : given_row_bytes(hidden); }

int64_t RowFormat::arriving_scale_bytes(int64_t hidden) const {
  if (encoding == TERN_ENCODING_FP8_UE8M0) return (num_scales(hidden) + 3) / 4 * 4;
  return casts() ? num_scales(hidden) * int64_t{sizeof(float)} : given_scale_bytes(hidden);
}

int64_t RowFormat::combine_row_bytes(int64_t hidden) const { return hidden * element_bytes(combine_dtype); }

std::vector<std::string> row_format_names() {
  std::vector<std::string> names;
  for (const RowFormat& format : formats()) names.push_back(format.name);
  return names;
}

RowFormat parse_row_format(const std::string& name) {
  for (const RowFormat& format : formats()) {
    if (format.name == name) return format;
  }
  fail(TERN_INVALID_ARGUMENT, "dtype \"{}\" is none of: {}", name, fmt::join(row_format_names(), ", "));
}

std::vector<std::string> layout_names() { return {std::begin(kLayouts), std::end(kLayouts)}; }

const char* layout_name(tern_layout layout) { return kLayouts[layout]; }

tern_layout parse_layout(const std::string& name) {
  for (int i = 0; i < 3; ++i) {
    if (name == kLayouts[i]) return static_cast<tern_layout>(i);
  }
  fail(TERN_INVALID_ARGUMENT, "layout \"{}\" is none of: {}", name, fmt::join(layout_names(), ", "));
}

}  // namespace tern::tools
