// SPDX-License-Identifier: Apache-2.0
// What the engine tests share.
#pragma once

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "conformance/round_trip.h"
#include "conformance/runner.h"
#include "conformance/sweep.h"

namespace tern::conformance {

// `count` items of a long sweep, less if TERN_TEST_SCALE (percent, for slow builds) says so; at least one.
inline int64_t scaled(int64_t count) {
  const char* text = std::getenv("TERN_TEST_SCALE");
  const int64_t percent = text == nullptr ? 100 : std::atoll(text);
  return std::max<int64_t>(1, count * percent / 100);
}
inline bool full_scale() { return scaled(100) >= 100; }

inline void expect_right(const Case& c, const std::vector<std::string>& differences) {
  EXPECT_TRUE(differences.empty()) << c.name() << "\n" << join_lines(differences);
}
inline void expect_right_as_threads(const Case& c) { expect_right(c, run_as_threads(c)); }
inline void expect_right_as_processes(const Case& c) { expect_right(c, run_as_processes(c)); }

struct DestroyPlan {
  void operator()(tern_plan* plan) const noexcept { tern_plan_destroy(plan); }
};
using PlanHandle = std::unique_ptr<tern_plan, DestroyPlan>;

inline PlanHandle make_plan(tern_exchange* exchange, const tern_plan_options& options) {
  tern_plan* plan = nullptr;
  EXPECT_EQ(tern_plan_create(exchange, &options, &plan), TERN_OK) << tern_last_error();
  return PlanHandle(plan);
}

// A small case with weights of the owners both ways, to be reshaped.
inline Case ordinary_case(uint64_t seed) {
  Case c;
  c.seed = seed;
  c.num_ranks = 4;
  c.max_tokens = 10;
  c.num_topk = 3;
  c.layout = TERN_LAYOUT_EXPERT_MAJOR;
  c.weighting = TERN_WEIGHTS_OWNER;
  c.return_weights = true;
  return c;
}

}  // namespace tern::conformance
