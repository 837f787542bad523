// SPDX-License-Identifier: Apache-2.0
// Dispatch: every rank pulls the rows of its messages from where their sources have them, once for each message, and puts them into all rows
// of its outputs that they belong to.
//
//   staging warps   put this rank's tokens (cast, if asked for) into its window and raise a flag for each finished chunk, unless they are
//                   in window memory already; then write what follows from the plan alone
//   pulling warps   walk over the received messages, wait for their chunks, and copy; before that they deliver this rank's rows where that is
//                   possible (delivery.cuh), which nobody pulls then
//
// A staging warp waits for nothing that another rank does in this operation, so every chunk is finished some time.
#include "kernels/delivery.cuh"
#include "kernels/dispatch.h"
#include "kernels/dispatch_outputs.cuh"
#include "kernels/message_arrivals.cuh"
#include "kernels/message_sides.cuh"
#include "kernels/ring.cuh"
#include "kernels/shared_memory.h"
#include "kernels/token_source.cuh"
#include "kernels/transfer.cuh"

namespace tern::kernels {
namespace {

constexpr int kMostThreads = 512;
// A row of 7168 bytes: few warps stage, so each has much on its way.
constexpr int kStageUnroll = 14;
constexpr int kPullBarrier = 1;
constexpr int kOpenBarrier = 2;  // of all warps: the sources are open

__host__ __device__ constexpr SharedLayout shared_layout_of(const DispatchArgs& args, bool bulk_copies) {
  return {args.transfer.exchange.num_ranks, args.roles.num_pull_warps, args.pieces.num_stages, args.pieces.stage_bytes, bulk_copies};
}

// Puts this rank's tokens into its staging; one warp. The warps of all blocks take the next tokens when they come to them: SMs stage at very
// different speeds, and a chunk is there when the slowest has done its part of it.
class TokenStager {
 public:
  __device__ TokenStager(const DispatchArgs& args, const Transfer& transfer, int64_t warp, int64_t num_warps)
      : args_(args), transfer_(transfer), source_(args), num_warps_(num_warps), begin_(begin_of(warp)) {
    const TransferArgs& t = args.transfer;
    end_token_ = min(int64_t{args.plan.tokens_at(t.exchange.rank)}, int64_t{t.end_chunk} * t.tokens_per_chunk);
  }

  // Tokens in a row are reported together if they are of one chunk, because each report waits for their stores; and when loads of the next ones
  // are under way.
  __device__ void run() {
    while (begin_ < end_token_) {
      const uint32_t taken = device::lane_idx() == 0 ? atomicAdd(&args_.transfer.exchange.state->runs_taken, 1u) : 0;
      const int64_t end = min(begin_ + args_.stage_run, end_token_);
      const TokenSource::Weights weights = args_.carries_weights ? source_.load_weights(begin_, end) : TokenSource::Weights{};
      for (int64_t token = begin_; token < end; ++token) stage_token(token);
      report();
      if (args_.carries_weights) source_.put_weights(begin_, end, [&](int64_t token) { return weights_at(token); }, weights);
      __syncwarp();
      staged_ = {begin_, static_cast<uint32_t>(end - begin_)};
      begin_ = begin_of(num_warps_ + __shfl_sync(~0u, taken, 0));
    }
    report();
  }

 private:
  struct Run {
    int64_t begin;
    uint32_t num_tokens;
  };

  __device__ int64_t begin_of(int64_t run) const { return args_.transfer.first_token() + run * args_.stage_run; }
  __device__ std::byte* slot_of(int64_t token) const {
    return transfer_.staging() + (token - args_.transfer.first_token()) * args_.slot.stride();
  }
  __device__ float* weights_at(int64_t token) const { return reinterpret_cast<float*>(slot_of(token) + args_.slot.weights()); }

  __device__ void stage_token(int64_t token) {
    std::byte* const slot = slot_of(token);
    std::byte* const scales_at = slot + args_.slot.scales();
    const bool has_scales = args_.slot.scale_bytes > 0;
    const TokenSource::Scales scales = has_scales ? source_.load_scales(token) : TokenSource::Scales{};
    if (args_.slot.row_bytes > 0) source_.put_row<kStageUnroll>(token, slot + args_.slot.row(), scales_at, [&] { report(); });
    if (has_scales) source_.put_scales(token, scales_at, scales);
  }

  // What was staged last, and not reported: counts it, and tells everybody when its chunk is complete.
  __device__ void report() {
    if (staged_.num_tokens == 0) return;
    const auto chunk = static_cast<int>(staged_.begin / args_.transfer.tokens_per_chunk);
    const int64_t chunk_begin = int64_t{chunk} * args_.transfer.tokens_per_chunk;
    const auto total = static_cast<uint32_t>(min(end_token_ - chunk_begin, int64_t{args_.transfer.tokens_per_chunk}));
    int is_complete = 0;
    if (device::lane_idx() == 0) is_complete = transfer_.complete(0, chunk, staged_.num_tokens, total) ? 1 : 0;
    staged_.num_tokens = 0;
    if (__shfl_sync(~0u, is_complete, 0) == 0) return;
    __syncwarp();  // the other threads' releases cover what the first has seen
    for (int peer = static_cast<int>(device::lane_idx()); peer < transfer_.num_ranks(); peer += kWarpThreads)
      transfer_.raise_chunk(peer, chunk);
  }

  const DispatchArgs& args_;
  const Transfer& transfer_;
  const TokenSource source_;
  const int64_t num_warps_;
  int64_t begin_;  // of the tokens that are staged now
  Run staged_ = {};
  int64_t end_token_;
};

// Pulls the messages of one warp. Arrivals: those that it gets, AheadArrivals or DealtArrivals.
template <typename Arrivals>
class MessagePuller {
 public:
  __device__ MessagePuller(const DispatchArgs& args, const SourceView* sources, const Arrivals& arrivals)
      : args_(args), plan_(args.plan), sources_(sources), sides_(args), arrivals_(arrivals) {}

  // Ordinary loads and stores.
  __device__ void pull_by_threads() {
    Message message;
    while (arrivals_.next(message)) {
      if (!arrivals_.has_come(message, true)) return;
      const SourceView& source = sources_[message.source];
      const int32_t* rows = plan_.received_rows + int64_t{message.index} * plan_.topk_stride;
      const std::byte* scales = source.scales + message.token * source.scale_stride;
      const MessageSides::Share share =
          sides_.load(scales, reinterpret_cast<const float*>(source.weights + message.token * source.weight_stride));
      copy_row(source.rows + message.token * source.row_stride, args_.row_bytes, [&](auto visit) {
        if (!plan_.has_expert_rows()) {
          if (message.index < args_.out.num_rows) visit(args_.out.tokens + message.index * args_.row_bytes);
          return;
        }
        for (int k = 0; k < plan_.num_topk; ++k)
          if (rows[k] >= 0) visit(args_.out.tokens + rows[k] * args_.row_bytes);
      });
      sides_.store(message.index, rows, plan_.received_experts + int64_t{message.index} * plan_.topk_stride, scales, share);
    }
  }

  // Bulk copies: the functions of run_ring().
  static constexpr int kPendingStores = 1;
  __device__ RingLoad load(std::byte* stage, uint64_t* arrivals, bool may_wait) {
    settle_entries();
    if (!is_begun_) {
      if (!is_visited_ && !arrivals_.next(loading_)) return RingLoad::kNoMore;
      is_visited_ = true;
      is_begun_ = arrivals_.has_come(loading_, may_wait);
      if (!is_begun_) return may_wait ? RingLoad::kNoMore : RingLoad::kNotYet;
    }
    if (device::lane_idx() == 0) load_piece(stage, arrivals);
    fetch_entries(stage);
    if (++load_piece_ == args_.pieces.num_pieces) {
      load_piece_ = 0;
      is_visited_ = is_begun_ = false;
    }
    return RingLoad::kStarted;
  }
  __device__ void store(std::byte* stage) {
    const RowPieces& p = args_.pieces;
    if (stage == fetched_for_) settle_entries();
    __syncwarp();  // entries and tag were written by other threads
    const PieceTag tag = *tag_of(stage);
    const auto* entries = reinterpret_cast<const int32_t*>(stage + p.entries);
    const int64_t at = int64_t{store_piece_} * p.piece_bytes;
    if (plan_.has_expert_rows()) {
      for (int k = static_cast<int>(device::lane_idx()); k < plan_.num_topk; k += kWarpThreads)
        if (entries[k] >= 0 && args_.row_bytes > 0)
          device::bulk_store(args_.out.tokens + entries[k] * args_.row_bytes + at, stage, piece_size(store_piece_));
    } else if (device::lane_idx() == 0 && tag.message < args_.out.num_rows && args_.row_bytes > 0) {
      device::bulk_store(args_.out.tokens + tag.message * args_.row_bytes + at, stage, piece_size(store_piece_));
    }
    if (++store_piece_ < p.num_pieces) return;
    store_piece_ = 0;
    const std::byte* scales = stage + tag.scales_at;
    sides_.store(tag.message, entries, entries, scales, sides_.load(scales, reinterpret_cast<const float*>(stage + tag.weights_at)));
  }

 private:
  // At the end of a stage.
  struct alignas(16) PieceTag {
    int32_t message;
    int32_t scales_at, weights_at;  // in the stage
  };
  static_assert(sizeof(PieceTag) == kPieceTagBytes);
  __device__ PieceTag* tag_of(std::byte* stage) const {
    return reinterpret_cast<PieceTag*>(stage + args_.pieces.stage_bytes - kPieceTagBytes);
  }

  __device__ uint32_t piece_size(int piece) const {
    return static_cast<uint32_t>(min(int64_t{args_.pieces.piece_bytes}, args_.row_bytes - int64_t{piece} * args_.pieces.piece_bytes));
  }

  // One thread. The scales and weights come with the last piece; in one copy with it where they follow the row.
  __device__ void load_piece(std::byte* stage, uint64_t* arrivals) const {
    const RowPieces& p = args_.pieces;
    const SourceView& source = sources_[loading_.source];
    const uint32_t row_part = piece_size(load_piece_);
    const bool is_last = load_piece_ + 1 == p.num_pieces;
    const uint32_t scale_part = is_last ? static_cast<uint32_t>(layout::align_up(args_.scale_bytes, 16)) : 0;
    const uint32_t weight_part = is_last && args_.carries_weights ? static_cast<uint32_t>(plan_.topk_bytes()) : 0;
    const std::byte* row = source.rows + loading_.token * source.row_stride + int64_t{load_piece_} * p.piece_bytes;
    const auto row_end = static_cast<int32_t>(layout::align_up(row_part, 16));
    const int32_t scales_at = source.sides_follow ? row_end : p.scales;
    const int32_t weights_at = source.sides_follow ? row_end + static_cast<int32_t>(scale_part) : p.weights;
    *tag_of(stage) = {loading_.index, scales_at, weights_at};
    device::expect_bytes(arrivals, row_part + scale_part + weight_part);
    if (source.sides_follow) {
      device::bulk_load(stage, row, row_part + scale_part + weight_part, arrivals);
      return;
    }
    if (row_part > 0) device::bulk_load(stage, row, row_part, arrivals);
    if (scale_part > 0) device::bulk_load(stage + scales_at, source.scales + loading_.token * source.scale_stride, scale_part, arrivals);
    if (weight_part > 0)
      device::bulk_load(stage + weights_at, source.weights + loading_.token * source.weight_stride, weight_part, arrivals);
  }

  // What the message's entries are here (rows in the expert layouts, otherwise local experts): asked for when the piece is, put into its stage
  // when the next one is, so that nobody waits for them.
  __device__ void fetch_entries(std::byte* stage) {
    if (!plan_.has_expert_rows() && !args_.carries_weights) return;
    const int32_t* table = plan_.has_expert_rows() ? plan_.received_rows : plan_.received_experts;
    fetched_for_ = stage;
#pragma unroll
    for (int i = 0; i < kMostEntries; ++i) {
      const int k = static_cast<int>(device::lane_idx()) + i * kWarpThreads;
      if (k < plan_.num_topk) fetched_[i] = table[int64_t{loading_.index} * plan_.topk_stride + k];
    }
  }
  __device__ void settle_entries() {
    if (fetched_for_ == nullptr) return;
    auto* entries = reinterpret_cast<int32_t*>(fetched_for_ + args_.pieces.entries);
#pragma unroll
    for (int i = 0; i < kMostEntries; ++i) {
      const int k = static_cast<int>(device::lane_idx()) + i * kWarpThreads;
      if (k < plan_.num_topk) entries[k] = fetched_[i];
    }
    fetched_for_ = nullptr;
  }

  const DispatchArgs& args_;
  const PlanView& plan_;
  const SourceView* const sources_;
  const MessageSides sides_;
  Arrivals arrivals_;
  Message loading_ = {};
  bool is_visited_ = false;  // loading_ is the next one
  bool is_begun_ = false;    // and its chunk is there
  int load_piece_ = 0;
  int store_piece_ = 0;
  static constexpr int kMostEntries = 2;  // of a thread: top-k is at most 64
  int32_t fetched_[kMostEntries] = {};
  std::byte* fetched_for_ = nullptr;
};

// What all warps of a block know of the others' calls.
struct Sources {
  SourceView* views;
  bool* are_open;  // false: the exchange has failed
};

// One warp. The epoch of the route in front, while that has not ended, but has raised all its flags and has seen those of all others; 0: it may
// be anywhere. What it settles can be seen at its end.
__device__ uint64_t running_route(const DispatchArgs& args) {
  const LaneState* const state = args.transfer.exchange.state;
  const auto lane = static_cast<int>(device::lane_idx());
  const uint64_t epoch = __shfl_sync(~0u, load_relaxed_sys(&state->epoch) + 1, 0);
  const bool has_raised = lane >= args.route_blocks || load_acquire_sys(&state->routed[lane]) == epoch;
  const bool is_running = __all_sync(~0u, has_raised) != 0;
  __syncwarp();
  return is_running ? epoch : 0;
}
static_assert(kMostRouteBlocks <= kWarpThreads);

// One warp. Tokens do not follow from a route, and nothing stands between one of the same call and this kernel: who stages need not wait for
// its end.
__device__ Transfer begin(const DispatchArgs& args, bool stages) {
  const uint64_t route = stages && args.route_blocks > 0 ? running_route(args) : 0;
  if (route != 0) return {args.transfer, route + 1};
  device::await_kernel_before();
  return Transfer(args.transfer);
}

// The part of a staging warp.
__device__ void stage(const DispatchArgs& args, const Transfer& transfer) {
  const int num_warps = args.roles.num_stage_warps, warp = static_cast<int>(threadIdx.x) / kWarpThreads;
  if (args.transfer.sends) {
    const bool has_failed = args.route_blocks > 0 && transfer.operation().is_aborted();  // perhaps the route has
    if (!transfer.await_staging() || has_failed) return;
    if (blockIdx.x == 0 && warp == 0) transfer.announce(args.plan.tokens_at(args.transfer.exchange.rank));
    if (args.slot.stride() > 0) TokenStager(args, transfer, int64_t{warp} * gridDim.x + blockIdx.x, int64_t{num_warps} * gridDim.x).run();
  }
  device::await_kernel_before();
  if (args.transfer.sends && blockIdx.x == 0 && warp == 0) transfer.post_consumed_before();
  if (args.writes_outputs) OutputWriter(args).write();
}

// What staging warps do in the end.
__device__ void take_weights(const DispatchArgs& args, const Transfer& transfer, const Sources& sources) {
  device::sync_some_warps(kOpenBarrier, args.roles.num_threads());
  const auto num_threads = static_cast<uint32_t>(args.roles.num_stage_warps * kWarpThreads);
  if (*sources.are_open) receive_weights(args, transfer, sources.views, blockIdx.x * num_threads + threadIdx.x, gridDim.x * num_threads);
}

// All pulling warps of a block: waits for the calls of all sources. False: the exchange has failed.
__device__ bool open_sources(const DispatchArgs& args, const Transfer& transfer, const Sources& sources, int thread) {
  const int num_threads = args.roles.num_pull_warps * kWarpThreads;
  if (!transfer.open_sources(sources.views, thread, num_threads)) *sources.are_open = false;
  if (args.route_blocks > 0 && thread == 0 && transfer.operation().is_aborted()) *sources.are_open = false;  // perhaps the route has
  device::fence_async_proxy();  // the copy engine reads what lies in place, and writes outputs
  device::sync_some_warps(kPullBarrier, num_threads);
  if (args.takes_weights()) device::arrive_at_barrier(kOpenBarrier, args.roles.num_threads());
  return *sources.are_open;
}

// The part of a pulling warp.
template <bool kBulk, typename Arrivals>
__device__ void pull(const DispatchArgs& args, const Transfer& transfer, const Sources& sources, const Ring& ring) {
  const auto num_blocks = static_cast<int32_t>(gridDim.x), block = static_cast<int32_t>(blockIdx.x);
  const int thread = static_cast<int>(threadIdx.x) - args.roles.num_stage_warps * kWarpThreads;
  const int32_t warp = thread / kWarpThreads * num_blocks + block, num_warps = args.roles.num_pull_warps * num_blocks;
  MessagePuller<Arrivals> puller(args, sources.views, Arrivals(args, transfer, sources.views, warp, num_warps));
  if (!open_sources(args, transfer, sources, thread)) return;
  if constexpr (kBulk)
    run_ring(ring, puller);
  else
    puller.pull_by_threads();
}

// The part of a pulling warp where this rank's rows are delivered: first these, then it pulls from those who do not deliver theirs.
__device__ void deliver(const DispatchArgs& args, const Transfer& transfer, const Sources& sources, const Ring& ring) {
  const auto num_blocks = static_cast<int32_t>(gridDim.x), block = static_cast<int32_t>(blockIdx.x);
  const int thread = static_cast<int>(threadIdx.x) - args.roles.num_stage_warps * kWarpThreads;
  const int32_t warp = thread / kWarpThreads * num_blocks + block, num_warps = args.roles.num_pull_warps * num_blocks;
  RowDelivery delivery(args, sources.views, warp, num_warps, [&] { return open_sources(args, transfer, sources, thread); });
  run_ring(ring, delivery);
  device::fence_async_proxy();  // what the copy engine has written, the end of the kernel publishes
  if (!delivery.is_open()) return;
  bool pulls = false;
  for (int source = 0; source < transfer.num_ranks(); ++source)
    pulls = pulls || !(sources.views[source].delivers || transfer.operation().is_masked(source));
  if (!pulls) return;
  ring.end();
  ring.init();
  MessagePuller<AheadArrivals> puller(args, sources.views, AheadArrivals(args, transfer, sources.views, warp, num_warps));
  run_ring(ring, puller);
}

template <bool kBulk>
__global__ void __launch_bounds__(kMostThreads) dispatch_kernel(const __grid_constant__ DispatchArgs args) {
  extern __shared__ __align__(128) std::byte shared[];
  const SharedLayout shared_layout = shared_layout_of(args, kBulk);
  __shared__ bool are_open;
  if (threadIdx.x == 0) are_open = true;
  if (args.route_blocks == 0) device::await_kernel_before();  // perhaps a kernel of the caller's, behind the route
  if (Operation{args.transfer.exchange, args.transfer.operation, 0}.is_poisoned()) {
    device::await_kernel_before();  // the end of this kernel says that the route has ended too
    return;
  }
  const Sources sources{reinterpret_cast<SourceView*>(shared), &are_open};
  const int nth = static_cast<int>(threadIdx.x) / kWarpThreads - args.roles.num_stage_warps;
  const Transfer transfer = begin(args, nth < 0);
  if (nth < 0) {
    stage(args, transfer);
    if (args.takes_weights()) take_weights(args, transfer, sources);
  } else if (args.transfer.receives) {
    const RowPieces& p = args.pieces;
    const Ring ring{shared + shared_layout.rings + nth * p.num_stages * p.stage_bytes,
                    reinterpret_cast<uint64_t*>(shared + shared_layout.arrivals) + nth * p.num_stages, p.num_stages, p.stage_bytes};
    if constexpr (kBulk) ring.init();
    if (kBulk && args.transfer.delivers)
      deliver(args, transfer, sources, ring);
    else if (args.pull_run > 0)
      pull<kBulk, DealtArrivals>(args, transfer, sources, ring);
    else
      pull<kBulk, AheadArrivals>(args, transfer, sources, ring);
  }
  transfer.finish(sources.views);
}

}  // namespace

cudaError_t prepare_dispatch(bool bulk_copies) {
  const cudaError_t error = allow_shared(dispatch_kernel<false>, kMostSourceBytes);
  return error != cudaSuccess || !bulk_copies ? error : allow_shared(dispatch_kernel<true>, kMostSharedBytes);
}

cudaError_t launch_dispatch(const DispatchArgs& args, bool bulk_copies, int num_blocks, cudaStream_t stream) {
  const LaunchShape shape{num_blocks, args.roles.num_threads(), shared_layout_of(args, bulk_copies).bytes, args.follows_closely};
  return launch(bulk_copies ? dispatch_kernel<true> : dispatch_kernel<false>, shape, stream, args);
}

}  // namespace tern::kernels
