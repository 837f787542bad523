// SPDX-License-Identifier: Apache-2.0
// What a dispatch writes besides rows, scales and weights: it follows from the plan alone, so nobody is waited for.
#pragma once

#include "kernels/dispatch.h"
#include "kernels/rows.cuh"

namespace tern::kernels {

// The staging warps, which are the first of each block, write the outputs together: all threads of all blocks, but groups of experts one block
// each.
class OutputWriter {
 public:
  __device__ explicit OutputWriter(const DispatchArgs& args)
      : args_(args),
        plan_(args.plan),
        out_(args.out),
        num_sources_(args.plan.num_sources),
        num_rows_(static_cast<int32_t>(min(args.out.num_rows, int64_t{INT32_MAX}))),
        block_threads_(static_cast<uint32_t>(args.roles.num_stage_warps) * 32),
        thread_(blockIdx.x * block_threads_ + threadIdx.x),
        num_threads_(gridDim.x * block_threads_) {}

  __device__ void write() const {
    if (plan_.has_expert_rows()) {
      write_entries();
      clear_groups();
    } else {
      write_messages();
    }
    write_counts();
  }

 private:
  static constexpr int kBatch = 4;  // loads that are under way at a time

  // ---- rank_major: rows are messages

  __device__ void write_messages() const {
    const int32_t num = min(plan_.received_begin[num_sources_], num_rows_);
    if (out_.source_token != nullptr) copy_words(out_.source_token, plan_.source_token, static_cast<uint32_t>(num));
    if (out_.source_rank != nullptr) {
      for (int source = 0; source < num_sources_; ++source)
        fill(out_.source_rank, plan_.received_begin[source], min(plan_.received_begin[source + 1], num), source);
    }
    if (out_.topk_idx != nullptr) write_topk(static_cast<uint32_t>(num));
    clear_sources(num, num_rows_);
    const int64_t topk_begin = int64_t{num} * plan_.num_topk, topk_end = int64_t{num_rows_} * plan_.num_topk;
    if (out_.topk_idx != nullptr) fill(out_.topk_idx, topk_begin, topk_end, -1);
    if (out_.topk_weights != nullptr && args_.carries_weights) fill(out_.topk_weights, topk_begin, topk_end, 0.0f);
  }

  __device__ void write_topk(uint32_t num) const {
    const auto topk = static_cast<uint32_t>(plan_.num_topk);
    if (plan_.topk_stride == plan_.num_topk) {
      copy_words(out_.topk_idx, plan_.received_experts, num * topk);
      return;
    }
    for (uint32_t i = thread_; i < num * topk; i += num_threads_)
      out_.topk_idx[i] = plan_.received_experts[int64_t{i / topk} * plan_.topk_stride + i % topk];
  }

  // From a table of the plan, which begins at a multiple of 16 bytes.
  __device__ void copy_words(int32_t* to, const int32_t* from, uint32_t num) const {
    const bool by_vectors = reinterpret_cast<uintptr_t>(to) % sizeof(Vec16) == 0;
    const uint32_t num_vectors = by_vectors ? num / 4 : 0;
    copy_all(reinterpret_cast<Vec16*>(to), reinterpret_cast<const Vec16*>(from), num_vectors);
    copy_all(to + 4 * num_vectors, from + 4 * num_vectors, num - 4 * num_vectors);
  }

  template <typename T>
  __device__ void copy_all(T* to, const T* from, uint32_t num) const {
    for (uint32_t first = thread_; first < num; first += kBatch * num_threads_) {
      T values[kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u)
        if (first + u * num_threads_ < num) values[u] = from[first + u * num_threads_];
#pragma unroll
      for (int u = 0; u < kBatch; ++u)
        if (first + u * num_threads_ < num) to[first + u * num_threads_] = values[u];
    }
  }

  template <typename T>
  __device__ void fill(T* to, int64_t begin, int64_t end, T value) const {
#pragma unroll 1  // there is little to fill
    for (int64_t i = begin + thread_; i < end; i += num_threads_) to[i] = value;
  }

  __device__ void clear_sources(int64_t begin, int64_t end) const {
    if (out_.source_token != nullptr) fill(out_.source_token, begin, end, -1);
    if (out_.source_rank != nullptr) fill(out_.source_rank, begin, end, -1);
  }

  // ---- expert layouts: rows are entries

  // One thread for each four entries of a message.
  __device__ void write_entries() const {
    if (out_.source_token == nullptr && out_.source_rank == nullptr && out_.row_expert == nullptr) return;
    const uint32_t quads = static_cast<uint32_t>(plan_.topk_stride) / 4;
    for (int source = 0; source < num_sources_; ++source) {
      const uint32_t end = static_cast<uint32_t>(plan_.received_begin[source + 1]) * quads;
#pragma unroll 2
      for (uint32_t i = static_cast<uint32_t>(plan_.received_begin[source]) * quads + thread_; i < end; i += num_threads_) {
        const int4 rows = reinterpret_cast<const int4*>(plan_.received_rows)[i];
        const int4 experts = reinterpret_cast<const int4*>(plan_.received_experts)[i];
        const Origin origin{plan_.source_token[i / quads], source};
        const auto left = static_cast<uint32_t>(plan_.num_topk) - i % quads * 4;  // entries of the message from these on
        write_entry(rows.x, experts.x, origin);
        if (left > 1) write_entry(rows.y, experts.y, origin);
        if (left > 2) write_entry(rows.z, experts.z, origin);
        if (left > 3) write_entry(rows.w, experts.w, origin);
      }
    }
  }

  struct Origin {
    int32_t token, rank;
  };
  __device__ void write_entry(int32_t row, int32_t expert, Origin origin) const {
    if (row < 0) return;
    if (out_.source_token != nullptr) out_.source_token[row] = origin.token;
    if (out_.source_rank != nullptr) out_.source_rank[row] = origin.rank;
    if (out_.row_expert != nullptr) out_.row_expert[row] = expert;
  }

  // Behind the entries of each expert up to the next group is padding; behind the last group, unused rows.
  __device__ void clear_groups() const {
    for (int e = static_cast<int>(blockIdx.x); e < plan_.local_experts; e += static_cast<int>(gridDim.x)) {
      const int32_t end = min(plan_.group_begin[e + 1], num_rows_);
      const int32_t begin = min(plan_.group_begin[e] + entries_of(e), end);
      for (int64_t row = int64_t{begin} + threadIdx.x; row < end; row += block_threads_) {
        write_entry(static_cast<int32_t>(row), -1, {-1, -1});
      }
      if (out_.zero_padding) zero_rows(begin, end);
    }
    const int32_t unused = min(plan_.group_begin[plan_.local_experts], num_rows_);
    clear_sources(unused, num_rows_);
    if (out_.row_expert != nullptr) fill(out_.row_expert, unused, num_rows_, -1);
  }

  // By the threads of one block.
  __device__ void zero_rows(int64_t begin, int64_t end) const {
    for (int64_t at = begin * args_.row_bytes + threadIdx.x * 16; at < end * args_.row_bytes; at += block_threads_ * 16)
      *reinterpret_cast<Vec16*>(out_.tokens + at) = Vec16{};
    if (out_.scales == nullptr || args_.scale_bytes == 0) return;
    const int64_t num_elements = args_.scale_bytes / args_.scale_element_bytes;
    for (int64_t i = begin * num_elements + threadIdx.x; i < end * num_elements; i += block_threads_) {
      std::byte* to = out_.scale_address(plan_, {args_.scale_bytes, args_.scale_element_bytes}, i / num_elements, i % num_elements);
#pragma unroll 1
      for (int b = 0; b < args_.scale_element_bytes; ++b) to[b] = std::byte{0};
    }
  }

  // ---- counts

  __device__ const int32_t* counts_of(int source) const {
    return plan_.counts + int64_t{source} * plan_.num_counts(args_.transfer.exchange.num_ranks) +
           int64_t{args_.transfer.exchange.rank} * plan_.local_experts;
  }
  __device__ int32_t entries_of(int e) const {
    int32_t sum = 0;
#pragma unroll 4
    for (int source = 0; source < num_sources_; ++source) sum += counts_of(source)[e];
    return sum;
  }

  __device__ void write_counts() const {
    const auto thread = static_cast<int>(thread_), step = static_cast<int>(num_threads_);
    for (int e = thread; e < plan_.local_experts; e += step) {
      if (out_.expert_counts != nullptr) out_.expert_counts[e] = entries_of(e);
      if (plan_.has_expert_rows() && out_.expert_rank_ranges != nullptr) write_ranges(e);
    }
    if (plan_.has_expert_rows() && out_.expert_offsets != nullptr)
      for (int e = thread; e <= plan_.local_experts; e += step) out_.expert_offsets[e] = plan_.group_begin[e];
    for (int r = thread; r < num_sources_ && out_.rank_counts != nullptr; r += step)
      out_.rank_counts[r] = plan_.received_begin[r + 1] - plan_.received_begin[r];
  }

  __device__ void write_ranges(int e) const {
    for (int source = 0; source < num_sources_; ++source) {
      const int64_t at = int64_t{e} * num_sources_ + source;
      out_.expert_rank_ranges[at] = int64_t{plan_.source_begin[at]} << 32 | counts_of(source)[e];
    }
  }

  const DispatchArgs& args_;
  const PlanView& plan_;
  const DispatchOutputs& out_;
  const int num_sources_;
  const int32_t num_rows_;
  const uint32_t block_threads_;
  const uint32_t thread_, num_threads_;  // among those of all blocks
};

}  // namespace tern::kernels
