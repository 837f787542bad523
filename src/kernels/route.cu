// SPDX-License-Identifier: Apache-2.0
// Route, in one launch. Each block has a range of this rank's tokens, its warps parts of it, and all blocks then a share of what arrives:
//
//   count    experts of every entry; the ranks of every token, ascending, each once; how many entries (by expert) and messages (by rank) come
//            before each among its warp's, among the lower warps' and among the lower blocks'
//   push     counts, and for every message its token and its entries' experts and positions, into the receivers' routing banks; each block
//            raises a flag of its own
//   settle   when all ranks' have come: the rows of what arrives, and of this rank's messages where they go
//
// Positions are those of a walk in token order, so they are the same on every run, and for any number of blocks.
#include "kernels/operation.cuh"
#include "kernels/route.h"
#include "kernels/row_tables.cuh"
#include "kernels/shared_memory.h"
#include "kernels/token_counts.cuh"

namespace tern::kernels {
namespace {

constexpr int kThreads = kMostRouteWarps * kWarpThreads;
constexpr int64_t kSharedBytes = 96 << 10;                         // every GPU has it
constexpr int kEntryQuad = layout::RoutingBankLayout::kEntryQuad;  // entries of a message that a thread moves at a time
static_assert(kMostRouteBlocks <= layout::kMaxChunks, "each block has a flag");

template <bool kExpertRows>
class Route {
 public:
  __device__ Route(const RouteArgs& args, int32_t* workspace)
      : args_(args),
        plan_(args.plan),
        op_{args.exchange, TERN_OP_ROUTE, args.exchange.state->epoch + 1},
        rank_(args.exchange.rank),
        num_ranks_(args.exchange.num_ranks),
        num_counts_(plan_.num_counts(num_ranks_)),
        banks_(reinterpret_cast<BankPair*>(workspace)),
        own_(args, op_, banks_, workspace + bank_table_size(num_ranks_)),
        rows_(plan_, rank_, num_ranks_, workspace + bank_table_size(num_ranks_) + int64_t{args.num_counting_warps} * num_counts_) {}

  __device__ void run() {
    open_banks();
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
  __device__ void open_banks() const {
#pragma unroll 1
    for (int other = static_cast<int>(threadIdx.x); other < num_ranks_; other += kThreads)
      banks_[other] = op_.is_masked(other) ? BankPair{} : BankPair{bank(other, rank_), bank(rank_, other)};
    __syncthreads();
  }

  // Up to the moment when all ranks' counts and messages are here. False: the exchange has failed.
  __device__ bool exchange() {
    own_.count();
    if (!await_room()) return false;
    own_.add_lower_blocks([&](int c, int32_t count) { push_count(c, count); });
    push();
    publish();
    return await_counts();
  }

  // Until all blocks have counted, and the peers' banks are free; different threads look at each of these, at the same time. Block 0 describes the
  // call, long before anybody looks.
  __device__ bool await_room() const {
    __syncthreads();
    const int thread = static_cast<int>(threadIdx.x);
    bool ok = thread != 0 || op_.await_blocks();
    if (thread == kWarpThreads) ok = !op_.is_aborted();
#pragma unroll 1
    for (int peer = kThreads - 1 - thread; peer < num_ranks_; peer += kThreads) {
      if (is_masked(peer)) continue;
      ok = ok && op_.await_bank(peer);
      if (ok && blockIdx.x == 0) announce(peer);
    }
    return __syncthreads_and(ok ? 1 : 0) != 0;
  }

  // ---- push

  __device__ std::byte* bank(int owner, int source) const {
    return args_.exchange.window(owner) + args_.exchange.layout.routing(args_.exchange.lane, op_.epoch, source);
  }

  __device__ bool is_masked(int rank) const { return banks_[rank].there == nullptr; }

  __device__ void announce(int peer) const {
    layout::CallCell* cell = op_.call(peer, rank_);
    cell->shape = args_.shape;
    cell->epoch = op_.epoch;
    cell->operation = TERN_OP_ROUTE;
    cell->num_tokens = own_.num_tokens();
    store_release_sys(&op_.progress(peer, rank_)->ready, op_.epoch);
  }

  // Every block knows all counts of this rank: each tells them to some of the peers.
  __device__ void push_count(int c, int32_t count) const {
#pragma unroll 1
    for (int i = static_cast<int>(blockIdx.x); i < num_ranks_; i += static_cast<int>(gridDim.x)) {
      const int peer = rank_ + i < num_ranks_ ? rank_ + i : rank_ + i - num_ranks_;
      if (!is_masked(peer)) reinterpret_cast<int32_t*>(banks_[peer].there + args_.bank.counts())[c] = count;
    }
  }

  // kEntryQuad entries of a message, from k on, with positions among the warp's if they have rows.
  struct MessageQuad {
    int32_t token;
    int k;
    MessageRef message = {-1, 0};
    int32_t experts[kEntryQuad], positions[kEntryQuad];
  };

  // By each warp for its own tokens: one thread for each kEntryQuad entries of a message, or for several, which are loaded before any is stored.
  __device__ void push() const {
    const TokenRange tokens = own_.tokens();
    const auto quads = static_cast<uint32_t>(max(1, args_.bank.entry_stride() / kEntryQuad));
    const uint32_t num = static_cast<uint32_t>(tokens.size() * plan_.messages_per_token) * quads;
#pragma unroll 1
    for (uint32_t first = device::lane_idx(); first < num; first += kPushBatch * kWarpThreads) {
      MessageQuad batch[kPushBatch];
#pragma unroll
      for (int u = 0; u < kPushBatch; ++u)
        if (first + u * kWarpThreads < num) load_quad(first + u * kWarpThreads, quads, batch[u]);
#pragma unroll
      for (int u = 0; u < kPushBatch; ++u)
        if (batch[u].message.rank >= 0) push_quad(batch[u]);
    }
  }

  __device__ void load_quad(uint32_t i, uint32_t quads, MessageQuad& quad) const {
    const auto nth_message = static_cast<int32_t>(i / quads);
    quad.token = own_.tokens().begin + nth_message / plan_.messages_per_token;
    quad.k = static_cast<int>(i % quads) * kEntryQuad;
    quad.message = plan_.messages[own_.tokens().begin * plan_.messages_per_token + nth_message];
    const int32_t at = quad.token * plan_.num_topk + quad.k;
#pragma unroll
    for (int e = 0; e < kEntryQuad; ++e) {
      const bool in = quad.k + e < plan_.num_topk;
      quad.experts[e] = in ? plan_.experts[at + e] : -1;
      if constexpr (kExpertRows) quad.positions[e] = in ? plan_.entry_rows[at + e] : -1;
    }
  }

  __device__ void push_quad(const MessageQuad& quad) const {
    const int32_t* const before = own_.before();
    const int to = quad.message.rank;
    const int32_t nth = quad.message.row + before[plan_.num_experts + to];
    std::byte* const bank_there = banks_[to].there;
    if (quad.k == 0) reinterpret_cast<int32_t*>(bank_there + args_.bank.source_tokens())[nth] = quad.token;
    if (plan_.num_topk == 0) return;
    layout::RoutingBankLayout::Entry entries[kEntryQuad];
#pragma unroll
    for (int e = 0; e < kEntryQuad; ++e) {
      const int32_t expert = quad.experts[e];
      entries[e] = {-1, 0};
      if (expert < 0 || own_.rank_of(expert) != to) continue;
      entries[e] = {expert - to * plan_.local_experts, kExpertRows ? quad.positions[e] + before[expert] : 0};
    }
    auto* out = reinterpret_cast<int4*>(bank_there + args_.bank.entries(plan_.max_tokens) + args_.bank.entry_at(nth, quad.k));
    out[0] = {entries[0].expert, entries[0].position, entries[1].expert, entries[1].position};
    out[1] = {entries[2].expert, entries[2].position, entries[3].expert, entries[3].position};
  }

  // Every block raises flags of its own, when all its threads have pushed: what a thread has seen by the barrier goes with its release. Together
  // the blocks raise kMostRouteBlocks, so nobody needs to know how many they are.
  __device__ void publish() const {
    __syncthreads();
    const int num_blocks = static_cast<int>(gridDim.x), num_mine = (kMostRouteBlocks - 1 - static_cast<int>(blockIdx.x)) / num_blocks + 1;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < num_ranks_ * num_mine; i += kThreads) {
      const int peer = i / num_mine, flag = static_cast<int>(blockIdx.x) + i % num_mine * num_blocks;
      if (!is_masked(peer)) store_release_sys(op_.staged_flag(peer, rank_, flag), op_.epoch);
    }
  }

  // Each thread waits for a flag of a source; others look at the calls at the same time, which have come while blocks were counting.
  __device__ bool await_counts() const {
    bool ok = true;
#pragma unroll 1
    for (int source = kThreads - 1 - static_cast<int>(threadIdx.x); source < num_ranks_; source += kThreads)
      if (!is_masked(source)) ok = ok && await_call(source);
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < num_ranks_ * kMostRouteBlocks; i += kThreads) {
      const int source = i / kMostRouteBlocks;
      if (!is_masked(source)) ok = ok && op_.await(op_.staged_flag(rank_, source, i % kMostRouteBlocks), op_.epoch, source);
    }
    return __syncthreads_and(ok ? 1 : 0) != 0;
  }

  __device__ bool await_call(int source) const {
    if (!op_.await(&op_.progress(rank_, source)->ready, op_.epoch, source)) return false;
    const layout::CallCell* cell = op_.call(rank_, source);
    if (cell->epoch == op_.epoch && cell->operation == TERN_OP_ROUTE && cell->shape == args_.shape) return true;
    op_.give_up(TERN_MISMATCH, source, op_.epoch, op_.epoch);
    return false;
  }

  // ---- settle

  // Counts of a source; nullptr: it is masked.
  __device__ const int32_t* counts_of(int source) const {
    return is_masked(source) ? nullptr : reinterpret_cast<const int32_t*>(banks_[source].here + args_.bank.counts());
  }

  __device__ void settle() const {
    device::allow_next_kernel();  // from here on nobody is waited for
    if (blockIdx.x == 0) tell_host();
    rows_.add_up([&](int source) { return counts_of(source); }, static_cast<int>(threadIdx.x), kThreads);
    __syncthreads();
    rows_.place_groups(static_cast<int>(threadIdx.x) / kWarpThreads, kThreads / kWarpThreads);
    __syncthreads();
    write_counts(plan_.counts, plan_.num_tokens, thread_of_all(), num_all_threads());
    if (blockIdx.x == gridDim.x - 1) write_summary();
    settle_received();
    settle_empty_sources();
    settle_own();
  }

  // One block. With extent exact the host waits for this.
  __device__ void tell_host() const {
    if (args_.host.counts == nullptr) return;
    write_counts(args_.host.counts, args_.host.num_tokens, threadIdx.x, kThreads);
    __syncthreads();
    if (threadIdx.x == 0) store_release_sys(args_.host.ticket, args_.host.awaited_ticket);
  }

  // Thread i of n.
  __device__ void write_counts(int32_t* counts, int32_t* num_tokens, uint32_t i, uint32_t n) const {
    const auto first_count = static_cast<int>(i), step = static_cast<int>(n);
#pragma unroll 1
    for (int source = first_count; source < num_ranks_; source += step)
      num_tokens[source] = is_masked(source) ? 0 : op_.call(rank_, source)->num_tokens;
#pragma unroll 1
    for (int c = first_count; c < num_counts_; c += step) {
#pragma unroll 1
      for (int first = 0; first < num_ranks_; first += kBatch) {
        int32_t values[kBatch];
#pragma unroll
        for (int u = 0; u < kBatch; ++u) values[u] = first + u < num_ranks_ && !is_masked(first + u) ? counts_of(first + u)[c] : 0;
#pragma unroll
        for (int u = 0; u < kBatch; ++u)
          if (first + u < num_ranks_) counts[(first + u) * num_counts_ + c] = values[u];
      }
    }
  }

  // Of the plan as a whole, by one block.
  __device__ void write_summary() const {
#pragma unroll 1
    for (int source = static_cast<int>(threadIdx.x); source <= num_ranks_; source += kThreads)
      plan_.received_begin[source] = rows_.received_begin(source);
    bool overflow = !kExpertRows && rows_.num_received() > plan_.row_capacity;
#pragma unroll 1
    for (int e = static_cast<int>(threadIdx.x); kExpertRows && e < plan_.local_experts; e += kThreads) {
      int32_t num_entries = 0;
#pragma unroll 1
      for (int source = 0; source < num_ranks_; ++source) {
        const int32_t* const counts = counts_of(source);
        plan_.source_begin[e * num_ranks_ + source] = rows_.source_begin(e, source);
        num_entries += counts == nullptr ? 0 : counts[rank_ * plan_.local_experts + e];
      }
      plan_.group_begin[e] = rows_.group_begin(e);
      if (e + 1 == plan_.local_experts)
        plan_.group_begin[e + 1] = static_cast<int32_t>(rows_.group_begin(e) + rows_.group_rows(num_entries));
      overflow = overflow || !rows_.fits(e, num_entries);
    }
    if (overflow) op_.post_notice(TERN_CAPACITY_EXCEEDED);
  }

  __device__ static uint32_t thread_of_all() { return blockIdx.x * kThreads + threadIdx.x; }
  __device__ static uint32_t num_all_threads() { return gridDim.x * kThreads; }

  // kEntryQuad entries of a message that arrives, from k on, and its token.
  struct ReceivedQuad {
    int32_t message = -1, nth;  // among all, among the source's
    int source, k;
    int32_t token, token_before;
    int4 low, high;
  };

  // The messages that arrive, all blocks together: one thread for each kEntryQuad entries, or for several, which are loaded before any is stored.
  __device__ void settle_received() const {
    const auto quads = static_cast<uint32_t>(max(1, plan_.topk_stride / kEntryQuad));
    const uint32_t num = static_cast<uint32_t>(rows_.num_received()) * quads;
#pragma unroll 1
    for (uint32_t first = thread_of_all(); first < num; first += kPushBatch * num_all_threads()) {
      ReceivedQuad batch[kPushBatch];
#pragma unroll
      for (int u = 0; u < kPushBatch; ++u)
        if (first + u * num_all_threads() < num) load_received(first + u * num_all_threads(), quads, batch[u]);
#pragma unroll
      for (int u = 0; u < kPushBatch; ++u)
        if (batch[u].message >= 0) settle_quad(batch[u]);
    }
  }

  __device__ void load_received(uint32_t i, uint32_t quads, ReceivedQuad& quad) const {
    quad.message = static_cast<int32_t>(i / quads);
    quad.k = static_cast<int>(i % quads) * kEntryQuad;
    quad.source = rows_.source_of(quad.message);
    quad.nth = quad.message - rows_.received_begin(quad.source);
    const std::byte* const from = banks_[quad.source].here;
    const auto* tokens = reinterpret_cast<const int32_t*>(from + args_.bank.source_tokens()) + quad.nth;
    quad.token = tokens[0];
    quad.token_before = quad.nth == 0 ? -plan_.tokens_per_chunk : tokens[-1];
    if (plan_.num_topk == 0) return;
    const auto* in = reinterpret_cast<const int4*>(from + args_.bank.entries(plan_.max_tokens) + args_.bank.entry_at(quad.nth, quad.k));
    quad.low = in[0];
    quad.high = in[1];
  }

  __device__ void settle_quad(const ReceivedQuad& quad) const {
    const int32_t message = quad.message;
    if (quad.k == 0) settle_message(quad);
    if (plan_.num_topk == 0) return;
    const int64_t at = int64_t{message} * plan_.topk_stride + quad.k;
    const int4 low = quad.low, high = quad.high;
    *reinterpret_cast<int4*>(plan_.received_experts + at) = {low.x, low.z, high.x, high.z};
    *reinterpret_cast<int4*>(plan_.received_rows + at) = {
        rows_.received_row(quad.source, message, {low.x, low.y}), rows_.received_row(quad.source, message, {low.z, low.w}),
        rows_.received_row(quad.source, message, {high.x, high.y}), rows_.received_row(quad.source, message, {high.z, high.w})};
  }

  // Where a message is the first of a chunk, or of several, they begin here.
  __device__ void settle_message(const ReceivedQuad& quad) const {
    plan_.source_token[quad.message] = quad.token;
    const int chunk = quad.token / plan_.tokens_per_chunk;
    set_chunks(quad.source, quad.token_before / plan_.tokens_per_chunk + 1, chunk, quad.nth);
    const int32_t num = rows_.received_begin(quad.source + 1) - rows_.received_begin(quad.source);
    if (quad.nth + 1 == num) set_chunks(quad.source, chunk + 1, layout::kMaxChunks, num);
  }

  __device__ void settle_empty_sources() const {
#pragma unroll 1
    for (auto source = static_cast<int>(thread_of_all()); source < num_ranks_; source += static_cast<int>(num_all_threads()))
      if (rows_.received_begin(source) == rows_.received_begin(source + 1)) set_chunks(source, 0, layout::kMaxChunks, 0);
  }

  __device__ void set_chunks(int source, int first, int last, int32_t begin) const {
    int32_t* const chunk_begin = plan_.chunk_begin + int64_t{source} * (layout::kMaxChunks + 1);
#pragma unroll 1
    for (int c = first; c <= last; ++c) chunk_begin[c] = begin;
  }

  // Where this rank's messages and entries come to lie: positions become rows.
  __device__ void settle_own() const {
    settle_own_messages();
    if constexpr (kExpertRows) settle_own_entries();
  }

  __device__ void settle_own_messages() const {
    const int32_t* const before = own_.before() + plan_.num_experts;
    const TokenRange tokens = own_.tokens();
    const int32_t end = tokens.end * plan_.messages_per_token;
#pragma unroll 1
    for (int32_t first = tokens.begin * plan_.messages_per_token + lane(); first < end; first += kPushBatch * kWarpThreads) {
      MessageRef messages[kPushBatch];
#pragma unroll
      for (int u = 0; u < kPushBatch; ++u)
        messages[u] = first + u * kWarpThreads < end ? plan_.messages[first + u * kWarpThreads] : MessageRef{-1, 0};
#pragma unroll
      for (int u = 0; u < kPushBatch; ++u) {
        const auto [to, nth] = messages[u];
        if (to >= 0) plan_.messages[first + u * kWarpThreads].row = kExpertRows ? 0 : rows_.message_row(to, nth + before[to]);
      }
    }
  }

  __device__ void settle_own_entries() const {
    const int32_t* const before = own_.before();
    const TokenRange tokens = own_.tokens();
    const int32_t end = tokens.end * plan_.num_topk;
#pragma unroll 1
    for (int32_t first = tokens.begin * plan_.num_topk + lane(); first < end; first += kBatch * kWarpThreads) {
      int32_t experts[kBatch], positions[kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const int32_t i = first + u * kWarpThreads;
        experts[u] = i < end ? plan_.experts[i] : -1;
        positions[u] = i < end ? plan_.entry_rows[i] : -1;
      }
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        if (experts[u] < 0) continue;
        plan_.entry_rows[first + u * kWarpThreads] =
            rows_.entry_row(experts[u], own_.rank_of(experts[u]), positions[u] + before[experts[u]]);
      }
    }
  }

  __device__ static int32_t lane() { return static_cast<int32_t>(device::lane_idx()); }

  static constexpr int kBatch = 4, kPushBatch = 3;  // loads that are under way at a time

  const RouteArgs& args_;
  const PlanView& plan_;
  const Operation op_;
  const int rank_;
  const int num_ranks_;
  const int num_counts_;
  BankPair* const banks_;  // [num_ranks]
  const TokenCounts<kExpertRows> own_;
  const RowTables<kExpertRows> rows_;
};

template <bool kExpertRows>
__global__ void __launch_bounds__(kThreads, 1) route_kernel(const __grid_constant__ RouteArgs args) {
  extern __shared__ __align__(16) int32_t shared[];
  int32_t* workspace = shared;
  if (args.workspace != nullptr)
    workspace = args.workspace + blockIdx.x * route_workspace(args.plan.num_experts, args.exchange.num_ranks, args.num_counting_warps);
  Route<kExpertRows>(args, workspace).run();
}

}  // namespace

int32_t route_counting_warps(int32_t num_experts, int32_t num_ranks) {
  const int64_t counter_bytes = (int64_t{num_experts} + num_ranks) * static_cast<int64_t>(sizeof(int32_t));
  const int64_t fitting = kSharedBytes / counter_bytes - 6;  // the other tables take as much as six more, or less
  return static_cast<int32_t>(fitting < 1 ? 1 : fitting > kMostRouteWarps ? kMostRouteWarps : fitting);
}

bool route_fits_shared(int64_t workspace) { return workspace * static_cast<int64_t>(sizeof(int32_t)) <= kSharedBytes; }

cudaError_t prepare_route() {
  const cudaError_t error = allow_shared(route_kernel<false>, kSharedBytes);
  return error != cudaSuccess ? error : allow_shared(route_kernel<true>, kSharedBytes);
}

cudaError_t launch_route(const RouteArgs& args, int num_blocks, cudaStream_t stream) {
  const int64_t workspace = route_workspace(args.plan.num_experts, args.exchange.num_ranks, args.num_counting_warps);
  const int64_t shared_bytes = args.workspace != nullptr ? 0 : workspace * static_cast<int64_t>(sizeof(int32_t));
  const LaunchShape shape{num_blocks, kThreads, shared_bytes, false};
  return launch(args.plan.has_expert_rows() ? route_kernel<true> : route_kernel<false>, shape, stream, args);
}

}  // namespace tern::kernels
