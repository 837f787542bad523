// SPDX-License-Identifier: Apache-2.0
// The routing of a small batch within the dispatch that carries it, on the side of the tokens' owner: how many entries and messages it has, and
// where each stands among them. And the shared memory of that dispatch.
#pragma once

#include "kernels/latency.cuh"

namespace tern::kernels {

// Warps of a block that dispatches: the first ones, openers, count this rank's entries and learn what arrives here; meanwhile senders push this
// rank's rows, followed by the raising warp. When they are done, openers and senders alike spread what arrives.
inline constexpr int kOpenThreads = 8 * kWarpThreads;
inline constexpr int kSendThreads = kWorkThreads - kOpenThreads;
__device__ __forceinline__ bool is_opening() { return threadIdx.x < kOpenThreads; }
__device__ __forceinline__ int sender_idx() { return static_cast<int>(threadIdx.x) - kOpenThreads; }
__device__ __forceinline__ void sync_openers() { sync_first<kOpenThreads>(); }

// What the block sends: blocks but the first, which routes, take parts of tokens in turn; a block that is alone does both. -1: nothing.
__device__ __forceinline__ int32_t first_part() { return gridDim.x == 1 ? 0 : static_cast<int32_t>(blockIdx.x) - 1; }
__device__ __forceinline__ int32_t part_step() { return gridDim.x == 1 ? 1 : static_cast<int32_t>(gridDim.x) - 1; }

// Shared memory of a block.
class DispatchMemory {
 public:
  __device__ DispatchMemory(const LatencyDispatchArgs& args, std::byte* base)
      : base_(base),
        layout_(args.memory),
        num_sent_(args.call.words.num_batches * args.call.plan.num_experts),
        local_experts_(args.call.plan.local_experts) {}

  // Of a token that is sent.
  __device__ std::byte* scales() const { return base_; }
  // 1: a wait for words has failed.
  __device__ int32_t* has_failed() const { return at<int32_t>(layout_.has_failed); }
  // Of this rank's tokens so far: [num_batches, num_experts] entries, and behind them [num_batches, num_ranks, num_presence] which tokens have a
  // message for the rank.
  __device__ int32_t* entries_sent() const { return at<int32_t>(layout_.entries_sent); }
  __device__ uint32_t* presence_sent() const { return reinterpret_cast<uint32_t*>(entries_sent() + num_sent_); }
  // [num_ranks, num_routing_words] what the sources say.
  __device__ uint32_t* words() const { return at<uint32_t>(layout_.words); }
  // [num_experts] of the expert's group at its rank.
  __device__ int32_t* first_row() const { return at<int32_t>(layout_.first_row); }
  // [local_experts] of all sources.
  __device__ int32_t* num_entries() const { return at<int32_t>(layout_.num_entries); }
  __device__ int32_t* groups_end() const { return num_entries() + local_experts_; }

 private:
  template <typename T>
  __device__ T* at(int32_t offset) const {
    return reinterpret_cast<T*>(base_ + offset);
  }

  std::byte* const base_;
  const LatencyDispatchMemory& layout_;
  const int32_t num_sent_, local_experts_;
};

// This rank's tokens, as the call routes them.
template <typename Call>
class OwnRouting {
 public:
  __device__ OwnRouting(const LatencyDispatchArgs& args, const Call& call, const DispatchMemory& memory)
      : args_(args),
        plan_(args.call.plan),
        call_(call),
        memory_(memory),
        num_ranks_(args.call.exchange.num_ranks),
        num_presence_(args.call.words.num_presence()) {}

  // Thread `thread` of `num_threads`: no token has been counted.
  __device__ void clear(int thread, int num_threads) const {
#pragma unroll 1
    for (int i = thread; i < call_.num_batches() * num_sent(); i += num_threads) memory_.entries_sent()[i] = 0;
  }

  // Openers: adds the entries of tokens [begin, end), and for which ranks these have messages.
  __device__ void count(int32_t begin, int32_t end) const {
    constexpr int kAtOnce = 4;  // of a thread's entries are asked for together; then they go round
    const int32_t end_entry = end * plan_.num_topk;
#pragma unroll 1
    for (int32_t entry = begin * plan_.num_topk + static_cast<int32_t>(threadIdx.x); entry < end_entry;) {
      int64_t given[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) given[u] = entry + u * kOpenThreads < end_entry ? given_expert(entry + u * kOpenThreads) : -1;
#pragma unroll 1
      for (int u = 0; u < kAtOnce && entry < end_entry; ++u, entry += kOpenThreads) {
        count_entry(entry, usable(given[0]));
#pragma unroll
        for (int next = 1; next < kAtOnce; ++next) given[next - 1] = given[next];
      }
    }
  }

  // The workers of a block, when all tokens are counted: tells every rank all counts, and which tokens have a message for it.
  __device__ void publish() const {
    const LatencyPlaces& words = args_.call.words;
    const auto counts = words.counts(), presence = words.presence();
    const int num_counts = plan_.num_counts(num_ranks_), num_words = call_.num_batches() * (num_counts + num_ranks_ * num_presence_);
    const int num_present = num_words - call_.num_batches() * num_counts;  // first: it is what is asked for first
#pragma unroll 1
    for (int w = static_cast<int>(threadIdx.x); w < num_words; w += kWorkThreads) {
      if (w < num_present) {
        put_presence(presence, w);
        continue;
      }
      const int batch = Call::has_batches() ? (w - num_present) / num_counts : 0, c = w - num_present - batch * num_counts;
      if (c < plan_.num_experts)
        put_everywhere(counts + w - num_present, memory_.entries_sent()[batch * plan_.num_experts + c]);
      else
        put_everywhere(counts + w - num_present, messages_to(batch, c - plan_.num_experts));
    }
  }

  // Entry lane_idx() of a token, as the caller gives it; -1 beyond the last.
  __device__ int64_t own_given_expert(int32_t token) const {
    const int k = static_cast<int>(device::lane_idx());
    return k < plan_.num_topk ? given_expert(token * plan_.num_topk + k) : -1;
  }
  // All threads of a warp, with its entries: the ranks that a token goes to.
  __device__ uint64_t ranks_of(int64_t given) const {
    const int32_t expert = usable(given);
    return device::or_of_warp(expert >= 0 ? uint64_t{1} << rank_of(args_.call, expert) : 0);
  }

  // All threads of a warp, when all tokens before are counted: each has its entry of a token, and where that stands among those of its batch.
  __device__ layout::LatencyEntry place(int32_t token, int64_t given) const {
    const int32_t expert = usable(given);
    const int before = __popc(__match_any_sync(~0u, expert) & device::lanes_below());
    return {expert, expert >= 0 ? memory_.entries_sent()[call_.batch_token(token).node * plan_.num_experts + expert] + before : 0};
  }

  // The same warp, before other tokens are counted: the token, which goes to `ranks`, into the plan. Rows are positions until they are settled.
  __device__ void keep(int32_t token, int64_t given, const layout::LatencyEntry& entry, uint64_t ranks) const {
    const int lane = static_cast<int>(device::lane_idx());
    if (given < -1 || given >= plan_.num_experts) call_.operation().post_notice(TERN_INVALID_ARGUMENT);
    if (lane < plan_.num_topk) {
      plan_.experts[token * plan_.num_topk + lane] = entry.expert;
      plan_.entry_rows[token * plan_.num_topk + lane] = entry.position;
    }
    MessageRef* messages = plan_.messages + token * plan_.messages_per_token;
    const int batch = call_.batch_token(token).node;
#pragma unroll 1
    for (int rank = lane; rank < num_ranks_; rank += kWarpThreads)
      if ((ranks >> rank & 1) != 0) messages[__popcll(ranks & ((uint64_t{1} << rank) - 1))] = {rank, messages_to(batch, rank)};
#pragma unroll 1
    for (int m = __popcll(ranks) + lane; m < plan_.messages_per_token; m += kWarpThreads) messages[m].rank = -1;
  }

 private:
  __device__ int num_sent() const { return plan_.num_experts + num_ranks_ * num_presence_; }  // of a batch

  __device__ int64_t given_expert(int32_t entry) const {
    return args_.is_int32 ? static_cast<const int32_t*>(args_.topk_idx)[entry] : static_cast<const int64_t*>(args_.topk_idx)[entry];
  }

  // -1 for entries to masked ranks, and for numbers that are no expert.
  __device__ int32_t usable(int64_t given) const {
    if (static_cast<uint64_t>(given) >= static_cast<uint64_t>(plan_.num_experts)) return -1;
    const auto expert = static_cast<int32_t>(given);
    return call_.is_masked(rank_of(args_.call, expert)) ? -1 : expert;
  }

  __device__ void count_entry(int32_t entry, int32_t expert) const {
    if (expert < 0) return;
    const auto [batch, token] = call_.batch_token(quotient(entry, args_.call.topk_reciprocal));
    atomicAdd(memory_.entries_sent() + batch * plan_.num_experts + expert, 1);
    atomicOr(presence(batch, rank_of(args_.call, expert)) + token / 32, 1u << token % 32);
  }

  __device__ uint32_t* presence(int batch, int rank) const { return memory_.presence_sent() + (batch * num_ranks_ + rank) * num_presence_; }
  // Of the batch's tokens so far.
  __device__ int32_t messages_to(int batch, int rank) const {
    int32_t sum = 0;
#pragma unroll 1
    for (int i = 0; i < num_presence_; ++i) sum += __popc(presence(batch, rank)[i]);
    return sum;
  }

  __device__ void put_everywhere(int32_t word, int32_t value) const {
#pragma unroll 1
    for (int rank = 0; rank < num_ranks_; ++rank)
      if (call_.takes(rank)) call_.put_word(rank, word, static_cast<uint32_t>(value));
  }

  // Word `i` of those in presence_sent(), to whom it concerns.
  __device__ void put_presence(int32_t first_word, int i) const {
    const int of_batch = i / num_presence_, batch = Call::has_batches() ? of_batch / num_ranks_ : 0, rank = of_batch - batch * num_ranks_;
    if (!call_.takes(rank)) return;
    call_.put_word(rank, first_word + batch * num_presence_ + i - of_batch * num_presence_, memory_.presence_sent()[i]);
  }

  const LatencyDispatchArgs& args_;
  const PlanView& plan_;
  const Call& call_;
  const DispatchMemory& memory_;
  const int num_ranks_, num_presence_;
};

__device__ __forceinline__ int32_t num_tokens_given(const LatencyDispatchArgs& args) {
  return args.device_num_tokens == nullptr ? args.num_tokens : max(0, min(*args.device_num_tokens, args.num_tokens));
}

}  // namespace tern::kernels
