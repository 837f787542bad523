// SPDX-License-Identifier: Apache-2.0
// Combine of rows that travel in another form: all warps first put what this rank has for the owners of its messages into their windows, then they
// sum what the owners have got. Nothing stays in place, also not the rows that a rank has for its own tokens.
#include "kernels/wire_combine.h"

#include "kernels/messages.cuh"
#include "kernels/shared_memory.h"
#include "kernels/transfer.cuh"
#include "kernels/wire_rows.cuh"

namespace tern::kernels {
namespace {

constexpr int kThreads = 512;
constexpr int32_t kWarps = kThreads / kWarpThreads;

__device__ int32_t warp_idx() {
  return static_cast<int32_t>(threadIdx.x) / kWarpThreads * static_cast<int32_t>(gridDim.x) + static_cast<int32_t>(blockIdx.x);
}
__device__ int32_t num_warps() { return kWarps * static_cast<int32_t>(gridDim.x); }

// What this rank makes for the owners of the messages it received: a row for each, or for each of its entries.
class Shares {
 public:
  __device__ Shares(const WireCombineArgs& args, const Transfer& transfer)
      : args_(args), call_(args.combine), plan_(call_.plan), transfer_(transfer) {}

  template <typename Wire, typename Form>
  __device__ void run() {
    MessageWalk walk(call_.transfer, plan_, warp_idx(), num_warps());
    for (Message message; walk.next(message);) {
      const SumRow row{message.source, message.index, message.token, 0, static_cast<int32_t>(call_.row_bytes), 0};
      put_weights(row);
      for (entry_ = 0; entry_ < (call_.per_entry ? plan_.num_topk : 1); ++entry_)
        if (!call_.per_entry || row_of(message.index, entry_) >= 0) make_row<Wire, GivenRow<Wire>, Form>(*this, row);
      __syncwarp();
      if (device::lane_idx() == 0) report(message);
    }
  }

  __device__ int num_batches() const {
    return call_.per_entry || !plan_.has_expert_rows() ? 1 : (plan_.num_topk + kWarpThreads - 1) / kWarpThreads;
  }
  __device__ void get_terms(const SumRow& row, int batch, Terms& terms) const {
    const int i = batch * kWarpThreads + static_cast<int>(device::lane_idx());
    const int32_t from = call_.per_entry ? (i == 0 ? row_of(row.index, entry_) : -1) : row_of(row.index, i);
    terms.valid = __ballot_sync(~0u, from >= 0);
    terms.address = call_.rows + int64_t{from} * call_.row_bytes;
    if (from >= 0 && call_.entry_weights != nullptr) terms.weight = call_.entry_weights[int64_t{row.index} * plan_.topk_stride + i];
  }
  __device__ bool has_biases() const { return false; }
  __device__ const std::byte* bias(const SumRow&, int) const { return nullptr; }
  __device__ std::byte* out(const SumRow& row) const { return slot_of(row) + call_.slot.row() + entry_ * args_.wire_bytes; }

 private:
  // Of the message's k-th entry, or the message's own; -1: none, or beyond the capacity.
  __device__ int32_t row_of(int32_t message, int k) const {
    if (!plan_.has_expert_rows()) return k == 0 && message < plan_.row_capacity ? message : -1;
    return k < plan_.num_topk ? plan_.received_rows[int64_t{message} * plan_.topk_stride + k] : -1;
  }
  __device__ std::byte* slot_of(const SumRow& row) const {
    return transfer_.staging_at(row.rank) + (row.token - call_.transfer.first_token()) * call_.slot.stride();
  }

  __device__ void put_weights(const SumRow& row) const {
    if (!call_.returns_weights) return;
    auto* weights = reinterpret_cast<float*>(slot_of(row) + call_.slot.weights());
    for (int k = static_cast<int>(device::lane_idx()); k < plan_.num_topk; k += kWarpThreads) {
      const int32_t from = row_of(row.index, plan_.has_expert_rows() ? k : 0);
      weights[k] = from < 0 ? 0.0f : call_.returned_weights[plan_.has_expert_rows() ? from : int64_t{from} * plan_.num_topk + k];
    }
  }

  __device__ void report(const Message& message) const {
    const int chunk = transfer_.chunk_of(message.token);
    const int32_t* chunk_begin = plan_.chunks_from(message.source) + chunk;
    if (transfer_.complete(message.source, chunk, 1, static_cast<uint32_t>(chunk_begin[1] - chunk_begin[0])))
      transfer_.raise_chunk(message.source, chunk);
  }

  const WireCombineArgs& args_;
  const CombineArgs& call_;
  const PlanView& plan_;
  const Transfer& transfer_;
  int entry_ = 0;
};

// The results of this rank's tokens, or between nodes what is returned for those of a batch.
class Results {
 public:
  __device__ Results(const WireCombineArgs& args, const Transfer& transfer, const SourceView* sources)
      : args_(args), call_(args.combine), plan_(call_.plan), transfer_(transfer), sources_(sources) {}

  template <typename Wire, typename Form>
  __device__ void run() const {
    const TransferArgs& t = call_.transfer;
    const int32_t rows_per_token = call_.rows_per_token();
    const auto end_token = static_cast<int32_t>(min(int64_t{plan_.tokens_at(t.exchange.rank)}, int64_t{t.end_chunk} * t.tokens_per_chunk));
    for (int32_t nth = static_cast<int32_t>(t.first_token()) * rows_per_token + warp_idx(); nth / rows_per_token < end_token;
         nth += num_warps()) {
      const SumRow row{transfer_.rank(), nth % rows_per_token, nth / rows_per_token, 0, static_cast<int32_t>(call_.row_bytes), 0};
      if (call_.returns_slots() && out(row) == nullptr) continue;
      if (!await_sources(row.token)) return;
      put_words(row);
      if (!call_.returns_slots())
        make_row<Wire, Form, GivenRow<Wire>>(*this, row);
      else if (!call_.per_entry)
        make_row<Wire, Form, Form>(*this, row);
      else if (const std::byte* entry = entry_row(row.token, row.index))
        copy_row(entry, args_.wire_bytes, [&](auto visit) { visit(out(row)); });
    }
  }

  __device__ int num_batches() const {
    return ((call_.per_entry ? plan_.num_topk : plan_.messages_per_token) + kWarpThreads - 1) / kWarpThreads;
  }
  __device__ void get_terms(const SumRow& row, int batch, Terms& terms) const {
    const int i = batch * kWarpThreads + static_cast<int>(device::lane_idx());
    terms.address = call_.per_entry ? entry_row(row.token, i) : message_row(row.token, i);
    if (terms.address != nullptr && call_.token_weights != nullptr)
      terms.weight = call_.token_weights[int64_t{row.token} * plan_.num_topk + i];
    terms.valid = __ballot_sync(~0u, terms.address != nullptr);
  }
  __device__ bool has_biases() const { return call_.bias[0] != nullptr || call_.bias[1] != nullptr; }
  __device__ const std::byte* bias(const SumRow& row, int which) const {
    return call_.bias[which] == nullptr ? nullptr : call_.bias[which] + row.token * call_.row_bytes;
  }
  __device__ std::byte* out(const SumRow& row) const {
    if (!call_.returns_slots()) return call_.out_tokens + row.token * call_.row_bytes;
    return call_.slots.of(call_.node, int64_t{row.token} * call_.rows_per_token() + row.index);
  }

 private:
  __device__ MessageRef message_of(int32_t token, int m) const {
    if (m >= plan_.messages_per_token) return {-1, -1};
    return plan_.messages[int64_t{token} * plan_.messages_per_token + m];
  }

  // Each thread waits for one of the ranks that have a part of the token.
  __device__ bool await_sources(int32_t token) const {
    bool ok = true;
    for (int m = static_cast<int>(device::lane_idx()); m < plan_.messages_per_token; m += kWarpThreads) {
      const int32_t rank = message_of(token, m).rank;
      if (rank >= 0) ok = ok && transfer_.await_chunk(sources_[rank], rank, token);
    }
    const bool all_ok = __all_sync(~0u, ok) != 0;
    __syncwarp();  // what each thread has acquired, all may read
    return all_ok;
  }

  // nullptr: there is none.
  __device__ const std::byte* message_row(int32_t token, int m) const {
    const MessageRef message = message_of(token, m);
    if (message.rank < 0 || message.row < 0) return nullptr;
    return sources_[message.rank].rows + token * sources_[message.rank].row_stride;
  }
  __device__ const std::byte* entry_row(int32_t token, int k) const {
    const int64_t entry = int64_t{token} * plan_.num_topk + k;
    const int32_t expert = k < plan_.num_topk ? plan_.experts[entry] : -1;
    if (expert < 0 || plan_.entry_rows[entry] < 0) return nullptr;
    const SourceView& source = sources_[expert / plan_.local_experts];
    return source.rows + token * source.row_stride + k * args_.wire_bytes;
  }
  __device__ const float* returned(int32_t rank, int32_t token) const {
    return reinterpret_cast<const float*>(sources_[rank].weights + token * sources_[rank].weight_stride);
  }

  // What goes with a row: weights that are handed back; with a single entry's first whether it has a row.
  __device__ void put_words(const SumRow& row) const {
    if (!call_.returns_slots()) {
      if (call_.out_topk_weights != nullptr && call_.returns_weights)
        sum_weights(row.token, call_.out_topk_weights + int64_t{row.token} * plan_.num_topk);
      return;
    }
    auto* words = reinterpret_cast<uint32_t*>(out(row) + call_.slots.layout.words());
    if (!call_.per_entry) {
      if (call_.returns_weights) sum_weights(row.token, reinterpret_cast<float*>(words));
      return;
    }
    if (device::lane_idx() != 0) return;
    const bool has_row = entry_row(row.token, row.index) != nullptr;
    words[0] = has_row ? 1 : 0;
    if (!call_.returns_weights) return;
    const int32_t expert = plan_.experts[int64_t{row.token} * plan_.num_topk + row.index];
    reinterpret_cast<float*>(words)[1] = has_row ? returned(expert / plan_.local_experts, row.token)[row.index] : 0.0f;
  }
  __device__ void sum_weights(int32_t token, float* out) const {
    for (int k = static_cast<int>(device::lane_idx()); k < plan_.num_topk; k += kWarpThreads) {
      float sum = 0.0f;
      for (int m = 0; m < plan_.messages_per_token; ++m) {
        const int32_t rank = message_of(token, m).rank;
        if (rank < 0) break;
        sum = __fadd_rn(sum, returned(rank, token)[k]);
      }
      out[k] = sum;
    }
  }

  const WireCombineArgs& args_;
  const CombineArgs& call_;
  const PlanView& plan_;
  const Transfer& transfer_;
  const SourceView* const sources_;
};

template <typename Wire, typename Form>
__global__ void __launch_bounds__(kThreads) wire_combine_kernel(const __grid_constant__ WireCombineArgs args) {
  extern __shared__ __align__(128) std::byte shared[];
  __shared__ bool has_failed;  // to open the sources
  const TransferArgs& t = args.combine.transfer;
  const Transfer transfer(t);
  if (threadIdx.x == 0) has_failed = false;
  if (transfer.operation().is_poisoned()) return;
  const auto sources = reinterpret_cast<SourceView*>(shared);
  if (t.sends && transfer.await_staging()) {
    if (blockIdx.x == 0 && threadIdx.x < kWarpThreads) {
      transfer.post_consumed_before();
      transfer.announce(args.combine.plan.tokens_at(t.exchange.rank));
    }
    Shares(args, transfer).run<Wire, Form>();
  }
  if (t.receives) {
    if (!transfer.open_sources(sources, static_cast<int>(threadIdx.x), kThreads)) has_failed = true;
    __syncthreads();
    if (!has_failed) Results(args, transfer, sources).run<Wire, Form>();
  }
  transfer.finish();
}

// Calls function(kernel) for the type of the rows and what they are on their way.
template <typename Wire, typename Function>
auto with_form(int32_t wire, Function function) {
  return wire == TERN_WIRE_FP32 ? function(wire_combine_kernel<Wire, F32Row<Wire>>) : function(wire_combine_kernel<Wire, LogRow<Wire>>);
}
template <typename Function>
auto with_wire_kernel(int32_t dtype, int32_t wire, Function function) {
  if (dtype == TERN_DTYPE_BF16) return with_form<device::Bf16>(wire, function);
  if (dtype == TERN_DTYPE_FP16) return with_form<device::F16>(wire, function);
  return with_form<device::F32>(wire, function);
}

}  // namespace

cudaError_t prepare_wire_combine() {
  for (const int32_t dtype : {TERN_DTYPE_BF16, TERN_DTYPE_FP16, TERN_DTYPE_FP32}) {
    for (const int32_t wire : {TERN_WIRE_LOG10BIT, TERN_WIRE_FP32}) {
      const cudaError_t error = with_wire_kernel(dtype, wire, [](auto kernel) { return allow_shared(kernel, kMostSourceBytes); });
      if (error != cudaSuccess) return error;
    }
  }
  return cudaSuccess;
}

cudaError_t launch_wire_combine(const WireCombineArgs& args, int num_blocks, cudaStream_t stream) {
  const int64_t shared_bytes = args.combine.transfer.exchange.num_ranks * kSourceViewBytes;
  return with_wire_kernel(args.combine.dtype, args.wire,
                          [&](auto kernel) { return launch(kernel, {num_blocks, kThreads, shared_bytes, false}, stream, args); });
}

}  // namespace tern::kernels
