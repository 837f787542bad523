// SPDX-License-Identifier: Apache-2.0
// Route, in one launch. Each block has a range of this rank's tokens, and then a share of the messages that arrive:
//
//   list     experts of every entry; the ranks of every token, ascending, each once
//   count    how many entries (by expert) and messages (by rank) each warp's tokens have; sums over warps, then over blocks
//   push     counts, and for every message its token and its entries' experts and positions, into the receivers' routing banks
//   settle   when all ranks' have come: the first row of everything, here and of this rank's messages there; the tables of received messages
//
// Positions are those of a walk in token order, so they are the same on every run, and for any number of blocks.
#include "kernels/operation.cuh"
#include "kernels/route.h"
#include "kernels/shared_memory.h"

namespace tern::kernels {
namespace {

constexpr int kThreads = 512;
constexpr int kMostCountingWarps = kThreads / kWarpThreads;
constexpr int64_t kSharedBytes = 96 << 10;  // every GPU has it

struct Range {
  int64_t begin, end;
  __device__ int64_t size() const { return end - begin; }
};

class Route {
 public:
  __device__ Route(const RouteArgs& args, int32_t* workspace)
      : args_(args),
        plan_(args.plan),
        op_{args.exchange, TERN_OP_ROUTE, args.exchange.state->epoch + 1},
        rank_(args.exchange.rank),
        num_ranks_(args.exchange.num_ranks),
        num_counts_(plan_.num_counts(num_ranks_)),
        workspace_(workspace) {
    num_tokens_ = args.num_tokens;
    if (args.device_num_tokens != nullptr) num_tokens_ = max(0, min(*args.device_num_tokens, args.num_tokens));
    const int64_t per_block = (num_tokens_ + gridDim.x - 1) / gridDim.x;
    tokens_.begin = min(per_block * blockIdx.x, static_cast<int64_t>(num_tokens_));
    tokens_.end = min(tokens_.begin + per_block, static_cast<int64_t>(num_tokens_));
  }

  __device__ void run() {
    if (op_.is_poisoned()) return;
    if (!exchange()) {
      if (threadIdx.x == 0) op_.report_abort();
      return;
    }
    settle();
    if (!op_.is_last_block(&args_.exchange.state->blocks_done)) return;
    op_.post_consumed();
    if (threadIdx.x == 0) {
      args_.exchange.state->epoch = op_.epoch;
      args_.exchange.state->blocks_synced = 0;
    }
  }

 private:
  // Up to the moment when all ranks' counts and messages are here. False: the exchange has failed.
  __device__ bool exchange() {
    if (!await_banks()) return false;
    list();
    count();
    if (!op_.sync_blocks(1)) return false;
    add_lower_blocks();
    push();
    publish();
    return await_counts();
  }

  // ---- list

  __device__ void list() {
    for (int64_t token = tokens_.begin + threadIdx.x; token < tokens_.end; token += kThreads) {
      MessageRef* messages = plan_.messages + token * plan_.messages_per_token;
      int num_messages = 0;
      if (plan_.num_topk > 0) {
        for (int k = 0; k < plan_.num_topk; ++k) {
          const int32_t expert = checked_expert(token * plan_.num_topk + k);
          plan_.experts[token * plan_.num_topk + k] = expert;
          if (expert >= 0) num_messages = insert(messages, num_messages, expert / plan_.local_experts);
        }
      } else {
        for (int r = 0; r < num_ranks_; ++r)
          if (args_.token_in_rank[token * num_ranks_ + r] != 0 && !op_.is_masked(r)) messages[num_messages++].rank = r;
      }
      for (int m = num_messages; m < plan_.messages_per_token; ++m) messages[m].rank = -1;
    }
    __syncthreads();
  }

  // -1 for entries to masked ranks, and for numbers that are no expert, of which the host is told.
  __device__ int32_t checked_expert(int64_t entry) const {
    const int64_t expert =
        args_.is_int32 ? static_cast<const int32_t*>(args_.topk_idx)[entry] : static_cast<const int64_t*>(args_.topk_idx)[entry];
    if (expert < -1 || expert >= plan_.num_experts) {
      op_.post_notice(TERN_INVALID_ARGUMENT);
      return -1;
    }
    if (expert < 0 || op_.is_masked(static_cast<int>(expert) / plan_.local_experts)) return -1;
    return static_cast<int32_t>(expert);
  }

  __device__ static int insert(MessageRef* messages, int num_messages, int32_t rank) {
    int at = num_messages;
    while (at > 0 && messages[at - 1].rank >= rank) --at;
    if (at < num_messages && messages[at].rank == rank) return num_messages;
    for (int m = num_messages; m > at; --m) messages[m].rank = messages[m - 1].rank;
    messages[at].rank = rank;
    return num_messages + 1;
  }

  // ---- count. Counters are [warp][num_counts]: entries by expert, then messages by rank.

  __device__ void count() {
    const int num_warps = args_.num_counting_warps;
    for (int64_t i = threadIdx.x; i < int64_t{num_warps} * num_counts_; i += kThreads) workspace_[i] = 0;
    __syncthreads();
    for_each_counted([&](int64_t entry, int32_t position) { plan_.entry_rows[entry] = position; },
                     [&](int64_t message, int32_t position) { plan_.messages[message].row = position; });
    __syncthreads();
    // Per counter: the sum of the lower warps instead of a warp's own count; the block's sum goes to the other blocks.
    for (int c = static_cast<int>(threadIdx.x); c < num_counts_; c += kThreads) {
      int32_t sum = 0;
      for (int w = 0; w < num_warps; ++w) {
        int32_t& counter = workspace_[int64_t{w} * num_counts_ + c];
        const int32_t count = counter;
        counter = sum;
        sum += count;
      }
      args_.block_counts[int64_t{blockIdx.x} * num_counts_ + c] = sum;
    }
  }

  // The same walk over the block's entries and messages, which each warp makes over its own part of them in order.
  template <typename EntrySink, typename MessageSink>
  __device__ void for_each_counted(EntrySink entry_sink, MessageSink message_sink) {
    const int warp = static_cast<int>(threadIdx.x) / kWarpThreads;
    if (warp >= args_.num_counting_warps) return;
    int32_t* counters = workspace_ + int64_t{warp} * num_counts_;
    const int64_t first_entry = tokens_.begin * plan_.num_topk;
    walk(
        tokens_.size() * plan_.num_topk, warp, counters, [&](int64_t i) { return plan_.experts[first_entry + i]; },
        [&](int64_t i, int32_t position) { entry_sink(first_entry + i, position); });
    const int64_t first_message = tokens_.begin * plan_.messages_per_token;
    walk(
        tokens_.size() * plan_.messages_per_token, warp, counters + plan_.num_experts,
        [&](int64_t i) { return plan_.messages[first_message + i].rank; },
        [&](int64_t i, int32_t position) { message_sink(first_message + i, position); });
  }

  // Calls sink(i, how many of this warp's elements before i have the same value) for the warp's part of 0..n-1, values >= 0 only.
  template <typename Value, typename Sink>
  __device__ void walk(int64_t n, int warp, int32_t* counters, Value value, Sink sink) {
    const Range range = part_of_warp(n, warp);
    for (int64_t step = range.begin; step < range.end; step += kWarpThreads) {
      const int64_t i = step + device::lane_idx();
      const int32_t v = i < range.end ? value(i) : -1;
      const uint32_t same = __match_any_sync(~0u, v);
      const int before = __popc(same & device::lanes_below());
      const int32_t base = v >= 0 ? counters[v] : 0;
      __syncwarp();
      if (v >= 0 && before == 0) counters[v] = base + __popc(same);
      __syncwarp();
      if (v >= 0) sink(i, base + before);
    }
  }

  __device__ Range part_of_warp(int64_t n, int warp) const {
    const int64_t per_warp = (n + args_.num_counting_warps * kWarpThreads - 1) / (args_.num_counting_warps * kWarpThreads) * kWarpThreads;
    return {min(n, warp * per_warp), min(n, (warp + 1) * per_warp)};
  }

  // What the lower blocks counted comes before: positions become those of the whole batch. Leaves the rank's counts in the plan.
  __device__ void add_lower_blocks() {
    const int num_warps = args_.num_counting_warps;
    int32_t* own_counts = plan_.counts + int64_t{rank_} * num_counts_;
    for (int c = static_cast<int>(threadIdx.x); c < num_counts_; c += kThreads) {
      int32_t lower = 0, all = 0;
#pragma unroll 8
      for (unsigned b = 0; b < gridDim.x; ++b) {
        const int32_t count = args_.block_counts[b * num_counts_ + c];
        lower += b < blockIdx.x ? count : 0;
        all += count;
      }
      for (int w = 0; w < num_warps; ++w) workspace_[int64_t{w} * num_counts_ + c] += lower;
      if (args_.tokens_per_expert != nullptr && c < plan_.num_experts) all = args_.tokens_per_expert[c];
      if (blockIdx.x == 0) own_counts[c] = all;
    }
    __syncthreads();
    const int warp = static_cast<int>(threadIdx.x) / kWarpThreads;
    if (warp < num_warps) add_counters(warp, workspace_ + int64_t{warp} * num_counts_);
    __syncthreads();
  }

  __device__ void add_counters(int warp, const int32_t* counters) {
    const int64_t first_entry = tokens_.begin * plan_.num_topk;
    const Range entries = part_of_warp(tokens_.size() * plan_.num_topk, warp);
    for (int64_t i = first_entry + entries.begin + device::lane_idx(); i < first_entry + entries.end; i += kWarpThreads)
      if (plan_.experts[i] >= 0) plan_.entry_rows[i] += counters[plan_.experts[i]];
    const int64_t first_message = tokens_.begin * plan_.messages_per_token;
    const Range messages = part_of_warp(tokens_.size() * plan_.messages_per_token, warp);
    for (int64_t i = first_message + messages.begin + device::lane_idx(); i < first_message + messages.end; i += kWarpThreads) {
      MessageRef& message = plan_.messages[i];
      if (message.rank >= 0) message.row += counters[plan_.num_experts + message.rank];
    }
  }

  // ---- push

  __device__ bool await_banks() const {
    bool ok = true;
    for (int peer = static_cast<int>(threadIdx.x); peer < num_ranks_; peer += kThreads)
      ok = ok && (op_.is_masked(peer) || op_.await_bank(peer));
    return __syncthreads_and(ok ? 1 : 0) != 0;
  }

  __device__ std::byte* bank(int owner, int source) const {
    return args_.exchange.window(owner) + args_.exchange.layout.routing(args_.exchange.lane, op_.epoch, source);
  }

  __device__ void push() {
    if (blockIdx.x == 0) push_counts();
    // One thread for each entry of each message, counted within the block.
    const auto per_message = static_cast<uint32_t>(max(1, plan_.num_topk)), per_token = static_cast<uint32_t>(plan_.messages_per_token);
    const auto num = static_cast<uint32_t>(tokens_.size()) * per_token * per_message;
    for (uint32_t i = threadIdx.x; i < num; i += kThreads) {
      const uint32_t message_idx = i / per_message;
      const MessageRef message = plan_.messages[tokens_.begin * per_token + message_idx];
      if (message.rank >= 0) push_entry(tokens_.begin + message_idx / per_token, static_cast<int>(i % per_message), message);
    }
  }

  __device__ void push_counts() const {
    const int32_t* own_counts = plan_.counts + int64_t{rank_} * num_counts_;
    for (int i = 0; i < num_ranks_; ++i) {
      const int peer = (rank_ + i) % num_ranks_;
      if (op_.is_masked(peer)) continue;
      auto* counts = reinterpret_cast<int32_t*>(bank(peer, rank_) + args_.bank.counts());
      for (int c = static_cast<int>(threadIdx.x); c < num_counts_; c += kThreads) counts[c] = own_counts[c];
    }
  }

  // Entry k of a message; its row is still its position among the messages to that rank.
  __device__ void push_entry(int64_t token, int k, MessageRef message) const {
    std::byte* to = bank(message.rank, rank_);
    if (k == 0) reinterpret_cast<int32_t*>(to + args_.bank.source_tokens())[message.row] = static_cast<int32_t>(token);
    if (plan_.num_topk == 0) return;
    const int64_t entry_idx = token * plan_.num_topk + k;
    const int32_t expert = plan_.experts[entry_idx];
    const bool goes_there = expert >= 0 && expert / plan_.local_experts == message.rank;
    const layout::RoutingBankLayout::Entry entry{goes_there ? expert % plan_.local_experts : -1,
                                                 goes_there ? plan_.entry_rows[entry_idx] : 0};
    auto* entries = reinterpret_cast<layout::RoutingBankLayout::Entry*>(to + args_.bank.entries(plan_.max_tokens));
    entries[int64_t{message.row} * plan_.num_topk + k] = entry;
  }

  // The block that is last to have pushed tells everybody. Its release covers the other blocks' pushes, which it has seen to be done.
  __device__ void publish() const {
    if (!op_.is_last_block(&args_.exchange.state->blocks_sent)) return;
    for (int peer = static_cast<int>(threadIdx.x); peer < num_ranks_; peer += kThreads) {
      if (op_.is_masked(peer)) continue;
      layout::CallCell* cell = op_.call(peer, rank_);
      cell->shape = args_.shape;
      cell->epoch = op_.epoch;
      cell->operation = TERN_OP_ROUTE;
      cell->num_tokens = num_tokens_;
      store_release_sys(&op_.progress(peer, rank_)->ready, op_.epoch);
    }
  }

  __device__ bool await_counts() const {
    bool ok = true;
    for (int source = static_cast<int>(threadIdx.x); source < num_ranks_; source += kThreads) {
      if (op_.is_masked(source)) continue;
      ok = ok && op_.await(&op_.progress(rank_, source)->ready, op_.epoch, source);
      const layout::CallCell* cell = op_.call(rank_, source);
      if (!ok || (cell->epoch == op_.epoch && cell->operation == TERN_OP_ROUTE && cell->shape == args_.shape)) continue;
      op_.give_up(TERN_MISMATCH, source, op_.epoch, op_.epoch);
      ok = false;
    }
    return __syncthreads_and(ok ? 1 : 0) != 0;
  }

  // ---- settle. The workspace now holds, each [num_experts]:
  //   first_row     of the expert's group at its rank
  //   entries_here  of this rank's predecessors: where this rank's entries begin in the group
  // and received_before [local_experts][num_ranks]: entries of lower source ranks.

  __device__ int32_t* first_row() const { return workspace_; }
  __device__ int32_t* entries_before() const { return workspace_ + plan_.num_experts; }
  __device__ int32_t* received_before() const { return workspace_ + 2 * int64_t{plan_.num_experts}; }

  // Counts of a source; all zero if it is masked.
  __device__ int32_t counts_of(int source, int c) const {
    if (op_.is_masked(source)) return 0;
    return reinterpret_cast<const int32_t*>(bank(rank_, source) + args_.bank.counts())[c];
  }

  __device__ void settle() {
    __syncthreads();
    sum_counts();
    __syncthreads();
    set_first_rows();
    __syncthreads();
    if (blockIdx.x == 0) tell_host();
    if (blockIdx.x == gridDim.x - 1) write_summary();
    settle_received();
    settle_own();
  }

  __device__ void sum_counts() {
    const int first_local = rank_ * plan_.local_experts;
    for (int e = static_cast<int>(threadIdx.x); e < plan_.num_experts; e += kThreads) {
      int32_t sum = 0;
      for (int source = 0; source < num_ranks_; ++source) {
        if (source == rank_) entries_before()[e] = sum;
        if (e / plan_.local_experts == rank_) received_before()[(e - first_local) * num_ranks_ + source] = sum;
        sum += counts_of(source, e);
      }
      first_row()[e] = sum;  // all entries, until set_first_rows()
    }
  }

  // Groups follow each other within a rank: a warp for each rank adds up their sizes.
  __device__ void set_first_rows() {
    const int warp = static_cast<int>(threadIdx.x) / kWarpThreads, lane = static_cast<int>(device::lane_idx());
    for (int r = warp; r < num_ranks_; r += kThreads / kWarpThreads) {
      int64_t begin = 0;
      for (int first = 0; first < plan_.local_experts; first += kWarpThreads) {
        const int local = first + lane;
        const bool in = local < plan_.local_experts;
        int32_t* row = first_row() + r * plan_.local_experts + local;
        int64_t size = 0;
        if (in) size = plan_.layout == TERN_LAYOUT_EXPERT_PADDED ? plan_.padded_group_rows : layout::align_up(*row, plan_.alignment);
        int64_t sum = size;
        for (int step = 1; step < kWarpThreads; step *= 2) {
          const int64_t lower = __shfl_up_sync(~0u, sum, step);
          if (lane >= step) sum += lower;
        }
        if (in) *row = static_cast<int32_t>(begin + sum - size);
        begin += __shfl_sync(~0u, sum, kWarpThreads - 1);
      }
      if (blockIdx.x == 0 && r == rank_ && lane == 0) plan_.group_begin[plan_.local_experts] = static_cast<int32_t>(begin);
    }
  }

  // One block. With extent exact the host waits for this.
  __device__ void tell_host() {
    if (args_.host.counts == nullptr) return;
    for_each_source_count([&](int32_t source, int32_t c, int32_t at) { args_.host.counts[at] = counts_of(source, c); });
    for (int source = static_cast<int>(threadIdx.x); source < num_ranks_; source += kThreads)
      args_.host.num_tokens[source] = op_.is_masked(source) ? 0 : op_.call(rank_, source)->num_tokens;
    __syncthreads();
    if (threadIdx.x == 0) store_release_sys(args_.host.ticket, args_.host.awaited_ticket);
  }

  // All threads of a block together: visit(source, counter, index in a table of all).
  template <typename Visitor>
  __device__ void for_each_source_count(Visitor visit) const {
    for (int32_t at = static_cast<int32_t>(threadIdx.x); at < num_ranks_ * num_counts_; at += kThreads)
      visit(at / num_counts_, at % num_counts_, at);
  }

  // Of the plan as a whole, by one block.
  __device__ void write_summary() {
    for_each_source_count([&](int32_t source, int32_t c, int32_t at) { plan_.counts[at] = counts_of(source, c); });
    for (int source = static_cast<int>(threadIdx.x); source < num_ranks_; source += kThreads)
      plan_.num_tokens[source] = op_.is_masked(source) ? 0 : op_.call(rank_, source)->num_tokens;
    const int first_local = rank_ * plan_.local_experts;
    bool overflow = false;
    for (int e = static_cast<int>(threadIdx.x); e < plan_.local_experts; e += kThreads) {
      plan_.group_begin[e] = first_row()[first_local + e];
      int32_t num_entries = 0;
      for (int source = 0; source < num_ranks_; ++source) {
        plan_.source_begin[e * num_ranks_ + source] = num_entries;
        num_entries += counts_of(source, first_local + e);
      }
      if (plan_.has_expert_rows() && num_entries > 0) overflow = overflow || bounded_row(first_row()[first_local + e], num_entries - 1) < 0;
    }
    if (threadIdx.x == 0) {
      int32_t begin = 0;
      for (int source = 0; source < num_ranks_; ++source) {
        plan_.received_begin[source] = begin;
        begin += counts_of(source, plan_.num_experts + rank_);
      }
      plan_.received_begin[num_ranks_] = begin;
      if (!plan_.has_expert_rows()) overflow = begin > plan_.row_capacity;
    }
    if (overflow) op_.post_notice(TERN_CAPACITY_EXCEEDED);
  }

  // Row, or -1 if it lies beyond the group's or the outputs' end.
  __device__ int32_t bounded_row(int64_t group_begin, int64_t row_in_group) const {
    if (plan_.layout == TERN_LAYOUT_EXPERT_PADDED && row_in_group >= plan_.padded_group_rows) return -1;
    const int64_t row = group_begin + row_in_group;
    return row < plan_.row_capacity ? static_cast<int32_t>(row) : -1;
  }

  // The messages that arrive, all blocks together.
  __device__ void settle_received() {
    int32_t begin = 0;
    for (int source = 0; source < num_ranks_; ++source) {
      const int32_t num_messages = counts_of(source, plan_.num_experts + rank_);
      settle_source(source, begin, num_messages);
      begin += num_messages;
    }
  }

  __device__ void settle_source(int source, int32_t begin, int32_t num_messages) {
    int32_t* chunk_begin = plan_.chunk_begin + int64_t{source} * (layout::kMaxChunks + 1);
    const auto thread = static_cast<int32_t>(blockIdx.x * kThreads + threadIdx.x), num_threads = static_cast<int32_t>(gridDim.x * kThreads);
    if (num_messages == 0) {
      if (thread <= layout::kMaxChunks) chunk_begin[thread] = 0;
      return;
    }
    const std::byte* from = bank(rank_, source);
    const auto* source_tokens = reinterpret_cast<const int32_t*>(from + args_.bank.source_tokens());
    const auto* entries = reinterpret_cast<const layout::RoutingBankLayout::Entry*>(from + args_.bank.entries(plan_.max_tokens));
    for (int32_t i = thread; i < num_messages; i += num_threads) {
      const int32_t chunk = source_tokens[i] / plan_.tokens_per_chunk;
      const int32_t chunk_before = i == 0 ? -1 : source_tokens[i - 1] / plan_.tokens_per_chunk;
      plan_.source_token[begin + i] = source_tokens[i];
      for (int c = chunk_before + 1; c <= chunk; ++c) chunk_begin[c] = i;
      if (i + 1 == num_messages)
        for (int c = chunk + 1; c <= layout::kMaxChunks; ++c) chunk_begin[c] = num_messages;
    }
    const auto num_topk = static_cast<uint32_t>(plan_.num_topk);
    for (uint32_t i = static_cast<uint32_t>(thread); i < static_cast<uint32_t>(num_messages) * num_topk;
         i += static_cast<uint32_t>(num_threads)) {
      const layout::RoutingBankLayout::Entry entry = entries[i];
      const int64_t message = begin + static_cast<int64_t>(i / num_topk);
      int32_t row = -1;
      if (entry.expert >= 0)
        row = plan_.has_expert_rows() ? bounded_row(first_row()[rank_ * plan_.local_experts + entry.expert],
                                                    int64_t{received_before()[entry.expert * num_ranks_ + source]} + entry.position)
                                      : bounded_row(0, message);
      const int64_t at = message * plan_.topk_stride + i % num_topk;
      plan_.received_experts[at] = entry.expert;
      plan_.received_rows[at] = row;
    }
  }

  // Where this rank's messages and entries come to lie: positions become rows.
  __device__ void settle_own() {
    const int64_t messages_end = tokens_.end * plan_.messages_per_token;
    for (int64_t i = tokens_.begin * plan_.messages_per_token + threadIdx.x; i < messages_end; i += kThreads) {
      MessageRef& message = plan_.messages[i];
      if (message.rank < 0) continue;
      int64_t before = 0;
      for (int source = 0; source < rank_; ++source) before += counts_of(source, plan_.num_experts + message.rank);
      message.row = plan_.has_expert_rows() ? 0 : bounded_row(before, message.row);
    }
    const int64_t entries_end = tokens_.end * plan_.num_topk;
    for (int64_t i = tokens_.begin * plan_.num_topk + threadIdx.x; i < entries_end; i += kThreads) {
      const int32_t expert = plan_.experts[i];
      plan_.entry_rows[i] = expert < 0 || !plan_.has_expert_rows()
                                ? -1
                                : bounded_row(first_row()[expert], int64_t{entries_before()[expert]} + plan_.entry_rows[i]);
    }
  }

  const RouteArgs& args_;
  const PlanView& plan_;
  const Operation op_;
  const int rank_;
  const int num_ranks_;
  const int num_counts_;
  int32_t* const workspace_;
  int32_t num_tokens_;
  Range tokens_;
};

__global__ void __launch_bounds__(kThreads) route_kernel(const __grid_constant__ RouteArgs args) {
  extern __shared__ int32_t shared[];
  int32_t* workspace = shared;
  if (args.workspace != nullptr)
    workspace = args.workspace + blockIdx.x * route_workspace(args.plan.num_experts, args.plan.local_experts, args.exchange.num_ranks,
                                                              args.num_counting_warps);
  Route(args, workspace).run();
}

}  // namespace

int32_t route_counting_warps(int32_t num_experts, int32_t num_ranks) {
  const int64_t counter_bytes = (int64_t{num_experts} + num_ranks) * static_cast<int64_t>(sizeof(int32_t));
  const int64_t fitting = kSharedBytes / counter_bytes;
  return static_cast<int32_t>(fitting < 1 ? 1 : fitting > kMostCountingWarps ? kMostCountingWarps : fitting);
}

bool route_fits_shared(int64_t workspace) { return workspace * static_cast<int64_t>(sizeof(int32_t)) <= kSharedBytes; }

cudaError_t prepare_route() { return allow_shared(route_kernel, kSharedBytes); }

cudaError_t launch_route(const RouteArgs& args, int num_blocks, cudaStream_t stream) {
  const int64_t workspace =
      route_workspace(args.plan.num_experts, args.plan.local_experts, args.exchange.num_ranks, args.num_counting_warps);
  const size_t shared_bytes = args.workspace != nullptr ? 0 : static_cast<size_t>(workspace) * sizeof(int32_t);
  route_kernel<<<num_blocks, kThreads, shared_bytes, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace tern::kernels
