// SPDX-License-Identifier: Apache-2.0
// Where every message and every entry comes to lie, once a rank has the counts of all ranks. The arithmetic is that of
// src/plan/routing_table.cc; it works for one message at a time, in any order.
//
//   RowTables rows(plan, rank, num_ranks, memory);   // row_tables_size() elements for each block
//   rows.add_up(counts_of, thread, num_threads);     // counts_of(source): its counters, or nullptr if it is masked
//   __syncthreads();
//   rows.place_groups(warp, num_warps);
//   __syncthreads();
//   const int source = rows.source_of(message);
//   const int32_t row = rows.received_row(source, message, entry);
//
// Threads: all of a block for add_up() and place_groups(); then anybody of the block, and nothing is written any more.
#pragma once

#include "device/order.cuh"
#include "kernels/exchange_view.h"
#include "kernels/route.h"

namespace tern::kernels {

template <bool kExpertRows>
class RowTables {
 public:
  __device__ RowTables(const PlanView& plan, int rank, int num_ranks, int32_t* memory)
      : plan_(plan),
        rank_(rank),
        num_ranks_(num_ranks),
        received_begin_(memory),
        own_begin_(received_begin_ + num_ranks + 1),
        group_begin_(own_begin_ + num_ranks),
        own_first_(group_begin_ + plan.num_experts),
        received_first_(own_first_ + plan.num_experts) {}

  // Thread `thread` of whole warps of a block.
  template <typename CountsOf>
  __device__ void add_up(CountsOf counts_of, int thread, int num_threads) const {
    if (thread < 32) add_up_received(counts_of);
    // Where this rank's messages begin among those that a rank receives.
#pragma unroll 1
    for (int to = thread; to < num_ranks_; to += num_threads)
      own_begin_[to] = sum_of_sources(rank_, [&](int source) { return count(counts_of(source), plan_.num_experts + to); });
    if constexpr (kExpertRows) {
#pragma unroll 1
      for (int expert = thread; expert < plan_.num_experts; expert += num_threads) add_up_expert(counts_of, expert);
    }
  }

  // Groups follow each other within a rank: a warp for each rank adds up their sizes, and sums of entries become rows.
  __device__ void place_groups(int warp, int num_warps) const {
#pragma unroll 1
    for (int r = warp; kExpertRows && r < num_ranks_; r += num_warps) {
      int64_t begin = 0;
#pragma unroll 1
      for (int first = 0; first < plan_.local_experts; first += 32) {
        const int local = first + static_cast<int>(device::lane_idx()), expert = r * plan_.local_experts + local;
        const bool in = local < plan_.local_experts;
        const int64_t size = in ? group_rows(group_begin_[expert]) : 0;
        const int64_t end = begin + sum_of_lanes(size);
        if (in) place_group(expert, static_cast<int32_t>(end - size));
        begin = __shfl_sync(~0u, end, 31);
      }
    }
  }

  // Of the messages that arrive, ordered by source.
  __device__ int32_t received_begin(int source) const { return received_begin_[source]; }
  __device__ int32_t num_received() const { return received_begin_[num_ranks_]; }
  __device__ int source_of(int32_t message) const {
    int source = 0;
    for (int after = num_ranks_; after - source > 1;) {
      const int middle = (source + after) / 2;
      (received_begin_[middle] <= message ? source : after) = middle;
    }
    return source;
  }
  // Row of an entry of a received message; -1: it is not here, or lies beyond the capacity.
  __device__ int32_t received_row(int source, int32_t message, layout::RoutingBankLayout::Entry entry) const {
    if (entry.expert < 0) return -1;
    if (!kExpertRows) return bounded(message);
    return bounded_in_group(int64_t{received_first_[source * plan_.local_experts + entry.expert]} + entry.position, entry.expert);
  }

  // Rows of what this rank sends: of its nth message to a rank in rank_major, of its nth entry of an expert in the expert layouts.
  __device__ int32_t message_row(int to, int32_t nth) const { return bounded(int64_t{own_begin_[to]} + nth); }
  __device__ int32_t entry_row(int32_t expert, int to, int32_t nth) const {
    return bounded_in_group(int64_t{own_first_[expert]} + nth, expert - to * plan_.local_experts);
  }

  // Of this rank's experts, in the expert layouts: begin of the group, and of a source's rows in it.
  __device__ int32_t group_begin(int local) const { return group_begin_[rank_ * plan_.local_experts + local]; }
  __device__ int32_t source_begin(int local, int source) const {
    return received_first_[source * plan_.local_experts + local] - group_begin(local);
  }
  __device__ int64_t group_rows(int64_t num_entries) const {
    if (plan_.layout == TERN_LAYOUT_EXPERT_PADDED) return plan_.padded_group_rows;
    const auto alignment = static_cast<uint32_t>(plan_.alignment);
    return int64_t{(static_cast<uint32_t>(num_entries) + alignment - 1) / alignment} * alignment;
  }
  __device__ bool fits(int local, int64_t num_entries) const {
    return num_entries == 0 || bounded_in_group(group_begin(local) + num_entries - 1, local) >= 0;
  }

 private:
  static constexpr int kBatch = 4;  // counts that are under way at a time

  __device__ static int32_t count(const int32_t* counts, int c) { return counts == nullptr ? 0 : counts[c]; }

  // The sum over the sources below `end`.
  template <typename CountOf>
  __device__ static int32_t sum_of_sources(int end, CountOf count_of) {
    int32_t sum = 0;
#pragma unroll 1
    for (int first = 0; first < end; first += kBatch) {
#pragma unroll
      for (int u = 0; u < kBatch; ++u)
        if (first + u < end) sum += count_of(first + u);
    }
    return sum;
  }

  // One warp.
  template <typename CountsOf>
  __device__ void add_up_received(CountsOf counts_of) const {
    int32_t begin = 0;
#pragma unroll 1
    for (int first = 0; first < num_ranks_; first += 32) {
      const int source = first + static_cast<int>(device::lane_idx());
      const int32_t num = source < num_ranks_ ? count(counts_of(source), plan_.num_experts + rank_) : 0;
      const auto end = begin + static_cast<int32_t>(sum_of_lanes(num));
      if (source < num_ranks_) received_begin_[source + 1] = end;
      begin = __shfl_sync(~0u, end, 31);
    }
    if (device::lane_idx() == 0) received_begin_[0] = 0;
  }

  // All entries, those of lower ranks, and where it is this rank's expert those below each source. They become rows in place_group().
  template <typename CountsOf>
  __device__ void add_up_expert(CountsOf counts_of, int expert) const {
    const int local = expert - rank_ * plan_.local_experts;
    const bool is_here = local >= 0 && local < plan_.local_experts;
    int32_t sum = 0;
#pragma unroll 1
    for (int first = 0; first < num_ranks_; first += kBatch) {
      int32_t counts[kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u) counts[u] = first + u < num_ranks_ ? count(counts_of(first + u), expert) : 0;
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const int source = first + u;
        if (source == rank_) own_first_[expert] = sum;
        if (is_here && source < num_ranks_) received_first_[source * plan_.local_experts + local] = sum;
        sum += counts[u];
      }
    }
    group_begin_[expert] = sum;
  }

  __device__ void place_group(int expert, int32_t begin) const {
    group_begin_[expert] = begin;
    own_first_[expert] += begin;
    const int local = expert - rank_ * plan_.local_experts;
    if (local < 0 || local >= plan_.local_experts) return;
    for (int source = 0; source < num_ranks_; ++source) received_first_[source * plan_.local_experts + local] += begin;
  }

  // Of the threads of a warp up to this one.
  __device__ static int64_t sum_of_lanes(int64_t value) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int64_t lower = __shfl_up_sync(~0u, value, step);
      if (static_cast<int>(device::lane_idx()) >= step) value += lower;
    }
    return value;
  }

  // Row, or -1 if it lies beyond the outputs' or the group's end.
  __device__ int32_t bounded(int64_t row) const { return row < plan_.row_capacity ? static_cast<int32_t>(row) : -1; }
  __device__ int32_t bounded_in_group(int64_t row, int local) const {
    if (plan_.layout == TERN_LAYOUT_EXPERT_PADDED && row >= (local + int64_t{1}) * plan_.padded_group_rows) return -1;
    return bounded(row);
  }

  const PlanView& plan_;
  const int rank_, num_ranks_;
  int32_t* const received_begin_;  // [num_ranks + 1]
  int32_t* const own_begin_;       // [num_ranks] where this rank's messages begin at each rank
  // In the expert layouts alone:
  int32_t* const group_begin_;     // [num_experts]
  int32_t* const own_first_;       // [num_experts] first row of this rank's entries
  int32_t* const received_first_;  // [num_ranks, local_experts] first row of each source's entries
};

}  // namespace tern::kernels
