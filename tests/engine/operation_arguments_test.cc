// SPDX-License-Identifier: Apache-2.0
// Wrong arguments of operations: refused with a status and a text before anything is written or sent.
#include "engine/arguments.h"

namespace tern::conformance {
namespace {

bool still_poisoned(const GuardedBuffer& buffer) {
  const GuardedBuffer::Image image = buffer.read();
  return std::all_of(image.bytes().begin(), image.bytes().end(), [](uint8_t byte) { return byte == kPoison; });
}

TEST_F(Arguments, Routing) {
  const int64_t too_high[] = {0, 1, 2, 4, 1, -1, 3, 0}, too_low[] = {0, 1, 2, 3, 1, -2, 3, 0};
  const uint8_t mask[kNumTokens] = {1, 1, 0, 1};
  const Wrong<tern_routing> wrongs[] = {
      {"struct_size", [](auto& r) { r.struct_size = 0; }},
      {"num_tokens", [](auto& r) { r.num_tokens = -1; }},
      {"num_tokens above max_tokens", [](auto& r) { r.num_tokens = kNumTokens + 1; }},
      {"no topk_idx", [](auto& r) { r.topk_idx = nullptr; }},
      {"expert too high", [&](auto& r) { r.topk_idx = too_high; }},
      {"expert below -1", [&](auto& r) { r.topk_idx = too_low; }},
      {"topk_idx_type", [](auto& r) { r.topk_idx_type = no_such<tern_index_type>(2); }},
      {"token_in_rank with top-k", [&](auto& r) { r.topk_idx = nullptr, r.token_in_rank = mask; }},
      {"both", [&](auto& r) { r.token_in_rank = mask; }},
  };
  const PlanHandle plan = make_plan(exchange_.get(), plan_options());
  for (const auto& [what, change] : wrongs) {
    tern_routing given = routing();
    change(given);
    Untouched<tern_plan_info> info;
    expect_invalid_argument(what, tern_plan_route(plan.get(), &given, nullptr, &info.value));
    EXPECT_TRUE(info.intact()) << what;
    Untouched<tern_plan_info> not_routed;
    EXPECT_EQ(tern_plan_get_info(plan.get(), &not_routed.value), TERN_INVALID_STATE) << what;
    EXPECT_TRUE(not_routed.intact());
  }
  const tern_routing good = routing();
  expect_invalid_argument("plan", tern_plan_route(nullptr, &good, nullptr, nullptr));
  expect_invalid_argument("routing", tern_plan_route(plan.get(), nullptr, nullptr, nullptr));
  int64_t capacity = 0;
  expect_invalid_argument("plan", tern_plan_get_row_capacity(nullptr, &capacity));
  expect_invalid_argument("num_rows", tern_plan_get_row_capacity(plan.get(), nullptr));
  EXPECT_EQ(tern_plan_get_row_capacity(plan.get(), &capacity), TERN_OK);  // not routed yet
  tern_plan_info routed;
  EXPECT_EQ(tern_plan_route(plan.get(), &good, nullptr, &routed), TERN_OK);
  EXPECT_EQ(capacity, routed.row_capacity);
  expect_still_works();
}

TEST_F(Arguments, Launch) {
  const Wrong<tern_launch> wrongs[] = {
      {"struct_size", [](auto& l) { l.struct_size = 0; }},
      {"lane", [](auto& l) { l.lane = 1; }},
      {"lane", [](auto& l) { l.lane = -1; }},
      {"phase", [](auto& l) { l.phase = no_such<tern_phase>(3); }},
      {"num_sms", [](auto& l) { l.num_sms = -1; }},
  };
  const PlanHandle plan = routed_plan();
  const tern_routing given = routing();
  const tern_dispatch_args dispatch = dispatch_args();
  for (const auto& [what, change] : wrongs) {
    tern_launch how;
    change(how);
    expect_invalid_argument(what, tern_plan_route(plan.get(), &given, &how, nullptr));
    expect_invalid_argument(what, tern_dispatch(plan.get(), &dispatch, &how));
  }
  tern_launch how;
  how.phase = TERN_PHASE_SEND;
  expect_invalid_argument("route has no phases", tern_plan_route(plan.get(), &given, &how, nullptr));
  how.phase = TERN_PHASE_RECEIVE;
  EXPECT_EQ(tern_dispatch(plan.get(), &dispatch, &how), TERN_INVALID_STATE);
  EXPECT_STRNE(tern_last_error(), "");
  EXPECT_EQ(tern_dispatch(plan.get(), &dispatch, nullptr), TERN_OK) << tern_last_error();
  expect_still_works();
}

TEST_F(Arguments, Dispatch) {
  const tern_routing given = routing();
  const Wrong<tern_dispatch_args> wrongs[] = {
      {"struct_size", [](auto& a) { a.struct_size = 0; }},
      {"no tokens", [](auto& a) { a.tokens = nullptr; }},
      {"dtype", [](auto& a) { a.dtype = no_such<tern_dtype>(5); }},
      {"encoding", [](auto& a) { a.encoding = no_such<tern_encoding>(4); }},
      {"cast of bytes", [](auto& a) { a.encoding = TERN_ENCODING_FP8_F32, a.dtype = TERN_DTYPE_BYTES; }},
      {"cast of fp8", [](auto& a) { a.encoding = TERN_ENCODING_FP8_F32, a.dtype = TERN_DTYPE_FP8_E4M3; }},
      {"cast with scales", [&](auto& a) { a.encoding = TERN_ENCODING_FP8_F32, a.scales = tokens_.data(), a.scale_bytes = 4; }},
      {"hidden 0", [](auto& a) { a.hidden = 0; }},
      {"hidden", [](auto& a) { a.hidden = -8; }},
      {"hidden huge", [](auto& a) { a.hidden = kHuge; }},
      {"hidden of 24 bytes", [](auto& a) { a.hidden = 12; }},
      {"hidden of 8 bytes after the cast", [](auto& a) { a.hidden = 8, a.encoding = TERN_ENCODING_FP8_F32; }},
      {"token_stride_bytes", [](auto& a) { a.token_stride_bytes = 16; }},
      {"token_stride_bytes", [](auto& a) { a.token_stride_bytes = -256; }},
      {"scales without scale_bytes", [&](auto& a) { a.scales = tokens_.data(); }},
      {"scale_bytes without scales", [](auto& a) { a.scale_bytes = 8; }},
      {"scale_bytes", [&](auto& a) { a.scales = tokens_.data(), a.scale_bytes = -8; }},
      {"scale_bytes of no whole elements", [&](auto& a) { a.scales = tokens_.data(), a.scale_bytes = 6, a.scale_element_bytes = 4; }},
      {"scale_element_bytes", [&](auto& a) { a.scales = tokens_.data(), a.scale_bytes = 8, a.scale_element_bytes = -1; }},
      {"out_scale_order", [&](auto& a) { a.scales = tokens_.data(), a.scale_bytes = 8, a.out_scale_order = no_such<tern_scale_order>(2); }},
      {"no out_tokens", [](auto& a) { a.out_tokens = nullptr; }},
  };
  const PlanHandle plan = routed_plan();
  for (const auto& [what, change] : wrongs) {
    tern_dispatch_args args = dispatch_args();
    change(args);
    expect_invalid_argument(what, tern_dispatch(plan.get(), &args, nullptr));
    EXPECT_TRUE(still_poisoned(rows_)) << what;
  }
  const tern_dispatch_args good = dispatch_args();
  expect_invalid_argument("plan", tern_dispatch(nullptr, &good, nullptr));
  expect_invalid_argument("args", tern_dispatch(plan.get(), nullptr, nullptr));

  tern_plan_options exact = plan_options();
  exact.extent = TERN_EXTENT_EXACT;
  const PlanHandle exact_plan = make_plan(exchange_.get(), exact);
  EXPECT_EQ(tern_dispatch(exact_plan.get(), &good, nullptr), TERN_INVALID_STATE);
  tern_dispatch_args fused = good;
  fused.routing = &given;
  expect_invalid_argument("routing with exact", tern_dispatch(exact_plan.get(), &fused, nullptr));
  EXPECT_EQ(tern_dispatch(plan.get(), &good, nullptr), TERN_OK) << tern_last_error();
  expect_still_works();
}

TEST_F(Arguments, RowsTooLongForTheStagingSayWhatIsNeeded) {
  tern_dispatch_args args = dispatch_args();
  args.hidden = int64_t{1} << 28;
  const PlanHandle plan = routed_plan();
  EXPECT_EQ(tern_dispatch(plan.get(), &args, nullptr), TERN_OUT_OF_MEMORY);
  EXPECT_NE(std::string(tern_last_error()).find("staging_bytes"), std::string::npos) << tern_last_error();
  expect_still_works();
}

TEST_F(Arguments, Combine) {
  const Wrong<tern_combine_args> wrongs[] = {
      {"struct_size", [](auto& a) { a.struct_size = 0; }},
      {"no rows", [](auto& a) { a.rows = nullptr; }},
      {"dtype bytes", [](auto& a) { a.dtype = TERN_DTYPE_BYTES; }},
      {"dtype fp8", [](auto& a) { a.dtype = TERN_DTYPE_FP8_E4M3; }},
      {"dtype", [](auto& a) { a.dtype = no_such<tern_dtype>(-1); }},
      {"mode", [](auto& a) { a.mode = no_such<tern_combine_mode>(2); }},
      {"hidden 0", [](auto& a) { a.hidden = 0; }},
      {"hidden", [](auto& a) { a.hidden = -8; }},
      {"hidden huge", [](auto& a) { a.hidden = kHuge; }},
      {"hidden of 8 bytes", [](auto& a) { a.hidden = 4; }},
      {"weighting", [](auto& a) { a.weighting = no_such<tern_weighting>(3); }},
      {"wire", [](auto& a) { a.wire = no_such<tern_wire>(3); }},
      {"owner without weights", [](auto& a) { a.weighting = TERN_WEIGHTS_OWNER; }},
      {"no out_tokens", [](auto& a) { a.out_tokens = nullptr; }},
      {"weights back without row_weights", [&](auto& a) { a.out_topk_weights = weights_; }},
  };
  const PlanHandle plan = routed_plan();
  const tern_combine_args good = combine_args();
  EXPECT_EQ(tern_combine(plan.get(), &good, nullptr), TERN_INVALID_STATE) << "before the first dispatch";
  tern_dispatch_args dispatch = dispatch_args();
  dispatch.topk_weights = nullptr;
  ASSERT_EQ(tern_dispatch(plan.get(), &dispatch, nullptr), TERN_OK) << tern_last_error();
  rows_.poison();
  for (const auto& [what, change] : wrongs) {
    tern_combine_args args = combine_args();
    change(args);
    expect_invalid_argument(what, tern_combine(plan.get(), &args, nullptr));
    EXPECT_TRUE(still_poisoned(rows_)) << what;
  }
  expect_invalid_argument("plan", tern_combine(nullptr, &good, nullptr));
  expect_invalid_argument("args", tern_combine(plan.get(), nullptr, nullptr));
  tern_combine_args weighted = combine_args();
  weighted.weighting = TERN_WEIGHTS_DISPATCH;
  expect_refused("dispatch carried no weights", tern_combine(plan.get(), &weighted, nullptr));
  EXPECT_EQ(tern_combine(plan.get(), &good, nullptr), TERN_OK) << tern_last_error();
  expect_still_works();
}

TEST_F(Arguments, RankMajorHasNoWeighting) {
  tern_plan_options options = plan_options();
  options.layout = TERN_LAYOUT_RANK_MAJOR;
  const PlanHandle plan = make_plan(exchange_.get(), options);
  const tern_routing given = routing();
  const tern_dispatch_args dispatch = dispatch_args();
  ASSERT_EQ(tern_plan_route(plan.get(), &given, nullptr, nullptr), TERN_OK);
  ASSERT_EQ(tern_dispatch(plan.get(), &dispatch, nullptr), TERN_OK) << tern_last_error();
  for (const tern_weighting weighting : {TERN_WEIGHTS_DISPATCH, TERN_WEIGHTS_OWNER}) {
    tern_combine_args args = combine_args();
    args.weighting = weighting;
    args.topk_weights = weights_;
    expect_invalid_argument("weighting", tern_combine(plan.get(), &args, nullptr));
  }
}

TEST_F(Arguments, CountRouting) {
  const tern_routing given = routing();
  int32_t per_rank[1], per_node[1], per_expert[4];
  uint8_t in_rank[kNumTokens];
  tern_routing_counts counts;
  counts.tokens_per_rank = per_rank;
  counts.tokens_per_node = per_node;
  counts.tokens_per_expert = per_expert;
  counts.token_in_rank = in_rank;
  expect_invalid_argument("exchange", tern_count_routing(nullptr, &given, 4, 2, nullptr, &counts));
  expect_invalid_argument("routing", tern_count_routing(exchange_.get(), nullptr, 4, 2, nullptr, &counts));
  expect_invalid_argument("counts", tern_count_routing(exchange_.get(), &given, 4, 2, nullptr, nullptr));
  expect_invalid_argument("num_experts", tern_count_routing(exchange_.get(), &given, 0, 2, nullptr, &counts));
  expect_invalid_argument("num_experts", tern_count_routing(exchange_.get(), &given, 3, 2, nullptr, &counts));
  expect_invalid_argument("num_topk", tern_count_routing(exchange_.get(), &given, 4, 65, nullptr, &counts));
  ASSERT_EQ(tern_count_routing(exchange_.get(), &given, 4, 2, nullptr, &counts), TERN_OK) << tern_last_error();
  EXPECT_EQ(per_rank[0], 4);
  EXPECT_EQ(per_node[0], 4);
  EXPECT_EQ(std::vector<int32_t>(per_expert, per_expert + 4), (std::vector<int32_t>{2, 2, 1, 2}));
  EXPECT_EQ(std::vector<uint8_t>(in_rank, in_rank + 4), (std::vector<uint8_t>{1, 1, 1, 1}));
}

}  // namespace
}  // namespace tern::conformance
