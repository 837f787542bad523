// SPDX-License-Identifier: Apache-2.0
// Combine of a small batch, in one launch. Rows are pushed.
//
//   at the experts' ranks   a block for each part of a received message's row: summed over its entries (or the rows of its entries as they
//                           are) into the slot of (this rank, token) at the token's owner
//   at the owners           a warp for each part of a token's row: waits for the ranks that have a share of it, and sums in the contract's order
//
// Weights that only the owners know are pushed ahead, a word each, and the experts' ranks wait for those that they need.
#include "kernels/latency_shares.cuh"
#include "kernels/shared_memory.h"

namespace tern::kernels {
namespace {

// Sums the results of this rank's tokens.
template <typename Wire, bool kLog, typename Call>
class OwnerSums {
 public:
  __device__ OwnerSums(const LatencyCombineArgs& args, const Call& call) : args_(args), plan_(args.call.plan), call_(call) {}

  // The workers of all blocks; a warp takes a piece of a token's row at a time, which is not of more than one part.
  __device__ void run() const {
    const int32_t num_pieces = (args_.row_bytes + kPieceBytes - 1) / kPieceBytes;
    const int32_t num_tokens = plan_.num_tokens[call_.rank()];
    const int warp = static_cast<int>(threadIdx.x) / kWarpThreads;
    const auto num_warps = static_cast<int32_t>(kRaisingWarp * gridDim.x);
    const auto first = static_cast<int32_t>(warp * gridDim.x + blockIdx.x);
    if (call_.may_go_on_without()) settle(num_tokens);
    if (first >= num_tokens * num_pieces) call_.wait_no_more();
    for (int32_t i = first; i < num_tokens * num_pieces; i += num_warps) {
      const int32_t token = i / num_pieces, piece = i % num_pieces;
      // Where the terms will be, before they are there.
      const MessageRef message = message_of(token, static_cast<int>(device::lane_idx()));
      Terms terms = args_.per_entry ? terms_of_entries(token) : terms_of_shares(token, message);
      TermBatch batch = {};
      if (!kLog) batch = take_batch(terms);
      const int begin = piece * kPieceBytes, end = min(begin + kPieceBytes, args_.row_bytes);
      if (!await_share(token, begin / args_.call.part_bytes, message)) return;
      if (i + num_warps >= num_tokens * num_pieces) call_.wait_no_more();
      if (piece == 0 && args_.returns_weights && args_.out_topk_weights != nullptr) sum_weights(token);
      std::byte* out = args_.out_tokens + int64_t{token} * args_.row_bytes;
      sum_bytes<Wire>(
          begin, end,
          [&](int at, PieceSums<Wire>& sums) {
            add_biases(token, at, end, sums);
            if constexpr (kLog) {
              add_log_terms<Wire, kSumVecs>(terms, at, end, sums);
            } else {
              add_batch<Wire, kSumVecs>(batch, at, end, sums);
              add_terms<Wire, kSumVecs>(terms, at, end, sums);
            }
          },
          [&](int at, const auto& sum) {
            if (at < end) *reinterpret_cast<Vec16*>(out + at) = Wire::narrow(sum);
          });
    }
  }

 private:
  // Under TERN_ON_TIMEOUT_MASK, where rows are in one part: who has a share in the sums.
  __device__ __noinline__ void settle(int32_t num_tokens) const {
    call_.template settle_attendance<kWorkThreads>([&] {
      for (auto i = static_cast<int32_t>(threadIdx.x); i < num_tokens * plan_.messages_per_token; i += kWorkThreads) {
        const int32_t rank = plan_.messages[i].rank;
        if (rank >= 0 && !call_.await_row(rank, i / plan_.messages_per_token, 0)) call_.miss(rank);
      }
    });
  }

  __device__ MessageRef message_of(int32_t token, int m) const {
    if (m >= plan_.messages_per_token) return {-1, -1};
    return plan_.messages[int64_t{token} * plan_.messages_per_token + m];
  }

  // Each thread waits for one of the ranks that have a share of the token.
  __device__ bool await_share(int32_t token, int part, const MessageRef& message) const {
    const bool ok = message.rank < 0 || call_.is_absent(message.rank) || call_.await_row(message.rank, token, part);
    const bool all_ok = __all_sync(~0u, ok) != 0;
    __syncwarp();  // what each thread has acquired, all may read
    return all_ok;
  }

  __device__ void add_biases(int32_t token, int at, int end, PieceSums<Wire>& sums) const {
    constexpr int kStep = 32 * sizeof(Vec16);
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      if (args_.bias[which] == nullptr) continue;
      const std::byte* bias = args_.bias[which] + int64_t{token} * args_.row_bytes + at;
#pragma unroll
      for (int v = 0; v < kSumVecs; ++v)
        if (at + v * kStep < end) add_term<Wire>(sums[v], device::load_vec16(bias + v * kStep), 1.0f);
    }
  }

  __device__ Terms terms_of_shares(int32_t token, const MessageRef& message) const {
    const bool has_row = message.rank >= 0 && message.row >= 0 && !call_.is_absent(message.rank);
    Terms terms;
    terms.valid = __ballot_sync(~0u, has_row);
    if (has_row) terms.address = call_.slot(call_.rank(), slot_idx_of(args_, call_, message.rank, token));
    return terms;
  }
  __device__ Terms terms_of_entries(int32_t token) const {
    const int k = static_cast<int>(device::lane_idx());
    const int64_t entry = int64_t{token} * plan_.num_topk + k;
    const int32_t expert = k < plan_.num_topk ? plan_.experts[entry] : -1;
    const int rank = expert >= 0 ? rank_of(args_.call, expert) : 0;
    const bool has_row = expert >= 0 && plan_.entry_rows[entry] >= 0 && !call_.is_absent(rank);
    Terms terms;
    terms.valid = __ballot_sync(~0u, has_row);
    terms.address = call_.slot(call_.rank(), slot_idx_of(args_, call_, rank, token)) + k * args_.wire_bytes;
    if (has_row && args_.token_weights != nullptr) terms.weight = args_.token_weights[entry];
    return terms;
  }

  __device__ void sum_weights(int32_t token) const {
    for (int k = static_cast<int>(device::lane_idx()); k < plan_.num_topk; k += kWarpThreads) {
      const int64_t entry = int64_t{token} * plan_.num_topk + k;
      float sum = 0.0f;
      if (args_.per_entry) {
        const int32_t expert = plan_.experts[entry];
        const int rank = expert >= 0 ? rank_of(args_.call, expert) : 0;
        if (expert >= 0 && !call_.is_absent(rank)) sum = __fadd_rn(sum, returned(rank, token)[k]);
      } else {
        for (int m = 0; m < plan_.messages_per_token; ++m) {
          const MessageRef message = message_of(token, m);
          if (message.rank < 0) break;
          if (call_.is_absent(message.rank)) continue;
          sum = __fadd_rn(sum, returned(message.rank, token)[k]);
        }
      }
      args_.out_topk_weights[entry] = sum;
    }
  }
  __device__ const float* returned(int rank, int32_t token) const {
    return reinterpret_cast<const float*>(call_.slot(call_.rank(), slot_idx_of(args_, call_, rank, token)) + args_.call.slot.weights());
  }

  const LatencyCombineArgs& args_;
  const PlanView& plan_;
  const Call& call_;
};

// All threads of all blocks: the weights of this rank's tokens, to the ranks of their experts.
template <typename Call>
__device__ void push_weights(const LatencyCombineArgs& args, const Call& call) {
  const PlanView& plan = args.call.plan;
  const int32_t num_entries = plan.num_tokens[call.rank()] * plan.num_topk;
  for (auto i = static_cast<int32_t>(blockIdx.x * kLatencyThreads + threadIdx.x); i < num_entries;
       i += static_cast<int32_t>(gridDim.x * kLatencyThreads)) {
    const int32_t expert = plan.experts[i];
    if (expert < 0) continue;
    const int rank = rank_of(args.call, expert);
    if (call.takes(rank)) call.put_word(rank, static_cast<int32_t>(args.call.words.weights()) + i, __float_as_uint(args.owner_weights[i]));
  }
}

template <typename Wire, bool kLog, bool kMasks>
__global__ void __launch_bounds__(kLatencyThreads, 1) latency_combine_kernel(const __grid_constant__ LatencyCombineArgs args) {
  device::await_kernel_before();
  LatencyCall<kMasks> call(args.call);
  ShareSender<Wire, kLog, LatencyCall<kMasks>> sender(args, call);
  if (call.begin()) {
    const bool announces = is_raising() && blockIdx.x == gridDim.x - 1;  // in a block that seldom has a message
    if (args.call.sends) {
      if (args.owner_weights != nullptr) push_weights(args, call);
      if (announces) call.announce(0);
      sender.run();
      if (announces) call.announce_to_throughput();
    }
    if (args.call.receives) {
      if (!is_raising()) {
        OwnerSums<Wire, kLog, LatencyCall<kMasks>>(args, call).run();
      } else {
        if (announces) call.await_calls();
        call.wait_no_more();
      }
    }
  }
  call.finish();
}

// Calls function(kernel) for the type of the rows and what they are on their way.
template <bool kMasks, typename Wire, typename Function>
auto with_kernel_of(bool is_log, Function function) {
  return is_log ? function(latency_combine_kernel<Wire, true, kMasks>) : function(latency_combine_kernel<Wire, false, kMasks>);
}
template <bool kMasks, typename Function>
auto with_kernel(int32_t dtype, bool is_log, Function function) {
  if (dtype == TERN_DTYPE_BF16) return with_kernel_of<kMasks, device::Bf16>(is_log, function);
  if (dtype == TERN_DTYPE_FP16) return with_kernel_of<kMasks, device::F16>(is_log, function);
  return with_kernel_of<kMasks, device::F32>(is_log, function);
}

template <bool kMasks>
cudaError_t prepare() {
  for (const int32_t dtype : {TERN_DTYPE_BF16, TERN_DTYPE_FP16, TERN_DTYPE_FP32}) {
    for (const bool is_log : {false, true}) {
      const cudaError_t error = with_kernel<kMasks>(dtype, is_log, [](auto kernel) { return allow_shared(kernel, 0); });
      if (error != cudaSuccess) return error;
    }
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t launch_latency_combine(const LatencyCombineArgs& args, int num_blocks, cudaStream_t stream) {
  const auto launch_one = [&](auto kernel) {
    return launch(kernel, {num_blocks, kLatencyThreads, 0, args.call.follows_closely}, stream, args);
  };
  return args.call.exchange.attendance != nullptr ? with_kernel<true>(args.dtype, args.is_log, launch_one)
                                                  : with_kernel<false>(args.dtype, args.is_log, launch_one);
}

cudaError_t prepare_latency_combine() {
  const cudaError_t error = prepare<false>();
  return error == cudaSuccess ? prepare<true>() : error;
}

}  // namespace tern::kernels
