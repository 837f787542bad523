// SPDX-License-Identifier: Apache-2.0
// One batch as one rank sees it: what it sends, room for what arrives, and the check of every byte of it. The content of
// all rows follows from a seed (token_data.h) and the routing of all ranks is known to each, so no rank asks another.
//
//   RankBatch batch(shape, {rank, exchange, device, /*in_windows=*/true});
//   plan.route(batch.routing());
//   batch.poison();
//   plan.dispatch(batch.dispatch_args());
//   if (const auto wrong = batch.check_dispatch()) fmt::print("{}\n", *wrong);
//
// On a GPU the operations' stream must have been waited for before a check.
//
// Lifetime: the shape's routing, the exchange and the device must outlive the batch. Threads: one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <tern/tern.hpp>
#include <vector>

#include "routing/routing.h"
#include "tools/device_buffer.h"
#include "tools/row_format.h"

namespace tern::tools {

struct BatchShape {
  const Routing& routing;
  RowFormat format;
  tern_layout layout = TERN_LAYOUT_RANK_MAJOR;
  int64_t hidden = 0;
  uint64_t seed = 0;
  int32_t expert_alignment = 1;  // expert_major: rows of a group are padded to a multiple of it
  tern_combine_mode combine_mode = TERN_COMBINE_HIERARCHICAL;
  tern_wire wire = TERN_WIRE_AS_DTYPE;  // of a combine; AS_DTYPE or FP32

  // Does each expert's row travel back, and not one of each rank?
  bool combines_entries() const { return combine_mode == TERN_COMBINE_EXACT && layout != TERN_LAYOUT_RANK_MAJOR; }
  // Of a row that is sent back within a node.
  int64_t combine_wire_bytes() const;
};

// One row that arrives at a rank.
struct ArrivingRow {
  int64_t row = 0;
  int32_t source_rank = 0;
  int32_t source_token = 0;
  int32_t expert = -1;  // global; -1 in rank_major
  int32_t k = -1;       // the entry; -1 in rank_major
};

// All rows that arrive at `rank`, in ascending order, by the definition of the layouts.
std::vector<ArrivingRow> arriving_rows(const BatchShape& shape, int rank);

// Rows that the outputs must have, unused ones of expert_padded included.
int64_t num_output_rows(const BatchShape& shape, int rank);
int64_t max_output_rows(const BatchShape& shape);

// expert_major: the first row of each local expert's group, and the end of the last group; padding included.
std::vector<int64_t> expert_offsets(const BatchShape& shape, int rank);

// Window memory that a batch takes on the rank that takes most.
int64_t window_bytes(const BatchShape& shape);

tern_plan_options plan_options(const BatchShape& shape, tern_extent extent);

// Where a rank's buffers lie.
struct BatchPlace {
  int rank = 0;
  const Exchange& exchange;
  RankDevice& device;
  bool in_windows = true;  // what goes out and what comes in; else all is the rank's own memory
  int ranks_per_node = 0;  // combine sums the ranks of each node first; 0: all are on one
};

class RankBatch {
 public:
  RankBatch(const BatchShape& shape, const BatchPlace& place);

  tern_routing routing() const;
  tern_dispatch_args dispatch_args() const;
  tern_combine_args combine_args() const;

  // Fills all outputs with a pattern that no right result has.
  void poison();

  // What is wrong with the last dispatch or combine on this rank: its first difference in words, or nothing.
  std::optional<std::string> check_dispatch();
  std::optional<std::string> check_combine();

 private:
  // What the host needs of a dispatch's outputs to look at one row, but for the row itself.
  struct Arrived;

  void allocate_inputs(const BatchPlace& place);
  void allocate_outputs(const BatchPlace& place);
  void fill_inputs();
  std::optional<std::string> check_row(const ArrivingRow& arriving, std::span<const std::byte> row, const Arrived& arrived) const;
  std::optional<std::string> check_entries(const ArrivingRow& arriving, const Arrived& arrived) const;
  std::optional<std::string> check_offsets() const;
  void sum_rank(int64_t token, int destination, std::span<float> sum) const;
  void sum_token(int64_t token, std::span<std::byte> result) const;
  void sum_entries(int64_t token, std::span<std::byte> result) const;
  float weight_of(int source_rank, int64_t token, int32_t k) const;
  bool by_rank() const { return shape_.layout == TERN_LAYOUT_RANK_MAJOR; }
  HostRows::Rows arriving_rows_of(const Buffer& buffer, int64_t row_bytes) const;

  BatchShape shape_;
  int rank_;
  int ranks_per_node_;
  RankDevice& device_;
  HostRows host_;
  int64_t num_tokens_;
  int64_t num_rows_;  // of the outputs: as many as on the rank that receives most, which is the capacity with extent worst
  std::vector<ArrivingRow> arriving_;
  Buffer topk_idx_, tokens_, scales_, weights_;                                                       // what goes out
  Buffer out_tokens_, out_scales_, out_topk_idx_, out_weights_, out_source_token_, out_source_rank_;  // what arrives
  Buffer out_expert_offsets_;
  Buffer expert_rows_, results_;
  std::vector<std::byte> expected_results_;
};

}  // namespace tern::tools
