// SPDX-License-Identifier: Apache-2.0
// The first half of a route: this rank's tokens are counted by all blocks, in token order.
//
//   TokenCounts counts(args, op, banks, counters);   // counters: [num_counting_warps][num_counts] of the block
//   counts.count();
//   ... all blocks have counted ...
//   counts.add_lower_blocks(use);                    // use(c, count) for each of the rank's counts
//   position of a message = message.row + counts.before()[num_experts + message.rank], of an entry = entry_row + counts.before()[expert]
//
// Each block has a range of the tokens, and each of its warps a part of that. Counters are of entries by expert, then of messages by rank. Where
// entries have no rows of their own (rank_major) nobody asks for their positions: the block's are counted in the first warp's counters.
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
  __device__ explicit RankOfExpert(int32_t local_experts) : inverse((uint64_t{1} << kShift) / static_cast<uint32_t>(local_experts) + 1) {}
  __device__ int operator()(int32_t expert) const { return static_cast<int>(static_cast<uint32_t>(expert) * inverse >> kShift); }
};

template <bool kExpertRows>
class TokenCounts {
 public:
  __device__ TokenCounts(const RouteArgs& args, const Operation& op, const BankPair* banks, int32_t* counters)
      : args_(args),
        plan_(args.plan),
        op_(op),
        banks_(banks),
        num_ranks_(args.exchange.num_ranks),
        num_counts_(plan_.num_counts(num_ranks_)),
        warp_(static_cast<int>(threadIdx.x) / kWarpThreads),
        rank_of_(plan_.local_experts),
        counters_(counters),
        num_tokens_(args.device_num_tokens == nullptr ? args.num_tokens : max(0, min(*args.device_num_tokens, args.num_tokens))) {
    const TokenRange of_block = TokenRange{0, num_tokens_}.part(static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x));
    if (warp_ < args.num_counting_warps) tokens_ = of_block.part(warp_, args.num_counting_warps);
  }

  __device__ int32_t num_tokens() const { return num_tokens_; }
  // Of this warp.
  __device__ TokenRange tokens() const { return tokens_; }
  // What comes before the warp's tokens, once everything is counted.
  __device__ const int32_t* before() const { return warp_counters(); }
  __device__ int rank_of(int32_t expert) const { return rank_of_(expert); }

  // Leaves experts, messages and positions among the warp's in the plan, and the block's counts for the other blocks.
  __device__ void count() const {
    const int num_warps = args_.num_counting_warps;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < num_warps * num_counts_; i += num_threads()) counters_[i] = 0;
    __syncthreads();
    if (kExpertRows && plan_.num_topk > 0) count_entries();
    __syncwarp();
    count_messages();
    __syncthreads();
#pragma unroll 1
    for (int c = static_cast<int>(threadIdx.x); c < num_counts_; c += num_threads()) {
      const bool is_of_block = !kExpertRows && c < plan_.num_experts;
      args_.block_counts[int64_t{blockIdx.x} * num_counts_ + c] = is_of_block ? counters_[c] : add_lower_warps(counters_ + c);
    }
  }

  // When all blocks have counted: what the lower ones did comes before, too. Calls use(c, count) for each of the rank's counts.
  template <typename Use>
  __device__ void add_lower_blocks(Use use) const {
#pragma unroll 1
    for (int c = static_cast<int>(threadIdx.x); c < num_counts_; c += num_threads()) {
      int32_t lower = 0, all = 0;
#pragma unroll
      for (unsigned b = 0; b < kMostRouteBlocks; ++b) {
        const int32_t count = b < gridDim.x ? args_.block_counts[b * num_counts_ + c] : 0;
        lower += b < blockIdx.x ? count : 0;
        all += count;
      }
      if (kExpertRows || c >= plan_.num_experts) {
#pragma unroll 4
        for (int w = 0; w < args_.num_counting_warps; ++w) counters_[int64_t{w} * num_counts_ + c] += lower;
      }
      if (args_.tokens_per_expert != nullptr && c < plan_.num_experts) all = args_.tokens_per_expert[c];
      use(c, all);
    }
    __syncthreads();
  }

 private:
  static constexpr int kBatch = 4;  // loads that are under way at a time

  __device__ static int num_threads() { return static_cast<int>(blockDim.x); }
  __device__ int32_t* warp_counters() const { return counters_ + int64_t{warp_} * num_counts_; }

  // The sum of the lower warps instead of a warp's own count; returns the block's.
  __device__ int32_t add_lower_warps(int32_t* counter) const {
    int32_t sum = 0;
#pragma unroll 1
    for (int first = 0; first < args_.num_counting_warps; first += kBatch) {
      int32_t counts[kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u) counts[u] = first + u < args_.num_counting_warps ? counter[int64_t{first + u} * num_counts_] : 0;
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        if (first + u < args_.num_counting_warps) counter[int64_t{first + u} * num_counts_] = sum;
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

  __device__ bool is_masked(int rank) const { return banks_[rank].there == nullptr; }
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
        if (expert >= 0) atomicAdd(counters_ + expert, 1);
      }
    }
    if (has_invalid) op_.post_notice(TERN_INVALID_ARGUMENT);
    return ranks;
  }

  const RouteArgs& args_;
  const PlanView& plan_;
  const Operation op_;
  const BankPair* const banks_;  // of all ranks
  const int num_ranks_;
  const int num_counts_;
  const int warp_;
  const RankOfExpert rank_of_;
  int32_t* const counters_;
  const int32_t num_tokens_;
  TokenRange tokens_ = {};
};

}  // namespace tern::kernels
