// SPDX-License-Identifier: Apache-2.0
// What GPU ranks do between nodes, beside the kernels of one node: see rail.h.
#include "kernels/rail.h"

#include <algorithm>

#include "kernels/host_steps.cuh"
#include "kernels/shared_memory.h"
#include "kernels/sums.cuh"
#include "kernels/token_source.cuh"
#include "kernels/wire_rows.cuh"

namespace tern::kernels {
namespace {

constexpr int kThreads = 512;
constexpr int kMostCopyBlocks = 16;

__global__ void talk_kernel(const __grid_constant__ TalkArgs args) {
  const Operation op{args.exchange, args.operation, 0};
  if (op.is_poisoned()) return;
  const HostTalker host(op, args.steps);
  host.ask_first();
  if (host.await()) host.finish();
}

__global__ void __launch_bounds__(kThreads) copy_kernel(const __grid_constant__ CopyArgs args) {
  const Operation op{args.exchange, args.operation, 0};
  if (op.is_poisoned()) return;
  const HostTalker host(op, args.steps);
  host.ask_first();
  if (!host.await()) return;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < args.num_bytes / static_cast<int64_t>(sizeof(uint4));
       i += int64_t{gridDim.x} * kThreads)
    reinterpret_cast<uint4*>(args.to)[i] = reinterpret_cast<const uint4*>(args.from)[i];
  host.finish();
}

// Warps of all blocks; those that follow each other are of different blocks, since one SM fills a part of PCIe only.
__device__ int32_t warp_of_all() { return static_cast<int32_t>(threadIdx.x / kWarpThreads * gridDim.x + blockIdx.x); }
__device__ int32_t num_all_warps() { return static_cast<int32_t>(gridDim.x) * (kThreads / kWarpThreads); }

// ---- Tokens on their way to other nodes: a warp takes one after the other, or parts of them.

__global__ void __launch_bounds__(kThreads) pack_kernel(const __grid_constant__ PackArgs args) {
  const DispatchArgs& d = args.dispatch;
  const TransferArgs& t = d.transfer;
  const Operation op{t.exchange, t.operation, 0};
  if (op.is_poisoned()) return;
  const HostTalker host(op, args.steps);
  host.ask_first();
  if (!host.await()) return;
  const TokenSource source(d);
  const int64_t end = min(int64_t{d.plan.tokens_at(t.exchange.rank)}, int64_t{t.end_chunk} * t.tokens_per_chunk);
  for (int64_t i = warp_of_all();; i += num_all_warps()) {
    const int64_t token = t.first_token() + i / args.num_parts;
    if (token >= end) break;
    const auto part = static_cast<int32_t>(i % args.num_parts);
    for (int node = 0; node < args.num_nodes; ++node) {
      if (node == args.slots.own_node && !args.packs_own) continue;
      std::byte* const slot = args.slots.of(node, token);
      if (slot == nullptr) continue;
      const layout::RailSlotLayout& layout = args.slots.layout;
      if (args.num_parts > 1)
        source.put_part(token, slot + layout.payload(), {int64_t{part} * args.part_bytes, args.part_bytes});
      else if (d.row_bytes > 0)
        source.put_row(token, slot + layout.payload(), slot + layout.scales());
      if (part > 0) continue;
      if (d.scale_bytes > 0) source.put_scales(token, slot + layout.scales());
      if (d.carries_weights)
        source.put_weights(token, token + 1, [&](int64_t) { return reinterpret_cast<float*>(slot + layout.weights()); });
    }
  }
  host.finish();
}

// A thread takes one weight after the other. Those of tokens that are not in this node are not looked at by anybody.
__global__ void __launch_bounds__(kThreads) take_weights_kernel(const __grid_constant__ TakeWeightsArgs args) {
  const Operation op{args.exchange, TERN_OP_WEIGHTS, 0};
  if (op.is_poisoned()) return;
  const HostTalker host(op, args.steps);
  host.ask_first();
  if (!host.await()) return;
  const AbsentNodes absent = host.absent_nodes();
  const int64_t batch_entries = args.max_tokens * args.num_topk, num_entries = args.rails.num_nodes * batch_entries;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < num_entries; i += int64_t{gridDim.x} * kThreads) {
    if (args.rails.experts[i] < 0) continue;
    const auto node = static_cast<int32_t>(i / batch_entries);
    const int64_t entry = i - node * batch_entries, token = entry / args.num_topk;
    const float* of_token = args.own + token * args.num_topk;
    if (node != args.rails.own_node) of_token = reinterpret_cast<const float*>(args.slots.of(node, token) + args.slots.layout.weights());
    // Else nobody gets the sums, but others of this node wait for the weights.
    args.rails.owner_weights[i] = absent.has(node) ? 0.0f : of_token[entry - token * args.num_topk];
  }
  host.finish();
}

// ---- Sums over nodes: the Rows of sums.cuh. A warp takes one part of a row after the other.

class ReturnedRows {
 public:
  __device__ ReturnedRows(const NodeSumArgs& args, const AbsentNodes& absent)
      : args_(args),
        plan_(args.plan),
        absent_(absent),
        next_(args.first_token * args.num_parts + warp_of_all()),
        end_token_(min(plan_.tokens_at(args.exchange.rank), args.end_token)) {}

  __device__ bool next_row(SumRow& row) {
    const int32_t token = next_ / args_.num_parts;
    if (token >= end_token_) return false;
    const int32_t begin = next_ % args_.num_parts * args_.part_bytes;
    next_ += num_all_warps();
    row = {args_.exchange.rank, token, token, begin, min(begin + args_.part_bytes, static_cast<int32_t>(args_.row_bytes)), 0};
    if (begin == 0 && args_.out_topk_weights != nullptr && args_.returns_weights) sum_weights(token);
    return true;
  }

  __device__ int num_batches() const { return ((args_.per_entry ? plan_.num_topk : args_.num_nodes) + kWarpThreads - 1) / kWarpThreads; }
  __device__ void get_terms(const SumRow& row, int batch, Terms& terms) const {
    const int i = batch * kWarpThreads + static_cast<int>(device::lane_idx());
    terms.address = args_.per_entry ? entry_slot(row.token, i) : node_slot(row.token, i);
    if (terms.address != nullptr && args_.token_weights != nullptr)
      terms.weight = args_.token_weights[int64_t{row.token} * plan_.num_topk + i];
    terms.valid = __ballot_sync(~0u, terms.address != nullptr);
  }

  __device__ bool has_biases() const { return args_.bias[0] != nullptr || args_.bias[1] != nullptr; }
  __device__ const std::byte* bias(const SumRow& row, int which) const {
    return args_.bias[which] == nullptr ? nullptr : args_.bias[which] + row.token * args_.row_bytes;
  }
  __device__ std::byte* out(const SumRow& row) const { return args_.out_tokens + row.token * args_.row_bytes; }
  __device__ void row_done(const SumRow&) const {}

 private:
  __device__ const std::byte* node_slot(int32_t token, int node) const {
    return node < args_.num_nodes && !absent_.has(node) ? args_.slots.of(node, token) : nullptr;
  }
  // nullptr: there is no entry, or its row lay beyond the capacity.
  __device__ const std::byte* entry_slot(int32_t token, int k) const {
    if (k >= plan_.num_topk) return nullptr;
    const int64_t entry = int64_t{token} * plan_.num_topk + k;
    const int32_t node = args_.node_of_entry[entry];
    const std::byte* slot = node < 0 || absent_.has(node) ? nullptr : args_.slots.of(node, entry);
    return slot != nullptr && *words_of<uint32_t>(slot) != 0 ? slot : nullptr;
  }
  template <typename Word>
  __device__ const Word* words_of(const std::byte* slot) const {
    return reinterpret_cast<const Word*>(slot + args_.slots.layout.words());
  }

  __device__ void sum_weights(int32_t token) const {
    for (int k = static_cast<int>(device::lane_idx()); k < plan_.num_topk; k += kWarpThreads) {
      float sum = 0.0f;
      if (args_.per_entry) {
        if (const std::byte* slot = entry_slot(token, k)) sum = __fadd_rn(sum, words_of<float>(slot)[1]);
      } else {
        for (int node = 0; node < args_.num_nodes; ++node)
          if (const std::byte* slot = node_slot(token, node)) sum = __fadd_rn(sum, words_of<float>(slot)[k]);
      }
      args_.out_topk_weights[int64_t{token} * plan_.num_topk + k] = sum;
    }
  }

  const NodeSumArgs& args_;
  const PlanView& plan_;
  const AbsentNodes absent_;
  int32_t next_;  // token * num_parts + part
  const int32_t end_token_;
};

template <typename Wire, typename Form>
__global__ void __launch_bounds__(kThreads) node_sum_kernel(const __grid_constant__ NodeSumArgs args) {
  const Operation op{args.exchange, TERN_OP_COMBINE, 0};
  if (op.is_poisoned()) return;
  const HostTalker host(op, args.steps);
  host.ask_first();
  if (!host.await()) return;
  ReturnedRows rows(args, host.absent_nodes());
  if constexpr (std::is_same_v<Form, GivenRow<Wire>>) {
    sum_by_threads<Wire>(rows);
  } else {
    for (SumRow row; rows.next_row(row);) make_row<Wire, Form, GivenRow<Wire>>(rows, row);
  }
  host.finish();
}

// Calls function(kernel) for the type of the rows and what they are on their way.
template <typename Wire, typename Function>
auto with_form(int32_t wire, Function function) {
  if (wire == TERN_WIRE_FP32) return function(node_sum_kernel<Wire, F32Row<Wire>>);
  if (wire == TERN_WIRE_LOG10BIT) return function(node_sum_kernel<Wire, LogRow<Wire>>);
  return function(node_sum_kernel<Wire, GivenRow<Wire>>);
}
template <typename Function>
auto with_sum_kernel(int32_t dtype, int32_t wire, Function function) {
  if (dtype == TERN_DTYPE_BF16) return with_form<device::Bf16>(wire, function);
  if (dtype == TERN_DTYPE_FP16) return with_form<device::F16>(wire, function);
  return with_form<device::F32>(wire, function);
}

// Of kernels whose threads take items in turn, which are few.
int blocks_for(int64_t num_items) { return static_cast<int>(std::clamp<int64_t>(num_items / kThreads, 1, kMostCopyBlocks)); }

}  // namespace

cudaError_t prepare_rail() {
  cudaError_t error = allow_shared(talk_kernel, 0);
  if (error == cudaSuccess) error = allow_shared(copy_kernel, 0);
  if (error == cudaSuccess) error = allow_shared(pack_kernel, 0);
  if (error == cudaSuccess) error = allow_shared(take_weights_kernel, 0);
  for (const int32_t dtype : {TERN_DTYPE_BF16, TERN_DTYPE_FP16, TERN_DTYPE_FP32})
    for (const int32_t wire : {TERN_WIRE_AS_DTYPE, TERN_WIRE_LOG10BIT, TERN_WIRE_FP32})
      if (error == cudaSuccess) error = with_sum_kernel(dtype, wire, [](auto kernel) { return allow_shared(kernel, 0); });
  return error;
}

cudaError_t launch_talk(const TalkArgs& args, cudaStream_t stream) {
  talk_kernel<<<1, kWarpThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

cudaError_t launch_copy(const CopyArgs& args, cudaStream_t stream) {
  copy_kernel<<<blocks_for(args.num_bytes / static_cast<int64_t>(sizeof(uint4))), kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

cudaError_t launch_take_weights(const TakeWeightsArgs& args, cudaStream_t stream) {
  take_weights_kernel<<<blocks_for(args.rails.num_nodes * args.max_tokens * args.num_topk), kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

cudaError_t launch_pack(const PackArgs& args, int num_blocks, cudaStream_t stream) {
  pack_kernel<<<num_blocks, kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

cudaError_t launch_node_sums(const NodeSumArgs& args, int num_blocks, cudaStream_t stream) {
  with_sum_kernel(args.dtype, args.wire, [&](auto kernel) { kernel<<<num_blocks, kThreads, 0, stream>>>(args); });
  return cudaGetLastError();
}

}  // namespace tern::kernels
