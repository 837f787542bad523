// SPDX-License-Identifier: Apache-2.0
// What must have arrived, byte for byte.
#include <algorithm>
#include <cstring>

#include "base/error.h"
#include "tools/batch.h"
#include "tools/numbers.h"
#include "tools/token_data.h"

namespace tern::tools {
namespace {

std::string differs(int rank, const ArrivingRow& arriving, const std::string& what) {
  return fmt::format("dispatch: rank {}, row {} (token {} of rank {}): {}", rank, arriving.row, arriving.source_token, arriving.source_rank,
                     what);
}

std::string byte_differs(const char* part, int64_t at, std::span<const std::byte> expected, std::span<const std::byte> found) {
  const auto i = static_cast<size_t>(at);
  return fmt::format("byte {} of the {} is {:#04x}, expected {:#04x}", at, part, static_cast<int>(found[i]), static_cast<int>(expected[i]));
}

}  // namespace

struct RankBatch::Arrived {
  HostBytes scales, topk_idx, weights, source_token, source_rank;
};

std::optional<std::string> RankBatch::check_dispatch() {
  if (auto wrong = check_offsets()) return wrong;
  const Arrived arrived{HostBytes(device_, out_scales_), HostBytes(device_, out_topk_idx_), HostBytes(device_, out_weights_),
                        HostBytes(device_, out_source_token_), HostBytes(device_, out_source_rank_)};
  return host_.check(arriving_rows_of(out_tokens_, shape_.format.arriving_row_bytes(shape_.hidden)),
                     [&](int64_t i, std::span<const std::byte> row) {
                       const ArrivingRow& arriving = arriving_[static_cast<size_t>(i)];
                       if (auto wrong = check_entries(arriving, arrived)) return wrong;
                       return check_row(arriving, row, arrived);
                     });
}

std::optional<std::string> RankBatch::check_offsets() const {
  if (shape_.layout != TERN_LAYOUT_EXPERT_MAJOR) return std::nullopt;
  const std::vector<int64_t> expected = expert_offsets(shape_, rank_);
  const HostBytes found(device_, out_expert_offsets_);
  for (size_t e = 0; e < expected.size(); ++e) {
    if (found.as<int64_t>()[e] != expected[e])
      return fmt::format("dispatch: rank {}: the group of local expert {} starts at row {}, expected {}", rank_, e, found.as<int64_t>()[e],
                         expected[e]);
  }
  return std::nullopt;
}

std::optional<std::string> RankBatch::check_row(const ArrivingRow& arriving, std::span<const std::byte> row, const Arrived& arrived) const {
  const RowFormat& format = shape_.format;
  std::vector<std::byte> token(static_cast<size_t>(format.given_row_bytes(shape_.hidden)));
  std::vector<std::byte> scales(static_cast<size_t>(format.given_scale_bytes(shape_.hidden)));
  fill_row({shape_.seed, kTokenStream, arriving.source_rank, arriving.source_token}, format.dtype, token);
  fill_row({shape_.seed, kScaleStream, arriving.source_rank, arriving.source_token}, TERN_DTYPE_FP32, scales);
  if (format.casts()) {
    std::vector<uint16_t> values(static_cast<size_t>(shape_.hidden));
    std::memcpy(values.data(), token.data(), token.size());
    token.resize(static_cast<size_t>(format.arriving_row_bytes(shape_.hidden)));
    scales.resize(static_cast<size_t>(format.arriving_scale_bytes(shape_.hidden)));
    cast_row_to_fp8(values, format.encoding, token, scales);
  }
  if (const int64_t at = first_difference(token, row); at >= 0) return differs(rank_, arriving, byte_differs("row", at, token, row));
  const auto found = arrived.scales.bytes().subspan(static_cast<size_t>(arriving.row) * scales.size(), scales.size());
  if (const int64_t at = first_difference(scales, found); at >= 0)
    return differs(rank_, arriving, byte_differs("scales", at, scales, found));
  return std::nullopt;
}

std::optional<std::string> RankBatch::check_entries(const ArrivingRow& arriving, const Arrived& arrived) const {
  const int32_t source_rank = arrived.source_rank.as<int32_t>()[arriving.row];
  const int32_t source_token = arrived.source_token.as<int32_t>()[arriving.row];
  if (source_rank != arriving.source_rank || source_token != arriving.source_token)
    return differs(rank_, arriving, fmt::format("said to be token {} of rank {}", source_token, source_rank));
  const int32_t experts = shape_.routing.experts_per_rank(), topk = shape_.routing.num_topk;
  const int32_t* entries = shape_.routing.entries(arriving.source_rank, arriving.source_token);
  const int32_t first_k = by_rank() ? 0 : arriving.k, end_k = by_rank() ? topk : arriving.k + 1;
  for (int32_t k = first_k; k < end_k; ++k) {
    const bool here = entries[k] >= 0 && entries[k] / experts == rank_;
    const int32_t expert = here ? entries[k] % experts : -1;
    const float weight = here ? weight_of(arriving.source_rank, arriving.source_token, k) : 0.0f;
    const int64_t at = by_rank() ? arriving.row * topk + k : arriving.row;
    const int32_t found_expert = arrived.topk_idx.as<int32_t>()[at];
    const float found_weight = arrived.weights.as<float>()[at];
    if (found_expert != expert || found_weight != weight)
      return differs(
          rank_, arriving,
          fmt::format("entry {} is expert {} with weight {}, expected {} with {}", k, found_expert, found_weight, expert, weight));
  }
  return std::nullopt;
}

namespace {

// What experts or ranks answer for one token, made anew.
class ExpertAnswers {
 public:
  ExpertAnswers(const BatchShape& shape, int rank, int64_t token)
      : shape_(shape), rank_(rank), token_(token), bits_(static_cast<size_t>(shape.format.combine_row_bytes(shape.hidden))) {}

  void add_to(std::span<float> sum, int32_t slot, float weight) {
    row_.resize(sum.size());
    fill_row({shape_.seed, kExpertStream, rank_, token_, slot}, shape_.format.combine_dtype, bits_);
    load_elements(bits_.data(), shape_.format.combine_dtype, row_);
    for (size_t i = 0; i < sum.size(); ++i) sum[i] += weight * row_[i];
  }

 private:
  const BatchShape& shape_;
  int rank_;
  int64_t token_;
  std::vector<std::byte> bits_;
  std::vector<float> row_;
};

}  // namespace

// What one rank contributes.
void RankBatch::sum_rank(int64_t token, int destination, std::span<float> sum) const {
  const Routing& routing = shape_.routing;
  const int32_t* entries = routing.entries(rank_, token);
  ExpertAnswers answers(shape_, rank_, token);
  if (by_rank()) return answers.add_to(sum, destination, 1.0f);
  for (int32_t k = 0; k < routing.num_topk; ++k) {
    if (entries[k] >= 0 && entries[k] / routing.experts_per_rank() == destination)
      answers.add_to(sum, entries[k], weight_of(rank_, token, k));
  }
}

// The order of sums is that of tern_combine.
void RankBatch::sum_token(int64_t token, std::span<std::byte> result) const {
  if (shape_.combines_entries()) return sum_entries(token, result);
  const int num_ranks = shape_.routing.num_ranks();
  const tern_dtype dtype = shape_.format.combine_dtype;
  const auto hidden = static_cast<size_t>(shape_.hidden);
  std::vector<float> on_rank(hidden), on_node(hidden, 0.0f), total(hidden, 0.0f);
  const auto add_rounded = [&](std::vector<float>& sum, std::vector<float>& part) {
    if (shape_.wire == TERN_WIRE_AS_DTYPE) {
      store_elements(part, dtype, result.data());
      load_elements(result.data(), dtype, part);
    }
    for (size_t i = 0; i < hidden; ++i) sum[i] += part[i];
    std::ranges::fill(part, 0.0f);
  };
  for (int destination = 0; destination < num_ranks; ++destination) {
    if (shape_.routing.goes_to(rank_, token, destination)) {
      sum_rank(token, destination, on_rank);
      add_rounded(ranks_per_node_ == num_ranks ? total : on_node, on_rank);
    }
    if (ranks_per_node_ != num_ranks && (destination + 1) % ranks_per_node_ == 0) add_rounded(total, on_node);
  }
  store_elements(total, dtype, result.data());
}

// TERN_COMBINE_EXACT of expert rows.
void RankBatch::sum_entries(int64_t token, std::span<std::byte> result) const {
  std::vector<float> total(static_cast<size_t>(shape_.hidden), 0.0f);
  const int32_t* entries = shape_.routing.entries(rank_, token);
  ExpertAnswers answers(shape_, rank_, token);
  for (int32_t k = 0; k < shape_.routing.num_topk; ++k) {
    if (entries[k] >= 0) answers.add_to(total, entries[k], weight_of(rank_, token, k));
  }
  store_elements(total, shape_.format.combine_dtype, result.data());
}

std::optional<std::string> RankBatch::check_combine() {
  const int64_t row_bytes = shape_.format.combine_row_bytes(shape_.hidden);
  if (expected_results_.empty()) {
    expected_results_.resize(static_cast<size_t>(num_tokens_ * row_bytes));
    host_.split(num_tokens_, [&](int64_t first, int64_t end) {
      for (int64_t token = first; token < end; ++token)
        sum_token(token, std::span(expected_results_).subspan(static_cast<size_t>(token * row_bytes), static_cast<size_t>(row_bytes)));
    });
  }
  return host_.check(
      {results_, row_bytes, num_tokens_}, [&](int64_t token, std::span<const std::byte> found) -> std::optional<std::string> {
        const auto expected = std::span<const std::byte>(expected_results_).subspan(static_cast<size_t>(token * row_bytes), found.size());
        const int64_t at = first_difference(expected, found);
        if (at < 0) return std::nullopt;
        return fmt::format("combine: rank {}, token {}: {}", rank_, token, byte_differs("results", at, expected, found));
      });
}

}  // namespace tern::tools
