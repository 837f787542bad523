// SPDX-License-Identifier: Apache-2.0
// Dispatch of a small batch, in one launch from the routing to the rows of the outputs. Rows are pushed.
//
//   routing block   counts this rank's entries, and tells everybody: counts, and which tokens have a message for them
//   row blocks      push each token once to every rank that it goes to, into the slot of (source, token): its row (cast, if asked for) and scales;
//                   and in words its weights, and where among this rank's entries those of the token are
//   all blocks      learn from the counts where everything comes to lie, and spread the messages to their rows, one group of warps each
//
// In a block these go on side by side, since what one warp does after the other is code that is fetched and loads that are waited for: openers
// count, and then learn; senders push rows; the raising warp does the rest of a token.
//
// Positions are those of a walk in token order, so they are the same on every run, for any number of blocks.
#include "kernels/host_steps.cuh"
#include "kernels/latency_spreader.cuh"
#include "kernels/shared_memory.h"

namespace tern::kernels {
namespace {

// How rows travel: as they are given, or cast to fp8 from a type.
struct AsGiven {
  using Sent = Vec16;
  static constexpr int kShrink = 1;  // of 16 bytes that are given
};
template <typename Wire>
struct CastFrom {
  using Sent = typename CastVector<Wire>::Values;
  static constexpr int kShrink = 16 / Wire::kElements;
};

// Pushes this rank's tokens.
template <typename Travel, typename Call>
class RowSender {
 public:
  // Asks for what the call gives of the block's first token: before the epoch is known, since that comes from memory too.
  __device__ RowSender(const LatencyDispatchArgs& args, const Call& call, const DispatchMemory& memory)
      : args_(args), plan_(args.call.plan), call_(call), memory_(memory), routing_(args, call, memory) {
    if (call.sends() && !is_opening() && first_part() >= 0 && call.row_of(first_part()) < num_tokens_given(args)) fetch(first_part());
  }

  // All threads of all blocks. The openers have counted the tokens before the first, though not all of them may know it.
  __device__ void run(int32_t num_tokens) {
    const int32_t first = first_part(), end = call_.num_parts_of(num_tokens);
#pragma unroll 1
    for (int32_t i = first; i < end; i += part_step()) {
      if (is_raising()) {
        finish(i, i + part_step() < end);
        continue;
      }
      if (i > first) device::sync_some_warps(kFreeBarrier, kLatencyThreads);
      if (!is_opening()) {
        push(i);
      } else {
        if (call_.routes() && i > first) routing_.count(call_.row_of(i - part_step()), call_.row_of(i));
        device::arrive_at_barrier(kCountedBarrier, kCountThreads);
      }
    }
  }

 private:
  // The raising warp waits until the senders have pushed a row, and until the openers have counted what is before it; they all wait until it has
  // done with the shared memory of the token before.
  static constexpr int kPushedBarrier = 1, kPushThreads = kSendThreads + kWarpThreads;
  static constexpr int kCountedBarrier = 2, kCountThreads = kOpenThreads + kWarpThreads;
  static constexpr int kFreeBarrier = 3;
  // What a thread has of a row at a time.
  static constexpr int kVecs = 4;
  static constexpr int32_t kStep = kSendThreads * static_cast<int32_t>(sizeof(Vec16));

  // Of the row as it is given, the bytes of part `i`.
  __device__ int32_t begin_of(int32_t i) const { return call_.part_of(i) * args_.call.part_bytes * Travel::kShrink; }
  __device__ int32_t end_of(int32_t i) const {
    return min(begin_of(i) + args_.call.part_bytes * Travel::kShrink, args_.row_bytes * Travel::kShrink);
  }

  // Part `i` of this rank's tokens.
  __device__ void fetch(int32_t i) {
    fetched_ = i;
    const int32_t token = call_.row_of(i);
    if (call_.routes()) given_ = routing_.own_given_expert(token);
    if (!is_raising()) {
      load(token, begin_of(i), end_of(i));
      ranks_ = ranks_of(token);
      return;
    }
    const int k = static_cast<int>(device::lane_idx());
    const float* const weights = args_.carries_weights ? weights_of(token) : nullptr;
    if (weights != nullptr && k < plan_.num_topk) weight_ = weights[k];
  }
  // Between nodes there may be none: its bytes count as zeros, and are sent nowhere.
  __device__ void load(int32_t token, int32_t first, int32_t end) {
    const std::byte* row = row_of(token);
    if (Call::has_batches() && row == nullptr) end = first;
#pragma unroll
    for (int v = 0; v < kVecs; ++v) {
      const int32_t at = first + v * kStep + sender_idx() * static_cast<int32_t>(sizeof(Vec16));
      chunk_[v] = at < end ? device::load_vec16(row + at) : Vec16{};
    }
  }

  // Where a token's row and weights, and scales as they are given, lie: in the caller's arrays, or in its slot; nullptr: there is no such token.
  __device__ const std::byte* row_of(int32_t token) const {
    if (!Call::has_batches()) return args_.in.tokens + token * args_.in.token_stride_bytes;
    const auto at = call_.batch_token(token);
    if (!call_.is_there(at)) return nullptr;
    if (is_given(at)) return args_.in.tokens + at.token * args_.in.token_stride_bytes;
    return slot_of(at, args_.call.batches.slots.layout.payload());
  }
  __device__ const std::byte* scale_of(int32_t token, int64_t element) const {
    const std::byte* const given = args_.in.scales + element * args_.in.scale_element_stride_bytes;
    if (!Call::has_batches()) return given + token * args_.in.scale_token_stride_bytes;
    const auto at = call_.batch_token(token);
    if (is_given(at)) return given + at.token * args_.in.scale_token_stride_bytes;
    return slot_of(at, args_.call.batches.slots.layout.scales()) + element * args_.scale_element_bytes;
  }
  __device__ const float* weights_of(int32_t token) const {
    if (!Call::has_batches()) return args_.in.weights + token * plan_.num_topk;
    const auto at = call_.batch_token(token);
    if (!call_.is_there(at)) return nullptr;
    if (is_given(at)) return args_.in.weights + at.token * plan_.num_topk;
    return reinterpret_cast<const float*>(slot_of(at, args_.call.batches.slots.layout.weights()));
  }
  __device__ bool is_given(const typename Call::BatchToken& at) const {
    return !args_.call.batches.has_own_packed && at.node == args_.call.batches.slots.own_node;
  }
  __device__ const std::byte* slot_of(const typename Call::BatchToken& at, int64_t offset) const {
    const std::byte* const slot = args_.call.batches.slots.of(at.node, at.token);
    return slot == nullptr ? nullptr : slot + offset;
  }

  // All threads of a warp: the ranks that the token which is in goes to.
  __device__ uint64_t ranks_of(int32_t token) const {
    if (call_.routes()) return routing_.ranks_of(given_);
    if (Call::has_batches() && !call_.is_there(call_.batch_token(token))) return 0;
    uint64_t ranks = 0;
#pragma unroll 1
    for (int m = static_cast<int>(device::lane_idx()); m < plan_.messages_per_token; m += kWarpThreads) {
      const int32_t rank = plan_.messages[int64_t{token} * plan_.messages_per_token + m].rank;
      if (rank >= 0) ranks |= uint64_t{1} << rank;
    }
    return device::or_of_warp(ranks);
  }

  // Calls visit(slot) for the token's slot at each of the ranks; beginning with one after the other, so that not all send to the same at a time.
  template <typename Visit>
  __device__ void for_each_slot(int32_t token, uint64_t ranks, Visit visit) const {
    const int32_t slot_idx = call_.slot_idx(call_.rank(), token), num_ranks = call_.num_ranks();
    int32_t first = call_.rank() + 1 + token;
    first -= quotient(first, args_.call.ranks_reciprocal) * num_ranks;
    uint64_t left = first == 0 ? ranks : ranks >> first | ranks << (num_ranks - first);  // bit n: n ranks behind the first
    left &= ~uint64_t{0} >> (layout::kMostLatencyRanks - num_ranks);
#pragma unroll 1
    for (; left != 0; left &= left - 1) {
      const int32_t rank = first + __ffsll(static_cast<long long>(left)) - 1;
      visit(call_.slot(rank < num_ranks ? rank : rank - num_ranks, slot_idx));
    }
  }

  // The raising warp: with the first part what belongs to the token as a whole; then the flags, if they are needed. What nobody waits for comes
  // last, unless the senders go on.
  __device__ void finish(int32_t i, bool more) {
    const int32_t token = call_.row_of(i);
    const int part = call_.part_of(i);
    if (i != fetched_) fetch(i);
    const uint64_t ranks = ranks_of(token), takers = ranks & ~call_.cut_off();
    const int k = static_cast<int>(device::lane_idx());
    device::sync_some_warps(kCountedBarrier, kCountThreads);
    layout::LatencyEntry entry;
    if (call_.routes()) entry = routing_.place(token, given_);
    if (part == 0) put_words(token, takers, entry);
    device::sync_some_warps(kPushedBarrier, kPushThreads);
    bool needs_flag = call_.needs_flag(0);
    if (args_.scale_bytes > 0 && part == 0) needs_flag = push_scales(token, takers) || needs_flag;
    __syncwarp();
    if (more) {
      if (part == 0) keep(token, entry, ranks);
      device::arrive_at_barrier(kFreeBarrier, kLatencyThreads);
    }
#pragma unroll 1
    for (int rank = k; rank < call_.num_ranks() && needs_flag; rank += kWarpThreads)
      if ((takers >> rank & 1) != 0) call_.raise_row(rank, token, part);
    __syncwarp();
    if (!more && part == 0) keep(token, entry, ranks);
  }
  // Into the plan.
  __device__ void keep(int32_t token, const layout::LatencyEntry& entry, uint64_t ranks) const {
    const int k = static_cast<int>(device::lane_idx());
    if (call_.routes()) routing_.keep(token, given_, entry, ranks);
    if (!args_.carries_weights || k >= plan_.num_topk) return;
    if (const int32_t own = own_token(token); own >= 0) plan_.weights_sent[own * plan_.num_topk + k] = weight_;
  }
  // -1: its weights are not to be kept, since it is another rank's, or has been packed.
  __device__ int32_t own_token(int32_t token) const {
    if (!Call::has_batches()) return token;
    const auto at = call_.batch_token(token);
    return is_given(at) && call_.is_there(at) ? at.token : -1;
  }
  // Of the token's entries, a thread each, what they are and their weights.
  __device__ void put_words(int32_t token, uint64_t ranks, const layout::LatencyEntry& entry) const {
    const LatencyPlaces& words = args_.call.words;
    const int k = static_cast<int>(device::lane_idx());
    if (k >= plan_.num_topk) return;
    const int32_t at = token * plan_.num_topk + k;
#pragma unroll 1
    for (uint64_t left = ranks; left != 0; left &= left - 1) {
      const int rank = __ffsll(static_cast<long long>(left)) - 1;
      if (call_.routes()) call_.put_word(rank, words.entries() + at, entry.packed());
      if (args_.carries_weights) call_.put_word(rank, words.weights() + at, __float_as_uint(weight_));
    }
  }
  // True: they look unwritten.
  __device__ bool push_scales(int32_t token, uint64_t ranks) const {
    const auto begin = static_cast<int32_t>(args_.call.slot.scales()), num_bytes = static_cast<int32_t>(args_.call.slot.end()) - begin;
    bool is_unclear = false;
#pragma unroll 1
    for (auto at = static_cast<int32_t>(device::lane_idx() * sizeof(Vec16)); at < num_bytes; at += kWarpThreads * sizeof(Vec16)) {
      const Vec16 value = device::load_vec16(memory_.scales() + at);
      is_unclear = is_unclear || looks_unwritten(value);
      for_each_slot(token, ranks, [&](std::byte* to) { *reinterpret_cast<Vec16*>(to + begin + at) = value; });
    }
    return __any_sync(~0u, is_unclear) != 0;
  }

  // Senders: the row's part into its slots, with the first one scales into the tail.
  __device__ void push(int32_t i) {
    if (i != fetched_) fetch(i);
    const int32_t token = call_.row_of(i);
    push_row(token, ranks_ & ~call_.cut_off(), begin_of(i), end_of(i));
    if (std::is_same_v<Travel, AsGiven> && args_.scale_bytes > 0 && call_.part_of(i) == 0) {
#pragma unroll 1
      for (int64_t at = sender_idx(); at < args_.scale_bytes && ranks_ != 0; at += kSendThreads)
        memory_.scales()[at] = scale_of(token, at / args_.scale_element_bytes)[at % args_.scale_element_bytes];
    }
    device::arrive_at_barrier(kPushedBarrier, kPushThreads);
  }

  // Its first chunk is there already.
  __device__ void push_row(int32_t token, uint64_t ranks, int32_t part_begin, int32_t end) {
    bool is_unclear = false;
#pragma unroll 1
    for (int32_t first = part_begin; first < end; first += kVecs * kStep) {
      if (first > part_begin) load(token, first, end);
      const int32_t begin = first + sender_idx() * static_cast<int32_t>(sizeof(Vec16));
      typename Travel::Sent values[kVecs];
#pragma unroll
      for (int v = 0; v < kVecs; ++v)
        if (first + v * kStep < end) {
          values[v] = as_sent(Travel(), chunk_[v], begin + v * kStep);
          is_unclear = is_unclear || looks_unwritten(values[v]);
        }
      for_each_slot(token, ranks, [&](std::byte* to) {
#pragma unroll
        for (int v = 0; v < kVecs; ++v)
          if (begin + v * kStep < end) *reinterpret_cast<typename Travel::Sent*>(to + (begin + v * kStep) / Travel::kShrink) = values[v];
      });
    }
    if (is_unclear) call_.note_unclear(0);
  }

  // 16 bytes at `at` of a row as given, also beyond its end. All threads of a warp.
  __device__ Vec16 as_sent(AsGiven, const Vec16& value, int32_t /*at*/) const { return value; }
  // The last block's scale is followed by zeros where scales are bytes.
  template <typename Wire>
  __device__ typename CastVector<Wire>::Values as_sent(CastFrom<Wire>, const Vec16& value, int32_t at) const {
    constexpr int kBlock = CastVector<Wire>::kBlock;
    const auto hidden = static_cast<int32_t>(args_.in.hidden), channel = at / CastFrom<Wire>::kShrink;
    const CastVector<Wire> cast = cast_channels<Wire>(value, args_.in.encoding);
    if (channel >= hidden || channel % kBlock != 0) return cast.values;
    std::byte* scales = memory_.scales();
    store_scale(cast.scale, channel / kBlock, args_.in.encoding, scales);
    if (args_.in.encoding != TERN_ENCODING_FP8_UE8M0 || channel + kBlock < hidden) return cast.values;
    const int num_blocks = channel / kBlock + 1;
#pragma unroll 1
    for (int pad = num_blocks; pad < layout::align_up(num_blocks, 4); ++pad) scales[pad] = std::byte{0};
    return cast.values;
  }

  const LatencyDispatchArgs& args_;
  const PlanView& plan_;
  const Call& call_;
  const DispatchMemory& memory_;
  const OwnRouting<Call> routing_;
  int32_t fetched_ = -1;  // the part that is in
  // Of its token: an entry in each thread of a warp, with its weight in the raising one; and what a sender has of the row.
  int64_t given_ = -1;
  uint64_t ranks_ = 0;  // in the senders
  float weight_ = 0.0f;
  Vec16 chunk_[kVecs];
};

// Openers: of the routing block all tokens, of the others those before their first.
template <typename Call>
__device__ void count_tokens(const LatencyDispatchArgs& args, const Call& call, const OwnRouting<Call>& routing) {
  routing.clear(static_cast<int>(threadIdx.x), kOpenThreads);
  sync_openers();
  const int32_t num_tokens = num_tokens_given(args);
  routing.count(0, blockIdx.x == 0 ? num_tokens : min(call.row_of(first_part()), num_tokens));
}

// All threads. Senders begin without the openers, who count.
template <typename Call>
__device__ bool begin(const Call& call, const DispatchMemory& memory) {
  constexpr typename Call::Start kOpeners = {4, kOpenThreads + kWarpThreads}, kSenders = {5, kSendThreads + kWarpThreads};
  if (!is_raising()) return call.follow(is_opening() ? kOpeners : kSenders);
  if (device::lane_idx() == 0) *memory.has_failed() = 0;
  return call.lead(kOpeners, kSenders);
}

// Of a batch of this rank's.
template <typename Call>
__device__ int32_t num_tokens_of(const LatencyDispatchArgs& args, const Call& call, int batch) {
  if (!Call::has_batches() && call.routes()) return num_tokens_given(args);
  return args.call.plan.num_tokens[call.source_of({call.rank(), batch})];
}

constexpr int kAllCountedBarrier = 6;

template <typename Travel, typename Call>
__device__ void send(const LatencyDispatchArgs& args, const Call& call, const OwnRouting<Call>& routing, RowSender<Travel, Call>& rows) {
  const int32_t num_tokens = Call::has_batches() ? args.call.sent_tokens : num_tokens_of(args, call, 0);
  if (blockIdx.x == 0) {
    if (is_raising()) {
      call.announce_to_throughput();
    } else if (call.routes()) {
      device::sync_some_warps(kAllCountedBarrier, kWorkThreads);
      routing.publish();
    }
    if (gridDim.x > 1) return;
    // The same block goes on with the rows, and counts again.
    __syncthreads();
    if (call.routes()) routing.clear(static_cast<int>(threadIdx.x), kLatencyThreads);
    __syncthreads();
  }
  rows.run(num_tokens);
}

template <typename Call>
__device__ void receive(const LatencyDispatchArgs& args, const Call& call, const DispatchMemory& memory) {
  const Arrivals arrivals(args, call, memory);
  // Who only spreads begins while others learn what arrives.
  const bool is_ahead = call.routes() && !call.may_go_on_without() && !is_opening() && !is_raising() && blockIdx.x != 0;
  if (!is_ahead && !arrivals.open()) return;
  if (is_opening()) {
    arrivals.write_outputs();
  } else if (blockIdx.x == 0 && call.routes()) {
    arrivals.keep_counts();
  }
  MessageSpreader(args, call, arrivals, !is_ahead).run();
}

template <typename Travel, CallKind kKind>
__global__ void __launch_bounds__(kLatencyThreads, 1) latency_dispatch_kernel(const __grid_constant__ LatencyDispatchArgs args) {
  extern __shared__ __align__(16) std::byte shared[];
  const DispatchMemory memory(args, shared);
  device::await_kernel_before();
  LatencyCall<kKind> call(args.call);
  const HostTalker host(call.operation(), args.call.batches.steps);
  if (call.has_batches() && !host.begin()) return;
  const OwnRouting routing(args, call, memory);
  RowSender<Travel, LatencyCall<kKind>> rows(args, call, memory);
  if (call.sends() && call.routes() && is_opening()) count_tokens(args, call, routing);
  const bool ok = begin(call, memory);
  if (is_raising()) {
    if (ok && call.sends() && blockIdx.x == 0) call.announce([&](int batch) { return num_tokens_of(args, call, batch); });
    call.count_followers();
  }
  if (ok && call.sends()) send(args, call, routing, rows);
  if (ok && call.receives()) receive(args, call, memory);
  call.finish();
  if (call.has_batches()) host.end();
}

// Calls function(kernel) for how rows travel.
template <CallKind kKind, typename Function>
auto with_kernel(const DispatchInputs& in, Function function) {
  if (in.encoding == TERN_ENCODING_AS_GIVEN) return function(latency_dispatch_kernel<AsGiven, kKind>);
  if (in.dtype == TERN_DTYPE_BF16) return function(latency_dispatch_kernel<CastFrom<device::Bf16>, kKind>);
  if (in.dtype == TERN_DTYPE_FP16) return function(latency_dispatch_kernel<CastFrom<device::F16>, kKind>);
  return function(latency_dispatch_kernel<CastFrom<device::F32>, kKind>);
}

template <CallKind kKind>
cudaError_t prepare() {
  const auto prepare_one = [](const DispatchInputs& in) {
    return with_kernel<kKind>(in, [](auto kernel) { return allow_shared(kernel, kMostLatencyShared); });
  };
  cudaError_t error = prepare_one({.encoding = TERN_ENCODING_AS_GIVEN});
  for (const int32_t dtype : {TERN_DTYPE_BF16, TERN_DTYPE_FP16, TERN_DTYPE_FP32})
    if (error == cudaSuccess) error = prepare_one({.dtype = dtype, .encoding = TERN_ENCODING_FP8_F32});
  return error;
}

}  // namespace

cudaError_t launch_latency_dispatch(const LatencyDispatchArgs& args, int num_blocks, cudaStream_t stream) {
  const auto launch_one = [&](auto kernel) {
    return launch(kernel, {num_blocks, kLatencyThreads, args.memory.num_bytes, args.call.follows_closely}, stream, args);
  };
  switch (kind_of(args.call, is_usual_call(args.call) && args.call.routes)) {
    case CallKind::kMasking: return with_kernel<CallKind::kMasking>(args.in, launch_one);
    case CallKind::kFlagged: return with_kernel<CallKind::kFlagged>(args.in, launch_one);
    case CallKind::kAny: return with_kernel<CallKind::kAny>(args.in, launch_one);
    case CallKind::kUsual: return with_kernel<CallKind::kUsual>(args.in, launch_one);
    case CallKind::kBatches: return launch_one(latency_dispatch_kernel<AsGiven, CallKind::kBatches>);
    case CallKind::kMaskingBatches: return launch_one(latency_dispatch_kernel<AsGiven, CallKind::kMaskingBatches>);
  }
  return cudaErrorInvalidValue;
}

cudaError_t prepare_latency_dispatch() {
  for (const auto prepare_kind :
       {prepare<CallKind::kMasking>, prepare<CallKind::kFlagged>, prepare<CallKind::kAny>, prepare<CallKind::kUsual>})
    if (const cudaError_t error = prepare_kind(); error != cudaSuccess) return error;
  const cudaError_t error = allow_shared(latency_dispatch_kernel<AsGiven, CallKind::kBatches>, kMostLatencyShared);
  return error != cudaSuccess ? error : allow_shared(latency_dispatch_kernel<AsGiven, CallKind::kMaskingBatches>, kMostLatencyShared);
}

}  // namespace tern::kernels
