// SPDX-License-Identifier: Apache-2.0
// Dispatch of a small batch, in one launch from the routing to the rows of the outputs. Rows are pushed.
//
//   routing block   counts this rank's entries, and tells everybody: counts, and which tokens have a message for them
//   row blocks      push each token once to every rank that it goes to, into the slot of (source, token): its row (cast, if asked for), scales,
//                   weights, and where among this rank's entries those of the token are
//   all blocks      learn from the counts where everything comes to lie, and spread the messages to their rows, one group of warps each
//
// Positions are those of a walk in token order, so they are the same on every run, for any number of blocks.
#include "kernels/latency.cuh"
#include "kernels/latency_arrivals.cuh"
#include "kernels/shared_memory.h"

namespace tern::kernels {
namespace {

// Pushes this rank's tokens.
class RowSender {
 public:
  __device__ RowSender(const LatencyDispatchArgs& args, const LatencyCall& call, const DispatchMemory& memory, int32_t num_tokens)
      : args_(args), plan_(args.call.plan), call_(call), memory_(memory), routing_(args, call.operation()), num_tokens_(num_tokens) {}

  // All threads of a block, which takes tokens first, first + step, ...
  __device__ void run(int32_t first, int32_t step) {
    int32_t* counters = memory_.counts();
#pragma unroll 1
    for (int c = static_cast<int>(threadIdx.x); c < plan_.num_counts(call_.num_ranks()); c += kLatencyThreads) counters[c] = 0;
    __syncthreads();
    int32_t num_counted = 0;
    const bool casts = args_.in.encoding != TERN_ENCODING_AS_GIVEN;
#pragma unroll 1
    for (int32_t token = first; token < num_tokens_; token += step) {
      Chunk chunk = load(token, 0);
      int64_t given = -1;
      if (args_.routes) {
        if (threadIdx.x < kWarpThreads) given = routing_.own_given_expert(token);
        routing_.count(num_counted, token, counters, [](int, int32_t, uint32_t) {});
        num_counted = token;
      }
      __syncthreads();
      if (threadIdx.x < kWarpThreads) set_destinations(token, given, counters);
      stage_sides(token);
      __syncthreads();
      push_row(token, chunk);
      if (casts) __syncthreads();  // its scales are in the tail
      push_tail();
      __syncthreads();
      if (is_raising()) raise(token);
    }
  }

 private:
  // What a thread has of a row at a time.
  static constexpr int kVecs = 2;
  static constexpr int32_t kStep = kLatencyThreads * static_cast<int32_t>(sizeof(Vec16));
  struct Chunk {
    Vec16 values[kVecs];
  };

  __device__ int32_t row_bytes_given() const {
    if (args_.in.encoding == TERN_ENCODING_AS_GIVEN) return args_.row_bytes;
    return static_cast<int32_t>(args_.in.hidden) * (args_.in.dtype == TERN_DTYPE_FP32 ? 4 : 2);
  }
  __device__ Chunk load(int32_t token, int32_t first) const {
    Chunk chunk = {};
    const std::byte* row = args_.in.tokens + token * args_.in.token_stride_bytes;
#pragma unroll
    for (int v = 0; v < kVecs; ++v) {
      const int32_t at = first + v * kStep + static_cast<int32_t>(threadIdx.x * sizeof(Vec16));
      if (at < row_bytes_given()) chunk.values[v] = *reinterpret_cast<const Vec16*>(row + at);
    }
    return chunk;
  }

  // One warp: the ranks that the token goes to, and where its entries are among all of this rank's; into the tail and the plan.
  __device__ void set_destinations(int32_t token, int64_t given, const int32_t* counters) const {
    const int lane = static_cast<int>(device::lane_idx());
    uint64_t ranks = 0;
    if (args_.routes) {
      ranks = routing_.place_token(token, given, counters, reinterpret_cast<layout::LatencySlot::Entry*>(tail(args_.call.slot.entries())));
    } else {
#pragma unroll 1
      for (int m = lane; m < plan_.messages_per_token; m += kWarpThreads) {
        const int32_t rank = plan_.messages[int64_t{token} * plan_.messages_per_token + m].rank;
        if (rank >= 0) ranks |= uint64_t{1} << rank;
      }
      ranks = device::or_of_warp(ranks);
    }
    ranks &= ~call_.cut_off();
#pragma unroll 1
    for (int rank = lane; rank < call_.num_ranks(); rank += kWarpThreads) {
      if ((ranks >> rank & 1) == 0) continue;
      const int nth = __popcll(ranks & ((uint64_t{1} << rank) - 1));
      memory_.destination_ranks()[nth] = rank;
      memory_.destinations()[nth] = call_.slot(rank, call_.slot_idx(call_.rank(), token));
    }
    if (lane == 0) memory_.set_num_destinations(__popcll(ranks));
  }

  // One warp: the token's row is in its slots.
  __device__ void raise(int32_t token) const {
#pragma unroll 1
    for (int i = static_cast<int>(device::lane_idx()); i < memory_.num_destinations(); i += kWarpThreads)
      call_.raise_row(memory_.destination_ranks()[i], token);
  }

  // `offset` in the slot, of what stands behind the row.
  __device__ std::byte* tail(int64_t offset) const { return memory_.tail() + (offset - args_.call.slot.scales()); }

  // Scales as given, and weights, into the tail; by the threads that set_destinations() leaves.
  __device__ void stage_sides(int32_t token) const {
    const int thread = static_cast<int>(threadIdx.x) - kWarpThreads, num_threads = kLatencyThreads - kWarpThreads;
    if (thread < 0) return;
    const layout::LatencySlot& slot = args_.call.slot;
    if (args_.in.encoding == TERN_ENCODING_AS_GIVEN && args_.scale_bytes > 0) {
      const std::byte* from = args_.in.scales + token * args_.in.scale_token_stride_bytes;
#pragma unroll 1
      for (int64_t at = thread; at < args_.scale_bytes; at += num_threads)
        tail(slot.scales())[at] =
            from[at / args_.scale_element_bytes * args_.in.scale_element_stride_bytes + at % args_.scale_element_bytes];
    }
    if (!args_.carries_weights) return;
#pragma unroll 1
    for (int k = thread; k < plan_.num_topk; k += num_threads) {
      const float weight = args_.in.weights[int64_t{token} * plan_.num_topk + k];
      reinterpret_cast<float*>(tail(slot.weights()))[k] = weight;
      plan_.weights_sent[int64_t{token} * plan_.num_topk + k] = weight;
    }
  }

  __device__ void push_row(int32_t token, Chunk& chunk) const {
    if (args_.in.encoding == TERN_ENCODING_AS_GIVEN) {
      push_chunks(token, chunk, [&](const Vec16& value, int32_t at) {
        if (at < args_.row_bytes) to_all<Vec16>(value, at);
      });
    } else if (args_.in.dtype == TERN_DTYPE_BF16) {
      push_chunks(token, chunk, [&](const Vec16& value, int32_t at) { cast<device::Bf16>(value, at); });
    } else if (args_.in.dtype == TERN_DTYPE_FP16) {
      push_chunks(token, chunk, [&](const Vec16& value, int32_t at) { cast<device::F16>(value, at); });
    } else {
      push_chunks(token, chunk, [&](const Vec16& value, int32_t at) { cast<device::F32>(value, at); });
    }
  }

  // Calls push(16 bytes of the row as given, where they are) in all threads alike, also beyond the row's end. The first chunk is there already.
  template <typename Push>
  __device__ void push_chunks(int32_t token, Chunk& chunk, Push push) const {
    const int32_t end = row_bytes_given();
#pragma unroll 1
    for (int32_t first = 0; first < end; first += kVecs * kStep) {
      if (first > 0) chunk = load(token, first);
#pragma unroll
      for (int v = 0; v < kVecs; ++v)
        if (first + v * kStep < end) push(chunk.values[v], first + v * kStep + static_cast<int32_t>(threadIdx.x * sizeof(Vec16)));
    }
  }

  template <typename T>
  __device__ void to_all(const T& value, int32_t at) const {
#pragma unroll 1
    for (int i = 0; i < memory_.num_destinations(); ++i) *reinterpret_cast<T*>(memory_.destinations()[i] + at) = value;
  }

  // 16 bytes of a row of Wire become fp8. The last block's scale is followed by zeros where scales are bytes.
  template <typename Wire>
  __device__ void cast(const Vec16& value, int32_t at) const {
    constexpr int kBlock = CastVector<Wire>::kBlock;
    const auto hidden = static_cast<int32_t>(args_.in.hidden), channel = at / (16 / Wire::kElements);
    const CastVector<Wire> cast = cast_channels<Wire>(value, args_.in.encoding);
    if (channel >= hidden) return;
    to_all(cast.values, channel);
    if (channel % kBlock != 0) return;
    std::byte* scales = tail(args_.call.slot.scales());
    store_scale(cast.scale, channel / kBlock, args_.in.encoding, scales);
    if (args_.in.encoding != TERN_ENCODING_FP8_UE8M0 || channel + kBlock < hidden) return;
    const int num_blocks = channel / kBlock + 1;
#pragma unroll 1
    for (int pad = num_blocks; pad < layout::align_up(num_blocks, 4); ++pad) scales[pad] = std::byte{0};
  }

  __device__ void push_tail() const {
    const layout::LatencySlot& slot = args_.call.slot;
    const auto begin = static_cast<int32_t>(slot.scales()), end = static_cast<int32_t>(slot.end());
#pragma unroll 1
    for (int32_t at = begin + static_cast<int32_t>(threadIdx.x * sizeof(Vec16)); at < end; at += kStep)
      to_all<Vec16>(*reinterpret_cast<const Vec16*>(tail(at)), at);
  }

  const LatencyDispatchArgs& args_;
  const PlanView& plan_;
  const LatencyCall& call_;
  const DispatchMemory& memory_;
  const OwnRouting routing_;
  const int32_t num_tokens_;
};

// Spreads the messages that arrive; a group of warps takes one at a time.
class MessageSpreader {
 public:
  static constexpr int kThreads = kGroupThreads;

  __device__ MessageSpreader(const LatencyDispatchArgs& args, const LatencyCall& call, const Arrivals& arrivals,
                             const DispatchMemory& memory)
      : args_(args),
        plan_(args.call.plan),
        call_(call),
        arrivals_(arrivals),
        group_(static_cast<int>(threadIdx.x) / kThreads),
        thread_(static_cast<int>(threadIdx.x) % kThreads),
        rows_(memory.rows(group_)) {}

  // The workers of all blocks, but for the routing block. Groups take messages in turn, those of all sources side by side.
  __device__ void run() {
    const bool is_alone = gridDim.x == 1;
    const auto num_blocks = static_cast<int32_t>(is_alone ? 1 : gridDim.x - 1), block = static_cast<int32_t>(is_alone ? 0 : blockIdx.x - 1);
    const int32_t num_groups = kGroups * num_blocks, first = group_ * num_blocks + block;
    const int32_t end = block < 0 ? first : arrivals_.num_candidates();
#pragma unroll 1
    for (int32_t i = first; i < end; i += num_groups) {
      ArrivingMessage message;
      if (!arrivals_.candidate(i, message)) continue;
      const bool is_absent = call_.is_absent(message.source);
      if (!is_absent && !await(message)) return;
      if (i + num_groups >= end) wait_no_more();
      if (is_absent)
        clear(message);
      else
        spread(message);
    }
    wait_no_more();
  }

 private:
  __device__ void sync_group() const { device::sync_some_warps(1 + group_, kThreads); }

  __device__ void wait_no_more() {
    if (waits_) call_.wait_no_more();
    waits_ = false;
  }

  // False: the exchange has failed.
  __device__ bool await(const ArrivingMessage& message) const {
    if (thread_ == 0) rows_->is_there = call_.await_row(message.source, message.token) ? 1 : 0;
    sync_group();
    return rows_->is_there != 0;
  }

  __device__ void spread(const ArrivingMessage& message) const {
    const std::byte* slot = call_.slot(call_.rank(), call_.slot_idx(message.source, message.token));
    constexpr int kVecs = 10;
    constexpr int32_t kStep = kThreads * static_cast<int32_t>(sizeof(Vec16));
#pragma unroll 1
    for (int32_t first = 0; first == 0 || first < args_.row_bytes; first += kVecs * kStep) {
      Vec16 values[kVecs];
      const int32_t begin = first + thread_ * static_cast<int32_t>(sizeof(Vec16));
#pragma unroll
      for (int v = 0; v < kVecs; ++v)
        if (begin + v * kStep < args_.row_bytes) values[v] = *reinterpret_cast<const Vec16*>(slot + begin + v * kStep);
      if (first == 0) {  // while the row is on its way
        if (thread_ < kWarpThreads) find_rows(message, slot);
        sync_group();
      }
#pragma unroll 1
      for (int r = 0; r < rows_->num_rows; ++r) {
        std::byte* to = args_.out.tokens + int64_t{rows_->row[r]} * args_.row_bytes;
#pragma unroll
        for (int v = 0; v < kVecs; ++v)
          if (begin + v * kStep < args_.row_bytes) *reinterpret_cast<Vec16*>(to + begin + v * kStep) = values[v];
      }
    }
    write_scales(slot + args_.call.slot.scales());
  }

  // Zeros in place of what its source has not sent, of a call along a plan.
  __device__ __noinline__ void clear(const ArrivingMessage& message) const {
    sync_group();  // the rows of the message before are written
    if (thread_ < kWarpThreads) find_rows(message, nullptr);
    sync_group();
    for (int r = 0; r < rows_->num_rows; ++r)
      for (int32_t at = thread_ * static_cast<int32_t>(sizeof(Vec16)); at < args_.row_bytes;
           at += kThreads * static_cast<int32_t>(sizeof(Vec16)))
        *reinterpret_cast<Vec16*>(args_.out.tokens + int64_t{rows_->row[r]} * args_.row_bytes + at) = Vec16{};
    if (args_.out.scales == nullptr || args_.scale_bytes == 0) return;
    const auto num_elements = static_cast<int32_t>(args_.scale_bytes / args_.scale_element_bytes);
    for (int32_t i = thread_; i < rows_->num_rows * num_elements; i += kThreads)
      for (int b = 0; b < args_.scale_element_bytes; ++b)
        args_.out.scale_address(plan_, {args_.scale_bytes, args_.scale_element_bytes}, rows_->row[i / num_elements], i % num_elements)[b] =
            std::byte{0};
  }

  // One warp: the rows of the message's entries, for the group and for the plan; and what is written once for each of them. No slot: nothing came.
  __device__ void find_rows(const ArrivingMessage& message, const std::byte* slot) const {
    const auto* weights = reinterpret_cast<const float*>(slot + args_.call.slot.weights());
    const auto* entries = reinterpret_cast<const layout::LatencySlot::Entry*>(slot + args_.call.slot.entries());
    const int k = static_cast<int>(device::lane_idx());
    int32_t row = -1;
    if (k < plan_.num_topk) {
      const ArrivingEntry entry = arrivals_.entry(message, k, entries);
      row = plan_.has_expert_rows() ? entry.row : -1;
      const float weight = args_.carries_weights && slot != nullptr ? weights[k] : 0.0f;
      if (args_.carries_weights) args_.out.plan_weights[message.index * plan_.topk_stride + k] = weight;
      write_entry(message, k, entry, weight);
    }
    const uint32_t valid = __ballot_sync(~0u, row >= 0);
    if (row >= 0) rows_->row[__popc(valid & device::lanes_below())] = row;
    int num_rows = __popc(valid);
    if (device::lane_idx() != 0) return;
    arrivals_.keep(message);
    if (!plan_.has_expert_rows() && message.index < args_.out.num_rows) {
      rows_->row[num_rows++] = message.index;
      write_source(message.index, message);
    }
    rows_->num_rows = num_rows;
  }

  __device__ void write_entry(const ArrivingMessage& message, int k, const ArrivingEntry& entry, float weight) const {
    const DispatchOutputs& out = args_.out;
    if (!plan_.has_expert_rows()) {
      if (message.index >= out.num_rows) return;
      const int32_t at = message.index * plan_.num_topk + k;
      if (out.topk_idx != nullptr) out.topk_idx[at] = entry.expert;
      if (out.topk_weights != nullptr && args_.carries_weights) out.topk_weights[at] = entry.expert >= 0 ? weight : 0.0f;
      return;
    }
    if (entry.row < 0) return;
    write_source(entry.row, message);
    if (out.row_expert != nullptr) out.row_expert[entry.row] = entry.expert;
    if (out.topk_weights != nullptr && args_.carries_weights) out.topk_weights[entry.row] = weight;
  }

  __device__ void write_source(int64_t row, const ArrivingMessage& message) const {
    if (args_.out.source_token != nullptr) args_.out.source_token[row] = message.token;
    if (args_.out.source_rank != nullptr) args_.out.source_rank[row] = message.source;
  }

  __device__ void write_scales(const std::byte* scales) const {
    if (args_.out.scales == nullptr || args_.scale_bytes == 0) return;
    const auto num_elements = static_cast<int32_t>(args_.scale_bytes / args_.scale_element_bytes);
#pragma unroll 1
    for (int32_t i = thread_; i < rows_->num_rows * num_elements; i += kThreads) {
      const int32_t element = i % num_elements;
      std::byte* to = args_.out.scale_address(plan_, {args_.scale_bytes, args_.scale_element_bytes}, rows_->row[i / num_elements], element);
      const std::byte* from = scales + element * args_.scale_element_bytes;
      if (args_.scale_element_bytes == 4 && (reinterpret_cast<uintptr_t>(to) & 3) == 0)
        *reinterpret_cast<uint32_t*>(to) = *reinterpret_cast<const uint32_t*>(from);
      else
#pragma unroll 1
        for (int b = 0; b < args_.scale_element_bytes; ++b) to[b] = from[b];
    }
  }

  const LatencyDispatchArgs& args_;
  const PlanView& plan_;
  const LatencyCall& call_;
  const Arrivals& arrivals_;
  const int group_, thread_;
  GroupRows* const rows_;
  bool waits_ = true;
};

__device__ void send(const LatencyDispatchArgs& args, const LatencyCall& call, const DispatchMemory& memory) {
  const int32_t num_tokens = args.routes ? OwnRouting::num_tokens(args) : args.call.plan.num_tokens[call.rank()];
  const bool is_alone = gridDim.x == 1;
  if (blockIdx.x == 0) {
    call.announce(num_tokens);
    if (args.routes) OwnRouting(args, call.operation()).publish(call, num_tokens, memory.counts());
    __syncthreads();
    if (is_raising()) call.announce_to_throughput();
    if (!is_alone) return;
  }
  RowSender(args, call, memory, num_tokens)
      .run(is_alone ? 0 : static_cast<int32_t>(blockIdx.x) - 1, is_alone ? 1 : static_cast<int32_t>(gridDim.x) - 1);
}

__device__ void receive(const LatencyDispatchArgs& args, const LatencyCall& call, const DispatchMemory& memory) {
  Arrivals arrivals(args, call, memory);
  if (!arrivals.open()) return;
  arrivals.write_outputs();
  MessageSpreader(args, call, arrivals, memory).run();
}

__global__ void __launch_bounds__(kLatencyThreads) latency_dispatch_kernel(const __grid_constant__ LatencyDispatchArgs args) {
  extern __shared__ __align__(16) std::byte shared[];
  const DispatchMemory memory(args, shared);
  device::await_kernel_before();
  LatencyCall call(args.call);
  if (threadIdx.x == 0) *memory.has_failed() = 0;
  if (call.begin()) {
    if (args.call.sends) send(args, call, memory);
    if (args.call.receives) receive(args, call, memory);
  }
  call.finish();
}

}  // namespace

int64_t latency_dispatch_shared_bytes(const LatencyDispatchArgs& args) { return DispatchMemory(args, nullptr).num_bytes(); }

cudaError_t launch_latency_dispatch(const LatencyDispatchArgs& args, int num_blocks, cudaStream_t stream) {
  return launch(latency_dispatch_kernel, {num_blocks, kLatencyThreads, latency_dispatch_shared_bytes(args), args.call.follows_closely},
                stream, args);
}

cudaError_t prepare_latency_dispatch() { return allow_shared(latency_dispatch_kernel, kMostLatencyShared); }

}  // namespace tern::kernels
