// SPDX-License-Identifier: Apache-2.0
#include "conformance/case.h"

#include <fmt/format.h>

#include <algorithm>
#include <iterator>

#include "conformance/number.h"
#include "conformance/random.h"

namespace tern::conformance {
namespace {

int64_t divide_up(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

constexpr const char* kRoutingNames[] = {"uniform", "zipf",       "group_limited", "one_expert", "one_rank",
                                         "holes",   "duplicates", "nothing",       "rank_mask"};
constexpr const char* kSpreadNames[] = {"full", "random", "empty", "nothing"};
constexpr const char* kLayoutNames[] = {"rank_major", "expert_major", "expert_padded"};
constexpr const char* kDtypeNames[] = {"bf16", "fp16", "fp32", "fp8", "bytes"};
constexpr const char* kEncodingNames[] = {"as_given", "fp8_f32", "fp8_pow2", "fp8_ue8m0"};
constexpr const char* kWeightingNames[] = {"none", "dispatch", "owner"};
constexpr const char* kModeNames[] = {"auto", "throughput", "latency"};

}  // namespace

int64_t Case::token_bytes() const { return hidden * element_bytes(dtype); }
int64_t Case::arriving_token_bytes() const { return casts() ? hidden : token_bytes(); }

int64_t Case::arriving_scale_bytes() const {
  if (!casts()) return scale_bytes;
  const int64_t num_blocks = divide_up(hidden, 128);
  return encoding == TERN_ENCODING_FP8_UE8M0 ? divide_up(num_blocks, 4) * 4 : num_blocks * 4;
}

int64_t Case::scale_token_stride_bytes() const {
  const int64_t num_scales = scale_bytes / scale_element_bytes;
  return num_scales * scale_stride_bytes() + (strided && num_scales > 0 ? scale_element_bytes : 0);
}

int64_t Case::combine_row_bytes() const { return combine_hidden() * element_bytes(combine_dtype); }

int64_t Case::combine_wire_bytes() const {
  if (wire == TERN_WIRE_AS_DTYPE) return combine_row_bytes();
  if (wire == TERN_WIRE_FP32) return combine_hidden() * element_bytes(TERN_DTYPE_FP32);
  return divide_up(divide_up(combine_hidden(), 128) * 168, 16) * 16;
}

int64_t Case::num_tokens(int32_t rank) const {
  switch (spread) {
    case Spread::kFull: return max_tokens;
    case Spread::kRandom: return Draw(seed, 0x746F6B).below(rank, max_tokens + 1);
    case Spread::kEmpty: return rank % 2 == 0 ? max_tokens : 0;
    case Spread::kNothing: return 0;
  }
  return 0;
}

int64_t Case::capacity() const {
  const int64_t most_messages = num_ranks * max_tokens;
  if (layout == TERN_LAYOUT_EXPERT_PADDED) return experts_per_rank * most_messages;
  if (row_capacity > 0) return row_capacity;
  if (layout == TERN_LAYOUT_RANK_MAJOR) return most_messages;
  const int64_t most_entries = most_messages * num_topk;
  // Each group that holds an entry is padded by at most alignment - 1 rows.
  return most_entries + std::min<int64_t>(experts_per_rank, most_entries) * (expert_alignment - 1);
}

Case Case::normalized() const {
  Case c = *this;
  if (c.ranks_per_node > 0) c.num_ranks = static_cast<int32_t>(divide_up(c.num_ranks, c.ranks_per_node)) * c.ranks_per_node;
  if (c.masks_ranks()) {
    c.layout = TERN_LAYOUT_RANK_MAJOR;
    c.num_topk = 0;
    c.carry_weights = c.return_weights = false;
  } else {
    c.num_topk = std::max(c.num_topk, 1);
    if (c.routing != Routing::kDuplicates) c.num_topk = std::min(c.num_topk, c.num_experts());
  }
  if (c.layout == TERN_LAYOUT_RANK_MAJOR) c.weighting = TERN_WEIGHTS_NONE;
  if (c.layout != TERN_LAYOUT_EXPERT_MAJOR) c.expert_alignment = 1;
  // An expert's room in expert_padded holds each token once.
  if (c.layout == TERN_LAYOUT_EXPERT_PADDED && c.routing == Routing::kDuplicates) c.routing = Routing::kHoles;
  if (c.routing != Routing::kDuplicates && !c.masks_ranks()) c.num_topk = std::min(c.num_topk, c.num_experts());
  if (c.extent == TERN_EXTENT_EXACT || c.layout == TERN_LAYOUT_EXPERT_PADDED) c.row_capacity = 0;
  if (c.extent == TERN_EXTENT_EXACT) c.fused = false;
  if (c.weighting == TERN_WEIGHTS_DISPATCH) c.carry_weights = true;
  if (c.casts()) {
    if (c.dtype == TERN_DTYPE_FP8_E4M3 || c.dtype == TERN_DTYPE_BYTES) c.dtype = TERN_DTYPE_BF16;
    c.scale_bytes = 0;
    c.scale_element_bytes = 4;
  }
  c.scale_bytes = divide_up(c.scale_bytes, c.scale_element_bytes) * c.scale_element_bytes;
  const int64_t elements_in_16_bytes = 16 / (c.casts() ? 1 : element_bytes(c.dtype));
  c.hidden = std::max<int64_t>(1, divide_up(c.hidden, elements_in_16_bytes)) * elements_in_16_bytes;
  c.lane = std::min(c.lane, c.num_lanes - 1);
  return c;
}

std::string Case::name() const {
  std::string text = fmt::format("ranks={} tokens={} hidden={} experts={} topk={} {} {}", num_ranks, max_tokens, hidden, num_experts(),
                                 num_topk, kLayoutNames[layout], kDtypeNames[dtype]);
  const auto add = [&](bool differs, const char* what, const auto& value) {
    if (differs) fmt::format_to(std::back_inserter(text), " {}{}", what, value);
  };
  add(ranks_per_node != 0, "nodes=", fmt::format("{}x{}", num_nodes(), ranks_per_node));
  add(spread != Spread::kFull, "spread=", kSpreadNames[static_cast<int>(spread)]);
  add(routing != Routing::kUniform, "routing=", kRoutingNames[static_cast<int>(routing)]);
  add(index_type == TERN_INDEX_INT32, "int32", "");
  add(extent == TERN_EXTENT_WORST, "worst", "");
  add(row_capacity != 0, "capacity=", row_capacity);
  add(expert_alignment != 1, "alignment=", expert_alignment);
  add(zero_padding, "zero_padding", "");
  add(casts(), "", kEncodingNames[encoding]);
  add(scale_bytes != 0, "scales=", fmt::format("{}x{}", scale_bytes, scale_element_bytes));
  add(scale_order == TERN_SCALES_COLUMN_MAJOR, "column_major", "");
  add(strided, "strided", "");
  add(!carry_weights, "no_weights", "");
  add(fused, "fused", "");
  add(few_outputs, "few_outputs", "");
  add(true, "combine=", kDtypeNames[combine_dtype]);
  add(combine_mode == TERN_COMBINE_EXACT, "exact_sums", "");
  add(wire == TERN_WIRE_LOG10BIT, "log10bit", "");
  add(wire == TERN_WIRE_FP32, "fp32 wire", "");
  add(weighting != TERN_WEIGHTS_NONE, "weighting=", kWeightingNames[weighting]);
  add(num_biases != 0, "biases=", num_biases);
  add(return_weights, "return_weights", "");
  add(phases, "phases", "");
  add(window_tokens, "window_tokens", "");
  add(window_dispatch, "window_dispatch", "");
  add(window_combine, "window_combine", "");
  add(mixed_windows, "mixed_windows", "");
  add(staging_bytes != 0, "staging=", staging_bytes);
  add(mode != TERN_MODE_AUTO, "mode=", kModeNames[mode]);
  add(masks, "masks", "");
  add(num_lanes != 1, "lane=", fmt::format("{}/{}", lane, num_lanes));
  add(delays, "delays", "");
  add(true, "seed=", seed);
  return text;
}

}  // namespace tern::conformance
