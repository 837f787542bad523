// SPDX-License-Identifier: Apache-2.0
// What one token's row looks like on its way: the choice behind `--dtype`, in the words of tern.h, with its sizes.
//
//   const RowFormat format = parse_row_format("fp8-cast");
//   format.arriving_row_bytes(7168);  // 7168: one byte for each channel
#pragma once

#include <tern/tern.h>

#include <cstdint>
#include <string>
#include <vector>

namespace tern::tools {

constexpr int64_t kScaleBlock = 128;  // channels that share one scale

struct RowFormat {
  std::string name;  // as on the command line
  tern_dtype dtype = TERN_DTYPE_BF16;
  tern_encoding encoding = TERN_ENCODING_AS_GIVEN;
  bool gives_scales = false;                   // AS_GIVEN with scales of the caller
  tern_dtype combine_dtype = TERN_DTYPE_BF16;  // results do not come back in fp8

  bool casts() const { return encoding != TERN_ENCODING_AS_GIVEN; }
  int64_t given_row_bytes(int64_t hidden) const;
  int64_t given_scale_bytes(int64_t hidden) const;
  int64_t arriving_row_bytes(int64_t hidden) const;
  int64_t arriving_scale_bytes(int64_t hidden) const;
  int64_t combine_row_bytes(int64_t hidden) const;
};

int64_t element_bytes(tern_dtype dtype);

// bf16, fp16, fp32, fp8 (given with float scales), bytes, fp8-cast, fp8-pow2 and fp8-ue8m0 (cast from bf16 on the way).
std::vector<std::string> row_format_names();

// Throws TERN_INVALID_ARGUMENT for a name that is none of them.
RowFormat parse_row_format(const std::string& name);

// rank_major, expert_major, expert_padded.
std::vector<std::string> layout_names();
tern_layout parse_layout(const std::string& name);
const char* layout_name(tern_layout layout);

}  // namespace tern::tools
