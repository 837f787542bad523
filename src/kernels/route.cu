// SPDX-License-Identifier: Apache-2.0
// Route, in one launch:
//
//   count    experts of every entry; the ranks of every token, ascending, each once; how many entries (by expert) and messages (by rank) come
//            before each in its group of tokens. Each group is one block's, and no block waits for another one
//   push     the group's counts, and for every message its token and its entries' experts and positions, into the receivers' routing banks; then
//            the group's flag
//   settle   when all groups of all ranks have come, all blocks together: the rows of what arrives, and of this rank's messages where they go
//
// Positions are those of a walk in token order, so they are the same on every run, and for any number of blocks.
//
// The code is run once, and fetching it takes about as long as the links do: so there is little of it.
#include "kernels/operation.cuh"
#include "kernels/route.h"
#include "kernels/row_tables.cuh"
#include "kernels/shared_memory.h"
#include "kernels/token_counts.cuh"

namespace tern::kernels {
namespace {

constexpr int kThreads = kRouteWarps * kWarpThreads;
constexpr int kEntryQuad = layout::RoutingBankLayout::kEntryQuad;  // entries of a message that a thread moves at a time
constexpr int kGroupChunks = layout::RoutingBankLayout::kGroupChunks;
static_assert(kRouteGroups <= layout::kMaxChunks, "each group has a flag");

template <bool kExpertRows>
class Route {
 public:
  __device__ Route(const RouteArgs& args, int32_t* workspace)
      : args_(args),
        plan_(args.plan),
        last_epoch_(args.exchange.state->epoch),
        op_{args.exchange, TERN_OP_ROUTE, last_epoch_ + 1},
        rank_(args.exchange.rank),
        num_ranks_(args.exchange.num_ranks),
        num_counts_(plan_.num_counts(num_ranks_)),
        banks_offset_(args.offsets.banks + (op_.epoch % layout::kNumBanks == 0 ? 0 : args.offsets.odd_banks)),
        windows_(reinterpret_cast<std::byte**>(workspace + args.memory.windows)),
        own_(args, op_, workspace + args.memory.counters),
        rows_(args, workspace) {}

  __device__ void run() {
    if (!exchange()) {
      if (threadIdx.x == 0) op_.report_abort();
      return;
    }
    let_next_begin();
    settle();
    if (threadIdx.x != 0 || !began_last_) return;
    LaneState* const state = args_.exchange.state;
    state->blocks_begun = 0;
    device::store_relaxed_sys(&state->epoch, op_.epoch);  // a dispatch may look at it
  }

 private:
  // Up to the moment when all ranks' counts and messages are here. False: the exchange has failed.
  __device__ bool exchange() {
    const bool is_open = open_banks();
    own_.count();
    // All have the epoch now: when all blocks have come here it may be advanced.
    if (__syncthreads_and(is_open && op_.epoch != 0 ? 1 : 0) == 0) return false;
    if (threadIdx.x == 0) began_last_ = atomicAdd(&args_.exchange.state->blocks_begun, 1u) == gridDim.x - 1;
    own_.add_warps([&](int group, int c, int32_t count) { push_count(group, c, count); });
    __syncthreads();
    push();
    publish();
    return await_groups();
  }

  // Beside the warps that count, the last threads each look at a peer's bank: may it be written? Block 0 describes the call there.
  __device__ bool open_banks() const {
    bool ok = threadIdx.x != kThreads / 2 || !op_.is_aborted();
#pragma unroll 1
    for (int peer = peer_of_thread(); peer < num_ranks_; peer += kThreads) {
      windows_[peer] = args_.exchange.window(peer);
      if (is_masked(peer)) continue;
      // Asked for before the epoch is known, which comes from memory too.
      const uint64_t consumed = load_acquire_sys(&progress(rank_, peer)->consumed);
      if (blockIdx.x == 0) op_.post_consumed_before(peer, last_epoch_);
      ok = ok && (consumed + layout::kNumBanks >= op_.epoch || op_.await_bank(peer));
      if (ok && blockIdx.x == 0) describe_call(peer);
      if (peer == rank_ && blockIdx.x == 0) plan_.num_tokens[rank_] = own_.num_tokens();  // a dispatch that follows begins with it
    }
    return ok;
  }

  __device__ static int peer_of_thread() { return kThreads - 1 - static_cast<int>(threadIdx.x); }

  __device__ bool is_masked(int rank) const { return windows_[rank] == nullptr; }

  __device__ void describe_call(int peer) const {
    auto* const cell =
        reinterpret_cast<layout::CallCell*>(windows_[peer] + args_.exchange.layout.call(args_.exchange.lane, op_.epoch, rank_));
    cell->shape = args_.shape;
    cell->epoch = op_.epoch;
    cell->operation = TERN_OP_ROUTE;
    cell->num_tokens = own_.num_tokens();
  }

  // ---- push

  // Where this rank writes for the peer, and where it reads what the source has written.
  __device__ std::byte* bank_at(int peer) const { return windows_[peer] + banks_offset_ + rank_ * args_.offsets.bank_bytes; }
  __device__ const std::byte* bank_of(int source) const { return windows_[rank_] + banks_offset_ + source * args_.offsets.bank_bytes; }

  __device__ void push_count(int group, int c, int32_t count) const {
#pragma unroll 1
    for (int peer = 0; peer < num_ranks_; ++peer)
      if (!is_masked(peer)) reinterpret_cast<int32_t*>(bank_at(peer))[group * num_counts_ + c] = count;
  }

  // By each warp for its own tokens, a message in each thread.
  __device__ void push() const {
    const TokenRange tokens = own_.tokens();
    const int32_t end = tokens.end * plan_.messages_per_token;
#pragma unroll 1
    for (int32_t i = tokens.begin * plan_.messages_per_token + lane(); i < end; i += kWarpThreads) {
      const MessageRef message = plan_.messages[i];
      if (message.rank >= 0) push_message(message, static_cast<uint32_t>(i) / static_cast<uint32_t>(plan_.messages_per_token));
    }
  }

  __device__ void push_message(MessageRef message, int32_t token) const {
    const int32_t* const before = own_.before();
    std::byte* const bank = bank_at(message.rank);
    const int32_t slot = own_.group(own_.nth_group()) * args_.group_tokens + message.row + before[plan_.num_experts + message.rank];
    reinterpret_cast<int32_t*>(bank + args_.offsets.tokens)[slot] = token;
    auto* const words = reinterpret_cast<uint32_t*>(bank + args_.offsets.entries) + int64_t{slot} * plan_.topk_stride;
#pragma unroll 1
    for (int k = 0; k < plan_.num_topk; k += kEntryQuad) {
      uint32_t quad[kEntryQuad];
#pragma unroll
      for (int e = 0; e < kEntryQuad; ++e)
        quad[e] = k + e < plan_.num_topk ? entry_word(message.rank, token * plan_.num_topk + k + e) : layout::RoutingBankLayout::kNotHere;
      *reinterpret_cast<uint4*>(words + k) = {quad[0], quad[1], quad[2], quad[3]};
    }
  }

  // Of an entry of this rank's, for a rank.
  __device__ uint32_t entry_word(int to, int32_t entry) const {
    const int32_t expert = plan_.experts[entry], local = expert - to * plan_.local_experts;
    if (expert < 0 || static_cast<uint32_t>(local) >= static_cast<uint32_t>(plan_.local_experts))
      return layout::RoutingBankLayout::kNotHere;
    if constexpr (!kExpertRows) return static_cast<uint32_t>(local);
    return static_cast<uint32_t>(plan_.entry_rows[entry] + own_.before()[expert]) << args_.expert_bits | static_cast<uint32_t>(local);
  }

  // Each of the block's groups has a flag, raised when all its threads have pushed: what a thread has seen by the barrier goes with its release.
  // So does what block 0 has said of the call.
  __device__ void publish() const {
    __syncthreads();
    const int num = own_.num_groups();
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < num_ranks_ * num; i += kThreads)
      if (!is_masked(i / num)) store_release_sys(flag(i / num, rank_, own_.group(i % num)), op_.epoch);
    if (blockIdx.x != 0) return;
#pragma unroll 1
    for (int peer = peer_of_thread(); peer < num_ranks_; peer += kThreads)
      if (!is_masked(peer)) store_release_sys(&progress(peer, rank_)->ready, op_.epoch);
  }

  // What `source` says to `owner`.
  __device__ uint64_t* flag(int owner, int source, int group) const {
    return reinterpret_cast<uint64_t*>(windows_[owner] + args_.exchange.layout.staged(args_.exchange.lane, source)) + group;
  }
  __device__ layout::ProgressCell* progress(int owner, int source) const {
    return reinterpret_cast<layout::ProgressCell*>(args_.exchange.window(owner) +
                                                   args_.exchange.layout.progress(args_.exchange.lane, source));
  }
  __device__ const layout::CallCell* call_of(int source) const {
    return reinterpret_cast<const layout::CallCell*>(windows_[rank_] + args_.exchange.layout.call(args_.exchange.lane, op_.epoch, source));
  }

  // Each thread waits for a group of a source; others look at the calls at the same time.
  __device__ bool await_groups() const {
    bool ok = true;
#pragma unroll 1
    for (int source = peer_of_thread(); source < num_ranks_; source += kThreads)
      if (!is_masked(source)) ok = ok && await_call(source);
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < num_ranks_ * kRouteGroups; i += kThreads) {
      const int source = i / kRouteGroups;
      if (!is_masked(source)) ok = ok && op_.await(flag(rank_, source, i % kRouteGroups), op_.epoch, source);
    }
    return __syncthreads_and(ok ? 1 : 0) != 0;
  }

  __device__ bool await_call(int source) const {
    if (!op_.await(&progress(rank_, source)->ready, op_.epoch, source)) return false;
    const layout::CallCell* cell = call_of(source);
    if (cell->epoch == op_.epoch && cell->operation == TERN_OP_ROUTE && cell->shape == args_.shape) return true;
    op_.give_up(TERN_MISMATCH, source, op_.epoch, op_.epoch);
    return false;
  }

  // From here on nobody is waited for, and a dispatch that follows may come before the peers with flags of the next epoch.
  __device__ void let_next_begin() const {
    if (threadIdx.x != kThreads - 1) return;
    store_release_sys(&args_.exchange.state->routed[blockIdx.x], op_.epoch);
    device::allow_next_kernel();
  }

  // ---- settle

  // Counts of a source's groups; nullptr: it is masked.
  __device__ const int32_t* counts_of(int source) const {
    return is_masked(source) ? nullptr : reinterpret_cast<const int32_t*>(bank_of(source));
  }

  __device__ void settle() const {
    const auto thread = static_cast<int>(threadIdx.x), warp = thread / kWarpThreads;
    if (blockIdx.x == 0 && args_.host.words != nullptr) tell_host();
    rows_.add_groups([&](int source) { return counts_of(source); }, thread, kThreads);
    __syncthreads();
    rows_.add_sources(thread, kThreads);
    __syncthreads();
    if constexpr (kExpertRows) {
      rows_.place_groups(warp, kRouteWarps);
      __syncthreads();
    }
    settle_received();
    settle_own();
    write_counts();
    if (blockIdx.x == gridDim.x - 1) write_summary();
  }

  // One block. With extent exact the host waits for these words.
  __device__ void tell_host() const {
    const HostCountsView host = args_.host;
    const uint32_t num = num_ranks_ * host.num_columns();
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < num; i += kThreads) {
      const auto source = static_cast<int>(i / host.num_columns());
      const auto column = static_cast<int>(i % host.num_columns());
      int32_t value = 0;
      if (column == host.num_tokens())
        value = num_tokens_of(source);
      else
        value = sum_of_groups(
            source, column < plan_.local_experts ? rank_ * plan_.local_experts + column : plan_.num_experts + column - plan_.local_experts);
      device::store_relaxed_sys(host.words + i, host.ticket << 32 | static_cast<uint32_t>(value));
    }
  }

  __device__ int32_t num_tokens_of(int source) const { return is_masked(source) ? 0 : call_of(source)->num_tokens; }
  __device__ int32_t sum_of_groups(int source, int c) const {
    int32_t sum = 0;
    if (is_masked(source)) return sum;
    const int32_t* const counts = counts_of(source) + c;
#pragma unroll
    for (int g = 0; g < kRouteGroups; ++g) sum += counts[g * num_counts_];
    return sum;
  }

  // By all blocks together.
  __device__ void write_counts() const {
#pragma unroll 1
    for (uint32_t source = thread_of_all(); source < static_cast<uint32_t>(num_ranks_); source += num_all_threads())
      if (source != static_cast<uint32_t>(rank_)) plan_.num_tokens[source] = num_tokens_of(static_cast<int>(source));
    const auto num = static_cast<uint32_t>(num_counts_);
#pragma unroll 1
    for (uint32_t i = thread_of_all(); i < num_ranks_ * num; i += num_all_threads())
      plan_.counts[i] = sum_of_groups(static_cast<int>(i / num), static_cast<int>(i % num));
  }

  // Of the plan as a whole, by one block.
  __device__ void write_summary() const {
#pragma unroll 1
    for (int source = static_cast<int>(threadIdx.x); source <= num_ranks_; source += kThreads)
      plan_.received_begin[source] = rows_.received_begin(source);
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < num_ranks_ * kRouteGroups; i += kThreads)
      begin_chunks({i / kRouteGroups, i % kRouteGroups});
    bool overflow = !kExpertRows && rows_.num_received() > plan_.row_capacity;
#pragma unroll 1
    for (int e = static_cast<int>(threadIdx.x); kExpertRows && e < plan_.local_experts; e += kThreads) {
      int32_t num_entries = 0;
#pragma unroll 1
      for (int source = 0; source < num_ranks_; ++source) {
        plan_.source_begin[e * num_ranks_ + source] = rows_.source_begin(e, source);
        num_entries += rows_.total(source, rank_ * plan_.local_experts + e);
      }
      plan_.group_begin[e] = rows_.group_begin(e);
      if (e + 1 == plan_.local_experts)
        plan_.group_begin[e + 1] = static_cast<int32_t>(rows_.group_begin(e) + rows_.group_rows(num_entries));
      overflow = overflow || !rows_.fits(e, num_entries);
    }
    if (overflow) op_.post_notice(TERN_CAPACITY_EXCEEDED);
  }

  // Where the first chunk of a group begins, and behind the last group the end; all chunks of a group without messages.
  __device__ void begin_chunks(SourceGroup of) const {
    const int32_t begin = rows_.messages_before(of), num = rows_.num_messages(of);
    const int first = of.group * kGroupChunks;
    set_chunks(of.source, first, num == 0 ? first + kGroupChunks - 1 : first, begin);
    if (of.group == kRouteGroups - 1) set_chunks(of.source, layout::kMaxChunks, layout::kMaxChunks, begin + num);
  }

  __device__ static uint32_t thread_of_all() { return blockIdx.x * kThreads + threadIdx.x; }
  __device__ static uint32_t num_all_threads() { return gridDim.x * kThreads; }

  // The messages that arrive: the warps of all blocks take parts of a source's groups, a message in each thread. Warps that have counted come last.
  __device__ void settle_received() const {
    const int num_parts = (args_.group_tokens + kWarpThreads - 1) / kWarpThreads;
    const int num = num_ranks_ * kRouteGroups * num_parts, num_warps = kRouteWarps * static_cast<int>(gridDim.x);
    const int warp = kRouteWarps - 1 - static_cast<int>(threadIdx.x) / kWarpThreads;
#pragma unroll 1
    for (int i = warp * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x); i < num; i += num_warps) {
      const auto source_part = static_cast<uint32_t>(i / kRouteGroups), part = source_part / static_cast<uint32_t>(num_ranks_);
      const SourceGroup of{static_cast<int>(source_part - part * num_ranks_), i % kRouteGroups};
      const int32_t nth = static_cast<int32_t>(part) * kWarpThreads + lane();
      if (nth < rows_.num_messages(of)) settle_message(of, nth);
    }
  }

  // The nth message of a group.
  __device__ void settle_message(SourceGroup of, int32_t nth) const {
    const std::byte* const from = bank_of(of.source);
    const int32_t first_token = of.group * args_.group_tokens, nth_of_source = rows_.messages_before(of) + nth;
    const int32_t message = rows_.received_begin(of.source) + nth_of_source;
    const auto* const tokens = reinterpret_cast<const int32_t*>(from + args_.offsets.tokens) + first_token + nth;
    const int32_t token = tokens[0], token_before = nth > 0 ? tokens[-1] : first_token;
    const auto* const words =
        reinterpret_cast<const uint32_t*>(from + args_.offsets.entries) + int64_t{first_token + nth} * plan_.topk_stride;
#pragma unroll 2
    for (int k = 0; k < plan_.topk_stride; k += kEntryQuad) settle_quad(of, message, k, *reinterpret_cast<const uint4*>(words + k));
    plan_.source_token[message] = token;
    // The group's first chunk begins with its first message in any case.
    const int first_chunk = of.group * kGroupChunks, chunk = chunk_in_group(token - first_token);
    set_chunks(of.source, first_chunk + chunk_in_group(token_before - first_token) + 1, first_chunk + chunk, nth_of_source);
    if (nth + 1 == rows_.num_messages(of))
      set_chunks(of.source, first_chunk + chunk + 1, first_chunk + kGroupChunks - 1, nth_of_source + 1);
  }

  __device__ int chunk_in_group(int32_t token) const {
    int chunk = 0;
#pragma unroll
    for (int c = 1; c < kGroupChunks; ++c) chunk += token >= c * plan_.tokens_per_chunk ? 1 : 0;
    return chunk;
  }

  // Entries of a message that arrives, from k on.
  __device__ void settle_quad(SourceGroup of, int32_t message, int k, uint4 words) const {
    const int64_t at = int64_t{message} * plan_.topk_stride + k;
    const int32_t message_row = rows_.bounded(message);
    int4 experts, rows;
    const auto settle_entry = [&](uint32_t word, int32_t& expert, int32_t& row) {
      expert = row = -1;
      if (word == layout::RoutingBankLayout::kNotHere) return;
      expert = static_cast<int32_t>(word & ((1u << args_.expert_bits) - 1));
      row = kExpertRows ? rows_.received_row(of, expert, static_cast<int32_t>(word >> args_.expert_bits)) : message_row;
    };
    settle_entry(words.x, experts.x, rows.x);
    settle_entry(words.y, experts.y, rows.y);
    settle_entry(words.z, experts.z, rows.z);
    settle_entry(words.w, experts.w, rows.w);
    *reinterpret_cast<int4*>(plan_.received_experts + at) = experts;
    *reinterpret_cast<int4*>(plan_.received_rows + at) = rows;
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
    for (int32_t i = tokens.begin * plan_.messages_per_token + lane(); i < end; i += kWarpThreads) {
      const auto [to, nth] = plan_.messages[i];
      if (to >= 0) plan_.messages[i].row = kExpertRows ? 0 : rows_.message_row(own_.nth_group(), to, nth + before[to]);
    }
  }

  __device__ void settle_own_entries() const {
    const int32_t* const before = own_.before();
    const TokenRange tokens = own_.tokens();
    const int32_t end = tokens.end * plan_.num_topk;
#pragma unroll 2
    for (int32_t i = tokens.begin * plan_.num_topk + lane(); i < end; i += kWarpThreads) {
      const int32_t expert = plan_.experts[i], position = plan_.entry_rows[i];
      if (expert >= 0) plan_.entry_rows[i] = rows_.entry_row(own_.nth_group(), expert, own_.rank_of(expert), position + before[expert]);
    }
  }

  __device__ static int32_t lane() { return static_cast<int32_t>(device::lane_idx()); }

  const RouteArgs& args_;
  const PlanView& plan_;
  const uint64_t last_epoch_;  // that the lane has begun before
  const Operation op_;
  const int rank_;
  const int num_ranks_;
  const int num_counts_;
  const int64_t banks_offset_;  // of this epoch's banks in a window
  std::byte** const windows_;   // [num_ranks] nullptr: the rank is masked
  const TokenCounts<kExpertRows> own_;
  const RowTables<kExpertRows> rows_;
  bool began_last_ = false;  // thread 0: all other blocks had the epoch before
};

template <bool kExpertRows>
__global__ void __launch_bounds__(kThreads, 1) route_kernel(const __grid_constant__ RouteArgs args) {
  extern __shared__ __align__(16) int32_t shared[];
  int32_t* workspace = shared;
  if (args.workspace != nullptr) workspace = args.workspace + blockIdx.x * args.memory.size;
  Route<kExpertRows>(args, workspace).run();
}

}  // namespace

RouteArgs::RouteArgs(const ExchangeView& of_exchange, const PlanView& of_plan, int32_t num_blocks)
    : exchange(of_exchange),
      plan(of_plan),
      memory(plan, exchange.num_ranks, num_blocks),
      inverse_experts(RankOfExpert::inverse_of(plan.local_experts)) {
  const layout::DeviceWindowLayout& window = exchange.layout;
  const layout::RoutingBankLayout bank = plan.routing_bank(exchange.num_ranks);
  offsets.banks = window.routing(exchange.lane, 0, 0);
  offsets.odd_banks = window.routing(exchange.lane, 1, 0) - offsets.banks;
  offsets.bank_bytes = window.routing_bytes;
  offsets.tokens = bank.source_tokens();
  offsets.entries = bank.entries();
  group_tokens = bank.group_tokens();
  expert_bits = bank.expert_bits();
}

cudaError_t prepare_route() {
  const cudaError_t error = allow_shared(route_kernel<false>, RouteMemory::kSharedBytes);
  return error != cudaSuccess ? error : allow_shared(route_kernel<true>, RouteMemory::kSharedBytes);
}

cudaError_t launch_route(const RouteArgs& args, cudaStream_t stream) {
  const int64_t shared_bytes = args.workspace != nullptr ? 0 : args.memory.size * static_cast<int64_t>(sizeof(int32_t));
  const LaunchShape shape{args.memory.num_blocks, kThreads, shared_bytes, false};
  return launch(args.plan.has_expert_rows() ? route_kernel<true> : route_kernel<false>, shape, stream, args);
}

}  // namespace tern::kernels
