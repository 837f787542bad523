// SPDX-License-Identifier: Apache-2.0
// Which way a batch of GPU ranks takes.
#include "plan/batch_path.h"

#include <gtest/gtest.h>

namespace tern {
namespace {

constexpr int64_t kFp8RowBytes = 7168 + 224, kBf16RowBytes = 14336;
constexpr int32_t kAllSms = 132;

// fp8 rows along a plan, on GPUs whose SMs nobody has bounded.
BatchFacts batch(int32_t num_ranks, int64_t num_tokens) {
  return {.num_ranks = num_ranks, .num_tokens = num_tokens, .messages_per_token = num_ranks, .row_bytes = kFp8RowBytes, .num_sms = kAllSms};
}
BatchFacts with_sms(BatchFacts facts, int32_t num_sms) {
  facts.num_sms = num_sms;
  facts.are_sms_asked = true;
  return facts;
}

TEST(BatchPath, BatchesForDecodingArePushed) {
  for (const tern_operation operation : {TERN_OP_DISPATCH, TERN_OP_COMBINE})
    for (const int32_t num_ranks : {1, 2, 4, 8})
      for (const int64_t num_tokens : {0, 1, 8, 32, 128})
        for (const int64_t row_bytes : {kFp8RowBytes, kBf16RowBytes}) {
          BatchFacts facts = batch(num_ranks, num_tokens);
          facts.operation = operation;
          facts.row_bytes = row_bytes;
          EXPECT_TRUE(is_pushed(facts)) << num_tokens << " tokens of " << row_bytes << " bytes, " << num_ranks << " ranks";
          facts.routes = operation == TERN_OP_DISPATCH;
          EXPECT_TRUE(is_pushed(facts)) << num_tokens << " tokens of " << row_bytes << " bytes that route, " << num_ranks << " ranks";
        }
}

TEST(BatchPath, FewSmsPushLess) {
  EXPECT_TRUE(is_pushed(batch(2, 512)));
  EXPECT_FALSE(is_pushed(with_sms(batch(2, 512), 24)));
  EXPECT_FALSE(is_pushed(with_sms(batch(4, 256), 8)));
  EXPECT_TRUE(is_pushed(with_sms(batch(2, 8), 8)));
}

TEST(BatchPath, LargeBatchesAreNot) {
  for (const int32_t num_sms : {8, 24, 32}) EXPECT_FALSE(is_pushed(with_sms(batch(4, 4096), num_sms))) << num_sms;
  BatchFacts facts = with_sms(batch(4, 4096), 32);
  facts.row_bytes = kBf16RowBytes;
  facts.operation = TERN_OP_COMBINE;
  EXPECT_FALSE(is_pushed(facts));
}

// A batch that is pushed along a plan is pushed with its routing too, which the other way costs more.
TEST(BatchPath, RoutesArePushedLonger) {
  int64_t most_along_plan = 0, most_routed = 0;
  for (int64_t num_tokens = 1; num_tokens <= 4096; ++num_tokens) {
    BatchFacts facts = with_sms(batch(4, num_tokens), 24);
    if (is_pushed(facts)) most_along_plan = num_tokens;
    facts.routes = true;
    if (is_pushed(facts)) most_routed = num_tokens;
  }
  EXPECT_GT(most_along_plan, 0);
  EXPECT_GT(most_routed, most_along_plan);
  EXPECT_LT(most_routed, 4096);
}

// Fewer tokens never go the way of more: there is one border.
TEST(BatchPath, ThereIsOneBorder) {
  for (const int32_t num_ranks : {2, 4, 8})
    for (const int32_t num_sms : {8, 24, 64}) {
      bool was_pushed = true;
      for (int64_t num_tokens = 1; num_tokens <= 4096; num_tokens += 7) {
        const bool pushed = is_pushed(with_sms(batch(num_ranks, num_tokens), num_sms));
        EXPECT_TRUE(was_pushed || !pushed) << num_tokens << " tokens, " << num_ranks << " ranks, " << num_sms << " SMs";
        was_pushed = pushed;
      }
      EXPECT_FALSE(was_pushed);
    }
}

TEST(BatchPath, MoreTakesLonger) {
  const BatchFacts facts = batch(4, 256);
  BatchFacts more = facts;
  more.num_tokens *= 2;
  EXPECT_GT(latency_us(more), latency_us(facts));
  EXPECT_GT(throughput_us(more), throughput_us(facts));
  more = facts;
  more.row_bytes *= 2;
  EXPECT_GT(latency_us(more), latency_us(facts));
  EXPECT_GT(throughput_us(more), throughput_us(facts));
}

}  // namespace
}  // namespace tern
