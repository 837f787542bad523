// SPDX-License-Identifier: Apache-2.0
#include "conformance/calls.h"

#include <fmt/format.h>

#include <algorithm>
#include <stdexcept>

#include "conformance/compare.h"
#include "conformance/random.h"

namespace tern::conformance {
namespace {

enum Stream : uint64_t { kDropped = 101, kWindowed };

// The window that this rank has such memory in, if the case wants that; NULL: its own memory. Of four ranks each has it otherwise.
enum class WindowUse { kInput = 1, kOutput = 2 };
tern_exchange* window_for(WindowUse use, bool is_wanted, const Case& c, const RankPlace& place) {
  const bool is_left_out = c.mixed_windows && (place.rank & static_cast<int32_t>(use)) != 0;
  return is_wanted && !is_left_out ? place.exchange : nullptr;
}

template <typename T>
T* pointer(const GuardedBuffer& buffer) {
  return reinterpret_cast<T*>(buffer.data());
}

// What was left out the first time stays so.
void poison_again(GuardedBuffer& buffer, int64_t num_bytes) {
  if (buffer.data() == nullptr) return;
  if (buffer.num_bytes() != num_bytes) throw std::runtime_error("a call was loaded again with a scenario of another shape");
  buffer.poison();
}

std::span<uint8_t> row_of(Bytes& rows, int64_t index, int64_t stride, int64_t num_bytes) {
  return std::span(rows).subspan(static_cast<size_t>(index * stride), static_cast<size_t>(num_bytes));
}

}  // namespace

void RoutingCall::load(const Scenario& scenario, const RankPlace& place, bool count_on_device) {
  const Case& c = scenario.c;
  const RankRouting& given = scenario.routings[static_cast<size_t>(place.rank)];
  RankDevice& device = *place.device;
  const auto room = static_cast<size_t>(place.room_tokens);
  routing.topk_idx_type = c.index_type;
  routing.num_tokens = given.num_tokens;
  if (c.masks_ranks()) {
    // A rank without tokens has no mask to show, but it must say which kind of routing this is.
    routing.token_in_rank = token_in_rank_.load(device, given.token_in_rank, std::max<size_t>(1, room * static_cast<size_t>(c.num_ranks)));
    routing.tokens_per_expert = tokens_per_expert_.load(device, given.tokens_per_expert, given.tokens_per_expert.size());
  } else if (c.index_type == TERN_INDEX_INT32) {
    const std::vector<int32_t> narrow(given.topk_idx.begin(), given.topk_idx.end());
    routing.topk_idx = topk_idx_.load(device, narrow, room * static_cast<size_t>(c.num_topk));
  } else {
    routing.topk_idx = topk_idx_.load(device, given.topk_idx, room * static_cast<size_t>(c.num_topk));
  }
  if (count_on_device && place.on_gpu()) {
    routing.device_num_tokens = num_tokens_.load(device, std::vector<int32_t>{static_cast<int32_t>(given.num_tokens)}, 1);
    routing.num_tokens = place.room_tokens;
  }
}

void DispatchCall::load(const Scenario& scenario, int batch, const RankPlace& place) {
  batch_ = batch;
  expected_ = dispatch_oracle(scenario.c, scenario.placements, batch, place.rank);
  load_inputs(scenario.c, place, scenario.placements[static_cast<size_t>(place.rank)].num_tokens);
  make_outputs(scenario.c, place);
}

void DispatchCall::load_inputs(const Case& c, const RankPlace& place, int64_t num_tokens) {
  const int64_t granule = c.scale_element_bytes, num_scales = c.scale_bytes / granule;
  const int64_t token_stride = c.token_stride_bytes(), scale_stride = c.scale_stride_bytes(),
                scale_token_stride = c.scale_token_stride_bytes();
  Bytes tokens(static_cast<size_t>(num_tokens * token_stride), kPoison),
      scales(static_cast<size_t>(num_tokens * scale_token_stride), kPoison);
  Bytes token_scales(static_cast<size_t>(c.scale_bytes));
  for (int64_t token = 0; token < num_tokens; ++token) {
    make_token(c, batch_, place.rank, token, row_of(tokens, token, token_stride, c.token_bytes()));
    make_scales(c, batch_, place.rank, token, token_scales);
    for (int64_t i = 0; i < num_scales; ++i)
      std::copy_n(token_scales.begin() + i * granule, granule, scales.begin() + token * scale_token_stride + i * scale_stride);
  }
  std::vector<float> weights;
  for (int64_t i = 0; c.carry_weights && i < num_tokens * c.num_topk; ++i)
    weights.push_back(make_weight(c, batch_, place.rank, WeightUse::kDispatch, i));

  const int64_t room = place.room_tokens;
  tern_exchange* const window = window_for(WindowUse::kInput, c.window_tokens, c, place);
  args.tokens = tokens_.load(*place.device, tokens, static_cast<size_t>(room * token_stride), window);
  args.dtype = c.dtype;
  args.encoding = c.encoding;
  args.hidden = c.hidden;
  args.token_stride_bytes = c.strided ? token_stride : 0;
  args.scales = scales_.load(*place.device, scales, static_cast<size_t>(room * scale_token_stride), window);
  args.scale_bytes = c.scale_bytes;
  args.scale_element_bytes = c.scale_bytes > 0 ? granule : 0;
  args.scale_token_stride_bytes = c.strided && c.scale_bytes > 0 ? scale_token_stride : 0;
  args.scale_element_stride_bytes = c.strided && c.scale_bytes > 0 ? scale_stride : 0;
  args.topk_weights = weights_.load(*place.device, weights, static_cast<size_t>(c.carry_weights ? room * c.num_topk : 0));
  args.carry_weights = c.carry_weights && args.topk_weights == nullptr ? 1 : 0;
}

void DispatchCall::make_outputs(const Case& c, const RankPlace& place) {
  // The rows alone in the window, or the scales too.
  tern_exchange* const window = window_for(WindowUse::kOutput, c.window_dispatch, c, place);
  tern_exchange* const scale_window = Draw(c.seed, kWindowed).one_in(0, 2) ? window : nullptr;
  std::vector<int64_t> sizes;
  expected_.for_each([&](const char*, const Bytes& bytes) { sizes.push_back(static_cast<int64_t>(bytes.size())); });
  const bool again = outputs.tokens.data() != nullptr;
  int64_t index = 0;
  const Draw dropped(c.seed, kDropped, place.rank);
  outputs.for_each([&](const char*, GuardedBuffer& buffer) {
    const int64_t size = sizes[static_cast<size_t>(index++)];
    const bool rows = index == 1, scales = index == 2;
    if (again)
      poison_again(buffer, size);
    else if (rows || (size > 0 && !(c.few_outputs && dropped.one_in(index, 2))))
      buffer = GuardedBuffer(size, rows ? window : scales ? scale_window : nullptr, *place.device);
  });
  args.out_scale_order = c.scale_order;
  // NULL is allowed where there are no rows, except in a window: there every rank has something, or none.
  const bool no_tokens = c.few_outputs && !c.window_dispatch && expected_.tokens.empty();
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

std::vector<std::string> DispatchCall::differences(const Placement& placement) {
  std::vector<std::string> result;
  std::vector<const Bytes*> expected;
  expected_.for_each([&](const char*, const Bytes& bytes) { expected.push_back(&bytes); });
  size_t index = 0;
  outputs.for_each([&](const char* name, const GuardedBuffer& buffer) {
    const Bytes& bytes = *expected[index++];
    if (buffer.data() == nullptr || (index == 1 && args.out_tokens == nullptr)) return;
    const auto num_rows = std::max<int64_t>(1, static_cast<int64_t>(placement.rows.size()));
    const GuardedBuffer::Image found = buffer.read();
    const std::string difference = compare_bytes(found.bytes(), bytes, static_cast<int64_t>(bytes.size()) / num_rows);
    if (!difference.empty()) result.push_back(fmt::format("dispatch of batch {}: {}: {}", batch_, name, difference));
    if (!found.guards_intact()) result.push_back(fmt::format("dispatch of batch {}: {}: written outside of the array", batch_, name));
  });
  return result;
}

void CombineCall::load(const Scenario& scenario, int batch, const RankPlace& place) {
  const Placement& placement = scenario.placements[static_cast<size_t>(place.rank)];
  batch_ = batch;
  expected_ = combine_oracle(scenario.c, scenario.placements, batch, place.rank);
  load_rows(scenario.c, place, placement);
  load_inputs(scenario.c, place, placement);
  make_outputs(scenario.c, place);
}

// Rows that hold no entry are filled with NaNs: nobody may read them into a sum.
void CombineCall::load_rows(const Case& c, const RankPlace& place, const Placement& placement) {
  const int64_t row_bytes = c.combine_row_bytes(), per_row = c.layout == TERN_LAYOUT_RANK_MAJOR ? c.num_topk : 1;
  Bytes rows(placement.rows.size() * static_cast<size_t>(row_bytes), 0xFF);
  std::vector<float> handed_back;
  for (size_t i = 0; i < placement.rows.size(); ++i) {
    const bool holds_token = placement.rows[i].kind == Origin::Kind::kToken;
    const auto row = static_cast<int64_t>(i);
    if (holds_token) make_result(c, batch_, place.rank, row, row_of(rows, row, row_bytes, row_bytes));
    for (int64_t k = 0; c.return_weights && k < per_row; ++k)
      handed_back.push_back(holds_token ? make_weight(c, batch_, place.rank, WeightUse::kRow, row * per_row + k) : __builtin_nanf(""));
  }
  if (rows_.data() == nullptr)
    rows_ = GuardedBuffer(static_cast<int64_t>(rows.size()), window_for(WindowUse::kInput, c.window_combine, c, place), *place.device);
  rows_.write(rows);
  args.rows = rows_.data();
  args.row_weights = row_weights_.load(*place.device, handed_back, handed_back.size());
  args.carry_weights = c.return_weights && handed_back.empty() ? 1 : 0;
}

void CombineCall::load_inputs(const Case& c, const RankPlace& place, const Placement& placement) {
  const int64_t row_bytes = c.combine_row_bytes(), num_tokens = placement.num_tokens, room = place.room_tokens;
  for (int b = 0; b < c.num_biases; ++b) {
    Bytes bias(static_cast<size_t>(num_tokens * row_bytes));
    for (int64_t token = 0; token < num_tokens; ++token)
      make_bias(c, batch_, place.rank, b, token, row_of(bias, token, row_bytes, row_bytes));
    args.bias[b] = bias_[b].load(*place.device, bias, static_cast<size_t>(room * row_bytes));
  }
  const bool owner = c.weighting == TERN_WEIGHTS_OWNER;
  std::vector<float> factors;
  for (int64_t i = 0; owner && i < num_tokens * c.num_topk; ++i)
    factors.push_back(make_weight(c, batch_, place.rank, WeightUse::kOwner, i));
  args.topk_weights = owner_weights_.load(*place.device, factors, static_cast<size_t>(owner ? room * c.num_topk : 0));
  args.dtype = c.combine_dtype;
  args.mode = c.combine_mode;
  args.hidden = c.combine_hidden();
  args.weighting = c.weighting;
  args.wire = c.wire;
}

void CombineCall::make_outputs(const Case& c, const RankPlace& place) {
  // Nothing is written behind the rank's own tokens.
  expected_.tokens.resize(static_cast<size_t>(place.room_tokens * c.combine_row_bytes()), kPoison);
  if (c.return_weights) expected_.weights.resize(static_cast<size_t>(place.room_tokens * c.num_topk) * sizeof(float), kPoison);
  const auto tokens_bytes = static_cast<int64_t>(expected_.tokens.size()), weights_bytes = static_cast<int64_t>(expected_.weights.size());
  if (tokens.data() != nullptr) {
    poison_again(tokens, tokens_bytes);
    return poison_again(weights, weights_bytes);
  }
  tokens = GuardedBuffer(tokens_bytes, nullptr, *place.device);
  const bool drop_weights = c.few_outputs && Draw(c.seed, kDropped, place.rank).one_in(100, 2);
  if (c.return_weights && !drop_weights) weights = GuardedBuffer(weights_bytes, nullptr, *place.device);
  args.out_tokens = tokens.data();
  args.out_topk_weights = pointer<float>(weights);
}

std::vector<std::string> CombineCall::differences(const Case& c) {
  std::vector<std::string> result;
  const GuardedBuffer::Image found = tokens.read(), found_weights = weights.read();
  const std::string difference = compare_numbers(c.combine_dtype, found.bytes(), expected_.tokens, c.combine_hidden());
  if (!difference.empty()) result.push_back(fmt::format("combine of batch {}: out_tokens: {}", batch_, difference));
  if (weights.data() != nullptr) {
    const std::string different = compare_numbers(TERN_DTYPE_FP32, found_weights.bytes(), expected_.weights, c.num_topk);
    if (!different.empty()) result.push_back(fmt::format("combine of batch {}: out_topk_weights: {}", batch_, different));
  }
  if (!found.guards_intact() || !found_weights.guards_intact() || !rows_.read().guards_intact())
    result.push_back(fmt::format("combine of batch {}: written outside of an array", batch_));
  return result;
}

}  // namespace tern::conformance
