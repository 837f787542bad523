// SPDX-License-Identifier: Apache-2.0
// What the tests of wrong arguments share: an exchange of one rank, right arguments for every call on it, and checks that a
// wrong call was refused and touched nothing.
#pragma once

#include <cstring>
#include <functional>
#include <limits>
#include <tern/tern.hpp>

#include "engine/support.h"

namespace tern::conformance {
inline constexpr int64_t kHuge = std::numeric_limits<int64_t>::max() / 2;

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
inline void expect_refused(const char* what, tern_status status) {
  EXPECT_TRUE(status == TERN_INVALID_ARGUMENT || status == TERN_INVALID_STATE) << what << ": " << tern_status_name(status);
  EXPECT_STRNE(tern_last_error(), "") << what;
}

inline void expect_invalid_argument(const char* what, tern_status status) {
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

  Arguments()
      : groups_(Group::local(1)), exchange_(groups_[0], {.device = TERN_DEVICE_CPU, .window_bytes = 1 << 16, .timeout_ms = 20'000}) {
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

}  // namespace tern::conformance
