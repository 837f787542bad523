// SPDX-License-Identifier: Apache-2.0
// Where rows lie, on a batch small enough to work out by hand.
#include <gtest/gtest.h>

#include "tools/batch.h"

namespace tern::tools {
namespace {

// Two ranks with two experts each; rank 0 has two tokens, rank 1 has one.
const Routing kRouting{2, 4, {{3, 2, 0, -1}, {2, 1}}};

BatchShape shape_of(tern_layout layout) { return {kRouting, parse_row_format("bf16"), layout, 64, 1}; }

struct Row {
  int64_t row;
  int32_t source_rank, source_token, expert, k;
  bool operator==(const Row&) const = default;
};

std::vector<Row> rows_of(tern_layout layout, int rank) {
  std::vector<Row> rows;
  for (const ArrivingRow& a : arriving_rows(shape_of(layout), rank)) rows.push_back({a.row, a.source_rank, a.source_token, a.expert, a.k});
  return rows;
}

TEST(BatchRows, RankMajorHasOneRowPerTokenInOrderOfSources) {
  EXPECT_EQ(rows_of(TERN_LAYOUT_RANK_MAJOR, 0), (std::vector<Row>{{0, 0, 1, -1, -1}, {1, 1, 0, -1, -1}}));
  EXPECT_EQ(rows_of(TERN_LAYOUT_RANK_MAJOR, 1), (std::vector<Row>{{0, 0, 0, -1, -1}, {1, 1, 0, -1, -1}}));
  EXPECT_EQ(num_output_rows(shape_of(TERN_LAYOUT_RANK_MAJOR), 1), 2);
}

TEST(BatchRows, ExpertMajorHasOneRowPerEntryGroupedByExpert) {
  EXPECT_EQ(rows_of(TERN_LAYOUT_EXPERT_MAJOR, 0), (std::vector<Row>{{0, 0, 1, 0, 0}, {1, 1, 0, 1, 1}}));
  EXPECT_EQ(rows_of(TERN_LAYOUT_EXPERT_MAJOR, 1), (std::vector<Row>{{0, 0, 0, 2, 1}, {1, 1, 0, 2, 0}, {2, 0, 0, 3, 0}}));
  EXPECT_EQ(max_output_rows(shape_of(TERN_LAYOUT_EXPERT_MAJOR)), 3);
}

TEST(BatchRows, ExpertPaddedStartsEachExpertAtItsOwnRoom) {
  EXPECT_EQ(rows_of(TERN_LAYOUT_EXPERT_PADDED, 1), (std::vector<Row>{{0, 0, 0, 2, 1}, {1, 1, 0, 2, 0}, {4, 0, 0, 3, 0}}));
  EXPECT_EQ(num_output_rows(shape_of(TERN_LAYOUT_EXPERT_PADDED), 0), 8);
}

TEST(BatchRows, ExpertMajorGroupsStartAtMultiplesOfTheAlignment) {
  BatchShape shape = shape_of(TERN_LAYOUT_EXPERT_MAJOR);
  shape.expert_alignment = 4;
  std::vector<int64_t> rows;
  for (const ArrivingRow& a : arriving_rows(shape, 1)) rows.push_back(a.row);
  EXPECT_EQ(rows, (std::vector<int64_t>{0, 1, 4}));
  EXPECT_EQ(expert_offsets(shape, 0), (std::vector<int64_t>{0, 4, 8}));
  EXPECT_EQ(expert_offsets(shape, 1), (std::vector<int64_t>{0, 4, 8}));
  EXPECT_EQ(num_output_rows(shape, 1), 8);
}

TEST(BatchRows, CapacityIsThatOfTheBusiestRank) {
  EXPECT_EQ(plan_options(shape_of(TERN_LAYOUT_EXPERT_MAJOR), TERN_EXTENT_WORST).row_capacity, 3);
  EXPECT_EQ(plan_options(shape_of(TERN_LAYOUT_EXPERT_MAJOR), TERN_EXTENT_EXACT).row_capacity, 0);
  EXPECT_EQ(plan_options(shape_of(TERN_LAYOUT_EXPERT_PADDED), TERN_EXTENT_WORST).row_capacity, 0);
}

}  // namespace
}  // namespace tern::tools
