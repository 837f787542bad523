// SPDX-License-Identifier: Apache-2.0
// Wrong arguments of groups, exchanges, windows and plans: every function says so with a status and a text, writes nothing, and works
// afterwards as if nothing had been asked.
#include "engine/arguments.h"

#include <thread>

namespace tern::conformance {
namespace {

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
  for (const int32_t num_ranks : {0, -1, 1'000'000})
    expect_invalid_argument("num_ranks", tern_group_create_local(&good, num_ranks, groups));
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
  tern_exchange_info info;
  expect_invalid_argument("info, exchange", tern_exchange_get_info(nullptr, &info));
  expect_invalid_argument("info, info", tern_exchange_get_info(exchange_.get(), nullptr));
  EXPECT_EQ(tern_exchange_get_info(exchange_.get(), &info), TERN_OK);
  EXPECT_EQ(info.device, TERN_DEVICE_CPU);
  EXPECT_EQ(info.num_lanes, 1);
  EXPECT_GT(info.timeout_ms, 0);
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
  const auto differences = run_threads(2, {}, {}, [](int32_t, tern_exchange* exchange, RankDevice&) {
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

}  // namespace
}  // namespace tern::conformance
