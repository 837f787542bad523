// SPDX-License-Identifier: Apache-2.0
// What a dispatch writes besides rows, scales and weights: it follows from the plan alone, so nobody is waited for.
#pragma once

#include "kernels/dispatch.h"
#include "kernels/rows.cuh"

namespace tern::kernels {

// One of `num_threads` threads that write the outputs together.
class OutputWriter {
 public:
  __device__ OutputWriter(const DispatchArgs& args, int64_t thread, int64_t num_threads)
      : args_(args),
        plan_(args.plan),
        out_(args.out),
        num_ranks_(args.transfer.exchange.num_ranks),
        thread_(thread),
        num_threads_(num_threads) {}

  __device__ void write() const {
    for (int source = 0; source < num_ranks_; ++source) write_rows_of(source);
    const int64_t num_received = plan_.received_begin[num_ranks_];
    if (!plan_.has_expert_rows()) {
      clear_rows(min(num_received, out_.num_rows), out_.num_rows, false);
    } else {
      // Behind the entries of each expert up to the next group is padding; behind the last group, unused rows.
      for (int e = 0; e < plan_.local_experts; ++e) {
        const int64_t end = min(int64_t{plan_.group_begin[e + 1]}, out_.num_rows);
        clear_rows(min(plan_.group_begin[e] + entries_of(e), end), end, out_.zero_padding);
      }
      clear_rows(min(int64_t{plan_.group_begin[plan_.local_experts]}, out_.num_rows), out_.num_rows, false);
    }
    write_counts();
  }

  // Where element `element_idx` of a row's scales goes. Row-major: [rows, elements]. Column-major: [elements, rows], in expert_padded for
  // each expert by itself.
  __device__ static std::byte* scale_address(const DispatchArgs& args, int64_t row, int64_t element_idx) {
    const int64_t element_bytes = args.scale_element_bytes;
    if (!args.out.scales_by_column) return args.out.scales + row * args.scale_bytes + element_idx * element_bytes;
    int64_t column_rows = args.out.num_rows, group = 0;
    if (args.plan.layout == TERN_LAYOUT_EXPERT_PADDED) {
      column_rows = args.plan.padded_group_rows;
      group = row / column_rows;
      row %= column_rows;
    }
    return args.out.scales + ((group * (args.scale_bytes / element_bytes) + element_idx) * column_rows + row) * element_bytes;
  }

 private:
  __device__ int64_t entries_of(int e) const {
    int64_t sum = 0;
    const int64_t expert = int64_t{args_.transfer.exchange.rank} * plan_.local_experts + e;
    for (int source = 0; source < num_ranks_; ++source) sum += plan_.counts[source * plan_.num_counts(num_ranks_) + expert];
    return sum;
  }

  __device__ void write_rows_of(int source) const {
    const int64_t begin = plan_.received_begin[source], end = plan_.received_begin[source + 1];
    if (!plan_.has_expert_rows()) {
      for (int64_t row = begin + thread_; row < min(end, out_.num_rows); row += num_threads_)
        write_source(row, plan_.source_token[row], source);
      const int64_t k_end = min(end, out_.num_rows) * plan_.num_topk;
#pragma unroll 4
      for (int64_t i = begin * plan_.num_topk + thread_; i < k_end && out_.topk_idx != nullptr; i += num_threads_)
        out_.topk_idx[i] = plan_.received_experts[received_at(i)];
      return;
    }
    for (int64_t i = begin * plan_.num_topk + thread_; i < end * plan_.num_topk; i += num_threads_) {
      const int32_t row = plan_.received_rows[received_at(i)];
      if (row < 0) continue;
      write_source(row, plan_.source_token[i / plan_.num_topk], source);
      if (out_.row_expert != nullptr) out_.row_expert[row] = plan_.received_experts[received_at(i)];
    }
  }

  // Of entry i, where entries are counted without gaps.
  __device__ int64_t received_at(int64_t i) const {
    if (plan_.topk_stride == plan_.num_topk) return i;
    return i / plan_.num_topk * plan_.topk_stride + i % plan_.num_topk;
  }

  __device__ void write_source(int64_t row, int32_t source_token, int32_t source_rank) const {
    if (out_.source_token != nullptr) out_.source_token[row] = source_token;
    if (out_.source_rank != nullptr) out_.source_rank[row] = source_rank;
  }

  __device__ void clear_rows(int64_t begin, int64_t end, bool zero) const {
    for (int64_t row = begin + thread_; row < end; row += num_threads_) {
      write_source(row, -1, -1);
      if (plan_.has_expert_rows() && out_.row_expert != nullptr) out_.row_expert[row] = -1;
    }
    if (!plan_.has_expert_rows()) clear_topk(begin * plan_.num_topk, end * plan_.num_topk);
    if (!zero) return;
    for (int64_t at = begin * args_.row_bytes + thread_ * 16; at < end * args_.row_bytes; at += num_threads_ * 16)
      *reinterpret_cast<Vec16*>(out_.tokens + at) = Vec16{};
    if (out_.scales == nullptr || args_.scale_bytes == 0) return;
    const int64_t num_elements = args_.scale_bytes / args_.scale_element_bytes;
    for (int64_t i = begin * num_elements + thread_; i < end * num_elements; i += num_threads_) {
      std::byte* to = scale_address(args_, i / num_elements, i % num_elements);
      for (int b = 0; b < args_.scale_element_bytes; ++b) to[b] = std::byte{0};
    }
  }

  __device__ void clear_topk(int64_t begin, int64_t end) const {
    for (int64_t i = begin + thread_; i < end; i += num_threads_) {
      if (out_.topk_idx != nullptr) out_.topk_idx[i] = -1;
      if (out_.topk_weights != nullptr && args_.carries_weights) out_.topk_weights[i] = 0.0f;
    }
  }

  __device__ void write_counts() const {
    for (int64_t e = thread_; e < plan_.local_experts; e += num_threads_) {
      if (out_.expert_counts != nullptr) out_.expert_counts[e] = static_cast<int32_t>(entries_of(static_cast<int>(e)));
      if (plan_.has_expert_rows() && out_.expert_rank_ranges != nullptr) write_ranges(e);
    }
    if (plan_.has_expert_rows() && out_.expert_offsets != nullptr)
      for (int64_t e = thread_; e <= plan_.local_experts; e += num_threads_) out_.expert_offsets[e] = plan_.group_begin[e];
    for (int64_t r = thread_; r < num_ranks_ && out_.rank_counts != nullptr; r += num_threads_)
      out_.rank_counts[r] = plan_.received_begin[r + 1] - plan_.received_begin[r];
  }

  __device__ void write_ranges(int64_t e) const {
    const int64_t expert = int64_t{args_.transfer.exchange.rank} * plan_.local_experts + e;
    for (int source = 0; source < num_ranks_; ++source) {
      const int64_t at = e * num_ranks_ + source;
      const int64_t count = plan_.counts[source * plan_.num_counts(num_ranks_) + expert];
      out_.expert_rank_ranges[at] = int64_t{plan_.source_begin[at]} << 32 | count;
    }
  }

  const DispatchArgs& args_;
  const PlanView& plan_;
  const DispatchOutputs& out_;
  const int num_ranks_;
  const int64_t thread_;
  const int64_t num_threads_;
};

}  // namespace tern::kernels
