// SPDX-License-Identifier: Apache-2.0
// The cases that GPU ranks run, as threads and as processes.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <vector>

#include "conformance/case.h"
#include "conformance/sweep.h"

namespace tern::conformance {

inline constexpr tern_layout kLayouts[] = {TERN_LAYOUT_RANK_MAJOR, TERN_LAYOUT_EXPERT_MAJOR, TERN_LAYOUT_EXPERT_PADDED};

// A case that uses most of the library, to be reshaped.
inline Case ordinary_case(int32_t num_ranks, tern_layout layout) {
  Case c;
  c.seed = 11;
  c.num_ranks = num_ranks;
  c.layout = layout;
  c.max_tokens = 20;
  c.num_topk = 3;
  c.weighting = TERN_WEIGHTS_DISPATCH;
  c.num_biases = 1;
  c.return_weights = true;
  return c;
}

inline std::vector<Case> layout_cases_of(int32_t num_ranks) {
  std::vector<Case> result;
  for (Case c : layout_cases()) {
    c.num_ranks = num_ranks;
    result.push_back(c.normalized());
  }
  return result;
}

// Tokens, scales, outputs and rows of combine in the window or in memory of the caller, in every mixture.
inline std::vector<Case> window_cases(int32_t num_ranks) {
  std::vector<Case> result;
  for (const tern_layout layout : kLayouts)
    for (const tern_extent extent : {TERN_EXTENT_EXACT, TERN_EXTENT_WORST})
      for (int mixture = 1; mixture < 8; ++mixture)
        for (const bool strided : {false, true}) {
          Case c = ordinary_case(num_ranks, layout);
          c.extent = extent;
          c.max_tokens = 130;
          c.hidden = 1032;
          c.scale_bytes = strided ? 20 : 32;
          c.strided = strided;
          c.window_tokens = (mixture & 1) != 0;
          c.window_dispatch = (mixture & 2) != 0;
          c.window_combine = (mixture & 4) != 0;
          c.phases = mixture == 7 && strided;
          c.delays = mixture == 7;
          result.push_back(c.normalized());
        }
  return result;
}

// Large rows that go from window to window, in pieces too: on all ranks, or on some, where windows then begin elsewhere. With few rows, rows
// beyond the capacity, graphs (extent WORST) and several rounds, the staging of which is chosen where they run.
inline std::vector<Case> delivery_cases(int32_t num_ranks,
                                        std::initializer_list<tern_extent> extents = {TERN_EXTENT_EXACT, TERN_EXTENT_WORST}) {
  std::vector<Case> result;
  for (const tern_extent extent : extents)
    for (const int64_t scale_bytes : {0, 32, 92})  // the last no multiple of 16: by words
      for (const bool mixed : {false, true})
        for (const bool few : {false, true}) {
          Case c = ordinary_case(num_ranks, TERN_LAYOUT_RANK_MAJOR);
          c.seed = 11 + result.size();
          c.extent = extent;
          c.max_tokens = 140;
          c.spread = few ? Spread::kRandom : Spread::kFull;
          c.routing = !few ? Routing::kUniform : mixed ? Routing::kRankMask : Routing::kHoles;
          c.few_outputs = few;
          c.row_capacity = few && scale_bytes > 0 ? 90 : 0;
          // One piece; two that are alike; two of which the last is shorter.
          c.hidden = few ? 1032 : scale_bytes == 32 ? 7168 : 4104;
          c.scale_bytes = scale_bytes == 92 && few ? 252 : scale_bytes;
          c.window_tokens = c.window_dispatch = c.window_combine = true;
          c.mixed_windows = mixed;
          c.mode = TERN_MODE_THROUGHPUT;
          c.delays = mixed && few;
          result.push_back(c.normalized());
        }
  return result;
}

// Rows of DeepSeek-V3 (7168, top-8 of 256) and gpt-oss (2880, top-4 of 128).
inline std::vector<Case> model_cases(int32_t num_ranks, int64_t max_tokens) {
  std::vector<Case> result;
  for (const tern_layout layout : kLayouts)
    for (const bool cast : {false, true}) {
      Case c = ordinary_case(num_ranks, layout);
      c.num_biases = 0;
      c.routing = Routing::kGroupLimited;
      c.max_tokens = layout == TERN_LAYOUT_EXPERT_PADDED ? (max_tokens + 7) / 8 : max_tokens;
      c.encoding = cast ? TERN_ENCODING_FP8_F32 : TERN_ENCODING_AS_GIVEN;
      c.hidden = 7168;
      c.num_topk = 8;
      c.experts_per_rank = 256 / num_ranks;
      result.push_back(c.normalized());
      c.hidden = 2880;
      c.num_topk = 4;
      c.experts_per_rank = 128 / num_ranks;
      result.push_back(c.normalized());
    }
  return result;
}

// All to one expert, all to one rank, few popular experts, ranks with no tokens, a batch with none.
inline std::vector<Case> uneven_cases(int32_t num_ranks) {
  std::vector<Case> result;
  for (const tern_layout layout : kLayouts)
    for (const tern_extent extent : {TERN_EXTENT_EXACT, TERN_EXTENT_WORST}) {
      Case c = ordinary_case(num_ranks, layout);
      c.extent = extent;
      c.max_tokens = 150;
      for (const Routing routing : {Routing::kOneExpert, Routing::kOneRank, Routing::kZipf, Routing::kHoles, Routing::kNothing}) {
        c.routing = routing;
        result.push_back(c.normalized());
      }
      c.routing = Routing::kUniform;
      for (const Spread spread : {Spread::kRandom, Spread::kEmpty, Spread::kNothing}) {
        c.spread = spread;
        result.push_back(c.normalized());
      }
    }
  return result;
}

// Batches of several rounds; the staging is chosen where they run.
inline std::vector<Case> rounds_cases(int32_t num_ranks) {
  std::vector<Case> result;
  for (const tern_layout layout : kLayouts)
    for (const tern_extent extent : {TERN_EXTENT_EXACT, TERN_EXTENT_WORST})
      for (const Routing routing : {Routing::kUniform, Routing::kOneRank})
        for (const Spread spread : {Spread::kFull, Spread::kRandom}) {
          Case c = ordinary_case(num_ranks, layout);
          c.extent = extent;
          c.routing = routing;
          c.spread = spread;
          c.max_tokens = 200;
          c.combine_mode = routing == Routing::kOneRank ? TERN_COMBINE_EXACT : TERN_COMBINE_HIERARCHICAL;
          c.mode = TERN_MODE_THROUGHPUT;
          result.push_back(c.normalized());
        }
  return result;
}

// Random options from seed `first` on.
inline std::vector<Case> random_cases(uint64_t first, int64_t count) {
  std::vector<Case> result;
  for (int64_t i = 0; i < count; ++i) result.push_back(random_case(first + static_cast<uint64_t>(i)));
  return result;
}

// The same on `num_ranks` ranks.
inline std::vector<Case> random_cases_of(int32_t num_ranks, uint64_t first, int64_t count) {
  std::vector<Case> result = random_cases(first, count);
  for (Case& c : result) {
    c.num_ranks = num_ranks;
    c = c.normalized();
  }
  return result;
}

// What GPU ranks have under TERN_ON_TIMEOUT_MASK.
inline std::vector<Case> with_masks(std::vector<Case> cases) {
  for (Case& c : cases) {
    c.masks = c.fused = true;
    c.extent = TERN_EXTENT_WORST;
    c.mode = TERN_MODE_LATENCY;
    c.num_lanes = 1;
    c.staging_bytes = 0;
    if (c.masks_ranks()) c.routing = Routing::kUniform;
    if (c.wire == TERN_WIRE_FP32) c.wire = TERN_WIRE_AS_DTYPE;
    if (c.num_nodes() > 1) c.combine_mode = TERN_COMBINE_HIERARCHICAL;
    c = c.normalized();
  }
  return cases;
}

// Captured into a graph: every way to route and to run, with capacities that suffice and that do not.
inline std::vector<Case> graph_cases(int32_t num_ranks) {
  std::vector<Case> result;
  for (const tern_layout layout : kLayouts)
    for (const bool fused : {false, true})
      for (const bool window : {false, true})
        for (const Spread spread : {Spread::kFull, Spread::kRandom}) {
          Case c = ordinary_case(num_ranks, layout);
          c.extent = TERN_EXTENT_WORST;
          c.routing = Routing::kHoles;
          c.fused = fused;
          c.window_tokens = c.window_dispatch = c.window_combine = window;
          c.spread = spread;
          c.phases = fused != window;
          c.row_capacity = layout == TERN_LAYOUT_EXPERT_PADDED || spread == Spread::kFull ? 0 : 30;
          c.combine_mode = window ? TERN_COMBINE_EXACT : TERN_COMBINE_HIERARCHICAL;
          result.push_back(c.normalized());
        }
  return result;
}

}  // namespace tern::conformance
