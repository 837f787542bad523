// SPDX-License-Identifier: Apache-2.0
#include "conformance/sweep.h"

#include <initializer_list>

#include "conformance/inputs.h"
#include "conformance/oracle.h"
#include "conformance/random.h"

namespace tern::conformance {
namespace {

// Successive choices from one seed.
class Chooser {
 public:
  explicit Chooser(uint64_t seed) : draw_(seed, 0x63617365) {}

  template <typename T>
  T of(std::initializer_list<T> values) {
    return values.begin()[draw_.below(position_++, static_cast<int64_t>(values.size()))];
  }
  template <typename T>
  T up_to(T last) {  // of an enumeration that starts at 0
    return static_cast<T>(draw_.below(position_++, static_cast<int64_t>(last) + 1));
  }
  bool one_in(int64_t n) { return draw_.one_in(position_++, n); }
  int64_t between(int64_t first, int64_t last) { return first + draw_.below(position_++, last - first + 1); }

 private:
  Draw draw_;
  int64_t position_ = 0;
};

// A capacity below, at or above what some rank receives.
int64_t choose_capacity(const Case& c, Chooser& choose) {
  std::vector<RankRouting> routings;
  for (int32_t rank = 0; rank < c.num_ranks; ++rank) routings.push_back(make_routing(c, rank));
  Case exact = c;
  exact.extent = TERN_EXTENT_EXACT;
  const auto placements = place(exact, routings, {});
  const auto needed = static_cast<int64_t>(placements[static_cast<size_t>(choose.between(0, c.num_ranks - 1))].rows.size());
  return std::max<int64_t>(1, choose.one_in(3) ? needed / 2 : needed + choose.between(0, 5));
}

void choose_dispatch(Case& c, Chooser& choose) {
  c.layout = choose.up_to(TERN_LAYOUT_EXPERT_PADDED);
  c.extent = choose.up_to(TERN_EXTENT_WORST);
  c.expert_alignment = choose.of({1, 1, 4, 16, 100});
  c.zero_padding = choose.one_in(2);
  c.hidden = choose.of<int64_t>({1, 8, 24, 64, 128, 136, 200, 256, 400, 640, 1000});
  c.dtype = choose.up_to(TERN_DTYPE_BYTES);
  c.encoding = choose.one_in(2) ? TERN_ENCODING_AS_GIVEN : choose.up_to(TERN_ENCODING_FP8_UE8M0);
  c.scale_element_bytes = choose.of<int64_t>({1, 2, 4, 4, 8});
  c.scale_bytes = choose.of<int64_t>({0, 0, 1, 4, 12, 56, 200});
  c.scale_order = choose.up_to(TERN_SCALES_COLUMN_MAJOR);
  c.strided = choose.one_in(3);
  c.carry_weights = !choose.one_in(4);
  c.fused = choose.one_in(2);
  c.few_outputs = choose.one_in(3);
  c.window_dispatch = choose.one_in(3);
}

void choose_combine(Case& c, Chooser& choose) {
  c.combine_dtype = choose.up_to(TERN_DTYPE_FP32);
  c.combine_mode = choose.up_to(TERN_COMBINE_EXACT);
  c.weighting = choose.up_to(TERN_WEIGHTS_OWNER);
  c.num_biases = static_cast<int32_t>(choose.between(0, 2));
  c.return_weights = choose.one_in(2);
  c.window_combine = choose.one_in(3);
}

void choose_driving(Case& c, Chooser& choose) {
  c.phases = choose.one_in(3);
  c.mode = choose.up_to(TERN_MODE_LATENCY);
  c.num_lanes = choose.of({1, 1, 2, 3});
  c.lane = static_cast<int32_t>(choose.between(0, 2));
  c.delays = choose.one_in(5);
}

}  // namespace

Case random_case(uint64_t seed) {
  Chooser choose(seed);
  Case c;
  c.seed = seed;
  c.num_ranks = choose.of({1, 2, 2, 3, 4, 4, 7, 8});
  c.max_tokens = choose.of<int64_t>({1, 2, 5, 16, 33});
  c.spread = choose.one_in(2) ? Spread::kFull : choose.up_to(Spread::kNothing);
  c.routing = choose.up_to(Routing::kRankMask);
  c.experts_per_rank = choose.of({1, 2, 4, 8});
  c.num_topk = choose.of({1, 2, 3, 6, 8});
  c.index_type = choose.up_to(TERN_INDEX_INT32);
  choose_dispatch(c, choose);
  choose_combine(c, choose);
  choose_driving(c, choose);
  c = c.normalized();
  if (c.extent == TERN_EXTENT_WORST && c.layout != TERN_LAYOUT_EXPERT_PADDED && choose.one_in(2))
    c.row_capacity = choose_capacity(c, choose);
  c.wire = choose.of({TERN_WIRE_AS_DTYPE, TERN_WIRE_AS_DTYPE, TERN_WIRE_LOG10BIT, TERN_WIRE_FP32});
  return c;
}

std::vector<Case> layout_cases() {
  std::vector<Case> result;
  for (const tern_layout layout : {TERN_LAYOUT_RANK_MAJOR, TERN_LAYOUT_EXPERT_MAJOR, TERN_LAYOUT_EXPERT_PADDED})
    for (const tern_extent extent : {TERN_EXTENT_EXACT, TERN_EXTENT_WORST})
      for (int encoding = 0; encoding <= TERN_ENCODING_FP8_UE8M0; ++encoding)
        for (const tern_scale_order order : {TERN_SCALES_ROW_MAJOR, TERN_SCALES_COLUMN_MAJOR}) {
          Case c;
          c.seed = 100 + result.size();
          c.num_ranks = 3;
          c.max_tokens = 9;
          c.hidden = 272;
          c.num_topk = 3;
          c.layout = layout;
          c.extent = extent;
          c.expert_alignment = 8;
          c.zero_padding = true;
          c.encoding = static_cast<tern_encoding>(encoding);
          c.scale_bytes = 20;
          c.scale_order = order;
          c.weighting = TERN_WEIGHTS_DISPATCH;
          result.push_back(c.normalized());
        }
  return result;
}

std::vector<Case> small_batch_cases(int32_t num_ranks) {
  constexpr int64_t kTokens[] = {1, 8, 32};
  std::vector<Case> result;
  for (const tern_layout layout : {TERN_LAYOUT_RANK_MAJOR, TERN_LAYOUT_EXPERT_MAJOR, TERN_LAYOUT_EXPERT_PADDED})
    for (int encoding = 0; encoding <= TERN_ENCODING_FP8_UE8M0; ++encoding)
      for (const tern_combine_mode mode : {TERN_COMBINE_HIERARCHICAL, TERN_COMBINE_EXACT})
        for (const tern_wire wire : {TERN_WIRE_AS_DTYPE, TERN_WIRE_LOG10BIT})
          for (const bool phases : {false, true}) {
            Case c;
            c.seed = 1000 + result.size();
            c.num_ranks = num_ranks;
            c.max_tokens = kTokens[result.size() % 3];
            c.spread = result.size() % 4 == 0 ? Spread::kRandom : Spread::kFull;
            c.routing = result.size() % 5 == 0 ? Routing::kHoles : Routing::kUniform;
            c.experts_per_rank = 6;
            c.num_topk = 4;
            c.layout = layout;
            c.extent = TERN_EXTENT_WORST;
            c.fused = true;
            c.hidden = 336;
            c.encoding = static_cast<tern_encoding>(encoding);
            c.scale_order = encoding % 2 == 0 ? TERN_SCALES_COLUMN_MAJOR : TERN_SCALES_ROW_MAJOR;
            c.combine_mode = mode;
            c.wire = wire;
            c.weighting = phases == (mode == TERN_COMBINE_EXACT) ? TERN_WEIGHTS_OWNER : TERN_WEIGHTS_DISPATCH;
            c.phases = phases;
            c.mode = TERN_MODE_LATENCY;
            result.push_back(c.normalized());
          }
  return result;
}

std::vector<Case> check_cases() {
  std::vector<Case> result = layout_cases();
  for (const Case& c : small_batch_cases(4)) result.push_back(c);
  for (uint64_t seed = 1; seed <= 100; ++seed) result.push_back(random_case(seed));
  Case model;  // DeepSeek-V3's row, experts and top-k
  model.num_ranks = 4;
  model.max_tokens = 16;
  model.experts_per_rank = 64;
  model.num_topk = 8;
  model.hidden = 7168;
  model.routing = Routing::kGroupLimited;
  for (const tern_layout layout : {TERN_LAYOUT_RANK_MAJOR, TERN_LAYOUT_EXPERT_MAJOR}) {
    model.layout = layout;
    model.weighting = TERN_WEIGHTS_OWNER;
    result.push_back(model.normalized());
    model.encoding = TERN_ENCODING_FP8_F32;
  }
  return result;
}

}  // namespace tern::conformance
