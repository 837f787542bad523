// SPDX-License-Identifier: Apache-2.0
// How much memory an exchange takes: defaults, limits, and that what was promised fits.
#include "plan/window_sizing.h"

#include <gtest/gtest.h>

#include <limits>

#include "base/error.h"
#include "layout/message.h"

namespace tern::test {
namespace {

constexpr int64_t kMost64 = std::numeric_limits<int64_t>::max();
constexpr int32_t kMost32 = std::numeric_limits<int32_t>::max();

tern_status status_of(const tern_exchange_options& options, int num_ranks) {
  try {
    const layout::WindowLayout window = make_window_layout(complete_options(options), num_ranks);
    EXPECT_GT(window.bank_bytes, 0);
    EXPECT_GT(window.total_bytes(), 0);
  } catch (const Failure& failure) {
    EXPECT_FALSE(std::string(failure.what()).empty());
    return failure.status();
  }
  return TERN_OK;
}

TEST(WindowSizing, FillsInDefaults) {
  const tern_exchange_options o = complete_options({});
  EXPECT_EQ(o.max_tokens, 128);
  EXPECT_EQ(o.max_row_bytes, 16384);
  EXPECT_EQ(o.max_topk, 8);
  EXPECT_EQ(o.max_experts, 256);
  EXPECT_EQ(o.num_lanes, 1);
  EXPECT_GT(o.timeout_ms, 0);
}

// A bank computed from shapes holds the counts and the rows of max_tokens tokens, in a fused dispatch too.
TEST(WindowSizing, HoldsTheShapesInOneRound) {
  for (const int num_ranks : {1, 2, 3, 8, 16})
    for (const int64_t max_tokens : {1, 5, 64})
      for (const int64_t row_bytes : {16, 48, 7168})
        for (const int topk : {1, 8}) {
          tern_exchange_options o;
          o.max_tokens = max_tokens;
          o.max_row_bytes = row_bytes;
          o.max_topk = topk;
          o.max_experts = 16 * num_ranks;
          o.num_lanes = 2;
          const layout::WindowLayout window = make_window_layout(complete_options(o), num_ranks);
          const layout::BankLayout bank{.num_counts = o.max_experts + num_ranks,
                                        .slot = {.payload_bytes = row_bytes, .scale_bytes = 0, .num_experts = topk, .num_weights = topk}};
          EXPECT_GE(bank.slots_in(window.bank_bytes), max_tokens);
          EXPECT_EQ(window.bank_bytes % static_cast<int64_t>(layout::kCacheLine), 0);
        }
}

TEST(WindowSizing, TakesNoMoreThanTheStagingThatWasGiven) {
  for (const int num_ranks : {1, 3, 8})
    for (int64_t staging_bytes = 1; staging_bytes < 40000; staging_bytes = staging_bytes * 3 / 2 + 1) {
      tern_exchange_options o;
      o.staging_bytes = staging_bytes;
      o.num_lanes = 2;
      const int64_t least = 2 * 2 * num_ranks * int64_t{sizeof(layout::MessageHeader) + layout::kCacheLine};
      if (staging_bytes < least) {
        EXPECT_EQ(status_of(o, num_ranks), TERN_INVALID_ARGUMENT);
        continue;
      }
      const layout::WindowLayout window = make_window_layout(complete_options(o), num_ranks);
      EXPECT_LE(window.staging_bytes(), staging_bytes);
      EXPECT_GT(window.staging_bytes() + 2 * 2 * num_ranks * static_cast<int64_t>(layout::kCacheLine), staging_bytes);
    }
}

TEST(WindowSizing, RefusesWhatCannotBe) {
  const auto with = [](auto change) {
    tern_exchange_options o;
    change(o);
    return status_of(o, 4);
  };
  for (const int64_t bad : {int64_t{-1}, -kMost64, kMost64}) {
    EXPECT_EQ(with([&](auto& o) { o.staging_bytes = bad; }), TERN_INVALID_ARGUMENT) << bad;
    EXPECT_EQ(with([&](auto& o) { o.window_bytes = bad; }), TERN_INVALID_ARGUMENT) << bad;
    EXPECT_EQ(with([&](auto& o) { o.max_tokens = bad; }), TERN_INVALID_ARGUMENT) << bad;
    EXPECT_EQ(with([&](auto& o) { o.max_row_bytes = bad; }), TERN_INVALID_ARGUMENT) << bad;
  }
  for (const int32_t bad : {-1, -kMost32, kMost32}) {
    EXPECT_EQ(with([&](auto& o) { o.max_topk = bad; }), TERN_INVALID_ARGUMENT) << bad;
    EXPECT_EQ(with([&](auto& o) { o.num_lanes = bad; }), TERN_INVALID_ARGUMENT) << bad;
    EXPECT_EQ(with([&](auto& o) { o.device = static_cast<tern_device_type>(bad); }), TERN_INVALID_ARGUMENT) << bad;
    EXPECT_EQ(with([&](auto& o) { o.mode = static_cast<tern_mode>(bad); }), TERN_INVALID_ARGUMENT) << bad;
    EXPECT_EQ(with([&](auto& o) { o.on_timeout = static_cast<tern_timeout_policy>(bad); }), TERN_INVALID_ARGUMENT) << bad;
  }
  EXPECT_EQ(with([](auto& o) { o.max_experts = -1; }), TERN_INVALID_ARGUMENT);
  EXPECT_EQ(with([](auto& o) { o.num_sms = -1; }), TERN_INVALID_ARGUMENT);
  EXPECT_EQ(with([](auto& o) { o.timeout_ms = -1; }), TERN_INVALID_ARGUMENT);
  EXPECT_EQ(with([](auto& o) { o.num_lanes = layout::kMaxLanes + 1; }), TERN_INVALID_ARGUMENT);
}

// The largest shapes that are not refused, on the most ranks: sizes stay positive.
TEST(WindowSizing, DoesNotOverflow) {
  tern_exchange_options o;
  o.max_tokens = int64_t{1} << 31;
  o.max_row_bytes = int64_t{1} << 30;
  o.max_topk = 64;
  o.max_experts = kMost32;
  o.num_lanes = layout::kMaxLanes;
  EXPECT_EQ(status_of(o, layout::kMaxRanks), TERN_OK);
  o.staging_bytes = int64_t{1} << 46;
  o.window_bytes = int64_t{1} << 46;
  EXPECT_EQ(status_of(o, layout::kMaxRanks), TERN_OK);
}

}  // namespace
}  // namespace tern::test
