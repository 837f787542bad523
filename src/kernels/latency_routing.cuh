// SPDX-License-Identifier: Apache-2.0
// The routing of a small batch within the dispatch that carries it, on the side of the tokens' owner: how many entries and messages it has, and
// where each stands among them. And the shared memory of that dispatch.
#pragma once

#include "kernels/latency.cuh"
#include "kernels/rows.cuh"

namespace tern::kernels {

// The rows of a message, of a group of warps.
struct GroupRows {
  int32_t row[layout::kMostLatencyTopk];
  int32_t num_rows;
  int32_t is_there;
};

// Shared memory of a block.
class DispatchMemory {
 public:
  __host__ __device__ DispatchMemory(const LatencyDispatchArgs& args, std::byte* base) : base_(base) {
    const PlanView& plan = args.call.plan;
    const int64_t num_ranks = args.call.exchange.num_ranks, num_counts = plan.num_counts(args.call.exchange.num_ranks);
    tail_ = place(args.call.slot.end() - args.call.slot.scales(), 1);
    destinations_ = place(num_ranks, sizeof(std::byte*));
    destination_ranks_ = place(num_ranks + 2, sizeof(int32_t));
    rows_ = place(kGroups, sizeof(GroupRows));
    counts_ = place(num_ranks * num_counts, sizeof(int32_t));
    presence_ = place(num_ranks * args.call.words.num_presence(), sizeof(uint32_t));
    first_row_ = place(plan.num_experts, sizeof(int32_t));
    num_entries_ = place(plan.local_experts + 1, sizeof(int32_t));
    received_begin_ = place(2 * num_ranks + 1, sizeof(int32_t));
    num_ranks_ = static_cast<int32_t>(num_ranks);
    local_experts_ = plan.local_experts;
  }
  __host__ __device__ int64_t num_bytes() const { return num_bytes_; }

  // Of a token that is sent: what stands behind its row, and the ranks it goes to with their slots.
  __device__ std::byte* tail() const { return at<std::byte>(tail_); }
  __device__ std::byte** destinations() const { return at<std::byte*>(destinations_); }
  __device__ int32_t* destination_ranks() const { return at<int32_t>(destination_ranks_); }
  __device__ int32_t num_destinations() const { return destination_ranks()[num_ranks_]; }
  __device__ void set_num_destinations(int32_t num) const { destination_ranks()[num_ranks_] = num; }
  // 1: a wait for words has failed.
  __device__ int32_t* has_failed() const { return destination_ranks() + num_ranks_ + 1; }
  __device__ GroupRows* rows(int group) const { return at<GroupRows>(rows_) + group; }
  // Sending: [num_counts] of this rank's tokens so far. Receiving: [num_ranks][num_counts] of the source, then of all lower sources.
  __device__ int32_t* counts() const { return at<int32_t>(counts_); }
  __device__ uint32_t* presence() const {
    return at<uint32_t>(presence_);
  }  // [num_ranks][num_presence] tokens with a message for this rank
  __device__ int32_t* first_row() const { return at<int32_t>(first_row_); }      // [num_experts] of the expert's group at its rank
  __device__ int32_t* num_entries() const { return at<int32_t>(num_entries_); }  // [local_experts] of all sources
  __device__ int32_t* groups_end() const { return num_entries() + local_experts_; }
  __device__ int32_t* received_begin() const { return at<int32_t>(received_begin_); }   // [num_ranks + 1]
  __device__ int32_t* num_tokens() const { return received_begin() + num_ranks_ + 1; }  // [num_ranks]

 private:
  __host__ __device__ int32_t place(int64_t num, int64_t element_bytes) {
    const auto offset = static_cast<int32_t>(num_bytes_);
    num_bytes_ = layout::align_up(num_bytes_ + num * element_bytes, 16);
    return offset;
  }
  template <typename T>
  __device__ T* at(int32_t offset) const {
    return reinterpret_cast<T*>(base_ + offset);
  }

  std::byte* base_;
  int64_t num_bytes_ = 0;
  int32_t num_ranks_, local_experts_;
  int32_t tail_, destinations_, destination_ranks_, rows_, counts_, presence_, first_row_, num_entries_, received_begin_;
};

// This rank's tokens, as the call routes them.
class OwnRouting {
 public:
  __device__ OwnRouting(const LatencyDispatchArgs& args, const Operation& op)
      : args_(args), plan_(args.call.plan), op_(op), num_ranks_(args.call.exchange.num_ranks) {}

  __device__ static int32_t num_tokens(const LatencyDispatchArgs& args) {
    return args.device_num_tokens == nullptr ? args.num_tokens : max(0, min(*args.device_num_tokens, args.num_tokens));
  }

  // Threads of a block: adds the entries (by expert) and the messages (by rank) of tokens [begin, end) to the counters. One thread calls
  // presence(rank, i, bits) for the tokens with a message to that rank, of begin + 32 i to begin + 32 i + 31.
  template <typename Presence>
  __device__ void count(int32_t begin, int32_t end, int32_t* counters, Presence presence) const {
    const int lane = static_cast<int>(device::lane_idx());
#pragma unroll 1
    for (int32_t first = begin + static_cast<int32_t>(threadIdx.x) - lane; first < end; first += kLatencyThreads) {
      const int32_t token = first + lane;
      const uint64_t ranks = token < end ? count_token(token, counters) : 0;
#pragma unroll 1
      for (int first_rank = 0; first_rank < num_ranks_; first_rank += kWarpThreads) {
        const int num = min(num_ranks_ - first_rank, kWarpThreads);
        uint32_t own_bits = 0;  // of rank first_rank + lane
#pragma unroll 1
        for (int r = 0; r < num; ++r) {
          const uint32_t bits = __ballot_sync(~0u, (ranks >> (first_rank + r) & 1) != 0);
          if (r == lane) own_bits = bits;
        }
        if (lane >= num) continue;
        if (own_bits != 0) atomicAdd(counters + plan_.num_experts + first_rank + lane, __popc(own_bits));
        presence(first_rank + lane, (first - begin) / kWarpThreads, own_bits);
      }
    }
  }

  // All threads of one block: tells every rank all counts, and which tokens have a message for it.
  __device__ void publish(const LatencyCall& call, int32_t num_tokens, int32_t* counters) const {
    const layout::LatencyWords& words = args_.call.words;
    const auto num_counts = static_cast<int32_t>(words.num_counts), counts = static_cast<int32_t>(words.counts());
    const auto presence = static_cast<int32_t>(words.presence()), num_presence = static_cast<int32_t>(words.num_presence());
#pragma unroll 1
    for (int c = static_cast<int>(threadIdx.x); c < num_counts; c += kLatencyThreads) counters[c] = 0;
    __syncthreads();
    count(0, num_tokens, counters, [&](int rank, int i, uint32_t bits) {
      if (call.takes(rank)) call.put_word(rank, presence + i, bits);
    });
    const int num_filled = (num_tokens + kWarpThreads - 1) / kWarpThreads;
#pragma unroll 1
    for (int i = num_filled + static_cast<int>(threadIdx.x); i < num_presence; i += kLatencyThreads)
#pragma unroll 1
      for (int rank = 0; rank < num_ranks_; ++rank)
        if (call.takes(rank)) call.put_word(rank, presence + i, 0);
    __syncthreads();
#pragma unroll 1
    for (int c = static_cast<int>(threadIdx.x); c < num_counts; c += kLatencyThreads) {
      const auto count = static_cast<uint32_t>(counters[c]);
#pragma unroll 1
      for (int rank = 0; rank < num_ranks_; ++rank)
        if (call.takes(rank)) call.put_word(rank, counts + c, count);
    }
  }

  // Entry lane_idx() of a token, as the caller gives it; -1 beyond the last.
  __device__ int64_t own_given_expert(int32_t token) const {
    const int k = static_cast<int>(device::lane_idx());
    return k < plan_.num_topk ? given_expert(token * plan_.num_topk + k) : -1;
  }

  // One warp, with the counters of all tokens before: the token's entries, and where they stand among this rank's. Returns the ranks that it
  // goes to. Rows in the plan are positions until they are settled.
  __device__ uint64_t place_token(int32_t token, int64_t given, const int32_t* counters, layout::LatencySlot::Entry* entries) const {
    const int lane = static_cast<int>(device::lane_idx());
    const int32_t expert = checked(given);
    const int before = __popc(__match_any_sync(~0u, expert) & device::lanes_below());
    uint64_t ranks = expert >= 0 ? uint64_t{1} << rank_of(args_.call, expert) : 0;
    if (lane < plan_.num_topk) {
      const int32_t position = expert >= 0 ? counters[expert] + before : 0;
      entries[lane] = {expert, position};
      plan_.experts[token * plan_.num_topk + lane] = expert;
      plan_.entry_rows[token * plan_.num_topk + lane] = position;
    }
    __syncwarp();
    ranks = device::or_of_warp(ranks);
    MessageRef* messages = plan_.messages + token * plan_.messages_per_token;
#pragma unroll 1
    for (int rank = lane; rank < num_ranks_; rank += kWarpThreads)
      if ((ranks >> rank & 1) != 0) messages[__popcll(ranks & ((uint64_t{1} << rank) - 1))] = {rank, counters[plan_.num_experts + rank]};
#pragma unroll 1
    for (int m = __popcll(ranks) + lane; m < plan_.messages_per_token; m += kWarpThreads) messages[m].rank = -1;
    return ranks;
  }

 private:
  __device__ int64_t given_expert(int32_t entry) const {
    return args_.is_int32 ? static_cast<const int32_t*>(args_.topk_idx)[entry] : static_cast<const int64_t*>(args_.topk_idx)[entry];
  }

  // -1 for entries to masked ranks, and for numbers that are no expert, of which the host is told.
  __device__ int32_t checked(int64_t expert) const {
    if (expert < -1 || expert >= plan_.num_experts) {
      op_.post_notice(TERN_INVALID_ARGUMENT);
      return -1;
    }
    if (expert < 0 || args_.call.exchange.inline_windows[rank_of(args_.call, static_cast<int32_t>(expert))] == nullptr) return -1;
    return static_cast<int32_t>(expert);
  }

  // One thread: adds the token's entries; the ranks that it goes to.
  __device__ uint64_t count_token(int32_t token, int32_t* counters) const {
    constexpr int kAtOnce = 8;  // under way together
    uint64_t ranks = 0;
#pragma unroll 1
    for (int first = 0; first < plan_.num_topk; first += kAtOnce) {
      int64_t given[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) given[i] = first + i < plan_.num_topk ? given_expert(token * plan_.num_topk + first + i) : -1;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int32_t expert = checked(given[i]);
        if (expert < 0) continue;
        atomicAdd(counters + expert, 1);
        ranks |= uint64_t{1} << rank_of(args_.call, expert);
      }
    }
    return ranks;
  }

  const LatencyDispatchArgs& args_;
  const PlanView& plan_;
  const Operation& op_;
  const int num_ranks_;
};

}  // namespace tern::kernels
