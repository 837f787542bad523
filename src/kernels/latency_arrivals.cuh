// SPDX-License-Identifier: Apache-2.0
// The routing of a small batch within the dispatch that carries it, on the side of the experts' ranks: where what arrives comes to lie.
#pragma once

#include "kernels/latency_routing.cuh"

namespace tern::kernels {

struct ArrivingMessage {
  int32_t source;
  int32_t token;  // at its source
  int32_t index;  // among all received messages
};

struct ArrivingEntry {
  int32_t expert;  // local; -1: not here
  int32_t row;     // -1: not here, or beyond the capacity
};

// What arrives here: of a call that routes, worked out from the words of all sources; else as the plan has it.
class Arrivals {
 public:
  __device__ Arrivals(const LatencyDispatchArgs& args, const LatencyCall& call, const DispatchMemory& memory)
      : args_(args),
        plan_(args.call.plan),
        call_(call),
        memory_(memory),
        rank_(call.rank()),
        num_ranks_(call.num_ranks()),
        num_counts_(static_cast<int>(args.call.words.num_counts)),
        num_presence_(static_cast<int>(args.call.words.num_presence())) {}

  // All threads of the block. False: the exchange has failed, or this is the raising warp, which has no further part in it.
  __device__ bool open() {
    if (is_raising()) {
      if (blockIdx.x == 0) call_.await_calls();
      call_.wait_no_more();
      device::sync_some_warps(kOpenedBarrier, kLatencyThreads);
      if (args_.routes && *memory_.has_failed() == 0) settle_own();
      return false;
    }
    if (call_.may_go_on_without()) {
      settle();
    } else if (args_.routes && !fetch_words()) {
      *memory_.has_failed() = 1;
    }
    if (args_.routes) {
      sync_workers();
      set_received_begin();
      if (blockIdx.x == 0) {
        keep_counts();
        sync_workers();
      }
      sum_counts();
      if (plan_.layout == TERN_LAYOUT_EXPERT_MAJOR) {
        sync_workers();
        set_first_rows();
      }
    } else {
      read_plan();
    }
    sync_workers();
    device::arrive_at_barrier(kOpenedBarrier, kLatencyThreads);
#pragma unroll 1
    for (int source = 0; args_.routes && source < num_ranks_; ++source) most_tokens_ = max(most_tokens_, memory_.num_tokens()[source]);
    return *memory_.has_failed() == 0;
  }

  // Message i of those that there may be; false: there is none. All threads of a warp.
  __device__ int32_t num_candidates() const { return args_.routes ? most_tokens_ * num_ranks_ : memory_.received_begin()[num_ranks_]; }
  __device__ bool candidate(int32_t i, ArrivingMessage& message) const {
    const int32_t* begin = memory_.received_begin();
    if (!args_.routes) {
      message = {0, plan_.source_token[i], i};
      while (begin[message.source + 1] <= i) ++message.source;
      return true;
    }
    message.source = (rank_ + i) % num_ranks_;
    message.token = i / num_ranks_;
    const uint32_t* presence = memory_.presence() + message.source * num_presence_;
    const int word = message.token / 32;
    const uint32_t bit = 1u << message.token % 32;
    if ((presence[word] & bit) == 0) return false;
    int lower = 0;
    const int lane = static_cast<int>(device::lane_idx());
    if (lane < word) lower = __popc(presence[lane]);
    message.index = begin[message.source] + __reduce_add_sync(~0u, lower) + __popc(presence[word] & (bit - 1));
    return true;
  }

  // One thread: entry k of a message, whose entries are `sent`; into the plan too if the call routes.
  __device__ ArrivingEntry entry(const ArrivingMessage& message, int k, const layout::LatencySlot::Entry* sent) const {
    const int32_t at = message.index * plan_.topk_stride + k;
    if (!args_.routes) return {plan_.received_experts[at], plan_.received_rows[at]};
    const layout::LatencySlot::Entry entry = sent[k];
    ArrivingEntry here{-1, -1};
    if (entry.expert >= 0 && rank_of(args_.call, entry.expert) == rank_) {
      here.expert = entry.expert - rank_ * plan_.local_experts;
      const int32_t before = memory_.counts()[message.source * num_counts_ + entry.expert];
      here.row =
          plan_.has_expert_rows() ? bounded_row(first_row(entry.expert), int64_t{before} + entry.position) : bounded_row(0, message.index);
    }
    plan_.received_experts[at] = here.expert;
    plan_.received_rows[at] = here.row;
    return here;
  }
  __device__ void keep(const ArrivingMessage& message) const {
    if (args_.routes) plan_.source_token[message.index] = message.token;
  }

  // The workers of all blocks: what follows from the routing alone.
  __device__ void write_outputs() const {
    const DispatchOutputs& out = args_.out;
    if (plan_.layout == TERN_LAYOUT_EXPERT_PADDED && !out.zero_padding) {
      if (out.source_token != nullptr || out.source_rank != nullptr || out.row_expert != nullptr) clear_padded_rows();
      if (blockIdx.x == 0) keep_and_write_counts();
      return;
    }
    const auto warp = static_cast<int>(threadIdx.x) / kWarpThreads;
    const auto num_warps = static_cast<int>(kWorkThreads / kWarpThreads * gridDim.x);
#pragma unroll 1
    for (auto e = static_cast<int>(warp * gridDim.x + blockIdx.x); plan_.has_expert_rows() && e < plan_.local_experts; e += num_warps) {
      const int64_t begin = group_begin(e), end = min(int64_t{group_begin(e + 1)}, args_.out.num_rows);
      clear_rows(min(begin + memory_.num_entries()[e], end), end, args_.out.zero_padding, device::lane_idx(), kWarpThreads);
    }
    const int64_t used = plan_.has_expert_rows() ? group_begin(plan_.local_experts) : memory_.received_begin()[num_ranks_];
    clear_rows(min(used, args_.out.num_rows), args_.out.num_rows, false, blockIdx.x * kWorkThreads + threadIdx.x, gridDim.x * kWorkThreads);
    if (blockIdx.x == 0) keep_and_write_counts();
  }

 private:
  static constexpr int kOpenedBarrier = 14;

  // One warp: where this rank's messages and entries come to lie, into the plan. Of the tokens that this block has placed.
  __device__ void settle_own() const {
    const int32_t num_senders = max(1, static_cast<int32_t>(gridDim.x) - 1);
    const int32_t first = gridDim.x == 1 ? 0 : static_cast<int32_t>(blockIdx.x) - 1;
    if (first < 0) return;
    // Positions become rows.
    const int32_t* lower = memory_.counts() + rank_ * num_counts_;  // sums over the lower sources
#pragma unroll 1
    for (int32_t token = first; token < memory_.num_tokens()[rank_]; token += num_senders) {
#pragma unroll 1
      for (int k = static_cast<int>(device::lane_idx()); k < plan_.num_topk; k += kWarpThreads) {
        int32_t& row = plan_.entry_rows[token * plan_.num_topk + k];
        const int32_t expert = plan_.experts[token * plan_.num_topk + k];
        const bool has_row = expert >= 0 && plan_.has_expert_rows();
        row = has_row ? bounded_row(first_row(expert), int64_t{lower[expert]} + row) : -1;
      }
#pragma unroll 1
      for (int m = static_cast<int>(device::lane_idx()); m < plan_.messages_per_token; m += kWarpThreads) {
        MessageRef& message = plan_.messages[int64_t{token} * plan_.messages_per_token + m];
        if (message.rank < 0) continue;
        message.row = plan_.has_expert_rows() ? 0 : bounded_row(lower[plan_.num_experts + message.rank], message.row);
      }
    }
  }

  __device__ void read_plan() const {
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i <= num_ranks_; i += kWorkThreads) memory_.received_begin()[i] = plan_.received_begin[i];
#pragma unroll 1
    for (int e = static_cast<int>(threadIdx.x); e < plan_.local_experts; e += kWorkThreads) {
      int32_t sum = 0;
#pragma unroll 1
      for (int source = 0; source < num_ranks_; ++source) sum += plan_.counts[source * num_counts_ + rank_ * plan_.local_experts + e];
      memory_.num_entries()[e] = sum;
    }
  }

  // Under TERN_ON_TIMEOUT_MASK: who has a part in this dispatch. Of a call that routes, the others send nothing.
  __device__ __noinline__ void settle() const {
    call_.settle_attendance([&] {
      if (args_.routes && !fetch_words()) *memory_.has_failed() = 1;
      sync_workers();
      await_all_rows();
    });
    const int num_words = num_counts_ + num_presence_;
    for (int source = 0; args_.routes && source < num_ranks_; ++source) {
      if (!call_.is_absent(source)) continue;
      for (int i = static_cast<int>(threadIdx.x); i < num_words; i += kWorkThreads)
        *(i < num_counts_ ? reinterpret_cast<uint32_t*>(memory_.counts() + source * num_counts_ + i)
                          : memory_.presence() + source * num_presence_ + i - num_counts_) = 0;
      if (threadIdx.x == 0) memory_.num_tokens()[source] = 0;
    }
  }
  __device__ void await_all_rows() const {
    if (!args_.routes) {
      for (int i = static_cast<int>(threadIdx.x); i < plan_.received_begin[num_ranks_]; i += kWorkThreads) {
        int source = 0;
        while (plan_.received_begin[source + 1] <= i) ++source;
        if (!call_.await_row(source, plan_.source_token[i])) call_.miss(source);
      }
      return;
    }
    const auto max_tokens = static_cast<int>(plan_.max_tokens);
    for (int i = static_cast<int>(threadIdx.x); i < num_ranks_ * max_tokens; i += kWorkThreads) {
      const int source = i / max_tokens, token = i % max_tokens;
      const bool is_sent = (memory_.presence()[source * num_presence_ + token / 32] >> token % 32 & 1) != 0;
      if (is_sent && !call_.await_row(source, token)) call_.miss(source);
    }
  }

  // All that the sources tell of their routing. Each thread has the words of several sources under way.
  __device__ bool fetch_words() const {
    constexpr int kAtOnce = 4;
    const int num_words = 2 + num_counts_ + num_presence_;
    bool ok = true;
#pragma unroll 1
    for (int word = static_cast<int>(threadIdx.x); word < num_words; word += kWorkThreads) {
#pragma unroll 1
      for (int first = 0; first < num_ranks_; first += kAtOnce) {
        uint64_t seen[kAtOnce] = {};
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u)
          if (first + u < num_ranks_ && !call_.is_masked(first + u)) seen[u] = load_relaxed_sys(call_.words(rank_, first + u) + word);
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u)
          if (first + u < num_ranks_) ok = ok && take_word(first + u, word, seen[u]);
      }
    }
    return ok;
  }
  __device__ bool take_word(int source, int word, uint64_t seen) const {
    auto value = static_cast<uint32_t>(seen);
    if (call_.is_masked(source)) {
      value = 0;
    } else if (!call_.operation().is_of_epoch(seen) && !call_.await_word(source, word, value)) {
      if (!call_.may_go_on_without() || call_.operation().is_aborted()) return false;
      call_.miss(source);
      return word == args_.call.words.call() || keep_word(source, word, 0);
    }
    return keep_word(source, word, value);
  }
  // False: the source calls something else.
  __device__ bool keep_word(int source, int word, uint32_t value) const {
    const layout::LatencyWords& words = args_.call.words;
    if (word == words.call()) return call_.is_masked(source) || call_.check_call(source, value);
    if (word == words.num_tokens())
      memory_.num_tokens()[source] = static_cast<int32_t>(value);
    else if (word < words.presence())
      memory_.counts()[source * num_counts_ + word - words.counts()] = static_cast<int32_t>(value);
    else
      memory_.presence()[source * num_presence_ + word - words.presence()] = value;
    return true;
  }

  __device__ void set_received_begin() const {
    const int counter = plan_.num_experts + rank_;
    if (threadIdx.x != counter % kWorkThreads) return;  // sum_counts() leaves this counter to the same thread
    int32_t begin = 0;
#pragma unroll 1
    for (int source = 0; source < num_ranks_; ++source) {
      memory_.received_begin()[source] = begin;
      begin += memory_.counts()[source * num_counts_ + counter];
    }
    memory_.received_begin()[num_ranks_] = begin;
  }

  // One block, into the plan.
  __device__ void keep_counts() const {
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < num_ranks_ * num_counts_; i += kWorkThreads) plan_.counts[i] = memory_.counts()[i];
#pragma unroll 1
    for (int source = static_cast<int>(threadIdx.x); source < num_ranks_; source += kWorkThreads)
      plan_.num_tokens[source] = memory_.num_tokens()[source];
    constexpr int kEnds = layout::kMaxChunks + 1;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < num_ranks_ * kEnds; i += kWorkThreads)
      plan_.chunk_begin[i] = num_present(i / kEnds, i % kEnds * plan_.tokens_per_chunk);
  }
  // Messages of the source's tokens below `end`.
  __device__ int32_t num_present(int source, int32_t end) const {
    const uint32_t* presence = memory_.presence() + source * num_presence_;
    int32_t sum = 0;
#pragma unroll 1
    for (int i = 0; i < num_presence_ && i * 32 < end; ++i)
      sum += __popc(end - i * 32 >= 32 ? presence[i] : presence[i] & ((1u << (end - i * 32)) - 1));
    return sum;
  }

  // Counts become sums over the lower sources; those over all sources go to first_row() until set_first_rows().
  __device__ void sum_counts() const {
#pragma unroll 1
    for (int c = static_cast<int>(threadIdx.x); c < num_counts_; c += kWorkThreads) {
      int32_t sum = 0;
#pragma unroll 1
      for (int source = 0; source < num_ranks_; ++source) {
        int32_t& count = memory_.counts()[source * num_counts_ + c];
        const int32_t own = count;
        count = sum;
        sum += own;
      }
      if (c >= plan_.num_experts) continue;
      memory_.first_row()[c] = sum;
      if (c / plan_.local_experts == rank_) memory_.num_entries()[c - rank_ * plan_.local_experts] = sum;
    }
  }

  // expert_major: groups follow each other within a rank; a warp for each rank adds up their sizes.
  __device__ void set_first_rows() const {
    const int warp = static_cast<int>(threadIdx.x) / kWarpThreads, lane = static_cast<int>(device::lane_idx());
#pragma unroll 1
    for (int r = warp; r < num_ranks_; r += kWorkThreads / kWarpThreads) {
      int64_t begin = 0;
#pragma unroll 1
      for (int first = 0; first < plan_.local_experts; first += kWarpThreads) {
        const bool in = first + lane < plan_.local_experts;
        int32_t* row = memory_.first_row() + r * plan_.local_experts + first + lane;
        int64_t size = 0;
        if (in) size = layout::align_up(*row, plan_.alignment);
        int64_t sum = size;
#pragma unroll 1
        for (int step = 1; step < kWarpThreads; step *= 2) {
          const int64_t lower = __shfl_up_sync(~0u, sum, step);
          if (lane >= step) sum += lower;
        }
        if (in) *row = static_cast<int32_t>(begin + sum - size);
        begin += __shfl_sync(~0u, sum, kWarpThreads - 1);
      }
      if (r == rank_ && lane == 0) *memory_.groups_end() = static_cast<int32_t>(begin);
    }
  }

  // One block, into the plan: the groups of this rank.
  __device__ void keep_groups() const {
    bool overflow = !plan_.has_expert_rows() && memory_.received_begin()[num_ranks_] > plan_.row_capacity;
#pragma unroll 1
    for (int e = static_cast<int>(threadIdx.x); e < plan_.local_experts && plan_.has_expert_rows(); e += kWorkThreads) {
      plan_.group_begin[e] = group_begin(e);
#pragma unroll 1
      for (int source = 0; source < num_ranks_; ++source)
        plan_.source_begin[e * num_ranks_ + source] = memory_.counts()[source * num_counts_ + rank_ * plan_.local_experts + e];
      if (memory_.num_entries()[e] > 0) overflow = overflow || bounded_row(group_begin(e), memory_.num_entries()[e] - 1) < 0;
    }
    if (threadIdx.x == 0 && plan_.has_expert_rows()) plan_.group_begin[plan_.local_experts] = group_begin(plan_.local_experts);
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i <= num_ranks_; i += kWorkThreads) plan_.received_begin[i] = memory_.received_begin()[i];
    if (overflow) call_.operation().post_notice(TERN_CAPACITY_EXCEEDED);
  }

  // First row of an expert's group at its rank.
  __device__ int64_t first_row(int32_t expert) const {
    if (plan_.layout == TERN_LAYOUT_EXPERT_MAJOR) return memory_.first_row()[expert];
    return (expert - rank_of(args_.call, expert) * plan_.local_experts) * plan_.padded_group_rows;
  }

  // First row of a local expert's group; local_experts: where the last one ends.
  __device__ int32_t group_begin(int e) const {
    if (plan_.layout == TERN_LAYOUT_EXPERT_PADDED) return static_cast<int32_t>(e * plan_.padded_group_rows);
    if (!args_.routes) return plan_.group_begin[e];
    return e < plan_.local_experts ? memory_.first_row()[rank_ * plan_.local_experts + e] : *memory_.groups_end();
  }

  // Row, or -1 if it lies beyond the group's or the outputs' end.
  __device__ int32_t bounded_row(int64_t group_begin, int64_t row_in_group) const {
    if (plan_.layout == TERN_LAYOUT_EXPERT_PADDED && row_in_group >= plan_.padded_group_rows) return -1;
    const int64_t row = group_begin + row_in_group;
    return row < plan_.row_capacity ? static_cast<int32_t>(row) : -1;
  }

  // One block.
  __device__ void keep_and_write_counts() const {
    if (args_.routes) keep_groups();
    write_counts();
  }

  // The workers of all blocks, for groups of equal size: what clear_rows() does, a row each.
  __device__ void clear_padded_rows() const {
    const DispatchOutputs& out = args_.out;
    const auto group_rows = static_cast<uint32_t>(plan_.padded_group_rows);
    const auto num_rows = static_cast<uint32_t>(out.num_rows);
#pragma unroll 1
    for (uint32_t row = blockIdx.x * kWorkThreads + threadIdx.x; row < num_rows; row += gridDim.x * kWorkThreads) {
      const uint32_t e = row / group_rows;
      if (static_cast<int32_t>(row - e * group_rows) < memory_.num_entries()[e]) continue;
      if (out.source_token != nullptr) out.source_token[row] = -1;
      if (out.source_rank != nullptr) out.source_rank[row] = -1;
      if (out.row_expert != nullptr) out.row_expert[row] = -1;
    }
  }

  // Thread `thread` of `num_threads`: rows that nothing arrives for.
  __device__ void clear_rows(int64_t begin, int64_t end, bool zero, int64_t thread, int64_t num_threads) const {
    const DispatchOutputs& out = args_.out;
#pragma unroll 1
    for (int64_t row = begin + thread; row < end; row += num_threads) {
      if (out.source_token != nullptr) out.source_token[row] = -1;
      if (out.source_rank != nullptr) out.source_rank[row] = -1;
      if (plan_.has_expert_rows() && out.row_expert != nullptr) out.row_expert[row] = -1;
    }
#pragma unroll 1
    for (int64_t i = begin * plan_.num_topk + thread; !plan_.has_expert_rows() && i < end * plan_.num_topk; i += num_threads) {
      if (out.topk_idx != nullptr) out.topk_idx[i] = -1;
      if (out.topk_weights != nullptr && args_.carries_weights) out.topk_weights[i] = 0.0f;
    }
    if (!zero) return;
#pragma unroll 1
    for (int64_t at = begin * args_.row_bytes + thread * 16; at < end * args_.row_bytes; at += num_threads * 16)
      *reinterpret_cast<Vec16*>(out.tokens + at) = Vec16{};
    if (out.scales == nullptr || args_.scale_bytes == 0) return;
    const int64_t num_elements = args_.scale_bytes / args_.scale_element_bytes;
#pragma unroll 1
    for (int64_t i = begin * num_elements + thread; i < end * num_elements; i += num_threads) {
      std::byte* to = out.scale_address(plan_, {args_.scale_bytes, args_.scale_element_bytes}, i / num_elements, i % num_elements);
#pragma unroll 1
      for (int b = 0; b < args_.scale_element_bytes; ++b) to[b] = std::byte{0};
    }
  }

  // One block, behind what it has left in the plan itself: each thread reads what it wrote, but for the counts.
  __device__ void write_counts() const {
    const DispatchOutputs& out = args_.out;
    sync_workers();
#pragma unroll 1
    for (int e = static_cast<int>(threadIdx.x); e < plan_.local_experts; e += kWorkThreads) {
      if (out.expert_counts != nullptr) out.expert_counts[e] = memory_.num_entries()[e];
      if (!plan_.has_expert_rows() || out.expert_rank_ranges == nullptr) continue;
#pragma unroll 1
      for (int source = 0; source < num_ranks_; ++source) {
        const int64_t count = plan_.counts[source * num_counts_ + rank_ * plan_.local_experts + e];
        out.expert_rank_ranges[e * num_ranks_ + source] = int64_t{plan_.source_begin[e * num_ranks_ + source]} << 32 | count;
      }
    }
    if (plan_.has_expert_rows() && out.expert_offsets != nullptr)
#pragma unroll 1
      for (int e = static_cast<int>(threadIdx.x); e <= plan_.local_experts; e += kWorkThreads) out.expert_offsets[e] = group_begin(e);
#pragma unroll 1
    for (int r = static_cast<int>(threadIdx.x); r < num_ranks_ && out.rank_counts != nullptr; r += kWorkThreads)
      out.rank_counts[r] = memory_.received_begin()[r + 1] - memory_.received_begin()[r];
  }

  const LatencyDispatchArgs& args_;
  const PlanView& plan_;
  const LatencyCall& call_;
  const DispatchMemory& memory_;
  const int rank_, num_ranks_, num_counts_, num_presence_;
  int32_t most_tokens_ = 0;
};

}  // namespace tern::kernels
