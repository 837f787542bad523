// SPDX-License-Identifier: Apache-2.0
#include "tools/timeline.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "base/error.h"

namespace tern::tools {
namespace {

tern_span wait_for(int32_t peer, tern_awaited awaited) { return {.kind = TERN_SPAN_WAIT, .peer = peer, .awaited = awaited}; }

TEST(Timeline, NamesSpansAsPeopleReadThem) {
  EXPECT_EQ(span_name({.operation = TERN_OP_DISPATCH, .phase = TERN_PHASE_SEND, .peer = -1}), "dispatch (send)");
  EXPECT_EQ(span_name({.operation = TERN_OP_RECOVER, .peer = -1}), "recover");
  EXPECT_EQ(span_name({.kind = TERN_SPAN_RECEIVE, .peer = 3}), "receive from rank 3");
  EXPECT_EQ(span_name({.kind = TERN_SPAN_RECEIVE, .peer = -1}), "fill in");
  EXPECT_EQ(span_name(wait_for(2, TERN_AWAITED_MESSAGES)), "wait for rank 2");
  EXPECT_EQ(span_name(wait_for(2, TERN_AWAITED_ADDRESS)), "wait for rank 2's rows");
  EXPECT_EQ(span_name(wait_for(2, TERN_AWAITED_CONSUMED)), "wait for rank 2 to take what it was sent");
  EXPECT_EQ(span_name(wait_for(0, TERN_AWAITED_OWN_GPU)), "wait for the GPU");
}

TEST(Timeline, IsAChromeTraceOfAllRanks) {
  const tern_span send = {.begin_ns = 5000,
                          .end_ns = 7500,
                          .epoch = 9,
                          .bytes = 640,
                          .kind = TERN_SPAN_SEND,
                          .operation = TERN_OP_ROUTE,
                          .lane = 1,
                          .peer = -1};
  tern_span wait = wait_for(0, TERN_AWAITED_MESSAGES);
  wait.status = TERN_TIMEOUT;
  const std::filesystem::path path = std::filesystem::path(testing::TempDir()) / "tern_timeline_test.json";
  write_chrome_trace(path.string(), {{0, {&send, 1}}, {1, {&wait, 1}}});
  const auto trace = nlohmann::json::parse(std::ifstream(path));
  std::filesystem::remove(path);
  const auto& events = trace["traceEvents"];
  ASSERT_EQ(events.size(), 4u);
  EXPECT_EQ(events[0]["args"]["name"], "rank 0");
  EXPECT_EQ(events[1], (nlohmann::json{{"ph", "X"},
                                       {"name", "send"},
                                       {"pid", 0},
                                       {"tid", 1},
                                       {"ts", 5.0},
                                       {"dur", 2.5},
                                       {"args", {{"operation", "route"}, {"epoch", 9}, {"bytes", 640}}}}));
  EXPECT_EQ(events[3]["pid"], 1);
  EXPECT_EQ(events[3]["args"]["status"], "TERN_TIMEOUT");
}

TEST(Timeline, SaysWhereItCannotBeWritten) { EXPECT_THROW(write_chrome_trace("/nowhere/at/all.json", {}), Failure); }

}  // namespace
}  // namespace tern::tools
