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

class Route {
 public:
  __device__ Route(const RouteArgs& args, int32_t* workspace)
      : args_(args),
        plan_(args.plan),
        op_{args.exchange, TERN_OP_ROUTE, args.exchange.state->epoch + 1},
        rank_(args.exchange.rank),
        num_ranks_(args.exchange.num_ranks),
        num_counts_(plan_.num_counts(num_ranks_)),
        own_(args, op_, workspace),
        rows_(plan_, rank_, num_ranks_, workspace + int64_t{args.num_counting_warps} * num_counts_) {}

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
    own_.count();
    if (!await_banks() || !op_.sync_blocks(1)) return false;
    own_.add_lower_blocks();
    push();
    publish();
    return await_counts();
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

  // By each warp for its own tokens: one thread for each kEntryQuad entries of a message.
  __device__ void push() const {
    if (blockIdx.x == 0) push_counts();
    const TokenRange tokens = own_.tokens();
    const auto quads = static_cast<uint32_t>(max(1, args_.bank.entry_stride() / kEntryQuad));
    const uint32_t per_token = static_cast<uint32_t>(plan_.messages_per_token) * quads;
    const uint32_t num = static_cast<uint32_t>(tokens.size()) * per_token;
#pragma unroll 2
    for (uint32_t i = device::lane_idx(); i < num; i += kWarpThreads) {
      const int32_t token = tokens.begin + static_cast<int32_t>(i / per_token);
      const MessageRef message = plan_.messages[int64_t{token} * plan_.messages_per_token + i % per_token / quads];
      if (message.rank >= 0) push_entries(token, message, static_cast<int>(i % quads) * kEntryQuad);
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

  // Entries from k on. Positions in the tables are still those among the warp's.
  __device__ void push_entries(int32_t token, MessageRef message, int k) const {
    const int32_t* const before = own_.before();
    const int32_t nth = message.row + before[plan_.num_experts + message.rank];
    std::byte* const to = bank(message.rank, rank_);
    if (k == 0) reinterpret_cast<int32_t*>(to + args_.bank.source_tokens())[nth] = token;
    if (plan_.num_topk == 0) return;
    layout::RoutingBankLayout::Entry entries[kEntryQuad];
#pragma unroll
    for (int i = 0; i < kEntryQuad; ++i) {
      entries[i] = {-1, 0};
      const int64_t at = int64_t{token} * plan_.num_topk + k + i;
      const int32_t expert = k + i < plan_.num_topk ? plan_.experts[at] : -1;
      if (expert >= 0 && own_.rank_of(expert) == message.rank)
        entries[i] = {expert - message.rank * plan_.local_experts, plan_.entry_rows[at] + before[expert]};
    }
    auto* out = reinterpret_cast<int4*>(to + args_.bank.entries(plan_.max_tokens) + args_.bank.entry_at(nth, k));
    out[0] = {entries[0].expert, entries[0].position, entries[1].expert, entries[1].position};
    out[1] = {entries[2].expert, entries[2].position, entries[3].expert, entries[3].position};
  }

  // The call is described by one block. Every block raises a flag of its own, when all its threads have pushed: what a thread has seen by the
  // barrier goes with its release.
  __device__ void publish() const {
    __syncthreads();
    for (int peer = static_cast<int>(threadIdx.x); peer < num_ranks_; peer += kThreads) {
      if (op_.is_masked(peer)) continue;
      if (blockIdx.x == 0) {
        layout::CallCell* cell = op_.call(peer, rank_);
        cell->shape = args_.shape;
        cell->epoch = op_.epoch;
        cell->operation = TERN_OP_ROUTE;
        cell->num_tokens = own_.num_tokens();
        cell->num_flags = static_cast<int32_t>(gridDim.x);
        store_release_sys(&op_.progress(peer, rank_)->ready, op_.epoch);
      } else {
        store_release_sys(op_.staged_flag(peer, rank_, static_cast<int>(blockIdx.x)), op_.epoch);
      }
    }
  }

  // Each thread waits for a block of a source; the first one has described its call.
  __device__ bool await_counts() const {
    bool ok = true;
    for (int i = static_cast<int>(threadIdx.x); i < num_ranks_ * kMostRouteBlocks; i += kThreads) {
      const int source = i / kMostRouteBlocks, block = i % kMostRouteBlocks;
      if (!op_.is_masked(source)) ok = ok && await_block(source, block);
    }
    return __syncthreads_and(ok ? 1 : 0) != 0;
  }

  __device__ bool await_block(int source, int block) const {
    if (!op_.await(&op_.progress(rank_, source)->ready, op_.epoch, source)) return false;
    const layout::CallCell* cell = op_.call(rank_, source);
    if (cell->epoch != op_.epoch || cell->operation != TERN_OP_ROUTE || cell->shape != args_.shape) {
      op_.give_up(TERN_MISMATCH, source, op_.epoch, op_.epoch);
      return false;
    }
    return block == 0 || block >= cell->num_flags || op_.await(op_.staged_flag(rank_, source, block), op_.epoch, source);
  }

  // ---- settle

  // Counts of a source; nullptr: it is masked.
  __device__ const int32_t* counts_of(int source) const {
    if (op_.is_masked(source)) return nullptr;
    return reinterpret_cast<const int32_t*>(bank(rank_, source) + args_.bank.counts());
  }

  __device__ void settle() const {
    device::allow_next_kernel();  // from here on nobody is waited for
    if (blockIdx.x == 0) tell_host();
    rows_.add_up([&](int source) { return counts_of(source); }, static_cast<int>(threadIdx.x), kThreads);
    __syncthreads();
    rows_.place_groups(static_cast<int>(threadIdx.x) / kWarpThreads, kThreads / kWarpThreads);
    __syncthreads();
    if (blockIdx.x == gridDim.x - 1) write_summary();
    settle_received();
    settle_empty_sources();
    settle_own();
  }

  // One block. With extent exact the host waits for this.
  __device__ void tell_host() const {
    if (args_.host.counts == nullptr) return;
    write_counts(args_.host.counts, args_.host.num_tokens);
    __syncthreads();
    if (threadIdx.x == 0) store_release_sys(args_.host.ticket, args_.host.awaited_ticket);
  }

  __device__ void write_counts(int32_t* counts, int32_t* num_tokens) const {
    const int num = num_ranks_ * num_counts_;
    for (int first = static_cast<int>(threadIdx.x); first < num; first += kBatch * kThreads) {
      int32_t values[kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const int i = first + u * kThreads;
        const int32_t* const from = i < num ? counts_of(i / num_counts_) : nullptr;
        values[u] = from == nullptr ? 0 : from[i % num_counts_];
      }
#pragma unroll
      for (int u = 0; u < kBatch; ++u)
        if (first + u * kThreads < num) counts[first + u * kThreads] = values[u];
    }
    for (int source = static_cast<int>(threadIdx.x); source < num_ranks_; source += kThreads)
      num_tokens[source] = op_.is_masked(source) ? 0 : op_.call(rank_, source)->num_tokens;
  }

  // Of the plan as a whole, by one block.
  __device__ void write_summary() const {
    write_counts(plan_.counts, plan_.num_tokens);
    for (int source = static_cast<int>(threadIdx.x); source <= num_ranks_; source += kThreads)
      plan_.received_begin[source] = rows_.received_begin(source);
    bool overflow = !plan_.has_expert_rows() && rows_.num_received() > plan_.row_capacity;
    for (int e = static_cast<int>(threadIdx.x); e < plan_.local_experts && plan_.has_expert_rows(); e += kThreads) {
      int32_t num_entries = 0;
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

  // The messages that arrive, all blocks together: one thread for each kEntryQuad entries.
  __device__ void settle_received() const {
    const auto quads = static_cast<uint32_t>(max(1, plan_.topk_stride / kEntryQuad));
    const uint32_t num = static_cast<uint32_t>(rows_.num_received()) * quads;
    for (uint32_t i = thread_of_all(); i < num; i += num_all_threads()) {
      const auto message = static_cast<int32_t>(i / quads);
      const int source = rows_.source_of(message);
      const int32_t nth = message - rows_.received_begin(source);
      const auto k = static_cast<int>(i % quads) * kEntryQuad;
      if (k == 0) settle_message(source, nth, message);
      if (plan_.num_topk == 0) continue;
      const auto* in =
          reinterpret_cast<const int4*>(bank(rank_, source) + args_.bank.entries(plan_.max_tokens) + args_.bank.entry_at(nth, k));
      const int4 low = in[0], high = in[1];
      const int64_t at = int64_t{message} * plan_.topk_stride + k;
      *reinterpret_cast<int4*>(plan_.received_experts + at) = {low.x, low.z, high.x, high.z};
      *reinterpret_cast<int4*>(plan_.received_rows + at) = {
          rows_.received_row(source, message, {low.x, low.y}), rows_.received_row(source, message, {low.z, low.w}),
          rows_.received_row(source, message, {high.x, high.y}), rows_.received_row(source, message, {high.z, high.w})};
    }
  }

  // The token of a source's nth message. Where that is the first of a chunk, or of several, they begin here.
  __device__ void settle_message(int source, int32_t nth, int32_t message) const {
    const auto* tokens = reinterpret_cast<const int32_t*>(bank(rank_, source) + args_.bank.source_tokens());
    const int32_t token = tokens[nth], token_before = nth == 0 ? -plan_.tokens_per_chunk : tokens[nth - 1];
    plan_.source_token[message] = token;
    set_chunks(source, token_before / plan_.tokens_per_chunk + 1, token / plan_.tokens_per_chunk, nth);
    const int32_t num = rows_.received_begin(source + 1) - rows_.received_begin(source);
    if (nth + 1 == num) set_chunks(source, token / plan_.tokens_per_chunk + 1, layout::kMaxChunks, num);
  }

  __device__ void settle_empty_sources() const {
    for (auto source = static_cast<int>(thread_of_all()); source < num_ranks_; source += static_cast<int>(num_all_threads()))
      if (rows_.received_begin(source) == rows_.received_begin(source + 1)) set_chunks(source, 0, layout::kMaxChunks, 0);
  }

  __device__ void set_chunks(int source, int first, int last, int32_t begin) const {
    int32_t* const chunk_begin = plan_.chunk_begin + int64_t{source} * (layout::kMaxChunks + 1);
    for (int c = first; c <= last; ++c) chunk_begin[c] = begin;
  }

  // Where this rank's messages and entries come to lie: positions become rows.
  __device__ void settle_own() const {
    const int32_t* const before = own_.before();
    const TokenRange tokens = own_.tokens();
    const int32_t messages_end = tokens.end * plan_.messages_per_token;
#pragma unroll 2
    for (int32_t i = tokens.begin * plan_.messages_per_token + static_cast<int32_t>(device::lane_idx()); i < messages_end;
         i += kWarpThreads) {
      const MessageRef message = plan_.messages[i];
      if (message.rank < 0) continue;
      plan_.messages[i].row =
          plan_.has_expert_rows() ? 0 : rows_.message_row(message.rank, message.row + before[plan_.num_experts + message.rank]);
    }
    if (!plan_.has_expert_rows()) return;  // entries have no rows
    const int32_t entries_end = tokens.end * plan_.num_topk;
#pragma unroll 4
    for (int32_t i = tokens.begin * plan_.num_topk + static_cast<int32_t>(device::lane_idx()); i < entries_end; i += kWarpThreads) {
      const int32_t expert = plan_.experts[i];
      if (expert >= 0) plan_.entry_rows[i] = rows_.entry_row(expert, own_.rank_of(expert), plan_.entry_rows[i] + before[expert]);
    }
  }

  static constexpr int kBatch = 4;  // loads that are under way at a time

  const RouteArgs& args_;
  const PlanView& plan_;
  const Operation op_;
  const int rank_;
  const int num_ranks_;
  const int num_counts_;
  const TokenCounts own_;
  const RowTables rows_;
};

__global__ void __launch_bounds__(kThreads, 1) route_kernel(const __grid_constant__ RouteArgs args) {
  extern __shared__ int32_t shared[];
  int32_t* workspace = shared;
  if (args.workspace != nullptr)
    workspace = args.workspace + blockIdx.x * route_workspace(args.plan.num_experts, args.exchange.num_ranks, args.num_counting_warps);
  Route(args, workspace).run();
}

}  // namespace

int32_t route_counting_warps(int32_t num_experts, int32_t num_ranks) {
  const int64_t counter_bytes = (int64_t{num_experts} + num_ranks) * static_cast<int64_t>(sizeof(int32_t));
  const int64_t fitting = kSharedBytes / counter_bytes - 4;  // the tables of rows take as much as three more, or four
  return static_cast<int32_t>(fitting < 1 ? 1 : fitting > kMostRouteWarps ? kMostRouteWarps : fitting);
}

bool route_fits_shared(int64_t workspace) { return workspace * static_cast<int64_t>(sizeof(int32_t)) <= kSharedBytes; }

cudaError_t prepare_route() { return allow_shared(route_kernel, kSharedBytes); }

cudaError_t launch_route(const RouteArgs& args, int num_blocks, cudaStream_t stream) {
  const int64_t workspace = route_workspace(args.plan.num_experts, args.exchange.num_ranks, args.num_counting_warps);
  const size_t shared_bytes = args.workspace != nullptr ? 0 : static_cast<size_t>(workspace) * sizeof(int32_t);
  route_kernel<<<num_blocks, kThreads, shared_bytes, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace tern::kernels
