// SPDX-License-Identifier: Apache-2.0
// One batch as one rank sees it: what it sends, room for what arrives, and the check of every byte of it. The content of
// all rows follows from a seed (token_data.h) and the routing of all ranks is known to each, so no rank asks another.
//
//   RankBatch batch(shape, rank, exchange, /*in_windows=*/true);
//   plan.route(batch.routing());
//   batch.poison();
//   plan.dispatch(batch.dispatch_args());
//   if (const auto wrong = batch.check_dispatch()) fmt::print("{}\n", *wrong);
//
// Lifetime: the shape's routing and the exchange must outlive the batch. Threads: one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <tern/tern.hpp>
#include <vector>

#include "routing/routing.h"
#include "tools/row_format.h"

namespace tern::tools {

struct BatchShape {
  const Routing& routing;
  RowFormat format;
  tern_layout layout = TERN_LAYOUT_RANK_MAJOR;
  int64_t hidden = 0;
  uint64_t seed = 0;
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

// Window memory that a batch takes on the rank that takes most.
int64_t window_bytes(const BatchShape& shape);

tern_plan_options plan_options(const BatchShape& shape, tern_extent extent);

// Cache-line aligned memory, either in the window or the rank's own.
class Buffer {
 public:
  Buffer() = default;
  static Buffer in_window(const Exchange& exchange, int64_t num_bytes);
  static Buffer own(int64_t num_bytes);

  std::byte* data() const { return data_; }
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }
  std::span<std::byte> bytes() const { return {data_, static_cast<size_t>(num_bytes_)}; }

 private:
  struct Delete {
    void operator()(std::byte* memory) const noexcept;
  };
  std::unique_ptr<std::byte, Delete> own_;
  std::optional<WindowBuffer> window_;
  std::byte* data_ = nullptr;
  int64_t num_bytes_ = 0;
};

class RankBatch {
 public:
  RankBatch(const BatchShape& shape, int rank, const Exchange& exchange, bool in_windows);

  tern_routing routing() const;
  tern_dispatch_args dispatch_args() const;
  tern_combine_args combine_args() const;

  // Fills all outputs with a pattern that no right result has.
  void poison();

  // What is wrong with the last dispatch or combine on this rank: its first difference in words, or nothing.
  std::optional<std::string> check_dispatch() const;
  std::optional<std::string> check_combine() const;

  std::span<const std::byte> tokens() const { return tokens_.bytes(); }

 private:
  void fill_inputs();
  std::optional<std::string> check_row(const ArrivingRow& arriving) const;
  std::optional<std::string> check_scales(const ArrivingRow& arriving, std::span<const std::byte> expected) const;
  std::optional<std::string> check_entries(const ArrivingRow& arriving) const;
  std::vector<std::byte> expected_results() const;

  BatchShape shape_;
  int rank_;
  int64_t num_tokens_;
  int64_t num_rows_;  // of the outputs: as many as on the rank that receives most, which is the capacity with extent worst
  std::vector<ArrivingRow> arriving_;
  Buffer tokens_, scales_, weights_;                                                                  // what goes out
  Buffer out_tokens_, out_scales_, out_topk_idx_, out_weights_, out_source_token_, out_source_rank_;  // what arrives
  Buffer expert_rows_, results_;
  std::vector<std::byte> expected_results_;
};

}  // namespace tern::tools
