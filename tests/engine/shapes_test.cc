// SPDX-License-Identifier: Apache-2.0
// How large, small or uneven an exchange can be.
#include "engine/support.h"

namespace tern::conformance {
namespace {

// A case that uses most of the library, to be reshaped.
Case ordinary_case(tern_layout layout) {
  Case c;
  c.layout = layout;
  c.num_ranks = 4;
  c.max_tokens = 12;
  c.num_topk = 3;
  c.weighting = layout == TERN_LAYOUT_RANK_MAJOR ? TERN_WEIGHTS_NONE : TERN_WEIGHTS_DISPATCH;
  c.num_biases = 1;
  c.return_weights = true;
  return c;
}

class EveryLayout : public testing::TestWithParam<tern_layout> {};

INSTANTIATE_TEST_SUITE_P(Shapes, EveryLayout, testing::Values(TERN_LAYOUT_RANK_MAJOR, TERN_LAYOUT_EXPERT_MAJOR, TERN_LAYOUT_EXPERT_PADDED));

TEST_P(EveryLayout, Ranks) {
  for (const int32_t num_ranks : {1, 2, 3, 4, 7, 8, 16}) {
    Case c = ordinary_case(GetParam());
    c.num_ranks = num_ranks;
    c.seed = static_cast<uint64_t>(num_ranks);
    expect_right_as_threads(c.normalized());
    if (num_ranks <= 8) expect_right_as_processes(c.normalized());
  }
}

TEST_P(EveryLayout, HiddenSizes) {
  // 16 bytes, odd multiples of 16 bytes, and the sizes of models.
  for (const int64_t hidden : {8, 24, 40, 72, 1000, 2056, 2880, 4096, 7168, 7176, 8192}) {
    Case c = ordinary_case(GetParam());
    c.num_ranks = 2;
    c.max_tokens = hidden > 4000 ? 5 : 12;
    c.hidden = hidden;
    expect_right_as_threads(c.normalized());
  }
}

TEST_P(EveryLayout, CastHiddenSizes) {
  for (const int64_t hidden : {16, 112, 128, 144, 1040, 7168, 7184}) {
    Case c = ordinary_case(GetParam());
    c.num_ranks = 2;
    c.max_tokens = 5;
    c.hidden = hidden;
    for (const tern_encoding encoding : {TERN_ENCODING_FP8_F32, TERN_ENCODING_FP8_F32_POW2, TERN_ENCODING_FP8_UE8M0}) {
      c.encoding = encoding;
      expect_right_as_threads(c.normalized());
    }
  }
}

TEST_P(EveryLayout, TopK) {
  for (const int32_t num_topk : {1, 2, 4, 7, 8, 16, 31, 32, 64}) {
    Case c = ordinary_case(GetParam());
    c.num_topk = num_topk;
    c.experts_per_rank = 18;
    c.max_tokens = num_topk > 16 ? 4 : 9;
    expect_right_as_threads(c.normalized());
  }
}

TEST_P(EveryLayout, NumbersOfTokens) {
  for (const Spread spread : {Spread::kFull, Spread::kRandom, Spread::kEmpty, Spread::kNothing}) {
    for (const int64_t max_tokens : {1, 2, 63, 200}) {
      Case c = ordinary_case(GetParam());
      c.max_tokens = max_tokens;
      c.spread = spread;
      c.hidden = 16;
      expect_right_as_threads(c.normalized());
    }
  }
}

TEST_P(EveryLayout, EveryKindOfRouting) {
  for (int routing = 0; routing <= static_cast<int>(Routing::kRankMask); ++routing) {
    for (const tern_extent extent : {TERN_EXTENT_EXACT, TERN_EXTENT_WORST}) {
      Case c = ordinary_case(GetParam());
      c.routing = static_cast<Routing>(routing);
      c.extent = extent;
      c.experts_per_rank = 8;
      c.max_tokens = 21;
      expect_right_as_threads(c.normalized());
    }
  }
}

TEST_P(EveryLayout, Alignments) {
  for (const int32_t alignment : {0, 1, 2, 7, 16, 128}) {
    for (const bool zero_padding : {false, true}) {
      Case c = ordinary_case(GetParam());
      c.expert_alignment = std::max(alignment, 1);
      c.zero_padding = zero_padding;
      c.encoding = TERN_ENCODING_FP8_F32;
      c.scale_order = TERN_SCALES_COLUMN_MAJOR;
      expect_right_as_threads(c.normalized());
    }
  }
}

TEST_P(EveryLayout, OpaqueScalesOfAnyWidth) {
  for (const int64_t element_bytes : {1, 2, 4, 8, 16}) {
    for (const int64_t num_elements : {1, 3, 56}) {
      Case c = ordinary_case(GetParam());
      c.scale_element_bytes = element_bytes;
      c.scale_bytes = num_elements * element_bytes;
      c.strided = num_elements == 3;
      c.dtype = num_elements == 56 ? TERN_DTYPE_FP8_E4M3 : TERN_DTYPE_BYTES;
      for (const tern_scale_order order : {TERN_SCALES_ROW_MAJOR, TERN_SCALES_COLUMN_MAJOR}) {
        c.scale_order = order;
        expect_right_as_threads(c.normalized());
      }
    }
  }
}

TEST_P(EveryLayout, DeepSeekV3) {
  Case c = ordinary_case(GetParam());
  c.routing = Routing::kGroupLimited;
  c.experts_per_rank = 64;
  c.num_topk = 8;
  c.hidden = 7168;
  c.max_tokens = full_scale() ? 16 : 2;
  c.encoding = GetParam() == TERN_LAYOUT_RANK_MAJOR ? TERN_ENCODING_AS_GIVEN : TERN_ENCODING_FP8_F32;
  expect_right_as_threads(c.normalized());
  expect_right_as_processes(c.normalized());
}

// Every sum of every dtype, with numbers that overflow, vanish and are none.
TEST_P(EveryLayout, Sums) {
  for (const tern_dtype dtype : {TERN_DTYPE_BF16, TERN_DTYPE_FP16, TERN_DTYPE_FP32})
    for (const tern_combine_mode mode : {TERN_COMBINE_HIERARCHICAL, TERN_COMBINE_EXACT})
      for (const tern_weighting weighting : {TERN_WEIGHTS_NONE, TERN_WEIGHTS_DISPATCH, TERN_WEIGHTS_OWNER})
        for (const int32_t num_biases : {0, 1, 2}) {
          Case c = ordinary_case(GetParam());
          c.combine_dtype = dtype;
          c.combine_mode = mode;
          c.weighting = weighting;
          c.num_biases = num_biases;
          c.num_topk = 5;
          c.num_ranks = 3;
          c.max_tokens = 30;
          c.seed = static_cast<uint64_t>(7 + num_biases);
          expect_right_as_threads(c.normalized());
        }
}

}  // namespace
}  // namespace tern::conformance
