// SPDX-License-Identifier: Apache-2.0
// Combine of a small batch, in one launch. Rows are pushed.
//
//   at the experts' ranks   a block for each part of a received message's row: summed over its entries (or the rows of its entries as they
//                           are) into the slot of (this rank, token) at the token's owner
//   at the owners           a warp for each piece of a token's row: takes it from the ranks that have a share, and sums in the contract's order
//
// Weights that only the owners know are pushed ahead, a word each, and the experts' ranks wait for those that they need.
#include "kernels/host_steps.cuh"
#include "kernels/latency_shares.cuh"
#include "kernels/shared_memory.h"

namespace tern::kernels {
namespace {

// Sums the results of this rank's tokens.
template <typename Wire, bool kLog, typename Call>
class OwnerSums {
 public:
  // Asks for what the plan says of the warp's first piece: before it is known whether the exchange has failed, and the plan may say anything.
  __device__ OwnerSums(const LatencyCombineArgs& args, const Call& call)
      : args_(args),
        plan_(args.call.plan),
        call_(call),
        num_pieces_((args.row_bytes + kPieceBytes - 1) / kPieceBytes),
        first_(static_cast<int32_t>(warp() * gridDim.x + blockIdx.x)),
        first_token_(first_ / num_pieces_) {
    if (is_raising() || !call.receives()) return;
    num_tokens_ = Call::has_batches() ? args.call.sent_tokens : plan_.num_tokens[call_.rank()];
    if (first_token_ < args.call.sent_tokens) ahead_ = message_of(first_token_, static_cast<int>(device::lane_idx()));
  }

  // The workers of all blocks; a warp takes a piece of a token's row at a time, which is not of more than one part.
  __device__ void run() const {
    const auto num_warps = static_cast<int32_t>(kRaisingWarp * gridDim.x);
    const int32_t end_piece = num_tokens_ * num_pieces_;
    if (call_.may_go_on_without()) settle(num_tokens_);
    if (first_ >= end_piece) call_.wait_no_more();
    for (int32_t i = first_; i < end_piece; i += num_warps) {
      const int32_t token = i == first_ ? first_token_ : i / num_pieces_, piece = i - token * num_pieces_;
      std::byte* const out = out_of(token);
      if (Call::has_batches() && out == nullptr) continue;
      // Where the terms will be, before they are there.
      const MessageRef message = i == first_ ? ahead_ : message_of(token, static_cast<int>(device::lane_idx()));
      Terms terms = is_per_entry<Call>(args_) ? terms_of_entries(token) : terms_of_shares(token, message);
      TermBatch batch = {};
      if (!kLog) batch = take_batch(terms);
      const int begin = piece * kPieceBytes, end = min(begin + kPieceBytes, args_.row_bytes);
      const int part = begin / args_.call.part_bytes;
      bool ok = !call_.has_row_flags() || await_share(token, part, message);
      if (piece == 0 && returns_weights<Call>(args_) && ok) ok = sum_weights(token, weights_of(token));
      if (!__all_sync(~0u, ok)) return;
      const bool is_last = i + num_warps >= end_piece;
      sum_bytes<Wire>(
          begin, end,
          [&](int at, PieceSums<Wire>& sums) {
            add_biases(token, at, end, sums);
            if constexpr (kLog) {
              add_log_terms<Wire, kSumVecs>(terms, at, end, sums);
            } else {
#pragma unroll 1
              for (;; batch = take_batch(terms)) {
                ok = take_batch_of(batch, {token, part}, at, end, sums) && ok;
                if (terms.valid == 0) break;
              }
            }
            ok = __all_sync(~0u, ok) != 0;
            if (is_last) call_.wait_no_more();
          },
          [&](int at, const auto& sum) {
            if constexpr (kLog && Call::has_batches())
              LogRow<Wire>::store(sum, ok && at < end, at / static_cast<int>(sizeof(Vec16)) * Wire::kElements, out);
            else if (ok && at < end)
              *reinterpret_cast<Vec16*>(out + at) = Wire::narrow(sum);
          });
      if (!ok) return;
    }
  }

 private:
  // The last warp of a block first: a short part of a row is pushed by the first ones.
  __device__ int warp() const { return kRaisingWarp - 1 - static_cast<int>(threadIdx.x) / kWarpThreads; }

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

  // What a thread takes of a batch of terms: of term u, two vectors.
  struct PartOfToken {
    int32_t token;
    int part;
  };
  struct TermVecs {
    const OwnerSums& sums;
    const TermBatch& batch;
    const PartOfToken& of;
    int begin, end;

    __device__ int offset(int v) const { return begin + v % kSumVecs * kWarpThreads * static_cast<int>(sizeof(Vec16)); }
    __device__ bool has(int v) const { return v / kSumVecs < batch.num && offset(v) < end; }
    __device__ std::byte* at(int v) const {
      const std::byte* address = batch.terms[0].address;
#pragma unroll
      for (int u = 1; u < TermBatch::kMost; ++u)
        if (v / kSumVecs == u) address = batch.terms[u].address;  // not by an index, or the batch would lie in memory
      return const_cast<std::byte*>(address) + offset(v);
    }
    __device__ ArrivingRow row_of(const std::byte* at) const { return {sums.source_of(at), of.token, of.part}; }
  };
  // Adds the terms at bytes `at`, and one step of the warp further on, when they are there. False: the exchange has failed.
  __device__ bool take_batch_of(const TermBatch& batch, const PartOfToken& of, int at, int end, PieceSums<Wire>& sums) const {
    Vec16 values[TermBatch::kMost * kSumVecs];
    const bool ok = call_.take_vecs(TermVecs{*this, batch, of, at, end}, values, [] {});
#pragma unroll
    for (int v = 0; v < TermBatch::kMost * kSumVecs; ++v)
      if (v / kSumVecs < batch.num) add_term<Wire>(sums[v % kSumVecs], values[v], batch.terms[v / kSumVecs].weight);
    return ok;
  }
  // From which rank is what lies at an address of a slot?
  __device__ int source_of(const std::byte* at) const {
    return static_cast<int>((at - call_.slot(call_.rank(), 0)) / (int64_t{args_.call.sent_tokens} * args_.call.slot_stride));
  }

  __device__ void add_biases(int32_t token, int at, int end, PieceSums<Wire>& sums) const {
    constexpr int kStep = 32 * sizeof(Vec16);
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      if (Call::is_usual() || args_.bias[which] == nullptr) continue;
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

  // Where a token's sum goes, and the weights that come back: into the outputs, or into the slot that leads to the owner's node; nullptr: there is
  // none, or nobody wants them.
  __device__ std::byte* out_of(int32_t token) const {
    if (!Call::has_batches()) return args_.out_tokens + int64_t{token} * args_.row_bytes;
    const auto at = call_.batch_token(token);
    return call_.is_there(at) ? args_.call.batches.slots.of(at.node, at.token) : nullptr;
  }
  __device__ float* weights_of(int32_t token) const {
    if (Call::has_batches()) return reinterpret_cast<float*>(out_of(token) + args_.call.batches.slots.layout.weights());
    return args_.out_topk_weights == nullptr ? nullptr : args_.out_topk_weights + int64_t{token} * plan_.num_topk;
  }

  // False: the exchange has failed.
  __device__ bool sum_weights(int32_t token, float* out) const {
    bool ok = true;
    if (out == nullptr) return ok;
    for (int k = static_cast<int>(device::lane_idx()); k < plan_.num_topk; k += kWarpThreads) {
      const int64_t entry = int64_t{token} * plan_.num_topk + k;
      float sum = 0.0f;
      if (args_.per_entry) {
        const int32_t expert = plan_.experts[entry];
        const int rank = expert >= 0 ? rank_of(args_.call, expert) : 0;
        if (expert >= 0 && !call_.is_absent(rank)) ok = add_returned(rank, entry, sum) && ok;
      } else {
        for (int m = 0; m < plan_.messages_per_token; ++m) {
          const MessageRef message = message_of(token, m);
          if (message.rank < 0) break;
          if (call_.is_absent(message.rank)) continue;
          ok = add_returned(message.rank, entry, sum) && ok;
        }
      }
      out[k] = sum;
    }
    return ok;
  }
  __device__ bool add_returned(int rank, int64_t entry, float& sum) const {
    uint32_t bits = 0;
    const bool ok = call_.await_word(rank, static_cast<int32_t>(args_.call.words.returned() + entry), bits);
    sum = __fadd_rn(sum, __uint_as_float(bits));
    return ok;
  }

  const LatencyCombineArgs& args_;
  const PlanView& plan_;
  const Call& call_;
  const int32_t num_pieces_, first_, first_token_;
  int32_t num_tokens_ = 0;
  MessageRef ahead_ = {-1, -1};  // of the first piece's token
};

// All threads of all blocks: the weights of this rank's tokens, to the ranks of their experts.
template <typename Call>
__device__ void push_weights(const LatencyCombineArgs& args, const Call& call) {
  const PlanView& plan = args.call.plan;
  const int32_t num_entries = (Call::has_batches() ? args.call.sent_tokens : plan.num_tokens[call.rank()]) * plan.num_topk;
  for (auto i = static_cast<int32_t>(blockIdx.x * kLatencyThreads + threadIdx.x); i < num_entries;
       i += static_cast<int32_t>(gridDim.x * kLatencyThreads)) {
    const int32_t expert = plan.experts[i];
    if (expert < 0) continue;
    const int rank = rank_of(args.call, expert);
    if (call.takes(rank)) call.put_word(rank, args.call.words.weights() + i, __float_as_uint(args.owner_weights[i]));
  }
}

template <typename Wire, bool kLog, CallKind kKind>
__global__ void __launch_bounds__(kLatencyThreads, 1) latency_combine_kernel(const __grid_constant__ LatencyCombineArgs args) {
  device::await_kernel_before();
  using Call = LatencyCall<kKind>;
  Call call(args.call);
  const HostTalker host(call.operation(), args.call.batches.steps);
  if (call.has_batches() && !host.begin()) return;
  ShareSender<Wire, kLog, Call> sender(args, call);
  const OwnerSums<Wire, kLog, Call> sums(args, call);
  if (call.begin()) {
    const bool announces = is_raising() && blockIdx.x == gridDim.x - 1;  // in a block that seldom has a message
    if (call.sends()) {
      if (!Call::is_usual() && args.owner_weights != nullptr) push_weights(args, call);
      if (announces) call.announce([](int) { return 0; });
      sender.run();
      if (announces) call.announce_to_throughput();
    }
    if (call.receives()) {
      if (!is_raising()) {
        sums.run();
      } else {
        if (announces) call.await_calls();
        call.wait_no_more();
      }
    }
  }
  call.finish();
  if (call.has_batches()) host.end();
}

// Calls function(kernel) for the type of the rows.
template <bool kLog, CallKind kKind, typename Function>
auto with_kernel(int32_t dtype, Function function) {
  if (dtype == TERN_DTYPE_BF16) return function(latency_combine_kernel<device::Bf16, kLog, kKind>);
  if (dtype == TERN_DTYPE_FP16) return function(latency_combine_kernel<device::F16, kLog, kKind>);
  return function(latency_combine_kernel<device::F32, kLog, kKind>);
}

template <bool kLog, CallKind kKind>
cudaError_t prepare() {
  for (const int32_t dtype : {TERN_DTYPE_BF16, TERN_DTYPE_FP16, TERN_DTYPE_FP32}) {
    const cudaError_t error = with_kernel<kLog, kKind>(dtype, [](auto kernel) { return allow_shared(kernel, 0); });
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

// A rank without tokens has no weights of its own, and yet sums with those of the others.
bool is_usual_combine(const LatencyCombineArgs& args) {
  return is_usual_call(args.call) && !args.per_entry && !args.sums_owner_weights && !args.returns_weights && args.bias[0] == nullptr &&
         args.bias[1] == nullptr;
}

}  // namespace

cudaError_t launch_latency_combine(const LatencyCombineArgs& args, int num_blocks, cudaStream_t stream) {
  const auto launch_one = [&](auto kernel) {
    return launch(kernel, {num_blocks, kLatencyThreads, 0, args.call.follows_closely}, stream, args);
  };
  if (args.is_log) {
    switch (kind_of(args.call, false)) {
      case CallKind::kMasking: return with_kernel<true, CallKind::kMasking>(args.dtype, launch_one);
      case CallKind::kMaskingBatches: return with_kernel<true, CallKind::kMaskingBatches>(args.dtype, launch_one);
      default: return with_kernel<true, CallKind::kFlagged>(args.dtype, launch_one);
    }
  }
  switch (kind_of(args.call, is_usual_combine(args))) {
    case CallKind::kMasking: return with_kernel<false, CallKind::kMasking>(args.dtype, launch_one);
    case CallKind::kFlagged: return with_kernel<false, CallKind::kFlagged>(args.dtype, launch_one);
    case CallKind::kAny: return with_kernel<false, CallKind::kAny>(args.dtype, launch_one);
    case CallKind::kUsual: return with_kernel<false, CallKind::kUsual>(args.dtype, launch_one);
    case CallKind::kBatches: return with_kernel<false, CallKind::kBatches>(args.dtype, launch_one);
    case CallKind::kMaskingBatches: return with_kernel<false, CallKind::kMaskingBatches>(args.dtype, launch_one);
  }
  return cudaErrorInvalidValue;
}

cudaError_t prepare_latency_combine() {
  for (const auto prepare_kind :
       {prepare<true, CallKind::kMasking>, prepare<true, CallKind::kFlagged>, prepare<false, CallKind::kMasking>,
        prepare<false, CallKind::kFlagged>, prepare<false, CallKind::kAny>, prepare<false, CallKind::kUsual>,
        prepare<false, CallKind::kBatches>, prepare<false, CallKind::kMaskingBatches>, prepare<true, CallKind::kMaskingBatches>})
    if (const cudaError_t error = prepare_kind(); error != cudaSuccess) return error;
  return cudaSuccess;
}

}  // namespace tern::kernels
