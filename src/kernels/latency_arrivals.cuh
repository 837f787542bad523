// SPDX-License-Identifier: Apache-2.0
// The routing of a small batch within the dispatch that carries it, on the side of the experts' ranks: where what arrives comes to lie.
#pragma once

#include "kernels/latency_routing.cuh"

namespace tern::kernels {

struct ArrivingMessage {
  int32_t source;
  int32_t token;  // at its source
  int32_t index;  // among all received messages, when it has been placed
};

struct ArrivingEntry {
  int32_t expert;  // local; -1: not here
  int32_t row;     // -1: not here, or beyond the capacity
};

// What arrives here: of a call that routes, worked out from the words of all sources; else as the plan has it.
template <typename Call>
class Arrivals {
 public:
  __device__ Arrivals(const LatencyDispatchArgs& args, const Call& call, const DispatchMemory& memory)
      : args_(args),
        plan_(args.call.plan),
        call_(call),
        memory_(memory),
        rank_(call.rank()),
        num_ranks_(call.num_ranks()),
        num_words_(args.call.words.num_routing_words()) {}

  // All threads of the block, of which workers that open nothing may call await_open() instead. False: the exchange has failed, or this is the
  // raising warp, which has no further part in it.
  __device__ bool open() const {
    if (is_opening()) {
      if (call_.may_go_on_without())
        settle();
      else if (call_.routes() && !fetch_words())
        *memory_.has_failed() = 1;
      if (call_.routes() && call_.layout() == TERN_LAYOUT_EXPERT_MAJOR) {
        sync_openers();
        set_first_rows();
      }
      // The others come when they have sent: senders, and later the raising warp.
      sync_openers();
      device::arrive_at_barrier(kOpenedBarrier, kWorkThreads);
      device::arrive_at_barrier(kSettleBarrier, kSettleThreads);
    } else if (is_raising()) {
      if (blockIdx.x == 0) call_.await_calls();
      call_.wait_no_more();
      device::sync_some_warps(kSettleBarrier, kSettleThreads);
    } else {
      return await_open();
    }
    if (*memory_.has_failed() != 0) return false;
    if (is_raising() && call_.routes()) settle_own();
    return !is_raising();
  }
  // False: the exchange has failed.
  __device__ bool await_open() const {
    device::sync_some_warps(kOpenedBarrier, kWorkThreads);
    return *memory_.has_failed() == 0;
  }

  // Message i of those that there may be; false: there is none. All threads of a warp.
  __device__ int32_t num_candidates() const {
    if (!call_.routes()) return plan_.received_begin[call_.num_sources()];
    uint32_t most_tokens = 0;
#pragma unroll 1
    for (int source = static_cast<int>(device::lane_idx()); source < call_.num_sources(); source += kWarpThreads)
      most_tokens = max(most_tokens, static_cast<uint32_t>(num_tokens(source)));
    return static_cast<int32_t>(__reduce_max_sync(~0u, most_tokens)) * call_.num_sources();
  }
  __device__ bool candidate(int32_t i, ArrivingMessage& message) const {
    if (!call_.routes()) {
      const int lane = static_cast<int>(device::lane_idx());
      message = {0, plan_.source_token[i], i};
#pragma unroll 1
      for (int first = 0; first < call_.num_sources(); first += kWarpThreads)
        message.source += __popc(__ballot_sync(~0u, first + lane < call_.num_sources() && plan_.received_begin[first + lane + 1] <= i));
      return true;
    }
    message = candidate_at(i);
    return (presence(message.source)[message.token / 32] >> message.token % 32 & 1) != 0;
  }
  // The same of a call that routes before all is known: the warp asks the source's own word. False also where the exchange has failed.
  __device__ bool await_candidate(int32_t i, ArrivingMessage& message) const {
    message = candidate_at(i);
    if (message.token >= plan_.max_tokens || call_.is_masked(call_.batch_of(message.source).rank)) return false;
    const auto [rank, batch] = call_.batch_of(message.source);
    const auto word = args_.call.words.presence() + batch * args_.call.words.num_presence() + message.token / 32;
    uint32_t present = 0;
    if (device::lane_idx() == 0) call_.await_word_after(call_.look_at_word(rank, word), rank, word, present);
    return (__shfl_sync(~0u, present, 0) >> message.token % 32 & 1) != 0;
  }
  // All threads of a warp: where a candidate stands.
  __device__ void place(ArrivingMessage& message) const {
    if (!call_.routes()) return;
    const int lane = static_cast<int>(device::lane_idx()), word = message.token / 32;
    const uint32_t* present = presence(message.source);
    int lower = lane < word ? __popc(present[lane]) : 0;
#pragma unroll 1
    for (int source = lane; source < message.source; source += kWarpThreads) lower += num_messages(source);
    message.index = __reduce_add_sync(~0u, lower) + __popc(present[word] & ((1u << message.token % 32) - 1));
  }

  // One thread: entry k of a message, as its source has sent it, if the call routes.
  __device__ ArrivingEntry entry(const ArrivingMessage& message, int k, uint32_t sent) const {
    const int32_t at = message.index * plan_.topk_stride + k;
    if (!call_.routes()) return {plan_.received_experts[at], plan_.received_rows[at]};
    const layout::LatencyEntry entry = layout::LatencyEntry::unpacked(sent);
    if (entry.expert < 0 || rank_of(args_.call, entry.expert) != rank_) return {-1, -1};
    const int32_t row = call_.has_expert_rows() ? row_of(message.source, entry.expert, entry.position) : bounded_row(0, message.index);
    return {entry.expert - rank_ * plan_.local_experts, row};
  }
  // Into the plan, if the call routes.
  __device__ void keep(const ArrivingMessage& message) const {
    if (call_.routes()) plan_.source_token[message.index] = message.token;
  }
  __device__ void keep(const ArrivingMessage& message, int k, const ArrivingEntry& entry) const {
    if (!call_.routes()) return;
    plan_.received_experts[message.index * plan_.topk_stride + k] = entry.expert;
    plan_.received_rows[message.index * plan_.topk_stride + k] = entry.row;
  }

  // The openers of all blocks: what follows from the routing alone.
  __device__ void write_outputs() const {
    const DispatchOutputs& out = args_.out;
    sum_entries();
    sync_openers();
    if (call_.layout() == TERN_LAYOUT_EXPERT_PADDED && !out.zero_padding) {
      if (out.source_token != nullptr || out.source_rank != nullptr || out.row_expert != nullptr) clear_padded_rows();
    } else {
      clear_all_rows();
    }
    if (blockIdx.x != 0) return;
    if (call_.routes()) keep_groups();
    write_counts();
  }

  // The senders of the first block of a call that routes, meanwhile: what the sources have said, into the plan; a warp takes a source at a time.
  __device__ void keep_counts() const {
    const int lane = static_cast<int>(device::lane_idx()), num_counts = plan_.num_counts(num_ranks_);
    constexpr int kEnds = layout::kMaxChunks + 1;
#pragma unroll 1
    for (int source = sender_idx() / kWarpThreads; source < call_.num_sources(); source += kSendThreads / kWarpThreads) {
#pragma unroll 1
      for (int c = lane; c < num_counts; c += kWarpThreads) plan_.counts[source * num_counts + c] = count(source, c);
#pragma unroll 1
      for (int chunk = lane; chunk < kEnds; chunk += kWarpThreads)
        plan_.chunk_begin[source * kEnds + chunk] = num_present(source, chunk * plan_.tokens_per_chunk);
      if (lane == 0) plan_.num_tokens[source] = num_tokens(source);
    }
    if (sender_idx() <= call_.num_sources()) plan_.received_begin[sender_idx()] = received_begin(sender_idx());
  }

 private:
  static constexpr int kOpenedBarrier = 14, kSettleBarrier = 13, kSettleThreads = kOpenThreads + kWarpThreads;

  // Those of all sources side by side, this rank's first.
  __device__ ArrivingMessage candidate_at(int32_t i) const {
    const int num_sources = call_.num_sources();
    ArrivingMessage message{0, quotient(i, Call::has_batches() ? args_.call.sources_reciprocal : args_.call.ranks_reciprocal), -1};
    message.source = rank_ + i - message.token * num_sources;
    if (message.source >= num_sources) message.source -= num_sources;
    return message;
  }

  // What a rank says, and of which source.
  __device__ uint32_t* words(int rank) const { return memory_.words() + rank * num_words_; }
  __device__ int32_t num_tokens(int source) const {
    const auto [rank, batch] = call_.batch_of(source);
    return static_cast<int32_t>(words(rank)[args_.call.words.num_tokens() + batch]);
  }
  __device__ int32_t count(int source, int counter) const {
    const auto [rank, batch] = call_.batch_of(source);
    return static_cast<int32_t>(words(rank)[args_.call.words.counts() + batch * args_.call.words.num_counts + counter]);
  }
  __device__ int32_t num_messages(int source) const { return count(source, plan_.num_experts + rank_); }  // to this rank
  __device__ const uint32_t* presence(int source) const {
    const auto [rank, batch] = call_.batch_of(source);
    return words(rank) + args_.call.words.presence() + batch * args_.call.words.num_presence();
  }

  // Of the sources below `source`.
  __device__ int32_t count_before(int source, int counter) const {
    int32_t sum = 0;
#pragma unroll 1
    for (int lower = 0; lower < source; ++lower) sum += count(lower, counter);
    return sum;
  }

  // Where an entry's row is at the expert's rank.
  __device__ int32_t row_of(int source, int32_t expert, int32_t position) const {
    return bounded_row(first_row(expert), int64_t{count_before(source, expert)} + position);
  }

  // One warp: where this rank's messages and entries come to lie, into the plan. Of the tokens that this block has placed.
  __device__ void settle_own() const {
    if (first_part() < 0) return;
    const int lane = static_cast<int>(device::lane_idx());
    const int32_t end = call_.num_parts_of(Call::has_batches() ? args_.call.sent_tokens : num_tokens(rank_));
#pragma unroll 1
    for (int32_t i = first_part(); i < end; i += part_step()) {
      const int32_t token = call_.row_of(i);
      const int source = call_.source_of({rank_, call_.batch_token(token).node});
      if (call_.part_of(i) != 0) continue;
      // Positions become rows.
      if (lane < plan_.num_topk) {
        int32_t& row = plan_.entry_rows[token * plan_.num_topk + lane];
        const int32_t expert = plan_.experts[token * plan_.num_topk + lane];
        row = expert >= 0 && call_.has_expert_rows() ? row_of(source, expert, row) : -1;
      }
#pragma unroll 1
      for (int m = lane; m < plan_.messages_per_token; m += kWarpThreads) {
        MessageRef& message = plan_.messages[int64_t{token} * plan_.messages_per_token + m];
        if (message.rank < 0) continue;
        message.row = call_.has_expert_rows() ? 0 : bounded_row(count_before(source, plan_.num_experts + message.rank), message.row);
      }
    }
  }

  // Openers, under TERN_ON_TIMEOUT_MASK: who has a part in this dispatch. Of a call that routes, the others send nothing.
  __device__ __noinline__ void settle() const {
    call_.template settle_attendance<kOpenThreads>([&] {
      if (call_.routes() && !fetch_words()) *memory_.has_failed() = 1;
      sync_openers();
      await_all_rows();
    });
    for (int rank = 0; call_.routes() && rank < num_ranks_; ++rank)
      for (int i = static_cast<int>(threadIdx.x); i < num_words_ && call_.is_absent(rank); i += kOpenThreads) words(rank)[i] = 0;
    sync_openers();
  }
  // Under TERN_ON_TIMEOUT_MASK rows are in one part.
  __device__ void await_all_rows() const {
    const auto await_row = [&](int source, int32_t token) {
      const auto from = call_.sender_of(source, token);
      if (!call_.await_row(from.rank, from.token, 0)) call_.miss(from.rank);
    };
    if (!call_.routes()) {
      for (int i = static_cast<int>(threadIdx.x); i < plan_.received_begin[call_.num_sources()]; i += kOpenThreads) {
        int source = 0;
        while (plan_.received_begin[source + 1] <= i) ++source;
        await_row(source, plan_.source_token[i]);
      }
      return;
    }
    const auto max_tokens = static_cast<int>(plan_.max_tokens);
    for (int i = static_cast<int>(threadIdx.x); i < call_.num_sources() * max_tokens; i += kOpenThreads) {
      const int source = i / max_tokens, token = i % max_tokens;
      if ((presence(source)[token / 32] >> token % 32 & 1) != 0) await_row(source, token);
    }
  }

  // All that the ranks tell of their routing; a warp takes one at a time, with many words under way.
  __device__ bool fetch_words() const {
    bool ok = true;
#pragma unroll 1
    for (int rank = static_cast<int>(threadIdx.x) / kWarpThreads; rank < num_ranks_; rank += kOpenThreads / kWarpThreads)
      ok = fetch_words(rank) && ok;
    return ok;
  }
  __device__ bool fetch_words(int rank) const {
    constexpr int kAtOnce = 10;
    const int lane = static_cast<int>(device::lane_idx());
    const uint64_t* from = call_.words(rank_, rank);
    bool has_call = lane == args_.call.words.call() && !call_.is_masked(rank);
#pragma unroll 1
    for (int first = lane; first < num_words_; first += kAtOnce * kWarpThreads) {
      uint64_t seen[kAtOnce] = {};  // of a rank that is masked
      // Until all are there: all are looked at again and again, since most waits are short, and in longer ones when the last of them has come.
      for (int missing = call_.is_masked(rank) ? -1 : first, look = 0; missing >= 0; ++look) {
        missing = -1;
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u)
          if (first + u * kWarpThreads < num_words_) seen[u] = load_relaxed_sys(from + first + u * kWarpThreads);
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u)
          if (first + u * kWarpThreads < num_words_ && !call_.operation().is_of_epoch(seen[u])) missing = first + u * kWarpThreads;
        uint32_t value;
        if (missing < 0 || look < call_.num_first_looks() || call_.await_word(rank, missing, value)) continue;
        if (!call_.may_go_on_without() || call_.operation().is_aborted()) return false;
        // What has not come says nothing.
        call_.miss(rank);
        has_call = false;
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u)
          if (!call_.operation().is_of_epoch(seen[u])) seen[u] = 0;
        break;
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u)
        if (first + u * kWarpThreads < num_words_) words(rank)[first + u * kWarpThreads] = static_cast<uint32_t>(seen[u]);
    }
    return !has_call || call_.check_call(rank, words(rank)[lane]);
  }

  // expert_major: groups follow each other within a rank; a warp for each rank adds up their sizes.
  __device__ void set_first_rows() const {
    const int warp = static_cast<int>(threadIdx.x) / kWarpThreads, lane = static_cast<int>(device::lane_idx());
#pragma unroll 1
    for (int r = warp; r < num_ranks_; r += kOpenThreads / kWarpThreads) {
      int64_t begin = 0;
#pragma unroll 1
      for (int first = 0; first < plan_.local_experts; first += kWarpThreads) {
        const bool in = first + lane < plan_.local_experts;
        const int expert = r * plan_.local_experts + first + lane;
        int64_t size = 0;
        if (in) size = layout::align_up(count_before(call_.num_sources(), expert), plan_.alignment);
        int64_t sum = size;
#pragma unroll 1
        for (int step = 1; step < kWarpThreads; step *= 2) {
          const int64_t lower = __shfl_up_sync(~0u, sum, step);
          if (lane >= step) sum += lower;
        }
        if (in) memory_.first_row()[expert] = static_cast<int32_t>(begin + sum - size);
        begin += __shfl_sync(~0u, sum, kWarpThreads - 1);
      }
      if (r == rank_ && lane == 0) *memory_.groups_end() = static_cast<int32_t>(begin);
    }
  }

  // Openers: entries of this rank's experts, of all sources.
  __device__ void sum_entries() const {
#pragma unroll 1
    for (int e = static_cast<int>(threadIdx.x); e < plan_.local_experts; e += kOpenThreads) {
      int32_t sum = 0;
#pragma unroll 1
      for (int source = 0; source < call_.num_sources(); ++source) sum += own_count(source, e);
      memory_.num_entries()[e] = sum;
    }
  }
  // Of local expert `e`.
  __device__ int32_t own_count(int source, int e) const {
    const int counter = rank_ * plan_.local_experts + e;
    return call_.routes() ? count(source, counter) : plan_.counts[source * plan_.num_counts(num_ranks_) + counter];
  }

  // The openers of the first block, into the plan: where the experts' rows begin. With keep_counts() that is all but what belongs to single
  // tokens and messages.
  __device__ void keep_groups() const {
    const int thread = static_cast<int>(threadIdx.x);
    bool overflow = !call_.has_expert_rows() && received_begin(call_.num_sources()) > plan_.row_capacity;
#pragma unroll 1
    for (int e = thread; e < plan_.local_experts && call_.has_expert_rows(); e += kOpenThreads) {
      plan_.group_begin[e] = group_begin(e);
      if (memory_.num_entries()[e] > 0) overflow = overflow || bounded_row(group_begin(e), memory_.num_entries()[e] - 1) < 0;
    }
    if (thread == 0 && call_.has_expert_rows()) plan_.group_begin[plan_.local_experts] = group_begin(plan_.local_experts);
    if (overflow) call_.operation().post_notice(TERN_CAPACITY_EXCEEDED);
  }
  // Messages of the source's tokens below `end`.
  __device__ int32_t num_present(int source, int32_t end) const {
    int32_t sum = 0;
#pragma unroll 1
    for (int i = 0; i < args_.call.words.num_presence() && i * 32 < end; ++i) {
      const uint32_t present = presence(source)[i];
      sum += __popc(end - i * 32 >= 32 ? present : present & ((1u << (end - i * 32)) - 1));
    }
    return sum;
  }

  // First message of a source; behind the last one: where its messages end.
  __device__ int32_t received_begin(int source) const {
    return call_.routes() ? count_before(source, plan_.num_experts + rank_) : plan_.received_begin[source];
  }

  // First row of an expert's group at its rank.
  __device__ int64_t first_row(int32_t expert) const {
    if (call_.layout() == TERN_LAYOUT_EXPERT_MAJOR) return memory_.first_row()[expert];
    return (expert - rank_of(args_.call, expert) * plan_.local_experts) * plan_.padded_group_rows;
  }

  // First row of a local expert's group; local_experts: where the last one ends.
  __device__ int32_t group_begin(int e) const {
    if (call_.layout() == TERN_LAYOUT_EXPERT_PADDED) return static_cast<int32_t>(e * plan_.padded_group_rows);
    if (!call_.routes()) return plan_.group_begin[e];
    return e < plan_.local_experts ? memory_.first_row()[rank_ * plan_.local_experts + e] : *memory_.groups_end();
  }

  // Row, or -1 if it lies beyond the group's or the outputs' end.
  __device__ int32_t bounded_row(int64_t group_begin, int64_t row_in_group) const {
    if (call_.layout() == TERN_LAYOUT_EXPERT_PADDED && row_in_group >= plan_.padded_group_rows) return -1;
    const int64_t row = group_begin + row_in_group;
    return row < plan_.row_capacity ? static_cast<int32_t>(row) : -1;
  }

  // Groups of equal size: what clear_rows() does, a row each.
  __device__ void clear_padded_rows() const {
    const DispatchOutputs& out = args_.out;
    const auto group_rows = static_cast<uint32_t>(plan_.padded_group_rows);
    const auto num_rows = static_cast<uint32_t>(out.num_rows);
#pragma unroll 1
    for (uint32_t row = blockIdx.x * kOpenThreads + threadIdx.x; row < num_rows; row += gridDim.x * kOpenThreads) {
      const uint32_t e = row / group_rows;
      if (static_cast<int32_t>(row - e * group_rows) < memory_.num_entries()[e]) continue;
      if (out.source_token != nullptr) out.source_token[row] = -1;
      if (out.source_rank != nullptr) out.source_rank[row] = -1;
      if (out.row_expert != nullptr) out.row_expert[row] = -1;
    }
  }

  // Groups of any size, and what lies behind the last one.
  __device__ void clear_all_rows() const {
    const auto warp = static_cast<int>(threadIdx.x) / kWarpThreads;
    const auto num_warps = static_cast<int>(kOpenThreads / kWarpThreads * gridDim.x);
    const int64_t num_rows = args_.out.num_rows;
#pragma unroll 1
    for (auto e = static_cast<int>(warp * gridDim.x + blockIdx.x); call_.has_expert_rows() && e < plan_.local_experts; e += num_warps) {
      const int64_t begin = group_begin(e), end = min(int64_t{group_begin(e + 1)}, num_rows);
      clear_rows(min(begin + memory_.num_entries()[e], end), end, args_.out.zero_padding, device::lane_idx(), kWarpThreads);
    }
    const int64_t used = call_.has_expert_rows() ? group_begin(plan_.local_experts) : received_begin(call_.num_sources());
    clear_rows(min(used, num_rows), num_rows, false, blockIdx.x * kOpenThreads + threadIdx.x, gridDim.x * kOpenThreads);
  }

  // Thread `thread` of `num_threads`: rows that nothing arrives for.
  __device__ void clear_rows(int64_t begin, int64_t end, bool zero, int64_t thread, int64_t num_threads) const {
    const DispatchOutputs& out = args_.out;
#pragma unroll 1
    for (int64_t row = begin + thread; row < end; row += num_threads) {
      if (out.source_token != nullptr) out.source_token[row] = -1;
      if (out.source_rank != nullptr) out.source_rank[row] = -1;
      if (call_.has_expert_rows() && out.row_expert != nullptr) out.row_expert[row] = -1;
    }
#pragma unroll 1
    for (int64_t i = begin * plan_.num_topk + thread; !call_.has_expert_rows() && i < end * plan_.num_topk; i += num_threads) {
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

  // The openers of the first block: the counts that the caller asked for.
  __device__ void write_counts() const {
    const DispatchOutputs& out = args_.out;
    const int thread = static_cast<int>(threadIdx.x);
#pragma unroll 1
    for (int e = thread; e < plan_.local_experts; e += kOpenThreads) {
      if (out.expert_counts != nullptr) out.expert_counts[e] = memory_.num_entries()[e];
      if (call_.has_expert_rows()) write_ranges(e);
    }
    if (call_.has_expert_rows() && out.expert_offsets != nullptr)
#pragma unroll 1
      for (int e = thread; e <= plan_.local_experts; e += kOpenThreads) out.expert_offsets[e] = group_begin(e);
    if (out.rank_counts != nullptr && thread < call_.num_sources())
      out.rank_counts[thread] = received_begin(thread + 1) - received_begin(thread);
  }
  // Where each source's rows begin in the expert's group, and how many they are.
  __device__ void write_ranges(int e) const {
    int32_t begin = 0;
#pragma unroll 1
    for (int source = 0; source < call_.num_sources(); ++source) {
      const int32_t num = own_count(source, e), at = e * call_.num_sources() + source;
      if (call_.routes()) plan_.source_begin[at] = begin;
      if (args_.out.expert_rank_ranges != nullptr) args_.out.expert_rank_ranges[at] = int64_t{begin} << 32 | static_cast<uint32_t>(num);
      begin += num;
    }
  }

  const LatencyDispatchArgs& args_;
  const PlanView& plan_;
  const Call& call_;
  const DispatchMemory& memory_;
  const int rank_, num_ranks_, num_words_;
};

}  // namespace tern::kernels
