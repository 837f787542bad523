// SPDX-License-Identifier: Apache-2.0
// Combine: the owner of a token gets one row from each rank that had it (or one for each entry), and sums.
//
//   staging warps   push what is summed into the owners' windows: for each received message one row, summed over its entries and rounded once; or
//                   copies of rows. They wait for nobody's rows, and when all is staged they pull too. Rows that are in window memory in the
//                   right form already stay there, and are pulled over the link.
//   pulling warps   take this rank's tokens, wait for the chunks of those who have a part of them, and sum in the contract's order
#include "kernels/combine.h"
#include "kernels/copies.cuh"
#include "kernels/messages.cuh"
#include "kernels/shared_memory.h"
#include "kernels/sums.cuh"
#include "kernels/transfer.cuh"

namespace tern::kernels {
namespace {

constexpr int kMostThreads = 512;
constexpr int kPullBarrier = 1;  // of the warps that pull from the start
constexpr int kJoinBarrier = 2;  // of all

// The dynamic shared memory of a block: sources, then with bulk copies the rings of its warps. A staging warp has two, one after the other.
struct CombineShared {
  int64_t stage_rings, pull_rings, bytes;

  __host__ __device__ constexpr CombineShared(const CombineArgs& args, bool bulk_copies)
      : stage_rings(layout::align_up(args.transfer.exchange.num_ranks * kSourceViewBytes, layout::kBulkLine)),
        pull_rings(stage_rings + (bulk_copies ? args.roles.num_stage_warps * stage_bytes(args) : 0)),
        bytes(pull_rings + (bulk_copies ? args.roles.num_pull_warps * args.pull_ring.bytes() : 0)) {}

  __host__ __device__ static constexpr int64_t stage_bytes(const CombineArgs& args) {
    return args.stage_ring.bytes() > args.joined_ring.bytes() ? args.stage_ring.bytes() : args.joined_ring.bytes();
  }
};

// What this rank makes for the owners of the messages it received: the Rows of sums.cuh.
class StagedRows {
 public:
  __device__ StagedRows(const CombineArgs& args, const Transfer& transfer, int32_t warp, int32_t num_warps)
      : args_(args),
        plan_(args.plan),
        transfer_(transfer),
        walk_({args.transfer, args.plan, num_warps, args.stage_run}, warp, &args.transfer.exchange.state->runs_taken) {
    look_ahead();
  }

  // Instead of sums: the next row that is copied, of this message or of the next one.
  __device__ bool next_copy(RowCopy& copy) {
    if (!has_copies_) {
      if (!next_row(copied_)) return false;
      copy_ahead_ = copy_from(0);
    }
    copy = copy_ahead_;
    has_copies_ = false;
    if (copy.from == nullptr) return true;
    copy_ahead_ = copy_from(entry_ahead_ + 1);
    has_copies_ = copy_ahead_.from != nullptr;
    if (has_copies_) copy.row.run = 0;
    return true;
  }

  __device__ bool next_row(SumRow& row) {
    while (has_ahead_) {
      const Message message = ahead_;
      term_ = term_ahead_;
      look_ahead();
      row = {message.source, message.index, message.token, 0, static_cast<int32_t>(args_.row_bytes), 0};
      const bool has_row = args_.rows_staged && !(args_.own_rows_direct && row.rank == transfer_.rank());
      if (!has_row && !args_.returns_weights) continue;  // nobody waits for it
      row.run = count(message);
      stage_weights(row);
      if (has_row) return true;
      __syncwarp();
      row_done(row);
    }
    return false;
  }

  __device__ int num_batches() const { return plan_.has_expert_rows() ? (plan_.num_topk + kWarpThreads - 1) / kWarpThreads : 1; }
  __device__ void get_terms(const SumRow& row, int batch, Terms& terms) const {
    const Term term = batch == 0 ? term_ : term_of(row.index, batch * kWarpThreads + static_cast<int>(device::lane_idx()));
    terms.valid = __ballot_sync(~0u, term.row >= 0);
    terms.address = args_.rows + term.row * args_.row_bytes;
    terms.weight = term.weight;
  }

  __device__ bool has_biases() const { return false; }
  __device__ const std::byte* bias(const SumRow&, int) const { return nullptr; }
  __device__ std::byte* out(const SumRow& row) const { return slot_of(row) + args_.slot.row(); }

  // Reports a run of rows together, because each report waits for their stores; tells the owner when the chunk is complete. The rows of a source
  // are all done here in the order of the walk.
  __device__ void row_done(const SumRow& row) const {
    if (row.run == 0 || device::lane_idx() != 0) return;
    const int chunk = chunk_of(row.token);
    const int32_t* chunk_begin = plan_.chunks_from(row.rank) + chunk;
    if (transfer_.complete(row.rank, chunk, row.run, static_cast<uint32_t>(chunk_begin[1] - chunk_begin[0])))
      transfer_.raise_chunk(row.rank, chunk);
  }

 private:
  // What a thread adds to a message's row: its k-th entry, or the row itself.
  struct Term {
    int32_t row = -1;  // here; -1: none
    float weight = 1.0f;
  };
  __device__ Term term_of(int32_t message, int k) const {
    Term term;
    if (!plan_.has_expert_rows()) {
      if (k == 0 && message < plan_.row_capacity) term.row = message;
    } else if (k < plan_.num_topk) {
      const int64_t entry = int64_t{message} * plan_.topk_stride + k;
      term.row = plan_.received_rows[entry];
      if (args_.entry_weights != nullptr) term.weight = args_.entry_weights[entry];
    }
    return term;
  }

  // Fetches the next message's terms while those of this one are loaded.
  __device__ void look_ahead() {
    has_ahead_ = walk_.next(ahead_);
    if (has_ahead_ && args_.rows_staged) term_ahead_ = term_of(ahead_.index, static_cast<int>(device::lane_idx()));
  }

  __device__ int chunk_of(int32_t token) const { return token / args_.transfer.tokens_per_chunk; }

  // Counts the message in its run; if it is the last, says how many there are.
  __device__ uint32_t count(const Message& message) {
    const bool goes_on = has_ahead_ && ahead_.source == message.source && chunk_of(ahead_.token) == chunk_of(message.token);
    if (++num_in_run_ < static_cast<uint32_t>(args_.stage_run) && goes_on) return 0;
    const uint32_t num = num_in_run_;
    num_in_run_ = 0;
    return num;
  }

  __device__ std::byte* slot_of(const SumRow& row) const {
    return transfer_.staging_at(row.rank) + (row.token - args_.transfer.first_token()) * args_.slot.stride();
  }

  // The first of the message's rows from entry `k` on.
  __device__ RowCopy copy_from(int k) {
    for (int batch = k / kWarpThreads; batch < num_batches(); ++batch, k = batch * kWarpThreads) {
      Terms terms;
      get_terms(copied_, batch, terms);
      const uint32_t left = terms.valid & ~0u << k % kWarpThreads;
      if (left == 0) continue;
      const int t = __ffs(static_cast<int>(left)) - 1;
      entry_ahead_ = batch * kWarpThreads + t;
      const auto from = reinterpret_cast<const std::byte*>(__shfl_sync(~0u, reinterpret_cast<uint64_t>(terms.address), t));
      return {copied_, from, out(copied_) + entry_ahead_ * args_.row_bytes};
    }
    return {copied_, nullptr, nullptr};
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
  DealtWalk walk_;
  Message ahead_ = {};
  bool has_ahead_ = false;
  Term term_, term_ahead_;
  uint32_t num_in_run_ = 0;
  // Where next_copy() is: the message, and its next row if it has one.
  SumRow copied_ = {};
  RowCopy copy_ahead_ = {};
  int entry_ahead_ = 0;
  bool has_copies_ = false;
};

// The results of this rank's tokens, or between nodes what is returned for those of a batch: the Rows of sums.cuh. The warps of all blocks take
// the next part of a row when they come to it. A row's index is the entry's where each entry has a row of its own.
class OwnedRows {
 public:
  __device__ OwnedRows(const CombineArgs& args, const Transfer& transfer, const SourceView* sources)
      : args_(args), plan_(args.plan), transfer_(transfer), sources_(sources) {
    const TransferArgs& t = args.transfer;
    end_token_ = min(int64_t{args.plan.tokens_at(t.exchange.rank)}, int64_t{t.end_chunk} * t.tokens_per_chunk);
    look_ahead();
  }

  __device__ bool next_row(SumRow& row) {
    const int32_t rows_per_token = args_.rows_per_token();
    for (;;) {
      const int32_t nth = next_ / args_.num_parts, token = nth / rows_per_token;
      if (token >= end_token_) return false;
      const int32_t begin = next_ % args_.num_parts * args_.part_bytes;
      message_ = message_ahead_;
      look_ahead();
      row = {transfer_.rank(), nth % rows_per_token, token, begin, min(begin + args_.part_bytes, static_cast<int32_t>(args_.row_bytes)), 0};
      if (args_.returns_slots() && slot_of(row) == nullptr) continue;
      if (!await_sources(token)) return false;
      if (begin == 0) put_words(row);
      return true;
    }
  }

  __device__ int num_batches() const {
    const int num_terms = !args_.per_entry ? plan_.messages_per_token : args_.returns_slots() ? 1 : plan_.num_topk;
    return (num_terms + kWarpThreads - 1) / kWarpThreads;
  }
  __device__ void get_terms(const SumRow& row, int batch, Terms& terms) const {
    const int i = batch * kWarpThreads + static_cast<int>(device::lane_idx());
    if (args_.per_entry && args_.returns_slots())
      get_entry(row.token, i == 0 ? row.index : plan_.num_topk, terms);
    else if (args_.per_entry)
      get_entry(row.token, i, terms);
    else
      get_message(row.token, i, terms);
    terms.valid = __ballot_sync(~0u, terms.address != nullptr);
  }

  __device__ bool has_biases() const { return args_.bias[0] != nullptr || args_.bias[1] != nullptr; }
  __device__ const std::byte* bias(const SumRow& row, int which) const {
    return args_.bias[which] == nullptr ? nullptr : args_.bias[which] + row.token * args_.row_bytes;
  }
  __device__ std::byte* out(const SumRow& row) const {
    return args_.returns_slots() ? slot_of(row) : args_.out_tokens + row.token * args_.row_bytes;
  }
  __device__ void row_done(const SumRow&) const {}

 private:
  // nullptr: nothing is returned for it.
  __device__ std::byte* slot_of(const SumRow& row) const {
    return args_.slots.of(args_.node, int64_t{row.token} * args_.rows_per_token() + row.index);
  }

  __device__ MessageRef message_of(int32_t token, int m) const {
    if (m >= plan_.messages_per_token) return {-1, -1};
    return plan_.messages[int64_t{token} * plan_.messages_per_token + m];
  }

  // Takes the next part, and fetches the thread's message of its token while those of this one are loaded.
  __device__ void look_ahead() {
    const uint32_t taken = device::lane_idx() == 0 ? atomicAdd(&args_.transfer.exchange.state->parts_taken, 1u) : 0;
    const auto nth = static_cast<int32_t>(__shfl_sync(~0u, taken, 0));
    next_ = static_cast<int32_t>(args_.transfer.first_token()) * args_.rows_per_token() * args_.num_parts + nth;
    const int32_t token = next_ / args_.num_parts / args_.rows_per_token();
    if (token < end_token_) message_ahead_ = message_of(token, static_cast<int>(device::lane_idx()));
  }

  // Message m of the current token, for the thread that stands for it: m % 32.
  __device__ MessageRef own_message(int32_t token, int m) const { return m < kWarpThreads ? message_ : message_of(token, m); }

  // Each thread waits for one of the ranks that have a part of the token.
  __device__ bool await_sources(int32_t token) const {
    bool ok = true;
    for (int m = static_cast<int>(device::lane_idx()); m < plan_.messages_per_token; m += kWarpThreads) {
      const MessageRef message = own_message(token, m);
      if (message.rank >= 0) ok = ok && transfer_.await_chunk(sources_[message.rank], message.rank, token);
    }
    const bool all_ok = __all_sync(~0u, ok) != 0;
    __syncwarp();                 // what each thread has acquired, all may read,
    device::fence_async_proxy();  // by bulk copies too
    return all_ok;
  }

  // A term's address is nullptr if there is none.
  __device__ void get_message(int32_t token, int m, Terms& terms) const {
    const MessageRef message = own_message(token, m);
    terms.address = nullptr;
    if (message.rank < 0 || message.row < 0) return;
    const SourceView& source = sources_[message.rank];
    terms.address = source.rows + (source.rows_in_heap ? message.row * args_.row_bytes : token * source.row_stride);
  }

  __device__ void get_entry(int32_t token, int k, Terms& terms) const {
    const int64_t entry = int64_t{token} * plan_.num_topk + k;
    const int32_t expert = k < plan_.num_topk ? plan_.experts[entry] : -1;
    const int32_t at = expert >= 0 ? plan_.entry_rows[entry] : -1;
    terms.address = nullptr;
    if (at < 0) return;
    const SourceView& source = sources_[expert / plan_.local_experts];
    terms.address = source.rows + (source.rows_in_heap ? at * args_.row_bytes : token * source.row_stride + k * args_.row_bytes);
    if (args_.token_weights != nullptr) terms.weight = args_.token_weights[entry];
  }

  // What goes with a row: weights that are handed back; with a single entry's first whether it has a row.
  __device__ void put_words(const SumRow& row) const {
    if (!args_.returns_slots()) {
      if (args_.out_topk_weights != nullptr && args_.returns_weights)
        sum_weights(row.token, args_.out_topk_weights + int64_t{row.token} * plan_.num_topk);
      return;
    }
    auto* words = reinterpret_cast<uint32_t*>(slot_of(row) + args_.slots.layout.words());
    if (!args_.per_entry) {
      if (args_.returns_weights) sum_weights(row.token, reinterpret_cast<float*>(words));
      return;
    }
    Terms terms;
    get_entry(row.token, row.index, terms);
    if (device::lane_idx() != 0) return;
    words[0] = terms.address != nullptr ? 1 : 0;
    if (!args_.returns_weights) return;
    const int32_t expert = plan_.experts[int64_t{row.token} * plan_.num_topk + row.index];
    const SourceView& source = sources_[expert / plan_.local_experts];
    const auto* weights = reinterpret_cast<const float*>(source.weights + row.token * source.weight_stride);
    reinterpret_cast<float*>(words)[1] = terms.address != nullptr ? weights[row.index] : 0.0f;
  }

  __device__ void sum_weights(int32_t token, float* out) const {
    for (int k = static_cast<int>(device::lane_idx()); k < plan_.num_topk; k += kWarpThreads) {
      float sum = 0.0f;
      for (int m = 0; m < plan_.messages_per_token; ++m) {
        const MessageRef message = message_of(token, m);
        if (message.rank < 0) break;
        const SourceView& source = sources_[message.rank];
        sum = __fadd_rn(sum, reinterpret_cast<const float*>(source.weights + token * source.weight_stride)[k]);
      }
      out[k] = sum;
    }
  }

  const CombineArgs& args_;
  const PlanView& plan_;
  const Transfer& transfer_;
  const SourceView* const sources_;
  int32_t next_;  // (token * rows_per_token + row) * num_parts + part
  int64_t end_token_;
  MessageRef message_ = {-1, -1}, message_ahead_ = {-1, -1};  // of the current token and the next one: the thread's
};

// The part of a staging warp; `ring` has the warp's memory.
template <typename Wire, bool kBulk>
__device__ void stage(const CombineArgs& args, const Transfer& transfer, const SumRing& ring) {
  if (!args.transfer.sends || !transfer.await_staging()) return;
  const int warp = static_cast<int>(threadIdx.x) / kWarpThreads;
  if (blockIdx.x == 0 && warp == 0) {
    transfer.post_consumed_before();
    transfer.announce(args.plan.tokens_at(args.transfer.exchange.rank));
  }
  if (args.slot.stride() == 0) return;
  const auto num_blocks = static_cast<int32_t>(gridDim.x);
  StagedRows rows(args, transfer, warp * num_blocks + static_cast<int32_t>(blockIdx.x), args.roles.num_stage_warps * num_blocks);
  if constexpr (kBulk) {
    device::fence_async_proxy();  // bulk stores too come after what await_staging() has seen
    ring.init();
    if (args.copies_rows())
      copy_by_bulk(ring, rows, static_cast<int32_t>(args.row_bytes));
    else
      sum_by_ring<Wire, kStagePieceBytes>(ring, rows);
    ring.end();
  } else if (args.copies_rows()) {
    copy_by_threads(rows, args.row_bytes);
  } else {
    sum_by_threads<Wire>(rows);
  }
}

// The warps that pull from the start: where the sources' rows are.
__device__ void open_sources(const CombineArgs& args, const Transfer& transfer, SourceView* sources, bool& has_failed) {
  const int num_threads = args.roles.num_pull_warps * kWarpThreads;
  const int thread = static_cast<int>(threadIdx.x) - args.roles.num_stage_warps * kWarpThreads;
  if (!transfer.open_sources(sources, thread, num_threads)) has_failed = true;
  if (args.own_rows_direct && thread == transfer.rank() % num_threads) {
    SourceView& own = sources[transfer.rank()];
    own.rows = args.rows;
    own.rows_in_heap = true;
    own.is_staged = args.returns_weights;
  }
  device::sync_some_warps(kPullBarrier, num_threads);
}

template <typename Wire, bool kBulk>
__device__ void pull(const CombineArgs& args, const Transfer& transfer, const SourceView* sources, const SumRing& ring) {
  OwnedRows rows(args, transfer, sources);
  if constexpr (kBulk) {
    ring.init();
    sum_by_ring<Wire, kPullPieceBytes>(ring, rows);
  } else {
    sum_by_threads<Wire>(rows);
  }
}

template <typename Wire, bool kBulk>
__global__ void __launch_bounds__(kMostThreads) combine_kernel(const __grid_constant__ CombineArgs args) {
  extern __shared__ __align__(128) std::byte shared[];
  __shared__ bool has_failed;  // to open the sources
  const CombineShared layout(args, kBulk);
  const Transfer transfer(args.transfer);
  if (threadIdx.x == 0) has_failed = false;
  if (transfer.operation().is_poisoned()) return;
  const auto sources = reinterpret_cast<SourceView*>(shared);
  const int warp = static_cast<int>(threadIdx.x) / kWarpThreads, nth = warp - args.roles.num_stage_warps;
  std::byte* const memory = shared + (nth < 0 ? layout.stage_rings + warp * CombineShared::stage_bytes(args)  //
                                              : layout.pull_rings + nth * args.pull_ring.bytes());
  if (nth < 0) {
    stage<Wire, kBulk>(args, transfer, {memory, args.stage_ring});
    if (args.transfer.receives) device::sync_some_warps(kJoinBarrier, args.roles.num_threads());
  } else if (args.transfer.receives) {
    open_sources(args, transfer, sources, has_failed);
    device::arrive_at_barrier(kJoinBarrier, args.roles.num_threads());
  }
  if (args.transfer.receives && !has_failed)
    pull<Wire, kBulk>(args, transfer, sources, {memory, nth < 0 ? args.joined_ring : args.pull_ring});
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

cudaError_t prepare_combine(bool bulk_copies) {
  const cudaError_t error = prepare_instances<false>(kMostSourceBytes);
  return error != cudaSuccess || !bulk_copies ? error : prepare_instances<true>(kMostSharedBytes);
}

cudaError_t launch_combine(const CombineArgs& args, bool bulk_copies, int num_blocks, cudaStream_t stream) {
  const auto shared_bytes = static_cast<size_t>(CombineShared(args, bulk_copies).bytes);
  const auto launch = [&](auto kernel) { kernel<<<num_blocks, args.roles.num_threads(), shared_bytes, stream>>>(args); };
  if (bulk_copies)
    with_kernel<true>(args.dtype, launch);
  else
    with_kernel<false>(args.dtype, launch);
  return cudaGetLastError();
}

}  // namespace tern::kernels
