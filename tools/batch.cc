// SPDX-License-Identifier: Apache-2.0
#include "tools/batch.h"

#include <algorithm>
#include <thread>

#include "base/error.h"
#include "tools/token_data.h"

namespace tern::tools {
namespace {

constexpr uint8_t kPoison = 0xA5;

// Threads of a rank that make and check rows: its share of the cores, if all ranks are on this machine.
int num_workers(int num_ranks) { return std::clamp(static_cast<int>(std::thread::hardware_concurrency()) / num_ranks, 1, 16); }

}  // namespace

RankBatch::RankBatch(const BatchShape& shape, const BatchPlace& place)
    : shape_(shape),
      rank_(place.rank),
      ranks_per_node_(place.ranks_per_node > 0 ? place.ranks_per_node : shape.routing.num_ranks()),
      device_(place.device),
      host_(place.device, num_workers(shape.routing.num_ranks())),
      num_tokens_(shape.routing.num_tokens(place.rank)),
      num_rows_(std::max<int64_t>(1, max_output_rows(shape))),
      arriving_(arriving_rows(shape, place.rank)) {
  allocate_inputs(place);
  allocate_outputs(place);
  fill_inputs();
}

namespace {

Buffer exchanged(const BatchPlace& place, int64_t num_bytes) {
  return place.in_windows ? Buffer::in_window(place.exchange, num_bytes) : Buffer::own(place.device, num_bytes);
}

}  // namespace

void RankBatch::allocate_inputs(const BatchPlace& place) {
  const RowFormat& format = shape_.format;
  const int64_t hidden = shape_.hidden, topk = shape_.routing.num_topk;
  topk_idx_ = Buffer::own(device_, num_tokens_ * topk * int64_t{sizeof(int32_t)});
  weights_ = Buffer::own(device_, num_tokens_ * topk * int64_t{sizeof(float)});
  tokens_ = exchanged(place, num_tokens_ * format.given_row_bytes(hidden));
  scales_ = exchanged(place, num_tokens_ * format.given_scale_bytes(hidden));
  expert_rows_ = exchanged(place, num_rows_ * format.combine_row_bytes(hidden));
}

void RankBatch::allocate_outputs(const BatchPlace& place) {
  const RowFormat& format = shape_.format;
  const int64_t hidden = shape_.hidden, entries_per_row = by_rank() ? shape_.routing.num_topk : 1;
  out_tokens_ = exchanged(place, num_rows_ * format.arriving_row_bytes(hidden));
  out_scales_ = exchanged(place, num_rows_ * format.arriving_scale_bytes(hidden));
  out_topk_idx_ = Buffer::own(device_, num_rows_ * entries_per_row * int64_t{sizeof(int32_t)});
  out_weights_ = Buffer::own(device_, num_rows_ * entries_per_row * int64_t{sizeof(float)});
  out_source_token_ = Buffer::own(device_, num_rows_ * int64_t{sizeof(int32_t)});
  out_source_rank_ = Buffer::own(device_, num_rows_ * int64_t{sizeof(int32_t)});
  if (shape_.layout == TERN_LAYOUT_EXPERT_MAJOR)
    out_expert_offsets_ = Buffer::own(device_, (shape_.routing.experts_per_rank() + 1) * int64_t{sizeof(int64_t)});
  results_ = Buffer::own(device_, num_tokens_ * format.combine_row_bytes(hidden));
}

namespace {

// What expert or rank `slot` answers for a token: its rows are told apart by who made them.
RowKey expert_row_key(const BatchShape& shape, int source_rank, int64_t token, int32_t slot) {
  return {shape.seed, kExpertStream, source_rank, token, slot};
}

}  // namespace

HostRows::Rows RankBatch::arriving_rows_of(const Buffer& buffer, int64_t row_bytes) const {
  return {buffer, row_bytes, static_cast<int64_t>(arriving_.size()), [this](int64_t i) { return arriving_[static_cast<size_t>(i)].row; }};
}

float RankBatch::weight_of(int source_rank, int64_t token, int32_t k) const {
  return entry_weight({shape_.seed, kWeightStream, source_rank, token, k});
}

void RankBatch::fill_inputs() {
  const RowFormat& format = shape_.format;
  const int64_t hidden = shape_.hidden;
  const int32_t topk = shape_.routing.num_topk;
  if (num_tokens_ > 0) device_.copy_in(topk_idx_.data(), shape_.routing.entries(rank_, 0), topk_idx_.num_bytes());
  std::vector<float> weights;
  for (int64_t token = 0; token < num_tokens_; ++token) {
    for (int32_t k = 0; k < topk; ++k) weights.push_back(weight_of(rank_, token, k));
  }
  device_.copy_in(weights_.data(), weights.data(), weights_.num_bytes());
  host_.write({tokens_, format.given_row_bytes(hidden), num_tokens_},
              [&](int64_t token, std::span<std::byte> row) { fill_row({shape_.seed, kTokenStream, rank_, token}, format.dtype, row); });
  host_.write({scales_, format.given_scale_bytes(hidden), num_tokens_},
              [&](int64_t token, std::span<std::byte> row) { fill_row({shape_.seed, kScaleStream, rank_, token}, TERN_DTYPE_FP32, row); });
  host_.write(arriving_rows_of(expert_rows_, format.combine_row_bytes(hidden)), [&](int64_t i, std::span<std::byte> row) {
    const ArrivingRow& arriving = arriving_[static_cast<size_t>(i)];
    const int32_t slot = by_rank() ? rank_ : arriving.expert;
    fill_row(expert_row_key(shape_, arriving.source_rank, arriving.source_token, slot), format.combine_dtype, row);
  });
}

tern_routing RankBatch::routing() const {
  return {.topk_idx = topk_idx_.data(), .topk_idx_type = TERN_INDEX_INT32, .num_tokens = num_tokens_};
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
                          .out_source_rank = out_source_rank_.as<int32_t>(),
                          .out_expert_offsets = out_expert_offsets_.as<int64_t>()};
  if (shape_.format.gives_scales) {
    args.scales = scales_.data();
    args.scale_bytes = shape_.format.given_scale_bytes(shape_.hidden);
  }
  if (shape_.format.arriving_scale_bytes(shape_.hidden) > 0) args.out_scales = out_scales_.data();
  if (by_rank())
    args.out_topk_idx = out_topk_idx_.as<int32_t>();
  else
    args.out_row_expert = out_topk_idx_.as<int32_t>();
  return args;
}

tern_combine_args RankBatch::combine_args() const {
  return {.rows = expert_rows_.data(),
          .dtype = shape_.format.combine_dtype,
          .mode = shape_.combine_mode,
          .hidden = shape_.hidden,
          .weighting = by_rank() ? TERN_WEIGHTS_NONE : TERN_WEIGHTS_DISPATCH,
          .out_tokens = results_.data(),
          .wire = shape_.wire};
}

void RankBatch::poison() {
  for (const Buffer* buffer :
       {&out_tokens_, &out_scales_, &out_topk_idx_, &out_weights_, &out_source_token_, &out_source_rank_, &out_expert_offsets_, &results_})
    device_.fill(buffer->data(), kPoison, buffer->num_bytes());
  device_.synchronise();
}

}  // namespace tern::tools
