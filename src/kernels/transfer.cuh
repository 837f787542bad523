// SPDX-License-Identifier: Apache-2.0
// The protocol of one round of rows, as the warps of dispatch and combine see it.
//
//   sending    announce(): where this rank's rows are;  await_staging();  stage rows;  complete(...): counts them, raises the chunk's flags
//   receiving  open_sources(): where the others' rows are;  await_chunk(...): a token's row may be read;  pull rows
//   both       finish(): the last block says that this rank needs nothing of the others' any more
//
// Memory: what a rank staged before complete() is visible to a peer's warp after await_chunk(), for ordinary and for bulk loads.
#pragma once

#include "device/bulk.cuh"
#include "kernels/operation.cuh"
#include "kernels/shared_memory.h"
#include "kernels/transfer.h"

namespace tern::kernels {

// Where one source's rows are, as this rank reaches them.
struct SourceView {
  const std::byte* rows;
  const std::byte* scales;
  const std::byte* weights;
  int64_t row_stride, scale_stride, weight_stride;
  std::byte* takes_rows;    // the source's outputs, into which this rank may deliver its rows; nullptr: none
  std::byte* takes_scales;  // and its scales
  bool is_staged;           // there are chunk flags to wait for
  bool sides_follow;        // all parts are staged, so that scales and weights stand right behind the row
  bool delivers;            // rows and scales are not pulled: the source writes them into this rank's outputs
  bool rows_in_heap;        // rows lie in the order of the source's outputs, otherwise in that of this rank's tokens (combine)
  uint64_t chunks_seen;     // that are there, as far as the block's warps tell each other: a bit each (dispatch)
};
static_assert(sizeof(SourceView) == kSourceViewBytes);

class Transfer {
 public:
  __device__ explicit Transfer(const TransferArgs& args) : Transfer(args, args.sends ? args.exchange.state->epoch + 1 : *args.ticket) {}
  __device__ Transfer(const TransferArgs& args, uint64_t epoch) : args_(args), op_{args.exchange, args.operation, epoch} {}

  __device__ const Operation& operation() const { return op_; }
  __device__ int rank() const { return args_.exchange.rank; }
  __device__ int num_ranks() const { return args_.exchange.num_ranks; }

  // Where this rank stages what all peers read, or what it pushes to `peer`.
  __device__ std::byte* staging() const { return op_.own_window() + bank(); }
  __device__ std::byte* staging_at(int peer) const { return args_.exchange.window(peer) + bank() + rank() * args_.sender_bytes; }

  // One warp. True when all peers have done with what any rank's staging held two epochs ago.
  __device__ bool await_staging() const {
    bool ok = true;
    for (int peer = static_cast<int>(device::lane_idx()); peer < num_ranks(); peer += kWarpThreads)
      ok = ok && (op_.is_masked(peer) || op_.await_bank(peer));
    const bool all_ok = __all_sync(~0u, ok) != 0;
    __syncwarp();
    return all_ok;
  }

  // One warp of one block, after await_staging().
  __device__ void announce(int num_tokens) const {
    for (int peer = static_cast<int>(device::lane_idx()); peer < num_ranks(); peer += kWarpThreads) {
      if (op_.is_masked(peer)) continue;
      layout::CallCell* cell = op_.call(peer, rank());
      cell->shape = args_.shape;
      cell->epoch = op_.epoch;
      cell->operation = op_.operation;
      cell->num_tokens = num_tokens;
      cell->rows = offered(args_.rows);
      cell->scales = offered(args_.scales);
      cell->weights = offered(args_.weights);
      cell->takes_rows_at = args_.takes_rows_at;
      cell->takes_scales_at = args_.takes_scales_at;
      cell->delivers = args_.delivers ? 1 : 0;
      store_release_sys(&op_.progress(peer, rank())->ready, op_.epoch);
    }
  }

  // One warp of one block: what kernels before this one took from the peers, they have read.
  __device__ void post_consumed_before() const {
    for (int peer = static_cast<int>(device::lane_idx()); peer < num_ranks(); peer += kWarpThreads)
      if (!op_.is_masked(peer)) op_.post_consumed_before(peer, op_.epoch - 1);
  }

  // One thread, for what its warp has staged: `num` more of the `total` rows of (peer, chunk) are there. True if they were the last.
  __device__ bool complete(int peer, int chunk, uint32_t num, uint32_t total) const {
    uint32_t* counter = args_.exchange.staged_counters + peer * layout::kMaxChunks + chunk;
    if (device::add_acq_rel_gpu(counter, num) + num != total) return false;
    *counter = 0;
    return true;
  }
  // One thread: the chunk is there for `peer`.
  __device__ void raise_chunk(int peer, int chunk) const {
    if (!op_.is_masked(peer)) store_release_sys(op_.staged_flag(peer, rank(), chunk), op_.epoch);
  }

  // Threads i of n: waits for the calls of all sources and notes where their rows are. False: the exchange has failed.
  __device__ bool open_sources(SourceView* sources, int i, int n) const {
    bool ok = true;
    for (int source = i; source < num_ranks(); source += n) {
      sources[source] = {};
      if (op_.is_masked(source)) continue;
      ok = ok && open_source(source, sources[source]);
    }
    return ok;
  }

  __device__ int chunk_of(int32_t token) const { return token / args_.tokens_per_chunk; }
  // One thread: are the rows of the chunk that holds `token` there already?
  __device__ bool has_chunk(const SourceView& view, int source, int32_t token) const {
    return !view.is_staged || load_acquire_sys(op_.staged_flag(rank(), source, chunk_of(token))) >= op_.epoch;
  }
  // One thread: waits until the rows of the chunk that holds `token` are there.
  __device__ bool await_chunk(const SourceView& view, int source, int32_t token) const {
    if (!view.is_staged) return true;
    return op_.await_patiently(op_.staged_flag(rank(), source, chunk_of(token)), op_.epoch, source);
  }

  // One warp: has a warp of this block seen that the chunk is there?
  __device__ bool has_seen_chunk(const SourceView& view, int chunk) const {
    const bool was_seen = (device::load_acquire_block(&view.chunks_seen) >> chunk & 1) != 0;
    const bool was_seen_by_any = __ballot_sync(~0u, was_seen) != 0;
    __syncwarp();
    return was_seen_by_any;
  }
  // One warp: the threads look whether this chunk and the next ones are there, and tell the block. Is this one?
  __device__ bool look_at_chunks(SourceView& view, int source, int chunk) const {
    const int own = chunk + static_cast<int>(device::lane_idx());
    const bool is_there = own < args_.end_chunk && load_acquire_sys(op_.staged_flag(rank(), source, own)) >= op_.epoch;
    return note_chunks(view, __ballot_sync(~0u, is_there), chunk);
  }
  // One warp, whose threads have acquired the flags of chunks: bit i for first + i. Is the first among them?
  __device__ bool note_chunks(SourceView& view, uint32_t seen, int first) const {
    device::fence_async_proxy();  // what each thread has acquired, the copy engine reads from now on
    __syncwarp();                 // and all may
    if (seen != 0 && device::lane_idx() == 0) device::or_release_block(&view.chunks_seen, uint64_t{seen} << first);
    return (seen & 1) != 0;
  }

  // All threads of all blocks, at the end. `sources` as opened, where some may deliver.
  __device__ void finish(const SourceView* sources = nullptr) const {
    LaneState* state = args_.exchange.state;
    if (!op_.is_last_block(&state->blocks_done)) return;
    if (args_.receives) op_.post_consumed();
    if (op_.is_aborted() && threadIdx.x == 0) op_.report_abort();
    if (args_.in_place || args_.takes_rows_at >= 0) await_others(sources);
    __syncthreads();
    if (threadIdx.x != 0) return;
    state->runs_taken = state->parts_taken = 0;
    if (!args_.sends) return;
    state->epoch = op_.epoch;
    if (!args_.receives) *args_.ticket = op_.epoch;
  }

 private:
  __device__ int64_t bank() const { return args_.exchange.layout.staging(args_.exchange.lane, op_.epoch); }

  __device__ layout::PulledPart offered(layout::PulledPart part) const {
    if (part.in_heap == 0) part.offset += bank() + rank() * args_.sender_bytes;
    return part;
  }

  __device__ bool open_source(int source, SourceView& view) const {
    int64_t* wait_ns = args_.wait_ns != nullptr && blockIdx.x == 0 ? args_.wait_ns + source : nullptr;  // every block waits, one counts
    if (!op_.await(&op_.progress(rank(), source)->ready, op_.epoch, source, wait_ns)) return false;
    const layout::CallCell& cell = *op_.call(rank(), source);
    if (cell.epoch != op_.epoch || cell.operation != op_.operation || cell.shape != args_.shape) {
      op_.give_up(TERN_MISMATCH, source, op_.epoch, op_.epoch);
      return false;
    }
    view.rows = address(source, cell.rows);
    view.scales = address(source, cell.scales);
    view.weights = address(source, cell.weights);
    view.row_stride = cell.rows.stride;
    view.scale_stride = cell.scales.stride;
    view.weight_stride = cell.weights.stride;
    view.is_staged = (cell.rows.staged | cell.scales.staged | cell.weights.staged) != 0;
    view.sides_follow = (cell.rows.in_heap | cell.scales.in_heap | cell.weights.in_heap) == 0;
    view.delivers = cell.delivers != 0 && args_.takes_rows_at >= 0;
    view.rows_in_heap = cell.rows.in_heap != 0;
    view.takes_rows = cell.takes_rows_at >= 0 ? args_.exchange.heap(source) + cell.takes_rows_at : nullptr;
    view.takes_scales = cell.takes_scales_at >= 0 ? args_.exchange.heap(source) + cell.takes_scales_at : nullptr;
    return true;
  }

  __device__ const std::byte* address(int source, const layout::PulledPart& part) const {
    if (part.in_heap != 0) return args_.exchange.heap(source) + part.offset;
    return args_.exchange.window(args_.pushes ? rank() : source) + part.offset;
  }

  // Until they have pulled what lies in place here, and delivered what they do.
  __device__ void await_others(const SourceView* sources) const {
    for (int peer = static_cast<int>(threadIdx.x); peer < num_ranks(); peer += static_cast<int>(blockDim.x)) {
      if (op_.is_masked(peer) || !(args_.in_place || sources[peer].delivers)) continue;
      if (!op_.await(&op_.progress(rank(), peer)->consumed, op_.epoch, peer)) return;
    }
  }

  const TransferArgs& args_;
  const Operation op_;
};

}  // namespace tern::kernels
