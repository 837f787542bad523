// SPDX-License-Identifier: Apache-2.0
// Forecasts beside recorded results: data/bench_cpu.json is of `tern bench --device cpu` (2 cores; nodes are declared), data/bench_4_h200.json
// and data/bench_2_h200_nodes.json what the tables of `tern bench --device cuda` on 4 H200, and on 2 as 2 nodes over tcp, tell.
#include "tools/plan_check.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "base/error.h"

namespace tern::tools {
namespace {

std::string data(const std::string& name) { return std::string(TERN_TEST_DATA) + "/" + name; }

void expect_within(const Compared& compared, double factor, const CheckedLine& line, const char* what) {
  if (compared.measured == 0) return;
  EXPECT_LT(compared.ratio(), factor) << what << " of " << line.op << " " << line.buffers << ", " << line.batch;
  EXPECT_GT(compared.ratio(), 1 / factor) << what << " of " << line.op << " " << line.buffers << ", " << line.batch;
}

TEST(PlanCheck, BytesOfCpuRanksAreThoseThatWereCounted) {
  const ForecastCheck check = check_forecasts(data("bench_cpu.json"), {});
  ASSERT_EQ(check.lines.size(), 20u);
  bool crossed = false;
  for (const CheckedLine& line : check.lines) {
    // The measured rank is the one that moves most; of 8 tokens that is a tenth above the mean.
    const double factor = line.batch.find(" 8 tokens") != std::string::npos ? 1.12 : 1.04;
    expect_within(line.wire_mb, factor, line, "wire");
    expect_within(line.link_mb, factor, line, "link");
    expect_within(line.network_mb, factor, line, "network");
    crossed |= line.network_mb.measured > 0;
  }
  EXPECT_TRUE(crossed);
}

TEST(PlanCheck, TimesOfCpuRanksAreOfTheRightSize) {
  for (const CheckedLine& line : check_forecasts(data("bench_cpu.json"), {}).lines) expect_within(line.us, 2.5, line, "time");
}

TEST(PlanCheck, TimesOfFourGpusAreClose) {
  const ForecastCheck check = check_forecasts(data("bench_4_h200.json"), {});
  ASSERT_EQ(check.lines.size(), 33u);
  EXPECT_EQ(check.num_skipped, 0);
  for (const CheckedLine& line : check.lines) {
    expect_within(line.us, 1.15, line, "time");
    if (line.batch.find("4096 tokens") != std::string::npos) expect_within(line.wire_mb, 1.01, line, "wire");
  }
}

// Over a network of 2.7 GB/s with trips of 6 us.
TEST(PlanCheck, TimesOfGpusBetweenNodesAreClose) {
  CostOverrides overrides(cost_table().size());
  for (size_t i = 0; i < overrides.size(); ++i) {
    if (cost_table()[i].name == std::string("net-gbps")) overrides[i] = 2.7;
    if (cost_table()[i].name == std::string("net-latency-us")) overrides[i] = 6;
  }
  const ForecastCheck check = check_forecasts(data("bench_2_h200_nodes.json"), overrides);
  ASSERT_EQ(check.lines.size(), 12u);
  for (const CheckedLine& line : check.lines) expect_within(line.us, 1.25, line, "time");
}

TEST(PlanCheck, ConstantsCanBeOverridden) {
  CostOverrides overrides(cost_table().size());
  overrides[1] = 32.8;
  ASSERT_STREQ(cost_table()[1].name, "link-gbps");
  const ForecastCheck measured = check_forecasts(data("bench_4_h200.json"), {}),
                      slow = check_forecasts(data("bench_4_h200.json"), overrides);
  EXPECT_GT(slow.lines.front().us.predicted, 5 * measured.lines.front().us.predicted);
}

class PlanCheckFile : public testing::Test {
 protected:
  void SetUp() override {
    path_ = std::filesystem::temp_directory_path() /
            (std::string("tern_plan_check_") + testing::UnitTest::GetInstance()->current_test_info()->name() + ".json");
  }
  void TearDown() override { std::filesystem::remove(path_); }
  std::string write(const std::string& text) const {
    std::ofstream(path_) << text;
    return path_.string();
  }

 private:
  std::filesystem::path path_;
};

TEST_F(PlanCheckFile, WhatIsNoResultIsRefused) {
  EXPECT_THROW(check_forecasts("/nonexistent/bench.json", {}), Failure);
  EXPECT_THROW(check_forecasts(write("no json"), {}), Failure);
  EXPECT_THROW(check_forecasts(write("[]"), {}), Failure);
  EXPECT_THROW(check_forecasts(write(R"({"records": [{"op": "dispatch"}]})"), {}), Failure);
}

TEST_F(PlanCheckFile, LinesThatCannotBeComparedAreCounted) {
  const ForecastCheck check = check_forecasts(
      write(R"({"records": [{"routing": "file layer.routing", "verified": true}, {"routing": "uniform", "verified": false}]})"), {});
  EXPECT_TRUE(check.lines.empty());
  EXPECT_EQ(check.num_skipped, 2);
}

TEST_F(PlanCheckFile, WhatHasNoForecastIsCounted) {
  const auto record = [](const std::string& op, const std::string& layout, const std::string& choice) {
    return R"({"op": ")" + op + R"(", "layout": ")" + layout + R"(", )" + choice +
           R"(, "device": "cpu", "mode": "throughput", "dtype": "bf16", "ranks": 2, "tokens": 64, "hidden": 1024, "topk": 2, "experts": 4,
           "median_us": 100, "verified": true, "buffers": "caller", "extent": "exact", "routing": "uniform"})";
  };
  const std::string exact = R"("combine_mode": "exact", "wire": "dtype")", fp32 = R"("combine_mode": "hierarchical", "wire": "fp32")";
  const std::string records = record("combine", "expert_major", exact) + "," + record("round_trip", "expert_padded", exact) + "," +
                              record("combine", "rank_major", fp32) + "," + record("dispatch_send", "rank_major", exact) + "," +
                              record("combine", "rank_major", exact) + "," + record("dispatch", "expert_major", fp32);
  const ForecastCheck check = check_forecasts(write(R"({"records": [)" + records + "]}"), {});
  EXPECT_EQ(check.num_skipped, 4);
  ASSERT_EQ(check.lines.size(), 2u);  // rows of rank_major are the same with mode exact; a dispatch has neither choice
  EXPECT_EQ(check.lines[0].op, "combine");
  EXPECT_EQ(check.lines[1].op, "dispatch");
}

}  // namespace
}  // namespace tern::tools
