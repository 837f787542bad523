// SPDX-License-Identifier: Apache-2.0
#include "cpu/outputs.h"

#include <algorithm>
#include <cstring>

namespace tern::cpu {

DispatchOutputs::DispatchOutputs(const RoutingTable& table, const DispatchCall& call)
    : table_(table),
      shape_(table.shape()),
      call_(call),
      args_(call.args),
      num_scale_elements_(call.scale_bytes > 0 ? call.scale_bytes / call.scale_element_bytes : 0) {}

void DispatchOutputs::write(int64_t message_idx, const ArrivedMessage& message, Store store) {
  if (!shape_.has_expert_rows()) return write_rank_major(message_idx, message, store);
  for (int32_t k = 0; k < shape_.num_topk; ++k) {
    const int32_t row = table_.placed_row(message_idx, k);
    if (row >= 0) write_entry(row, k, message, store);
  }
}

void DispatchOutputs::write_rank_major(int64_t message_idx, const ArrivedMessage& message, Store store) {
  const int32_t row = table_.received_row(message_idx);
  if (row < 0) return;
  write_payload(row, message, store);
  write_source(row, message.source_token, message.source);
  for (int32_t k = 0; k < shape_.num_topk; ++k) {
    const int64_t at = int64_t{row} * shape_.num_topk + k;
    const int32_t expert = message.experts[static_cast<size_t>(k)];
    if (args_.out_topk_idx != nullptr) args_.out_topk_idx[at] = expert;
    if (args_.out_topk_weights != nullptr && !message.weights.empty())
      args_.out_topk_weights[at] = expert >= 0 ? message.weights[static_cast<size_t>(k)] : 0.0f;
  }
}

void DispatchOutputs::write_entry(int32_t row, int32_t k, const ArrivedMessage& message, Store store) {
  write_payload(row, message, store);
  write_source(row, message.source_token, message.source);
  if (args_.out_row_expert != nullptr) args_.out_row_expert[row] = message.experts[static_cast<size_t>(k)];
  if (args_.out_topk_weights != nullptr && !message.weights.empty()) args_.out_topk_weights[row] = message.weights[static_cast<size_t>(k)];
}

void DispatchOutputs::write_payload(int32_t row, const ArrivedMessage& message, Store store) {
  if (message.payload != nullptr)
    copy_row(static_cast<std::byte*>(args_.out_tokens) + row * call_.wire_bytes, message.payload, static_cast<size_t>(call_.wire_bytes),
             store);
  if (args_.out_scales == nullptr || call_.scale_bytes == 0) return;
  if (args_.out_scale_order == TERN_SCALES_ROW_MAJOR) {
    std::memcpy(scale_address(row, 0), message.scales, static_cast<size_t>(call_.scale_bytes));
    return;
  }
  const auto element = static_cast<size_t>(call_.scale_element_bytes);
  for (int64_t i = 0; i < num_scale_elements_; ++i)
    std::memcpy(scale_address(row, i), message.scales + static_cast<size_t>(i) * element, element);
}

// Row-major: [rows, elements]. Column-major: [elements, rows], in expert_padded for each expert by itself.
std::byte* DispatchOutputs::scale_address(int64_t row, int64_t element_idx) const {
  auto* scales = static_cast<std::byte*>(args_.out_scales);
  if (args_.out_scale_order == TERN_SCALES_ROW_MAJOR) return scales + row * call_.scale_bytes + element_idx * call_.scale_element_bytes;
  int64_t column_rows = table_.num_rows();
  int64_t group = 0;
  if (shape_.layout == TERN_LAYOUT_EXPERT_PADDED) {
    column_rows = shape_.padded_group_rows();
    group = row / column_rows;
    row %= column_rows;
  }
  return scales + ((group * num_scale_elements_ + element_idx) * column_rows + row) * call_.scale_element_bytes;
}

void DispatchOutputs::write_source(int32_t row, int32_t source_token, int32_t source_rank) {
  if (args_.out_source_token != nullptr) args_.out_source_token[row] = source_token;
  if (args_.out_source_rank != nullptr) args_.out_source_rank[row] = source_rank;
}

void DispatchOutputs::clear_rows(int64_t begin, int64_t end, bool zero) {
  for (int64_t row = begin; row < end; ++row) {
    write_source(static_cast<int32_t>(row), -1, -1);
    if (shape_.has_expert_rows()) {
      if (args_.out_row_expert != nullptr) args_.out_row_expert[row] = -1;
    } else {
      if (args_.out_topk_idx != nullptr) std::fill_n(args_.out_topk_idx + row * shape_.num_topk, shape_.num_topk, -1);
      if (args_.out_topk_weights != nullptr && call_.carries_weights)
        std::fill_n(args_.out_topk_weights + row * shape_.num_topk, shape_.num_topk, 0.0f);
    }
    if (!zero) continue;
    std::memset(static_cast<std::byte*>(args_.out_tokens) + row * call_.wire_bytes, 0, static_cast<size_t>(call_.wire_bytes));
    if (args_.out_scales == nullptr) continue;
    for (int64_t i = 0; i < num_scale_elements_; ++i) std::memset(scale_address(row, i), 0, static_cast<size_t>(call_.scale_element_bytes));
  }
}

void DispatchOutputs::clear_missing(int32_t source) {
  const auto clear = [&](int64_t begin, int64_t count) {
    clear_rows(std::min(begin, shape_.row_capacity), std::min(begin + count, shape_.row_capacity), true);
  };
  if (!shape_.has_expert_rows()) return clear(table_.received_begin(source), table_.messages_between(source, shape_.rank));
  for (int32_t e = 0; e < shape_.local_experts(); ++e)
    clear(table_.group_begin(e) + table_.source_begin(source, e), table_.source_entries(source, e));
}

void DispatchOutputs::finish() {
  const int64_t num_rows = table_.num_rows();
  if (!shape_.has_expert_rows()) {
    clear_rows(std::min(table_.num_received(), num_rows), num_rows, false);
  } else {
    // Behind the entries of each expert up to the next group is padding; behind the last group, unused rows.
    int64_t end = 0;
    for (int32_t e = 0; e < shape_.local_experts(); ++e) {
      end = std::min(table_.group_begin(e + 1), num_rows);
      clear_rows(std::min(table_.group_begin(e) + table_.received_entries(e), end), end, shape_.zero_padding);
    }
    clear_rows(end, num_rows, false);
  }
  write_counts();
}

void DispatchOutputs::write_counts() {
  for (int32_t e = 0; e < shape_.local_experts(); ++e) {
    if (args_.out_expert_counts != nullptr) args_.out_expert_counts[e] = table_.received_entries(e);
    if (!shape_.has_expert_rows()) continue;
    if (args_.out_expert_offsets != nullptr) args_.out_expert_offsets[e] = table_.group_begin(e);
    if (args_.out_expert_rank_ranges == nullptr) continue;
    for (int32_t r = 0; r < shape_.num_ranks; ++r)
      args_.out_expert_rank_ranges[e * shape_.num_ranks + r] = table_.source_begin(r, e) << 32 | table_.source_entries(r, e);
  }
  if (shape_.has_expert_rows() && args_.out_expert_offsets != nullptr)
    args_.out_expert_offsets[shape_.local_experts()] = table_.group_begin(shape_.local_experts());
  for (int32_t r = 0; r < shape_.num_ranks && args_.out_rank_counts != nullptr; ++r)
    args_.out_rank_counts[r] = table_.messages_between(r, shape_.rank);
}

}  // namespace tern::cpu
