// SPDX-License-Identifier: Apache-2.0
#include "conformance/round_trip.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <thread>

#include "conformance/compare.h"
#include "conformance/random.h"

namespace tern::conformance {
namespace {

enum Stream : uint64_t { kPause = 100, kDropped, kWindowed };

void check_status(const char* call, tern_status found, tern_status expected) {
  if (found == expected) return;
  throw std::runtime_error(fmt::format("{} returned {}, expected {}; last error: {}", call, tern_status_name(found),
                                       tern_status_name(expected), found == TERN_OK ? "" : tern_last_error()));
}

template <typename T>
T* pointer(const GuardedBuffer& buffer) {
  return reinterpret_cast<T*>(buffer.data());
}

template <typename T>
const T* data_or_null(const std::vector<T>& values) {
  return values.empty() ? nullptr : values.data();
}

}  // namespace

// Everything that one dispatch reads and writes; lives until its output is compared.
struct RoundTrip::DispatchCall {
  int batch = 0;
  Bytes tokens, scales;
  std::vector<float> weights;
  tern_routing routing;
  tern_dispatch_args args;
  DispatchBytes expected;
  DispatchArrays<GuardedBuffer> outputs;

  void fill_inputs(const Case& c, int32_t rank, int64_t num_tokens);
  void make_outputs(const Case& c, int32_t rank, tern_exchange* exchange);
};

void RoundTrip::DispatchCall::fill_inputs(const Case& c, int32_t rank, int64_t num_tokens) {
  const int64_t granule = c.scale_element_bytes, num_scales = c.scale_bytes / granule;
  const int64_t token_stride = c.token_bytes() + (c.strided ? 32 : 0);
  const int64_t scale_stride = c.strided ? 2 * granule : granule,
                scale_token_stride = num_scales * scale_stride + (c.strided && num_scales > 0 ? granule : 0);
  tokens.assign(static_cast<size_t>(num_tokens * token_stride), kPoison);
  scales.assign(static_cast<size_t>(num_tokens * scale_token_stride), kPoison);
  Bytes token_scales(static_cast<size_t>(c.scale_bytes));
  for (int64_t token = 0; token < num_tokens; ++token) {
    make_token(c, batch, rank, token,
               std::span(tokens).subspan(static_cast<size_t>(token * token_stride), static_cast<size_t>(c.token_bytes())));
    make_scales(c, batch, rank, token, token_scales);
    for (int64_t i = 0; i < num_scales; ++i)
      std::copy_n(token_scales.begin() + i * granule, granule, scales.begin() + token * scale_token_stride + i * scale_stride);
  }
  for (int64_t i = 0; c.carry_weights && i < num_tokens * c.num_topk; ++i)
    weights.push_back(make_weight(c, batch, rank, WeightUse::kDispatch, i));

  args.tokens = data_or_null(tokens);
  args.dtype = c.dtype;
  args.encoding = c.encoding;
  args.hidden = c.hidden;
  args.token_stride_bytes = c.strided ? token_stride : 0;
  args.scales = data_or_null(scales);
  args.scale_bytes = c.scale_bytes;
  args.scale_element_bytes = c.scale_bytes > 0 ? granule : 0;
  args.scale_token_stride_bytes = c.strided && c.scale_bytes > 0 ? scale_token_stride : 0;
  args.scale_element_stride_bytes = c.strided && c.scale_bytes > 0 ? scale_stride : 0;
  args.topk_weights = data_or_null(weights);
  args.carry_weights = c.carry_weights && num_tokens == 0 ? 1 : 0;
}

void RoundTrip::DispatchCall::make_outputs(const Case& c, int32_t rank, tern_exchange* exchange) {
  // The rows alone in the window, or the scales too.
  tern_exchange* const window = c.window_dispatch ? exchange : nullptr;
  tern_exchange* const scale_window = Draw(c.seed, kWindowed).one_in(0, 2) ? window : nullptr;
  outputs.tokens = GuardedBuffer(static_cast<int64_t>(expected.tokens.size()), window);
  if (!expected.scales.empty()) outputs.scales = GuardedBuffer(static_cast<int64_t>(expected.scales.size()), scale_window);

  std::vector<int64_t> sizes;
  expected.for_each([&](const char*, const Bytes& bytes) { sizes.push_back(static_cast<int64_t>(bytes.size())); });
  int64_t index = 0;
  const Draw dropped(c.seed, kDropped, rank);
  outputs.for_each([&](const char*, GuardedBuffer& buffer) {
    const int64_t size = sizes[static_cast<size_t>(index++)];
    if (index == 1) return;
    if (c.few_outputs && dropped.one_in(index, 2))
      buffer = GuardedBuffer();
    else if (size > 0 && buffer.data() == nullptr)
      buffer = GuardedBuffer(size, nullptr);
  });
  args.out_scale_order = c.scale_order;
  // NULL is allowed where there are no rows, except in a window: there every rank has something, or none.
  const bool no_tokens = c.few_outputs && !c.window_dispatch && expected.tokens.empty();
  args.out_tokens = no_tokens ? nullptr : outputs.tokens.data();
  args.out_scales = outputs.scales.data();
  args.out_topk_idx = pointer<int32_t>(outputs.topk_idx);
  args.out_topk_weights = pointer<float>(outputs.topk_weights);
  args.out_source_token = pointer<int32_t>(outputs.source_token);
  args.out_source_rank = pointer<int32_t>(outputs.source_rank);
  args.out_row_expert = pointer<int32_t>(outputs.row_expert);
  args.out_expert_offsets = pointer<int64_t>(outputs.expert_offsets);
  args.out_expert_counts = pointer<int32_t>(outputs.expert_counts);
  args.out_rank_counts = pointer<int32_t>(outputs.rank_counts);
  args.out_expert_rank_ranges = pointer<int64_t>(outputs.expert_rank_ranges);
}

struct RoundTrip::CombineCall {
  int batch = 0;
  GuardedBuffer rows, tokens, weights;
  std::vector<float> owner_weights, row_weights;
  Bytes bias[2];
  tern_combine_args args;
  CombineBytes expected;

  void fill_inputs(const Case& c, int32_t rank, const Placement& placement);
  void fill_row_weights(const Case& c, int32_t rank, const Placement& placement);
  void make_outputs(const Case& c, int32_t rank);
};

// Rows that hold no entry are filled with NaNs: nobody may read them into a sum.
void RoundTrip::CombineCall::fill_inputs(const Case& c, int32_t rank, const Placement& placement) {
  const int64_t row_bytes = c.combine_row_bytes();
  std::fill_n(rows.data(), rows.bytes().size(), uint8_t{0xFF});
  for (size_t row = 0; row < placement.rows.size(); ++row) {
    if (placement.rows[row].kind != Origin::Kind::kToken) continue;
    const auto index = static_cast<int64_t>(row);
    make_result(c, batch, rank, index, std::span(rows.data() + index * row_bytes, static_cast<size_t>(row_bytes)));
  }
  for (int b = 0; b < c.num_biases; ++b) {
    bias[b].resize(static_cast<size_t>(placement.num_tokens * row_bytes));
    for (int64_t token = 0; token < placement.num_tokens; ++token)
      make_bias(c, batch, rank, b, token,
                std::span(bias[b]).subspan(static_cast<size_t>(token * row_bytes), static_cast<size_t>(row_bytes)));
  }
  if (c.weighting == TERN_WEIGHTS_OWNER)
    for (int64_t i = 0; i < placement.num_tokens * c.num_topk; ++i)
      owner_weights.push_back(make_weight(c, batch, rank, WeightUse::kOwner, i));
  if (c.return_weights) fill_row_weights(c, rank, placement);

  args.rows = rows.data();
  args.dtype = c.combine_dtype;
  args.mode = c.combine_mode;
  args.hidden = c.combine_hidden();
  args.weighting = c.weighting;
  args.topk_weights = data_or_null(owner_weights);
  args.row_weights = data_or_null(row_weights);
  args.carry_weights = c.return_weights && row_weights.empty() ? 1 : 0;
  for (int b = 0; b < c.num_biases; ++b) args.bias[b] = data_or_null(bias[b]);
}

void RoundTrip::CombineCall::fill_row_weights(const Case& c, int32_t rank, const Placement& placement) {
  const int64_t per_row = c.layout == TERN_LAYOUT_RANK_MAJOR ? c.num_topk : 1;
  for (size_t row = 0; row < placement.rows.size(); ++row)
    for (int64_t i = 0; i < per_row; ++i)
      row_weights.push_back(placement.rows[row].kind == Origin::Kind::kToken
                                ? make_weight(c, batch, rank, WeightUse::kRow, static_cast<int64_t>(row) * per_row + i)
                                : __builtin_nanf(""));
}

void RoundTrip::CombineCall::make_outputs(const Case& c, int32_t rank) {
  tokens = GuardedBuffer(static_cast<int64_t>(expected.tokens.size()), nullptr);
  const bool drop_weights = c.few_outputs && Draw(c.seed, kDropped, rank).one_in(100, 2);
  if (c.return_weights && !drop_weights) weights = GuardedBuffer(static_cast<int64_t>(expected.weights.size()), nullptr);
  args.out_tokens = tokens.data();
  args.out_topk_weights = pointer<float>(weights);
}

RoundTrip::RoundTrip(const Scenario& scenario, int32_t rank, tern_exchange* exchange)
    : scenario_(scenario), c_(scenario.c), placement_(scenario.placements[static_cast<size_t>(rank)]), rank_(rank), exchange_(exchange) {
  const tern_plan_options options = scenario.plan_options();
  tern_plan* plan = nullptr;
  check_status("tern_plan_create", tern_plan_create(exchange, &options, &plan), TERN_OK);
  plan_.reset(plan);
  if (c_.index_type == TERN_INDEX_INT32)
    for (const int64_t expert : scenario.routings[static_cast<size_t>(rank)].topk_idx)
      topk_idx_int32_.push_back(static_cast<int32_t>(expert));
}

void RoundTrip::run() {
  if (!c_.fused) route();
  for (int batch = 0; batch < 2; ++batch) {
    dispatch(batch);
    combine(batch);
  }
}

void RoundTrip::route() {
  pause();
  const tern_routing routing = routing_args();
  const tern_launch how = launch(TERN_PHASE_WHOLE);
  tern_plan_info info;
  check_status("tern_plan_route", tern_plan_route(plan_.get(), &routing, &how, &info), TERN_OK);
  routed_ = true;
  check_info(info);
}

void RoundTrip::dispatch(int batch) {
  if (!c_.phases) {
    begin_dispatch(batch, TERN_PHASE_WHOLE);
    return finish_dispatch(batch, TERN_PHASE_WHOLE);
  }
  begin_dispatch(batch, TERN_PHASE_SEND);
  finish_dispatch(batch, TERN_PHASE_RECEIVE);
}

void RoundTrip::combine(int batch) {
  if (!c_.phases) {
    begin_combine(batch, TERN_PHASE_WHOLE);
    return finish_combine(batch, TERN_PHASE_WHOLE);
  }
  begin_combine(batch, TERN_PHASE_SEND);
  finish_combine(batch, TERN_PHASE_RECEIVE);
}

void RoundTrip::begin_dispatch(int batch, tern_phase phase) {
  pause();
  dispatch_.reset();  // gives its part of the window back first
  dispatch_ = std::make_shared<DispatchCall>();
  dispatch_->batch = batch;
  dispatch_->expected = dispatch_oracle(c_, scenario_.placements, batch, rank_);
  dispatch_->fill_inputs(c_, rank_, placement_.num_tokens);
  dispatch_->make_outputs(c_, rank_, exchange_);
  if (!routed_) {
    dispatch_->routing = routing_args();
    dispatch_->args.routing = &dispatch_->routing;
  }
  if (phase != TERN_PHASE_WHOLE) call_dispatch(phase);
}

void RoundTrip::finish_dispatch(int batch, tern_phase phase) {
  if (phase != TERN_PHASE_WHOLE) pause();
  call_dispatch(phase);
  if (!routed_) {
    routed_ = true;
    tern_plan_info info;
    check_status("tern_plan_get_info", tern_plan_get_info(plan_.get(), &info), TERN_OK);
    check_info(info);
  }
  std::vector<const Bytes*> expected;
  dispatch_->expected.for_each([&](const char*, const Bytes& bytes) { expected.push_back(&bytes); });
  size_t index = 0;
  dispatch_->outputs.for_each([&](const char* name, const GuardedBuffer& buffer) {
    const Bytes& bytes = *expected[index++];
    if (buffer.data() == nullptr || (index == 1 && dispatch_->args.out_tokens == nullptr)) return;
    const auto num_rows = std::max<int64_t>(1, static_cast<int64_t>(placement_.rows.size()));
    const std::string difference = compare_bytes(buffer.bytes(), bytes, static_cast<int64_t>(bytes.size()) / num_rows);
    if (!difference.empty()) report(fmt::format("dispatch of batch {}: {}: {}", batch, name, difference));
    if (!buffer.guards_intact()) report(fmt::format("dispatch of batch {}: {}: written outside of the array", batch, name));
  });
}

void RoundTrip::call_dispatch(tern_phase phase) {
  const tern_launch how = launch(phase);
  const bool receives = phase != TERN_PHASE_SEND;
  const tern_status expected = receives && placement_.overflow ? TERN_CAPACITY_EXCEEDED : TERN_OK;
  check_status("tern_dispatch", tern_dispatch(plan_.get(), &dispatch_->args, &how), expected);
}

void RoundTrip::begin_combine(int batch, tern_phase phase) {
  pause();
  combine_.reset();
  combine_ = std::make_shared<CombineCall>();
  combine_->batch = batch;
  combine_->expected = combine_oracle(c_, scenario_.placements, batch, rank_);
  const int64_t num_bytes = static_cast<int64_t>(placement_.rows.size()) * c_.combine_row_bytes();
  combine_->rows = GuardedBuffer(num_bytes, c_.window_combine ? exchange_ : nullptr);
  combine_->fill_inputs(c_, rank_, placement_);
  combine_->make_outputs(c_, rank_);
  if (phase != TERN_PHASE_WHOLE) call_combine(phase);
}

void RoundTrip::finish_combine(int batch, tern_phase phase) {
  if (phase != TERN_PHASE_WHOLE) pause();
  call_combine(phase);
  const std::string tokens = compare_numbers(c_.combine_dtype, combine_->tokens.bytes(), combine_->expected.tokens, c_.combine_hidden());
  if (!tokens.empty()) report(fmt::format("combine of batch {}: out_tokens: {}", batch, tokens));
  if (combine_->weights.data() != nullptr) {
    const std::string weights = compare_numbers(TERN_DTYPE_FP32, combine_->weights.bytes(), combine_->expected.weights, c_.num_topk);
    if (!weights.empty()) report(fmt::format("combine of batch {}: out_topk_weights: {}", batch, weights));
  }
  if (!combine_->tokens.guards_intact() || !combine_->weights.guards_intact() || !combine_->rows.guards_intact())
    report(fmt::format("combine of batch {}: written outside of an array", batch));
}

void RoundTrip::call_combine(tern_phase phase) {
  const tern_launch how = launch(phase);
  check_status("tern_combine", tern_combine(plan_.get(), &combine_->args, &how), TERN_OK);
}

std::vector<uint8_t> RoundTrip::output_bytes() {
  std::vector<uint8_t> result;
  const auto append = [&](std::span<const uint8_t> bytes) { result.insert(result.end(), bytes.begin(), bytes.end()); };
  if (dispatch_ != nullptr) dispatch_->outputs.for_each([&](const char*, const GuardedBuffer& buffer) { append(buffer.bytes()); });
  if (combine_ != nullptr) {
    append(combine_->tokens.bytes());
    append(combine_->weights.bytes());
  }
  return result;
}

tern_launch RoundTrip::launch(tern_phase phase) const {
  tern_launch how;
  how.lane = c_.lane;
  how.phase = phase;
  return how;
}

tern_routing RoundTrip::routing_args() {
  const RankRouting& given = scenario_.routings[static_cast<size_t>(rank_)];
  tern_routing routing;
  routing.num_tokens = given.num_tokens;
  routing.topk_idx_type = c_.index_type;
  if (c_.masks_ranks()) {
    // A rank without tokens has no mask to show, but it must say which kind of routing this is.
    static constexpr uint8_t kNoTokens = 0;
    routing.token_in_rank = given.token_in_rank.empty() ? &kNoTokens : given.token_in_rank.data();
    routing.tokens_per_expert = given.tokens_per_expert.data();
  } else if (c_.index_type == TERN_INDEX_INT32) {
    routing.topk_idx = data_or_null(topk_idx_int32_);
  } else {
    routing.topk_idx = data_or_null(given.topk_idx);
  }
  return routing;
}

void RoundTrip::check_info(const tern_plan_info& info) {
  expect("num_tokens", info.num_tokens, placement_.num_tokens);
  expect("num_received", info.num_received, placement_.num_received);
  expect("num_rows", info.num_rows, static_cast<int64_t>(placement_.rows.size()));
  if (c_.extent == TERN_EXTENT_WORST)
    expect("row_capacity", info.row_capacity, c_.capacity());
  else if (info.row_capacity < info.num_rows)
    report(fmt::format("info: row_capacity is {}, less than the {} rows there are", info.row_capacity, info.num_rows));
  for (int32_t r = 0; r < c_.num_ranks; ++r) {
    const auto peer = static_cast<size_t>(r);
    expect("received_per_rank", info.received_per_rank[r], placement_.received_per_rank[peer]);
    expect("sent_per_rank", info.sent_per_rank[r], placement_.sent_per_rank[peer]);
    for (int32_t to = 0; to < c_.num_ranks; ++to)
      expect("pair_counts", info.pair_counts[r * c_.num_ranks + to], scenario_.placements[peer].sent_per_rank[static_cast<size_t>(to)]);
  }
  for (int32_t e = 0; e < c_.experts_per_rank; ++e)
    expect("received_per_expert", info.received_per_expert[e], placement_.received_per_expert[static_cast<size_t>(e)]);
}

// Deterministic places and lengths, so that ranks drift apart by several operations.
void RoundTrip::pause() {
  const Draw draw(c_.seed, kPause, rank_);
  const int64_t step = num_steps_++;
  if (c_.delays && draw.one_in(2 * step, 3)) std::this_thread::sleep_for(std::chrono::milliseconds(1 + draw.below(2 * step + 1, 6)));
}

void RoundTrip::expect(const char* what, int64_t found, int64_t expected) {
  if (found != expected) report(fmt::format("info: {} is {}, expected {}", what, found, expected));
}

void RoundTrip::report(const std::string& text) {
  constexpr size_t kMostReports = 20;
  if (differences_.size() < kMostReports) differences_.push_back(fmt::format("rank {}: {}", rank_, text));
}

}  // namespace tern::conformance
