// SPDX-License-Identifier: Apache-2.0
// The first half of a route: this rank's tokens are counted, each group of them by one block, in token order.
//
//   TokenCounts counts(args, op, counters);   // counters: [kCountingWarps][num_counts] of the block
//   counts.count();
//   __syncthreads();
//   counts.add_warps(use);                    // use(group, c, count) for each of the groups' counts
//   __syncthreads();
//   position in its group: of a message message.row + counts.before()[num_experts + message.rank], of an entry entry_row + counts.before()[expert]
//
// A block may have several groups; its counting warps share them out evenly, and the tokens of a group among those that have it. Counters are of
// entries by expert, then of messages by rank. Where entries have no rows of their own (rank_major) nobody asks for their positions: a group's are
// counted in its first warp's counters.
// Threads: all of a block; a warp's tables in the plan are its own.
#pragma once

#include "kernels/operation.cuh"
#include "kernels/route.h"

namespace tern::kernels {

struct TokenRange {
  int32_t begin, end;

  __device__ int32_t size() const { return end - begin; }
  // The nth of `num` parts.
  __device__ TokenRange part(int nth, int num) const {
    const int32_t per_part = (size() + num - 1) / num;
    const int32_t first = min(end, begin + per_part * nth);
    return {first, min(end, first + per_part)};
  }
};

// Rank of an expert without a division: exact for fewer than 2^26 experts.
struct RankOfExpert {
  static constexpr int kShift = 52;
  uint64_t inverse;
  static constexpr uint64_t inverse_of(int32_t local_experts) { return (uint64_t{1} << kShift) / static_cast<uint32_t>(local_experts) + 1; }
  __device__ int operator()(int32_t expert) const { return static_cast<int>(static_cast<uint32_t>(expert) * inverse >> kShift); }
};

template <bool kExpertRows>
class TokenCounts {
 public:
  __device__ TokenCounts(const RouteArgs& args, const Operation& op, int32_t* counters)
      : args_(args),
        plan_(args.plan),
        op_(op),
        num_ranks_(args.exchange.num_ranks),
        num_counts_(plan_.num_counts(num_ranks_)),
        warp_(static_cast<int>(threadIdx.x) / kWarpThreads),
        rank_of_{args.inverse_experts},
        counters_(counters),
        num_tokens_(args.device_num_tokens == nullptr ? args.num_tokens : max(0, min(*args.device_num_tokens, args.num_tokens))),
        num_groups_(route_groups_of(static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x))),
        warps_per_group_(kCountingWarps / max(1, num_groups_)),
        nth_group_(warp_ / warps_per_group_) {
    if (nth_group_ >= num_groups_) return;
    const int32_t begin = group(nth_group_) * args.group_tokens, end = begin + args.group_tokens;
    tokens_ = TokenRange{min(begin, num_tokens_), min(end, num_tokens_)}.part(warp_ % warps_per_group_, warps_per_group_);
  }

  __device__ int32_t num_tokens() const { return num_tokens_; }
  // Of this block, and the nth of them.
  __device__ int num_groups() const { return num_groups_; }
  __device__ static int group(int nth) { return static_cast<int>(blockIdx.x) + nth * static_cast<int>(gridDim.x); }
  // Of this warp: the group's number among the block's, and its tokens; there may be none.
  __device__ int nth_group() const { return nth_group_; }
  __device__ TokenRange tokens() const { return tokens_; }
  // What comes before the warp's tokens in its group, after add_warps().
  __device__ const int32_t* before() const { return warp_counters(); }
  __device__ int rank_of(int32_t expert) const { return rank_of_(expert); }

  // By the counting warps. Leaves experts, messages and positions among the warp's in the plan.
  __device__ void count() const {
    constexpr int kBarrier = 1, kCountingThreads = kCountingWarps * kWarpThreads;
    if (warp_ >= kCountingWarps) return;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < kCountingWarps * num_counts_; i += kCountingThreads) counters_[i] = 0;
    device::sync_some_warps(kBarrier, kCountingThreads);
    if (tokens_.size() <= 0) return;
    if (kExpertRows && plan_.num_topk > 0) count_entries();
    __syncwarp();
    count_messages();
  }

  // What the lower warps of a group have counted comes before, too.
  template <typename Use>
  __device__ void add_warps(Use use) const {
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < num_groups_ * num_counts_; i += num_threads()) {
      const int nth = static_cast<int>(static_cast<uint32_t>(i) / static_cast<uint32_t>(num_counts_)), c = i - nth * num_counts_;
      int32_t* const first = counters_ + int64_t{nth} * warps_per_group_ * num_counts_ + c;
      const bool is_of_group = !kExpertRows && c < plan_.num_experts;
      int32_t count = is_of_group ? *first : add_lower_warps(first);
      if (args_.tokens_per_expert != nullptr && c < plan_.num_experts) count = group(nth) == 0 ? args_.tokens_per_expert[c] : 0;
      use(group(nth), c, count);
    }
  }

 private:
  static constexpr int kBatch = 4;  // loads that are under way at a time

  __device__ static int num_threads() { return static_cast<int>(blockDim.x); }
  __device__ int32_t* warp_counters() const { return counters_ + int64_t{warp_} * num_counts_; }
  // Where the warp counts entries.
  __device__ int32_t* entry_counters() const {
    return kExpertRows ? warp_counters() : counters_ + int64_t{nth_group_} * warps_per_group_ * num_counts_;
  }

  // The sum of the lower warps instead of a warp's own count; returns the group's.
  __device__ int32_t add_lower_warps(int32_t* counter) const {
    int32_t sum = 0;
#pragma unroll 1
    for (int first = 0; first < warps_per_group_; first += kBatch) {
      int32_t counts[kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u) counts[u] = first + u < warps_per_group_ ? counter[int64_t{first + u} * num_counts_] : 0;
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        if (first + u < warps_per_group_) counter[int64_t{first + u} * num_counts_] = sum;
        sum += counts[u];
      }
    }
    return sum;
  }

  // The warp's entries in order, 32 at a time: threads with the same expert find each other.
  __device__ void count_entries() const {
    int32_t* const counters = warp_counters();
    const int32_t end = tokens_.end * plan_.num_topk;
    bool has_invalid = false;  // numbers that are no expert
#pragma unroll 1
    for (int32_t first = tokens_.begin * plan_.num_topk; first < end; first += kBatch * kWarpThreads) {
      const int32_t own = first + static_cast<int32_t>(device::lane_idx());
      int64_t given[kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u) given[u] = own + u * kWarpThreads < end ? given_expert(own + u * kWarpThreads) : -1;
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        if (first + u * kWarpThreads >= end) break;
        const int32_t i = own + u * kWarpThreads;
        const int32_t expert = usable_expert(given[u]);
        has_invalid = has_invalid || is_invalid(given[u]);
        const uint32_t same = __match_any_sync(~0u, expert);
        const int before = __popc(same & device::lanes_below());
        const int32_t base = expert >= 0 ? counters[expert] : 0;
        __syncwarp();
        if (expert >= 0 && before == 0) counters[expert] = base + __popc(same);
        __syncwarp();
        if (i >= end) continue;
        plan_.experts[i] = expert;
        plan_.entry_rows[i] = expert >= 0 ? base + before : -1;
      }
    }
    if (has_invalid) op_.post_notice(TERN_INVALID_ARGUMENT);
  }

  __device__ int64_t given_expert(int32_t entry) const {
    return args_.is_int32 ? static_cast<const int32_t*>(args_.topk_idx)[entry] : static_cast<const int64_t*>(args_.topk_idx)[entry];
  }

  __device__ bool is_masked(int rank) const { return op_.is_masked(rank); }
  __device__ bool is_invalid(int64_t given) const { return given < -1 || given >= plan_.num_experts; }

  // -1 for entries to masked ranks, and for numbers that are no expert.
  __device__ int32_t usable_expert(int64_t given) const {
    if (given < 0 || given >= plan_.num_experts) return -1;
    const auto expert = static_cast<int32_t>(given);
    return is_masked(rank_of_(expert)) ? -1 : expert;
  }

  // The messages of the warp's tokens, 32 tokens and 64 ranks at a time; with their entries, if these have no rows.
  __device__ void count_messages() const {
    constexpr int kRanks = 64;
    int32_t* const counters = warp_counters() + plan_.num_experts;
#pragma unroll 1
    for (int32_t first = tokens_.begin; first < tokens_.end; first += kWarpThreads) {
      const int32_t token = first + static_cast<int32_t>(device::lane_idx());
      MessageRef* const messages = plan_.messages + int64_t{token} * plan_.messages_per_token;
      int num_messages = 0;
#pragma unroll 1
      for (int first_rank = 0; first_rank < num_ranks_; first_rank += kRanks) {
        uint64_t ranks = 0;
        if (token < tokens_.end) {
          const int num = min(kRanks, num_ranks_ - first_rank);
          ranks = plan_.num_topk == 0 ? ranks_given(token, first_rank, num) : ranks_of_entries(token, first_rank, num);
        }
#pragma unroll 1
        for (uint64_t left = device::or_of_warp(ranks); left != 0; left &= left - 1) {
          const int bit = __ffsll(static_cast<int64_t>(left)) - 1, to = first_rank + bit;
          const bool goes = (ranks >> bit & 1) != 0;
          const uint32_t all = __ballot_sync(~0u, goes);
          const int32_t base = counters[to];
          __syncwarp();
          if (goes) messages[num_messages++] = {to, base + __popc(all & device::lanes_below())};
          if (device::lane_idx() == 0) counters[to] = base + __popc(all);
          __syncwarp();
        }
      }
      if (token < tokens_.end)
#pragma unroll 1
        for (; num_messages < plan_.messages_per_token; ++num_messages) messages[num_messages].rank = -1;
    }
  }

  // Bit i: the token goes to rank first_rank + i.
  __device__ uint64_t ranks_given(int32_t token, int first_rank, int num) const {
    uint64_t ranks = 0;
    const uint8_t* goes = args_.token_in_rank + int64_t{token} * num_ranks_ + first_rank;
#pragma unroll 4
    for (int i = 0; i < num; ++i)
      if (goes[i] != 0 && !is_masked(first_rank + i)) ranks |= uint64_t{1} << i;
    return ranks;
  }

  // With rows of their own the entries have just been read, and are in the L1 cache.
  __device__ uint64_t ranks_of_entries(int32_t token, int first_rank, int num) const {
    constexpr int kEntries = 8;  // that are under way at a time
    const bool counts = !kExpertRows && first_rank == 0;
    uint64_t ranks = 0;
    bool has_invalid = false;
#pragma unroll 1
    for (int first = 0; first < plan_.num_topk; first += kEntries) {
      int64_t given[kEntries];
#pragma unroll
      for (int u = 0; u < kEntries; ++u) given[u] = first + u < plan_.num_topk ? given_expert(token * plan_.num_topk + first + u) : -1;
#pragma unroll
      for (int u = 0; u < kEntries; ++u) {
        if (first + u >= plan_.num_topk) break;
        const int32_t expert = usable_expert(given[u]);
        const int i = rank_of_(expert) - first_rank;
        if (expert >= 0 && i >= 0 && i < num) ranks |= uint64_t{1} << i;
        if (!counts) continue;
        has_invalid = has_invalid || is_invalid(given[u]);
        plan_.experts[token * plan_.num_topk + first + u] = expert;
        if (expert >= 0) atomicAdd(entry_counters() + expert, 1);
      }
    }
    if (has_invalid) op_.post_notice(TERN_INVALID_ARGUMENT);
    return ranks;
  }

  const RouteArgs& args_;
  const PlanView& plan_;
  const Operation op_;
  const int num_ranks_;
  const int num_counts_;
  const int warp_;
  const RankOfExpert rank_of_;
  int32_t* const counters_;
  const int32_t num_tokens_;
  const int num_groups_;
  const int warps_per_group_;
  const int nth_group_;
  TokenRange tokens_ = {};
};

}  // namespace tern::kernels
