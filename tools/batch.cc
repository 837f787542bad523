// SPDX-License-Identifier: Apache-2.0
#include "tools/batch.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "base/error.h"
#include "tools/numbers.h"
#include "tools/token_data.h"

namespace tern::tools {
namespace {

constexpr std::align_val_t kAlignment{256};
constexpr std::byte kPoison{0xA5};

}  // namespace

Buffer Buffer::in_window(const Exchange& exchange, int64_t num_bytes) {
  Buffer buffer;
  buffer.window_.emplace(exchange, std::max<int64_t>(1, num_bytes));
  buffer.data_ = buffer.window_->as<std::byte>();
  buffer.num_bytes_ = num_bytes;
  return buffer;
}

Buffer Buffer::own(int64_t num_bytes) {
  Buffer buffer;
  buffer.own_.reset(static_cast<std::byte*>(::operator new(static_cast<size_t>(std::max<int64_t>(1, num_bytes)), kAlignment)));
  buffer.data_ = buffer.own_.get();
  buffer.num_bytes_ = num_bytes;
  std::ranges::fill(buffer.bytes(), std::byte{0});  // all pages are there before anything is timed
  return buffer;
}

void Buffer::Delete::operator()(std::byte* memory) const noexcept { ::operator delete(memory, kAlignment); }

RankBatch::RankBatch(const BatchShape& shape, int rank, const Exchange& exchange, bool in_windows)
    : shape_(shape),
      rank_(rank),
      num_tokens_(shape.routing.num_tokens(rank)),
      num_rows_(std::max<int64_t>(1, max_output_rows(shape))),
      arriving_(arriving_rows(shape, rank)) {
  const RowFormat& format = shape_.format;
  const int64_t hidden = shape_.hidden, topk = shape_.routing.num_topk;
  const auto exchanged = [&](int64_t num_bytes) { return in_windows ? Buffer::in_window(exchange, num_bytes) : Buffer::own(num_bytes); };
  tokens_ = Buffer::own(num_tokens_ * format.given_row_bytes(hidden));
  scales_ = Buffer::own(num_tokens_ * format.given_scale_bytes(hidden));
  weights_ = Buffer::own(num_tokens_ * topk * int64_t{sizeof(float)});
  out_tokens_ = exchanged(num_rows_ * format.arriving_row_bytes(hidden));
  out_scales_ = exchanged(num_rows_ * format.arriving_scale_bytes(hidden));
  const int64_t entries_per_row = shape_.layout == TERN_LAYOUT_RANK_MAJOR ? topk : 1;
  out_topk_idx_ = Buffer::own(num_rows_ * entries_per_row * int64_t{sizeof(int32_t)});
  out_weights_ = Buffer::own(num_rows_ * entries_per_row * int64_t{sizeof(float)});
  out_source_token_ = Buffer::own(num_rows_ * int64_t{sizeof(int32_t)});
  out_source_rank_ = Buffer::own(num_rows_ * int64_t{sizeof(int32_t)});
  expert_rows_ = exchanged(num_rows_ * format.combine_row_bytes(hidden));
  results_ = Buffer::own(num_tokens_ * format.combine_row_bytes(hidden));
  fill_inputs();
  expected_results_ = expected_results();
}

namespace {

struct RowSizes {
  size_t token, scales, combine;
};

RowSizes given_sizes(const BatchShape& shape) {
  return {static_cast<size_t>(shape.format.given_row_bytes(shape.hidden)),
          static_cast<size_t>(shape.format.given_scale_bytes(shape.hidden)),
          static_cast<size_t>(shape.format.combine_row_bytes(shape.hidden))};
}

// What expert or rank `slot` answers for a token: its rows are told apart by who made them.
RowKey expert_row_key(const BatchShape& shape, int source_rank, int64_t token, int32_t slot) {
  return {shape.seed, kExpertStream, source_rank, token, slot};
}

}  // namespace

void RankBatch::fill_inputs() {
  const RowSizes sizes = given_sizes(shape_);
  const auto topk = static_cast<int32_t>(shape_.routing.num_topk);
  for (int64_t token = 0; token < num_tokens_; ++token) {
    const auto at = static_cast<size_t>(token);
    fill_row({shape_.seed, kTokenStream, rank_, token}, shape_.format.dtype, tokens_.bytes().subspan(at * sizes.token, sizes.token));
    fill_row({shape_.seed, kScaleStream, rank_, token}, TERN_DTYPE_FP32, scales_.bytes().subspan(at * sizes.scales, sizes.scales));
    for (int32_t k = 0; k < topk; ++k) weights_.as<float>()[token * topk + k] = entry_weight({shape_.seed, kWeightStream, rank_, token, k});
  }
  for (const ArrivingRow& arriving : arriving_) {
    const int32_t slot = shape_.layout == TERN_LAYOUT_RANK_MAJOR ? rank_ : arriving.expert;
    fill_row(expert_row_key(shape_, arriving.source_rank, arriving.source_token, slot), shape_.format.combine_dtype,
             expert_rows_.bytes().subspan(static_cast<size_t>(arriving.row) * sizes.combine, sizes.combine));
  }
}

tern_routing RankBatch::routing() const {
  return {.topk_idx = shape_.routing.entries(rank_, 0), .topk_idx_type = TERN_INDEX_INT32, .num_tokens = num_tokens_};
}

tern_dispatch_args RankBatch::dispatch_args() const {
  tern_dispatch_args args{.tokens = tokens_.data(),
                          .dtype = shape_.format.dtype,
                          .encoding = shape_.format.encoding,
                          .hidden = shape_.hidden,
                          .topk_weights = weights_.as<float>(),
                          .carry_weights = 1,
                          .out_tokens = out_tokens_.data(),
                          .out_topk_weights = out_weights_.as<float>(),
                          .out_source_token = out_source_token_.as<int32_t>(),
                          .out_source_rank = out_source_rank_.as<int32_t>()};
  if (shape_.format.gives_scales) {
    args.scales = scales_.data();
    args.scale_bytes = shape_.format.given_scale_bytes(shape_.hidden);
  }
  if (shape_.format.arriving_scale_bytes(shape_.hidden) > 0) args.out_scales = out_scales_.data();
  if (shape_.layout == TERN_LAYOUT_RANK_MAJOR)
    args.out_topk_idx = out_topk_idx_.as<int32_t>();
  else
    args.out_row_expert = out_topk_idx_.as<int32_t>();
  return args;
}

tern_combine_args RankBatch::combine_args() const {
  return {.rows = expert_rows_.data(),
          .dtype = shape_.format.combine_dtype,
          .hidden = shape_.hidden,
          .weighting = shape_.layout == TERN_LAYOUT_RANK_MAJOR ? TERN_WEIGHTS_NONE : TERN_WEIGHTS_DISPATCH,
          .out_tokens = results_.data()};
}

void RankBatch::poison() {
  for (const Buffer* buffer : {&out_tokens_, &out_scales_, &out_topk_idx_, &out_weights_, &out_source_token_, &out_source_rank_, &results_})
    std::ranges::fill(buffer->bytes(), kPoison);
}

std::optional<std::string> RankBatch::check_dispatch() const {
  for (const ArrivingRow& arriving : arriving_) {
    if (auto wrong = check_entries(arriving)) return wrong;
    if (auto wrong = check_row(arriving)) return wrong;
  }
  return std::nullopt;
}

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

std::optional<std::string> RankBatch::check_row(const ArrivingRow& arriving) const {
  const RowSizes given = given_sizes(shape_);
  std::vector<std::byte> token(given.token), scales(given.scales);
  fill_row({shape_.seed, kTokenStream, arriving.source_rank, arriving.source_token}, shape_.format.dtype, token);
  fill_row({shape_.seed, kScaleStream, arriving.source_rank, arriving.source_token}, TERN_DTYPE_FP32, scales);
  if (shape_.format.casts()) {
    std::vector<uint16_t> row(static_cast<size_t>(shape_.hidden));
    std::memcpy(row.data(), token.data(), token.size());
    token.resize(static_cast<size_t>(shape_.format.arriving_row_bytes(shape_.hidden)));
    scales.resize(static_cast<size_t>(shape_.format.arriving_scale_bytes(shape_.hidden)));
    cast_row_to_fp8(row, shape_.format.encoding, token, scales);
  }
  const auto found = out_tokens_.bytes().subspan(static_cast<size_t>(arriving.row) * token.size(), token.size());
  if (const int64_t at = first_difference(token, found); at >= 0) return differs(rank_, arriving, byte_differs("row", at, token, found));
  return check_scales(arriving, scales);
}

std::optional<std::string> RankBatch::check_scales(const ArrivingRow& arriving, std::span<const std::byte> expected) const {
  const auto found = out_scales_.bytes().subspan(static_cast<size_t>(arriving.row) * expected.size(), expected.size());
  if (const int64_t at = first_difference(expected, found); at >= 0)
    return differs(rank_, arriving, byte_differs("scales", at, expected, found));
  return std::nullopt;
}

std::optional<std::string> RankBatch::check_entries(const ArrivingRow& arriving) const {
  const int32_t source_rank = out_source_rank_.as<int32_t>()[arriving.row], source_token = out_source_token_.as<int32_t>()[arriving.row];
  if (source_rank != arriving.source_rank || source_token != arriving.source_token)
    return differs(rank_, arriving, fmt::format("said to be token {} of rank {}", source_token, source_rank));
  const int32_t experts = shape_.routing.experts_per_rank(), topk = shape_.routing.num_topk;
  const bool by_rank = shape_.layout == TERN_LAYOUT_RANK_MAJOR;
  const int32_t* entries = shape_.routing.entries(arriving.source_rank, arriving.source_token);
  const int32_t first_k = by_rank ? 0 : arriving.k, end_k = by_rank ? topk : arriving.k + 1;
  for (int32_t k = first_k; k < end_k; ++k) {
    const bool here = entries[k] >= 0 && entries[k] / experts == rank_;
    const int32_t expert = here ? entries[k] % experts : -1;
    const float weight = here ? entry_weight({shape_.seed, kWeightStream, arriving.source_rank, arriving.source_token, k}) : 0.0f;
    const int64_t at = by_rank ? arriving.row * topk + k : arriving.row;
    const int32_t found_expert = out_topk_idx_.as<int32_t>()[at];
    const float found_weight = out_weights_.as<float>()[at];
    if (found_expert != expert || found_weight != weight)
      return differs(
          rank_, arriving,
          fmt::format("entry {} is expert {} with weight {}, expected {} with {}", k, found_expert, found_weight, expert, weight));
  }
  return std::nullopt;
}

// The order of sums is that of tern_combine, TERN_COMBINE_HIERARCHICAL.
std::vector<std::byte> RankBatch::expected_results() const {
  const Routing& routing = shape_.routing;
  const tern_dtype dtype = shape_.format.combine_dtype;
  const auto hidden = static_cast<size_t>(shape_.hidden);
  const size_t row_bytes = given_sizes(shape_).combine;
  const bool by_rank = shape_.layout == TERN_LAYOUT_RANK_MAJOR;
  std::vector<std::byte> results(static_cast<size_t>(num_tokens_) * row_bytes), bits(row_bytes);
  std::vector<float> row(hidden), on_rank(hidden), total(hidden);
  for (int64_t token = 0; token < num_tokens_; ++token) {
    std::ranges::fill(total, 0.0f);
    const int32_t* entries = routing.entries(rank_, token);
    for (int destination = 0; destination < routing.num_ranks(); ++destination) {
      if (!routing.goes_to(rank_, token, destination)) continue;
      std::ranges::fill(on_rank, 0.0f);
      for (int32_t k = 0; k < (by_rank ? 1 : routing.num_topk); ++k) {
        if (!by_rank && (entries[k] < 0 || entries[k] / routing.experts_per_rank() != destination)) continue;
        const float weight = by_rank ? 1.0f : weights_.as<float>()[token * routing.num_topk + k];
        fill_row(expert_row_key(shape_, rank_, token, by_rank ? destination : entries[k]), dtype, bits);
        load_elements(bits.data(), dtype, row);
        for (size_t i = 0; i < hidden; ++i) on_rank[i] += weight * row[i];
      }
      store_elements(on_rank, dtype, bits.data());
      load_elements(bits.data(), dtype, on_rank);
      for (size_t i = 0; i < hidden; ++i) total[i] += on_rank[i];
    }
    store_elements(total, dtype, results.data() + static_cast<size_t>(token) * row_bytes);
  }
  return results;
}

std::optional<std::string> RankBatch::check_combine() const {
  const int64_t at = first_difference(expected_results_, results_.bytes());
  if (at < 0) return std::nullopt;
  const int64_t row_bytes = shape_.format.combine_row_bytes(shape_.hidden);
  return fmt::format("combine: rank {}, token {}: {}", rank_, at / row_bytes,
                     byte_differs("results", at, expected_results_, results_.bytes()));
}

}  // namespace tern::tools
