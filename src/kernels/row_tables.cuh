// SPDX-License-Identifier: Apache-2.0
// Where every message and every entry comes to lie, once a rank has the counts of all ranks. The arithmetic is that of
// src/plan/routing_table.cc; it works for one message at a time, in any order.
//
//   RowTables rows(args, memory);            // RouteMemory of each block
//   rows.add_groups(counts_of, ...);         // counts_of(source): its counters of all groups, or nullptr if it is masked
//   __syncthreads();
//   rows.add_sources(thread, num_threads);
//   __syncthreads();
//   rows.place_groups(warp, num_warps);      // expert layouts
//   __syncthreads();
//   const int32_t row = rows.received_row({source, group}, message, entry);
//
// "Group" is a group of a source's tokens; an expert's entries are its rows.
// Threads: all of a block up to place_groups(); then anybody of the block, and nothing is written any more.
#pragma once

#include "device/order.cuh"
#include "kernels/exchange_view.h"
#include "kernels/route.h"

namespace tern::kernels {

// Messages of a group of a source's tokens.
struct SourceGroup {
  int source, group;
};

template <bool kExpertRows>
class RowTables {
 public:
  __device__ RowTables(const RouteArgs& args, int32_t* memory)
      : plan_(args.plan),
        rank_(args.exchange.rank),
        num_ranks_(args.exchange.num_ranks),
        num_counts_(plan_.num_counts(args.exchange.num_ranks)),
        num_columns_(kExpertRows ? args.memory.num_columns : 1),
        totals_(memory + args.memory.totals),
        own_before_(memory + args.memory.own_before),
        received_before_(memory + args.memory.received_before),
        received_begin_(memory + args.memory.received_begin),
        own_begin_(memory + args.memory.own_begin),
        group_begin_(memory + args.memory.group_begin),
        own_first_(memory + args.memory.own_first),
        received_first_(memory + args.memory.received_first) {}

  // What each source has in all groups, and in those below each group. In rank_major entries have no rows, so there only messages are of interest.
  template <typename CountsOf>
  __device__ void add_groups(CountsOf counts_of, int thread, int num_threads) const {
    const uint32_t first_count = kExpertRows ? 0 : plan_.num_experts, num = num_counts_ - first_count;
#pragma unroll 1
    for (uint32_t i = thread; i < num_ranks_ * num; i += num_threads) {
      const auto source = static_cast<int>(i / num);
      add_groups_of(counts_of(source), source, static_cast<int>(first_count + i % num));
    }
  }

  __device__ void add_sources(int thread, int num_threads) const {
    if (thread < 32) begin_sources();
    // Where this rank's messages begin among those that a rank receives.
#pragma unroll 1
    for (int to = thread; to < num_ranks_; to += num_threads) {
      int32_t sum = 0;
#pragma unroll 1
      for (int source = 0; source < rank_; ++source) sum += total(source, plan_.num_experts + to);
      own_begin_[to] = sum;
    }
    if constexpr (kExpertRows) {
#pragma unroll 1
      for (int expert = thread; expert < plan_.num_experts; expert += num_threads) add_expert(expert);
    }
  }

  // Groups of an expert's rows follow each other within a rank: a warp for each rank adds up their sizes, and sums of entries become rows.
  __device__ void place_groups(int warp, int num_warps) const {
#pragma unroll 1
    for (int r = warp; r < num_ranks_; r += num_warps) {
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

  // Entries or messages of a source in all groups.
  __device__ int32_t total(int source, int c) const { return totals_[source * num_counts_ + c]; }

  // Of the messages that arrive, ordered by source.
  __device__ int32_t received_begin(int source) const { return received_begin_[source]; }
  __device__ int32_t num_received() const { return received_begin_[num_ranks_]; }
  // The source's messages in lower groups.
  __device__ int32_t messages_before(SourceGroup of) const { return *before(of, num_columns_ - 1); }
  __device__ int32_t num_messages(SourceGroup of) const { return messages_before({of.source, of.group + 1}) - messages_before(of); }

  // Row of an entry of a received message: `position` among the group's entries of the local expert.
  __device__ int32_t received_row(SourceGroup of, int32_t local, int32_t position) const {
    return bounded_in_group(int64_t{received_first_[of.source * plan_.local_experts + local]} + *before(of, local) + position, local);
  }

  // Rows of what this rank sends: of the nth message of the block's nth group to a rank in rank_major, of the nth entry of an expert in the
  // expert layouts.
  __device__ int32_t message_row(int nth_group, int to, int32_t nth) const {
    return bounded(int64_t{own_begin_[to]} + own_before_[nth_group * num_counts_ + plan_.num_experts + to] + nth);
  }
  __device__ int32_t entry_row(int nth_group, int32_t expert, int to, int32_t nth) const {
    return bounded_in_group(int64_t{own_first_[expert]} + own_before_[nth_group * num_counts_ + expert] + nth,
                            expert - to * plan_.local_experts);
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
  // Row, or -1 if it lies beyond the outputs' end.
  __device__ int32_t bounded(int64_t row) const { return row < plan_.row_capacity ? static_cast<int32_t>(row) : -1; }

 private:
  __device__ int32_t* before(SourceGroup of, int column) const {
    return received_before_ + (of.source * (kRouteGroups + 1) + of.group) * num_columns_ + column;
  }

  // The column of a counter in received_before_; -1: it is of no interest here.
  __device__ int column_of(int c) const {
    if (c >= plan_.num_experts) return c - plan_.num_experts == rank_ ? num_columns_ - 1 : -1;
    const int local = c - rank_ * plan_.local_experts;
    return local < plan_.local_experts ? max(local, -1) : -1;
  }

  __device__ void add_groups_of(const int32_t* counts, int source, int c) const {
    int32_t of_group[kRouteGroups] = {};
    if (counts != nullptr) {
#pragma unroll
      for (int g = 0; g < kRouteGroups; ++g) of_group[g] = counts[g * num_counts_ + c];
    }
    const int column = column_of(c);
    int own_group = source == rank_ ? static_cast<int>(blockIdx.x) : kRouteGroups;
    int32_t* own = own_before_ + c;
    int32_t* received = before({source, 0}, column);
    int32_t sum = 0;
#pragma unroll
    for (int g = 0; g < kRouteGroups; ++g) {
      if (column >= 0) received[g * num_columns_] = sum;
      if (g == own_group) {
        *own = sum;
        own += num_counts_;
        own_group += static_cast<int>(gridDim.x);
      }
      sum += of_group[g];
    }
    if (column >= 0) received[kRouteGroups * num_columns_] = sum;
    totals_[source * num_counts_ + c] = sum;
  }

  // One warp.
  __device__ void begin_sources() const {
    int32_t begin = 0;
#pragma unroll 1
    for (int first = 0; first < num_ranks_; first += 32) {
      const int source = first + static_cast<int>(device::lane_idx());
      const int32_t num = source < num_ranks_ ? total(source, plan_.num_experts + rank_) : 0;
      const auto end = begin + static_cast<int32_t>(sum_of_lanes(num));
      if (source < num_ranks_) received_begin_[source + 1] = end;
      begin = __shfl_sync(~0u, end, 31);
    }
    if (device::lane_idx() == 0) received_begin_[0] = 0;
  }

  // All entries, those of lower ranks, and where it is this rank's expert those below each source. They become rows in place_group().
  __device__ void add_expert(int expert) const {
    const int local = expert - rank_ * plan_.local_experts;
    const bool is_here = local >= 0 && local < plan_.local_experts;
    int32_t sum = 0;
#pragma unroll 1
    for (int source = 0; source < num_ranks_; ++source) {
      if (source == rank_) own_first_[expert] = sum;
      if (is_here) received_first_[source * plan_.local_experts + local] = sum;
      sum += total(source, expert);
    }
    group_begin_[expert] = sum;
  }

  __device__ void place_group(int expert, int32_t begin) const {
    group_begin_[expert] = begin;
    own_first_[expert] += begin;
    const int local = expert - rank_ * plan_.local_experts;
    if (local < 0 || local >= plan_.local_experts) return;
#pragma unroll 1
    for (int source = 0; source < num_ranks_; ++source) received_first_[source * plan_.local_experts + local] += begin;
  }

  // Of the threads of a warp up to this one.
  __device__ static int64_t sum_of_lanes(int64_t value) {
#pragma unroll 1
    for (int step = 1; step < 32; step *= 2) {
      const int64_t lower = __shfl_up_sync(~0u, value, step);
      if (static_cast<int>(device::lane_idx()) >= step) value += lower;
    }
    return value;
  }

  // The same, or beyond the expert's.
  __device__ int32_t bounded_in_group(int64_t row, int local) const {
    if (plan_.layout == TERN_LAYOUT_EXPERT_PADDED && row >= (local + int64_t{1}) * plan_.padded_group_rows) return -1;
    return bounded(row);
  }

  const PlanView& plan_;
  const int rank_, num_ranks_, num_counts_, num_columns_;
  // RouteMemory:
  int32_t* const totals_;
  int32_t* const own_before_;
  int32_t* const received_before_;
  int32_t* const received_begin_;
  int32_t* const own_begin_;  // where this rank's messages begin at each rank
  // In the expert layouts alone:
  int32_t* const group_begin_;
  int32_t* const own_first_;       // first row of this rank's entries
  int32_t* const received_first_;  // first row of each source's entries
};

}  // namespace tern::kernels
