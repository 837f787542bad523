// SPDX-License-Identifier: Apache-2.0
// Wrong arguments: every function says so with a status and a text, writes nothing, and works afterwards as if nothing had
// been asked.
#include <cstring>
#include <functional>
#include <limits>
#include <thread>
#include <tern/tern.hpp>

#include "engine/support.h"

namespace tern::conformance {
namespace {

constexpr int64_t kHuge = std::numeric_limits<int64_t>::max() / 2;

// A value that the enumeration does not have, as a caller from C can pass it.
template <typename Enum>
Enum no_such(int32_t value) {
  Enum result;
  static_assert(sizeof result == sizeof value);
  std::memcpy(&result, &value, sizeof result);
  return result;
}

// A change that makes a struct invalid.
template <typename Struct>
struct Wrong {
  const char* what;
  std::function<void(Struct&)> change;
};

// The call must refuse with one of the two statuses for wrong calls, and say why.
void expect_refused(const char* what, tern_status status) {
  EXPECT_TRUE(status == TERN_INVALID_ARGUMENT || status == TERN_INVALID_STATE) << what << ": " << tern_status_name(status);
  EXPECT_STRNE(tern_last_error(), "") << what;
}

void expect_invalid_argument(const char* what, tern_status status) {
  EXPECT_EQ(status, TERN_INVALID_ARGUMENT) << what << ": " << tern_last_error();
  EXPECT_STRNE(tern_last_error(), "") << what;
}

// A struct that no call may touch.
template <typename Struct>
struct Untouched {
  Untouched() {
    std::memset(static_cast<void*>(&value), kPoison, sizeof value);
    value.struct_size = sizeof value;
    std::memcpy(&before, &value, sizeof value);
  }
  bool intact() const { return std::memcmp(&value, &before, sizeof value) == 0; }
  Struct value, before;
};

class Arguments : public testing::Test {
 protected:
  static constexpr int64_t kNumTokens = 4, kHidden = 64;

  Arguments() : groups_(Group::local(1)), exchange_(groups_[0], {.device = TERN_DEVICE_CPU, .window_bytes = 1 << 16, .timeout_ms = 20'000}) {
    tokens_.assign(kNumTokens * kHidden * 4, 1);
    rows_ = GuardedBuffer(1 << 16, nullptr);
  }

  tern_plan_options plan_options() const {
    tern_plan_options options;
    options.max_tokens = kNumTokens;
    options.num_experts = 4;
    options.num_topk = 2;
    options.layout = TERN_LAYOUT_EXPERT_MAJOR;
    options.extent = TERN_EXTENT_WORST;
    return options;
  }
  tern_routing routing() const {
    tern_routing result;
    result.topk_idx = topk_;
    result.num_tokens = kNumTokens;
    return result;
  }
  tern_dispatch_args dispatch_args() const {
    tern_dispatch_args args;
    args.tokens = tokens_.data();
    args.hidden = kHidden;
    args.topk_weights = weights_;
    args.out_tokens = rows_.data();
    return args;
  }
  tern_combine_args combine_args() const {
    tern_combine_args args;
    args.rows = tokens_.data();
    args.hidden = 8;
    args.out_tokens = rows_.data();
    return args;
  }

  // The exchange still does what it should.
  void expect_still_works() {
    Case c;
    c.num_ranks = 1;
    c.layout = TERN_LAYOUT_EXPERT_MAJOR;
    const Scenario scenario(c);
    RoundTrip trip(scenario, 0, exchange_.get());
    trip.run();
    EXPECT_EQ(join_lines(trip.differences()), "");
    EXPECT_EQ(exchange_.state().health, TERN_HEALTH_OK);
  }

  PlanHandle routed_plan() {
    PlanHandle plan = make_plan(exchange_.get(), plan_options());
    const tern_routing given = routing();
    EXPECT_EQ(tern_plan_route(plan.get(), &given, nullptr, nullptr), TERN_OK) << tern_last_error();
    return plan;
  }

  int64_t topk_[kNumTokens * 2] = {0, 1, 2, 3, 1, -1, 3, 0};
  float weights_[kNumTokens * 2] = {1, 2, 3, 4, 5, 6, 7, 8};
  std::vector<uint8_t> tokens_;
  GuardedBuffer rows_;
  std::vector<Group> groups_;
  Exchange exchange_;
};

TEST(Status, NamesAndVersion) {
  EXPECT_STREQ(tern_status_name(TERN_OK), "TERN_OK");
  EXPECT_STREQ(tern_status_name(TERN_INTERNAL_ERROR), "TERN_INTERNAL_ERROR");
  EXPECT_STREQ(tern_status_name(no_such<tern_status>(99)), "TERN_UNKNOWN");
  EXPECT_STREQ(tern_status_name(no_such<tern_status>(-1)), "TERN_UNKNOWN");
  EXPECT_EQ(tern_version(), TERN_VERSION_MAJOR * 10000 + TERN_VERSION_MINOR * 100 + TERN_VERSION_PATCH);
}

TEST(Status, LastErrorBelongsToTheThread) {
  expect_invalid_argument("no group", tern_group_get_info(nullptr, nullptr));
  std::thread([] { EXPECT_STREQ(tern_last_error(), ""); }).join();
}

TEST(GroupArguments, Local) {
  tern_group* groups[2] = {};
  const tern_group_options good;
  expect_invalid_argument("no room", tern_group_create_local(&good, 2, nullptr));
  for (const int32_t num_ranks : {0, -1, 1'000'000}) expect_invalid_argument("num_ranks", tern_group_create_local(&good, num_ranks, groups));
  const Wrong<tern_group_options> wrongs[] = {
      {"struct_size 0", [](auto& o) { o.struct_size = 0; }},
      {"struct_size 7", [](auto& o) { o.struct_size = 7; }},
      {"timeout_ms", [](auto& o) { o.timeout_ms = -1; }},
      {"name", [](auto& o) { o.name = "a name of sixty-four bytes or more, which is longer than is allowed"; }},
      {"log_level", [](auto& o) { o.log_level = no_such<tern_log_level>(77); }},
  };
  for (const auto& [what, change] : wrongs) {
    tern_group_options options;
    change(options);
    expect_invalid_argument(what, tern_group_create_local(&options, 2, groups));
  }
  EXPECT_EQ(groups[0], nullptr);
  EXPECT_EQ(groups[1], nullptr);
}

TEST(GroupArguments, Allgather) {
  const auto refuses = [](void*, const void*, void*, size_t) { return 1; };
  tern_group* group = nullptr;
  const tern_group_options good;
  expect_invalid_argument("no callback", tern_group_create_from_allgather(&good, 0, 1, nullptr, nullptr, &group));
  expect_invalid_argument("no group", tern_group_create_from_allgather(&good, 0, 1, refuses, nullptr, nullptr));
  expect_invalid_argument("rank", tern_group_create_from_allgather(&good, 2, 2, refuses, nullptr, &group));
  expect_invalid_argument("rank", tern_group_create_from_allgather(&good, -1, 2, refuses, nullptr, &group));
  expect_invalid_argument("num_ranks", tern_group_create_from_allgather(&good, 0, 0, refuses, nullptr, &group));
  EXPECT_NE(tern_group_create_from_allgather(&good, 0, 2, refuses, nullptr, &group), TERN_OK);
  EXPECT_STRNE(tern_last_error(), "");
  EXPECT_EQ(group, nullptr);
}

TEST_F(Arguments, GroupInfo) {
  Untouched<tern_group_info> info;
  expect_invalid_argument("no group", tern_group_get_info(nullptr, &info.value));
  expect_invalid_argument("no info", tern_group_get_info(groups_[0].get(), nullptr));
  EXPECT_TRUE(info.intact());
  tern_group_info small;
  small.struct_size = 4;
  expect_invalid_argument("struct_size", tern_group_get_info(groups_[0].get(), &small));
  tern_group_destroy(nullptr);
}

TEST_F(Arguments, ExchangeOptions) {
  const Wrong<tern_exchange_options> wrongs[] = {
      {"struct_size 0", [](auto& o) { o.struct_size = 0; }},
      {"struct_size 4", [](auto& o) { o.struct_size = 4; }},
      {"device", [](auto& o) { o.device = no_such<tern_device_type>(9); }},
      {"staging_bytes", [](auto& o) { o.staging_bytes = -1; }},
      {"staging_bytes too small", [](auto& o) { o.staging_bytes = 1; }},
      {"window_bytes", [](auto& o) { o.window_bytes = -1; }},
      {"max_tokens", [](auto& o) { o.max_tokens = -1; }},
      {"max_tokens huge", [](auto& o) { o.max_tokens = kHuge; }},
      {"max_row_bytes", [](auto& o) { o.max_row_bytes = -16; }},
      {"max_row_bytes huge", [](auto& o) { o.max_row_bytes = kHuge; }},
      {"max_topk", [](auto& o) { o.max_topk = 65; }},
      {"max_topk", [](auto& o) { o.max_topk = -1; }},
      {"max_experts", [](auto& o) { o.max_experts = -1; }},
      {"num_lanes", [](auto& o) { o.num_lanes = 17; }},
      {"num_lanes", [](auto& o) { o.num_lanes = -1; }},
      {"timeout_ms", [](auto& o) { o.timeout_ms = -1; }},
      {"on_timeout", [](auto& o) { o.on_timeout = no_such<tern_timeout_policy>(2); }},
      {"mode", [](auto& o) { o.mode = no_such<tern_mode>(3); }},
  };
  for (const auto& [what, change] : wrongs) {
    tern_exchange_options options;
    options.device = TERN_DEVICE_CPU;
    change(options);
    tern_exchange* exchange = nullptr;
    expect_invalid_argument(what, tern_exchange_create(groups_[0].get(), &options, &exchange));
    EXPECT_EQ(exchange, nullptr);
    Untouched<tern_memory_info> info;
    expect_invalid_argument(what, tern_exchange_query_memory(groups_[0].get(), &options, &info.value));
    EXPECT_TRUE(info.intact()) << what;
  }
}

TEST_F(Arguments, ExchangePointers) {
  const tern_exchange_options options;
  tern_exchange* exchange = nullptr;
  tern_memory_info memory;
  tern_exchange_state state;
  tern_metrics metrics;
  expect_invalid_argument("create, group", tern_exchange_create(nullptr, &options, &exchange));
  expect_invalid_argument("create, exchange", tern_exchange_create(groups_[0].get(), &options, nullptr));
  expect_invalid_argument("query, group", tern_exchange_query_memory(nullptr, &options, &memory));
  expect_invalid_argument("query, info", tern_exchange_query_memory(groups_[0].get(), &options, nullptr));
  expect_invalid_argument("state, exchange", tern_exchange_get_state(nullptr, &state));
  expect_invalid_argument("state, state", tern_exchange_get_state(exchange_.get(), nullptr));
  expect_invalid_argument("metrics, exchange", tern_exchange_get_metrics(nullptr, &metrics));
  expect_invalid_argument("metrics, metrics", tern_exchange_get_metrics(exchange_.get(), nullptr));
  expect_invalid_argument("recover", tern_exchange_recover(nullptr, nullptr));
  tern_exchange_destroy(nullptr);
  tern_plan_destroy(nullptr);
}

TEST_F(Arguments, QueriedMemoryIsWhatIsTaken) {
  const tern_memory_info info = Exchange::query_memory(groups_[0], {.device = TERN_DEVICE_CPU, .window_bytes = 1 << 16});
  EXPECT_EQ(info.window_bytes, 1 << 16);
  EXPECT_GT(info.control_bytes, 0);
  EXPECT_GT(info.staging_bytes, 0);
  EXPECT_GE(info.total_bytes, info.control_bytes + info.staging_bytes + info.window_bytes);
}

TEST_F(Arguments, Window) {
  void* const nowhere = rows_.data();
  void* pointer = nowhere;
  expect_invalid_argument("exchange", tern_window_alloc(nullptr, 16, &pointer));
  expect_invalid_argument("pointer", tern_window_alloc(exchange_.get(), 16, nullptr));
  expect_invalid_argument("0 bytes", tern_window_alloc(exchange_.get(), 0, &pointer));
  expect_invalid_argument("-1 byte", tern_window_alloc(exchange_.get(), -1, &pointer));
  EXPECT_EQ(tern_window_alloc(exchange_.get(), (1 << 16) + 1, &pointer), TERN_OUT_OF_MEMORY);
  EXPECT_EQ(tern_window_alloc(exchange_.get(), kHuge, &pointer), TERN_OUT_OF_MEMORY);
  EXPECT_STRNE(tern_last_error(), "");
  EXPECT_EQ(pointer, nowhere);
  expect_invalid_argument("foreign memory", tern_window_free(exchange_.get(), nowhere));
  ASSERT_EQ(tern_window_alloc(exchange_.get(), 1 << 16, &pointer), TERN_OK);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(pointer) % 256, 0u);
  expect_invalid_argument("inside of an allocation", tern_window_free(exchange_.get(), static_cast<uint8_t*>(pointer) + 256));
  EXPECT_EQ(tern_window_free(exchange_.get(), pointer), TERN_OK);
  expect_invalid_argument("freed twice", tern_window_free(exchange_.get(), pointer));
  ASSERT_EQ(tern_window_alloc(exchange_.get(), 1 << 16, &pointer), TERN_OK);
  EXPECT_EQ(tern_window_free(exchange_.get(), pointer), TERN_OK);
  expect_still_works();
}

TEST_F(Arguments, PlanOptions) {
  const Wrong<tern_plan_options> wrongs[] = {
      {"struct_size", [](auto& o) { o.struct_size = 0; }},
      {"max_tokens 0", [](auto& o) { o.max_tokens = 0; }},
      {"max_tokens", [](auto& o) { o.max_tokens = -1; }},
      {"max_tokens huge", [](auto& o) { o.max_tokens = kHuge; }},
      {"num_experts 0", [](auto& o) { o.num_experts = 0; }},
      {"num_experts", [](auto& o) { o.num_experts = -4; }},
      {"num_topk 65", [](auto& o) { o.num_topk = 65; }},
      {"num_topk", [](auto& o) { o.num_topk = -1; }},
      {"num_topk 0 with expert_major", [](auto& o) { o.num_topk = 0; }},
      {"layout", [](auto& o) { o.layout = no_such<tern_layout>(3); }},
      {"extent", [](auto& o) { o.extent = no_such<tern_extent>(2); }},
      {"expert_alignment", [](auto& o) { o.expert_alignment = -1; }},
      {"row_capacity", [](auto& o) { o.row_capacity = -1; }},
  };
  for (const auto& [what, change] : wrongs) {
    tern_plan_options options = plan_options();
    change(options);
    tern_plan* plan = nullptr;
    expect_invalid_argument(what, tern_plan_create(exchange_.get(), &options, &plan));
    EXPECT_EQ(plan, nullptr);
  }
  const tern_plan_options good = plan_options();
  tern_plan* plan = nullptr;
  expect_invalid_argument("exchange", tern_plan_create(nullptr, &good, &plan));
  expect_invalid_argument("options", tern_plan_create(exchange_.get(), nullptr, &plan));
  expect_invalid_argument("plan", tern_plan_create(exchange_.get(), &good, nullptr));
}

TEST(PlanArguments, ExpertsMustDivideByRanks) {
  const auto differences = run_threads(2, {}, {}, [](int32_t, tern_exchange* exchange) {
    tern_plan_options options;
    options.max_tokens = 1;
    options.num_experts = 5;
    options.num_topk = 1;
    tern_plan* plan = nullptr;
    expect_invalid_argument("num_experts", tern_plan_create(exchange, &options, &plan));
    return std::vector<std::string>();
  });
  EXPECT_EQ(join_lines(differences), "");
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
  EXPECT_EQ(tern_plan_route(plan.get(), &good, nullptr, nullptr), TERN_OK);
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
    EXPECT_TRUE(std::all_of(rows_.bytes().begin(), rows_.bytes().end(), [](uint8_t byte) { return byte == kPoison; })) << what;
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
    EXPECT_TRUE(std::all_of(rows_.bytes().begin(), rows_.bytes().end(), [](uint8_t byte) { return byte == kPoison; })) << what;
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
