// SPDX-License-Identifier: Apache-2.0
// Combine: the owner of a token pulls one row from each rank that had it (or one for each entry), and sums.
//
//   staging warps   make what is pulled: for each received message one row in this rank's window, summed over its entries, rounded once; or
//                   copies of the entries' rows. Rows that are in window memory in the right form already stay there.
//   pulling warps   walk over this rank's tokens, wait for the chunks of those who have a part of them, and sum in the contract's order
#include "kernels/combine.h"
#include "kernels/messages.cuh"
#include "kernels/shared_memory.h"
#include "kernels/sums.cuh"
#include "kernels/transfer.cuh"

namespace tern::kernels {
namespace {

constexpr int kMostThreads = 640;
constexpr int kPullBarrier = 1;

__host__ __device__ constexpr SharedLayout shared_layout_of(const CombineArgs& args, bool bulk_copies) {
  return {args.transfer.exchange.num_ranks, args.roles.num_pull_warps, args.num_stages, args.stage_bytes, bulk_copies};
}

// What this rank makes for the owners of the messages it received: the Rows of sums.cuh.
class StagedRows {
 public:
  __device__ StagedRows(const CombineArgs& args, const Transfer& transfer, int64_t warp, int64_t num_warps)
      : args_(args), plan_(args.plan), transfer_(transfer), walk_(args.transfer, args.plan, warp, num_warps, args.stage_run) {}

  __device__ bool next_row(SumRow& row) {
    Message message;
    while (walk_.next(message)) {
      const int chunk = message.token / args_.transfer.tokens_per_chunk;
      if (message.source != counted_rank_ || chunk != counted_chunk_) tell();
      counted_rank_ = message.source;
      counted_chunk_ = chunk;
      row = {message.source, message.index, message.token, 0, static_cast<int32_t>(args_.row_bytes)};
      stage_weights(row);
      const bool is_copy = args_.per_entry || !plan_.has_expert_rows();
      if (args_.rows_staged && !is_copy) return true;
      if (args_.rows_staged && !(args_.own_rows_direct && row.rank == transfer_.rank())) copy_rows(row);
      row_done(row);
    }
    tell();
    return false;
  }

  __device__ bool next_terms(const SumRow& row, int batch, Terms& terms) const {
    const int k = batch * 32 + static_cast<int>(device::lane_idx());
    if (batch * 32 >= plan_.num_topk) return false;
    const int64_t entry = int64_t{row.index} * plan_.topk_stride + k;
    const int32_t at = k < plan_.num_topk ? plan_.received_rows[entry] : -1;
    terms.valid = __ballot_sync(~0u, at >= 0);
    terms.address = args_.rows + at * args_.row_bytes;
    if (args_.entry_weights != nullptr && at >= 0) terms.weight = args_.entry_weights[entry];
    return true;
  }

  __device__ bool has_biases() const { return false; }
  __device__ const std::byte* bias(const SumRow&, int) const { return nullptr; }
  __device__ std::byte* out(const SumRow& row) const { return slot_of(row) + args_.slot.row(); }

  __device__ void row_done(const SumRow&) { ++counted_; }

 private:
  // Reports the rows that the warp has made of a chunk, together, because each report waits for their stores; tells the owner when the
  // chunk is complete.
  __device__ void tell() {
    __syncwarp();
    if (counted_ > 0 && device::lane_idx() == 0) {
      const int32_t* chunk_begin = plan_.chunk_begin + counted_rank_ * (layout::kMaxChunks + 1) + counted_chunk_;
      if (transfer_.complete(counted_rank_, counted_chunk_, counted_, static_cast<uint32_t>(chunk_begin[1] - chunk_begin[0])))
        transfer_.raise_chunk(counted_rank_, counted_chunk_);
    }
    counted_ = 0;
  }

  __device__ std::byte* slot_of(const SumRow& row) const {
    return transfer_.staging() + row.rank * args_.transfer.peer_bytes + (row.token - args_.transfer.first_token()) * args_.slot.stride();
  }

  // What owners want as it is.
  __device__ void copy_rows(const SumRow& row) const {
    if (!plan_.has_expert_rows()) {
      if (row.index < plan_.row_capacity)
        copy_row(args_.rows + row.index * args_.row_bytes, args_.row_bytes, [&](auto visit) { visit(out(row)); });
      return;
    }
    for (int k = 0; k < plan_.num_topk; ++k) {
      const int32_t at = plan_.received_rows[int64_t{row.index} * plan_.topk_stride + k];
      if (at >= 0) copy_row(args_.rows + at * args_.row_bytes, args_.row_bytes, [&](auto visit) { visit(out(row) + k * args_.row_bytes); });
    }
  }

  __device__ void stage_weights(const SumRow& row) const {
    if (!args_.returns_weights) return;
    auto* weights = reinterpret_cast<float*>(slot_of(row) + args_.slot.weights());
    for (int k = static_cast<int>(device::lane_idx()); k < plan_.num_topk; k += kWarpThreads) {
      float weight = 0.0f;
      if (plan_.has_expert_rows()) {
        const int32_t at = plan_.received_rows[int64_t{row.index} * plan_.topk_stride + k];
        if (at >= 0) weight = args_.returned_weights[at];
      } else if (row.index < plan_.row_capacity) {
        weight = args_.returned_weights[int64_t{row.index} * plan_.num_topk + k];
      }
      weights[k] = weight;
    }
  }

  const CombineArgs& args_;
  const PlanView& plan_;
  const Transfer& transfer_;
  MessageWalk walk_;
  int counted_rank_ = -1, counted_chunk_ = -1;
  uint32_t counted_ = 0;  // rows of it that are made and not reported
};

// The results of this rank's tokens: the Rows of sums.cuh.
class OwnedRows {
 public:
  __device__ OwnedRows(const CombineArgs& args, const Transfer& transfer, const SourceView* sources, int64_t warp, int64_t num_warps)
      : args_(args), plan_(args.plan), transfer_(transfer), sources_(sources), num_warps_(num_warps) {
    const TransferArgs& t = args.transfer;
    next_ = t.first_token() * args.num_parts + warp;
    end_token_ = min(int64_t{args.plan.num_tokens[t.exchange.rank]}, int64_t{t.end_chunk} * t.tokens_per_chunk);
  }

  __device__ bool next_row(SumRow& row) {
    const auto token = static_cast<int32_t>(next_ / args_.num_parts);
    if (token >= end_token_) return false;
    const auto begin = static_cast<int32_t>(next_ % args_.num_parts) * args_.part_bytes;
    next_ += num_warps_;
    row = {transfer_.rank(), token, token, begin, min(begin + args_.part_bytes, static_cast<int32_t>(args_.row_bytes))};
    if (!await_sources(token)) return false;
    if (begin == 0 && args_.out_topk_weights != nullptr && args_.returns_weights) sum_weights(token);
    return true;
  }

  __device__ bool next_terms(const SumRow& row, int batch, Terms& terms) const {
    const int i = batch * 32 + static_cast<int>(device::lane_idx());
    if (args_.per_entry) return next_entries(row.token, i, terms);
    if (batch * 32 >= plan_.messages_per_token) return false;
    const MessageRef message = message_of(row.token, i);
    const bool valid = message.rank >= 0 && message.row >= 0;
    terms.valid = __ballot_sync(~0u, valid);
    if (valid) {
      const SourceView& source = sources_[message.rank];
      terms.address = source.rows + (source.rows_in_heap ? message.row * args_.row_bytes : row.token * source.row_stride);
    }
    return true;
  }

  __device__ bool has_biases() const { return args_.bias[0] != nullptr || args_.bias[1] != nullptr; }
  __device__ const std::byte* bias(const SumRow& row, int which) const {
    return args_.bias[which] == nullptr ? nullptr : args_.bias[which] + row.token * args_.row_bytes;
  }
  __device__ std::byte* out(const SumRow& row) const { return args_.out_tokens + row.token * args_.row_bytes; }
  __device__ void row_done(const SumRow&) const {}

 private:
  __device__ MessageRef message_of(int32_t token, int m) const {
    if (m >= plan_.messages_per_token) return {-1, -1};
    return plan_.messages[int64_t{token} * plan_.messages_per_token + m];
  }

  // Each thread waits for one of the ranks that have a part of the token.
  __device__ bool await_sources(int32_t token) const {
    bool ok = true;
    for (int m = static_cast<int>(device::lane_idx()); m < plan_.messages_per_token; m += kWarpThreads) {
      const MessageRef message = message_of(token, m);
      if (message.rank >= 0) ok = ok && transfer_.await_chunk(sources_[message.rank], message.rank, token);
    }
    const bool all_ok = __all_sync(~0u, ok) != 0;
    __syncwarp();  // what each thread has acquired, all may read
    return all_ok;
  }

  __device__ bool next_entries(int32_t token, int k, Terms& terms) const {
    if (k - static_cast<int>(device::lane_idx()) >= plan_.num_topk) return false;
    const int64_t entry = int64_t{token} * plan_.num_topk + k;
    const int32_t expert = k < plan_.num_topk ? plan_.experts[entry] : -1;
    const int32_t at = expert >= 0 ? plan_.entry_rows[entry] : -1;
    terms.valid = __ballot_sync(~0u, at >= 0);
    if (at < 0) return true;
    const SourceView& source = sources_[expert / plan_.local_experts];
    terms.address = source.rows + (source.rows_in_heap ? at * args_.row_bytes : token * source.row_stride + k * args_.row_bytes);
    if (args_.token_weights != nullptr) terms.weight = args_.token_weights[entry];
    return true;
  }

  __device__ void sum_weights(int32_t token) const {
    for (int k = static_cast<int>(device::lane_idx()); k < plan_.num_topk; k += kWarpThreads) {
      float sum = 0.0f;
      for (int m = 0; m < plan_.messages_per_token; ++m) {
        const MessageRef message = message_of(token, m);
        if (message.rank < 0) break;
        const SourceView& source = sources_[message.rank];
        sum = __fadd_rn(sum, reinterpret_cast<const float*>(source.weights + token * source.weight_stride)[k]);
      }
      args_.out_topk_weights[int64_t{token} * plan_.num_topk + k] = sum;
    }
  }

  const CombineArgs& args_;
  const PlanView& plan_;
  const Transfer& transfer_;
  const SourceView* const sources_;
  const int64_t num_warps_;
  int64_t next_;  // token * num_parts + part
  int64_t end_token_;
};

// The part of a staging warp.
template <typename Wire>
__device__ void stage(const CombineArgs& args, const Transfer& transfer) {
  if (!args.transfer.sends || !transfer.await_staging()) return;
  const int warp = static_cast<int>(threadIdx.x) / kWarpThreads;
  if (blockIdx.x == 0 && warp == 0) transfer.announce(args.plan.num_tokens[args.transfer.exchange.rank]);
  if (args.slot.stride() == 0) return;
  StagedRows rows(args, transfer, int64_t{warp} * gridDim.x + blockIdx.x, int64_t{args.roles.num_stage_warps} * gridDim.x);
  sum_by_threads<Wire>(rows);
}

// The part of a pulling warp.
template <typename Wire, bool kBulk>
__device__ void pull(const CombineArgs& args, const Transfer& transfer, SourceView* sources, const Ring& ring) {
  if (!args.transfer.receives) return;
  __shared__ int all_ok;
  const int num_threads = args.roles.num_pull_warps * kWarpThreads;
  const int thread = static_cast<int>(threadIdx.x) - args.roles.num_stage_warps * kWarpThreads;
  if (thread == 0) all_ok = 1;
  device::sync_some_warps(kPullBarrier, num_threads);
  if (!transfer.open_sources(sources, thread, num_threads)) all_ok = 0;
  if (args.own_rows_direct && thread == transfer.rank() % num_threads) {
    sources[transfer.rank()].rows = args.rows;
    sources[transfer.rank()].rows_in_heap = true;
  }
  device::sync_some_warps(kPullBarrier, num_threads);
  if (all_ok == 0) return;
  const int64_t warp = int64_t{thread / kWarpThreads} * gridDim.x + blockIdx.x;
  OwnedRows rows(args, transfer, sources, warp, int64_t{args.roles.num_pull_warps} * gridDim.x);
  if constexpr (kBulk) {
    sum_by_ring<Wire, kMostCombinePieceBytes / 512>(ring, rows, args.piece_bytes, args.group);
  } else {
    sum_by_threads<Wire>(rows);
  }
}

template <typename Wire, bool kBulk>
__global__ void __launch_bounds__(kMostThreads) combine_kernel(const __grid_constant__ CombineArgs args) {
  extern __shared__ __align__(128) std::byte shared[];
  const SharedLayout shared_layout = shared_layout_of(args, kBulk);
  const Transfer transfer(args.transfer);
  if (transfer.operation().is_poisoned()) return;
  const int nth = static_cast<int>(threadIdx.x) / kWarpThreads - args.roles.num_stage_warps;
  if (nth < 0) {
    stage<Wire>(args, transfer);
  } else {
    const Ring ring{shared + shared_layout.rings + nth * args.num_stages * args.stage_bytes,
                    reinterpret_cast<uint64_t*>(shared + shared_layout.arrivals) + nth * args.num_stages, args.num_stages,
                    args.stage_bytes};
    if constexpr (kBulk) ring.init();
    pull<Wire, kBulk>(args, transfer, reinterpret_cast<SourceView*>(shared), ring);
  }
  transfer.finish();
}

// Calls function(kernel) for the type of the rows.
template <bool kBulk, typename Function>
auto with_kernel(int32_t dtype, Function function) {
  if (dtype == TERN_DTYPE_BF16) return function(combine_kernel<device::Bf16, kBulk>);
  if (dtype == TERN_DTYPE_FP16) return function(combine_kernel<device::F16, kBulk>);
  return function(combine_kernel<device::F32, kBulk>);
}

template <bool kBulk>
cudaError_t prepare_instances(int64_t shared_bytes) {
  for (const int32_t dtype : {TERN_DTYPE_BF16, TERN_DTYPE_FP16, TERN_DTYPE_FP32}) {
    const cudaError_t error = with_kernel<kBulk>(dtype, [&](auto kernel) { return allow_shared(kernel, shared_bytes); });
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

int32_t combine_group(int32_t most_terms) { return most_terms < kMostGroup ? most_terms : kMostGroup; }

int32_t combine_stage_bytes(int32_t piece_bytes, int32_t group) {
  return static_cast<int32_t>(layout::align_up(group * piece_bytes + kStageTagBytes, layout::kBulkLine));
}

cudaError_t prepare_combine(bool bulk_copies) {
  const cudaError_t error = prepare_instances<false>(kMostSourceBytes);
  return error != cudaSuccess || !bulk_copies ? error : prepare_instances<true>(kMostSharedBytes);
}

cudaError_t launch_combine(const CombineArgs& args, bool bulk_copies, int num_blocks, cudaStream_t stream) {
  const auto shared_bytes = static_cast<size_t>(shared_layout_of(args, bulk_copies).bytes);
  const auto launch = [&](auto kernel) { kernel<<<num_blocks, args.roles.num_threads(), shared_bytes, stream>>>(args); };
  if (bulk_copies)
    with_kernel<true>(args.dtype, launch);
  else
    with_kernel<false>(args.dtype, launch);
  return cudaGetLastError();
}

}  // namespace tern::kernels
