// SPDX-License-Identifier: Apache-2.0
// A batch that goes round by itself is right, and a damaged one is told.
#include <gtest/gtest.h>

#include "tools/batch.h"

namespace tern::tools {
namespace {

struct Shape {
  tern_layout layout;
  const char* format;
  tern_combine_mode combine_mode = TERN_COMBINE_HIERARCHICAL;
};

class BatchCheck : public testing::TestWithParam<Shape> {
 protected:
  BatchCheck()
      : routing_(generate_routing({.num_ranks = 1, .num_tokens = 20, .num_topk = 3, .num_experts = 8}, {.seed = 3})),
        shape_{routing_, parse_row_format(GetParam().format), GetParam().layout, 256, 5, 4, GetParam().combine_mode},
        groups_(Group::local(1)),
        exchange_(groups_.front(), {.device = TERN_DEVICE_CPU, .window_bytes = window_bytes(shape_), .max_row_bytes = 2048}),
        batch_(shape_, {0, exchange_, host_device(), true}),
        plan_(exchange_, plan_options(shape_, TERN_EXTENT_EXACT)) {
    batch_.poison();
    plan_.route(batch_.routing());
    plan_.dispatch(batch_.dispatch_args());
    plan_.combine(batch_.combine_args());
  }

  // The last row that arrived.
  std::byte* last_row() const {
    return static_cast<std::byte*>(batch_.dispatch_args().out_tokens) +
           arriving_rows(shape_, 0).back().row * shape_.format.arriving_row_bytes(shape_.hidden);
  }

  Routing routing_;
  BatchShape shape_;
  std::vector<Group> groups_;
  Exchange exchange_;
  RankBatch batch_;
  Plan plan_;
};

INSTANTIATE_TEST_SUITE_P(Shapes, BatchCheck,
                         testing::Values(Shape{TERN_LAYOUT_RANK_MAJOR, "bf16"}, Shape{TERN_LAYOUT_RANK_MAJOR, "fp8"},
                                         Shape{TERN_LAYOUT_EXPERT_MAJOR, "fp8"}, Shape{TERN_LAYOUT_EXPERT_MAJOR, "fp8-cast"},
                                         Shape{TERN_LAYOUT_EXPERT_PADDED, "fp16"},
                                         Shape{TERN_LAYOUT_EXPERT_PADDED, "bf16", TERN_COMBINE_EXACT}),
                         [](const auto& shape) {
                           std::string name = std::string(layout_name(shape.param.layout)) + "_" + shape.param.format;
                           std::erase(name, '-');
                           if (shape.param.combine_mode == TERN_COMBINE_EXACT) name += "_exact";
                           return name;
                         });

TEST_P(BatchCheck, RightResultsAreRight) {
  EXPECT_EQ(batch_.check_dispatch(), std::nullopt);
  EXPECT_EQ(batch_.check_combine(), std::nullopt);
}

TEST_P(BatchCheck, OneChangedBitOfARowIsTold) {
  last_row()[17] ^= std::byte{1};
  const auto wrong = batch_.check_dispatch();
  ASSERT_TRUE(wrong.has_value());
  EXPECT_NE(wrong->find("byte 17 of the row"), std::string::npos) << *wrong;
}

TEST_P(BatchCheck, WhatWasNeverWrittenIsTold) {
  batch_.poison();
  EXPECT_TRUE(batch_.check_dispatch().has_value());
  EXPECT_TRUE(batch_.check_combine().has_value());
}

TEST_P(BatchCheck, OneChangedBitOfASumIsTold) {
  static_cast<std::byte*>(batch_.combine_args().out_tokens)[1] ^= std::byte{1};
  const auto wrong = batch_.check_combine();
  ASSERT_TRUE(wrong.has_value());
  EXPECT_NE(wrong->find("token 0: byte 1 of the results"), std::string::npos) << *wrong;
}

}  // namespace
}  // namespace tern::tools
