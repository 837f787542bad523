// SPDX-License-Identifier: Apache-2.0
// Rows that their source puts where they belong, and nobody pulls: the source has them in place, and the outputs of the rank they go to are window
// memory too (rank_major). A row is loaded once, with its scales, and stored to all ranks that it goes to. Scales go by bulk copies where they lie in
// place, else by words of 4 bytes. Weights are staged, and what the receiver
// does for them its staging warps do in the end.
//
//   RowDelivery delivery(args, ranks, warp, num_warps, open);   // all threads of a warp
//   run_ring(ring, delivery);                                   // and then device::fence_async_proxy()
//   if (!delivery.is_open()) ...                                // the exchange has failed
//   receive_weights(args, transfer, sources, thread, num_threads);
//
// Memory: a rank's outputs may be written once its call has been seen (open_sources()); they are complete when all sources have posted `consumed`.
#pragma once

#include "kernels/dispatch.h"
#include "kernels/ring.cuh"
#include "kernels/transfer.cuh"

namespace tern::kernels {

// The rows of one warp, which it takes as it comes to them: a flow of ring.cuh. The first rows are loaded while open() waits for the others' calls;
// it says whether they have come, and `ranks` are valid then. All warps ask at the same place of the code, those without rows too: in open() they
// meet at a barrier, and tools that check barriers take two places for two barriers.
template <typename Open>
class RowDelivery {
 public:
  static constexpr int kPendingStores = 1;

  __device__ RowDelivery(const DispatchArgs& args, const SourceView* ranks, int32_t warp, int32_t num_warps, Open open)
      : args_(args), plan_(args.plan), ranks_(ranks), num_warps_(num_warps), open_(open) {
    const TransferArgs& t = args.transfer;
    end_token_ = static_cast<int32_t>(min(int64_t{plan_.tokens_at(t.exchange.rank)}, int64_t{t.end_chunk} * t.tokens_per_chunk));
    look_ahead(warp);
  }

  // After run_ring().
  __device__ bool is_open() const { return is_open_; }

  __device__ RingLoad load(std::byte* stage, uint64_t* arrivals, bool) {
    const RowPieces& p = args_.pieces;
    const bool has_more = load_piece_ > 0 || next_token_ < end_token_;
    // Before the ring is full, behind which the first piece is stored.
    if (!has_asked_ && (!has_more || ++num_loads_ == p.num_stages - kPendingStores)) {
      is_open_ = open_();
      has_asked_ = true;
    }
    if (!has_more || (has_asked_ && !is_open_)) return RingLoad::kNoMore;
    if (load_piece_ == 0) {
      token_ = next_token_;
#pragma unroll
      for (int i = 0; i < kMostRefs; ++i) refs_[i] = refs_ahead_[i];
#pragma unroll
      for (int i = 0; i < kScaleWords; ++i) words_[i] = words_ahead_[i];
      look_ahead(num_warps_ + __shfl_sync(~0u, static_cast<int32_t>(taken_), 0));
    }
    const bool is_last = load_piece_ + 1 == p.num_pieces;
    if (device::lane_idx() == 0) {
      const uint32_t row_part = piece_size(load_piece_), scale_part = is_last && !by_words() ? static_cast<uint32_t>(args_.scale_bytes) : 0;
      device::expect_bytes(arrivals, row_part + scale_part);
      device::bulk_load(stage, own(args_.transfer.rows) + int64_t{load_piece_} * p.piece_bytes, row_part, arrivals);
      if (scale_part > 0) device::bulk_load(stage + p.scales, own(args_.transfer.scales), scale_part, arrivals);
    }
#pragma unroll
    for (int i = 0; i < kMostRefs; ++i)
      if (nth_ref(i) < plan_.messages_per_token) refs_of(stage)[nth_ref(i)] = refs_[i];
    if (is_last && by_words()) for_own_words([&](int i, int32_t at) { *reinterpret_cast<uint32_t*>(stage + p.scales + at) = words_[i]; });
    if (++load_piece_ == p.num_pieces) load_piece_ = 0;
    return RingLoad::kStarted;
  }

  // Each thread stores to its ranks, which it wrote down itself.
  __device__ void store(std::byte* stage) {
    if (!is_open_) return;
    const RowPieces& p = args_.pieces;
    const bool is_last = store_piece_ + 1 == p.num_pieces;
    const int64_t at = int64_t{store_piece_} * p.piece_bytes;
#pragma unroll
    for (int i = 0; i < kMostRefs; ++i) {
      if (nth_ref(i) >= plan_.messages_per_token) break;
      const MessageRef ref = refs_of(stage)[nth_ref(i)];
      if (ref.rank < 0 || ref.row < 0 || ranks_[ref.rank].takes_rows == nullptr) continue;
      const SourceView& to = ranks_[ref.rank];
      device::bulk_store(to.takes_rows + ref.row * args_.row_bytes + at, stage, piece_size(store_piece_));
      if (is_last && to.takes_scales != nullptr && !by_words())
        device::bulk_store(to.takes_scales + ref.row * args_.scale_bytes, stage + p.scales, static_cast<uint32_t>(args_.scale_bytes));
    }
    if (is_last && by_words()) store_words(stage);
    store_piece_ = is_last ? 0 : store_piece_ + 1;
  }

 private:
  static constexpr int kMostRefs = kMostDelivered / kWarpThreads;  // of a thread

  static constexpr int kScaleWords = kMostScaleWords / kWarpThreads;

  // Scales that the copy engine cannot take as they lie: in words of 4 bytes, of which a thread loads, keeps and stores its own.
  __device__ bool by_words() const { return args_.scale_bytes > 0 && args_.transfer.scales.in_heap == 0; }
  template <typename Visitor>
  __device__ void for_own_words(Visitor visit) const {
#pragma unroll
    for (int i = 0; i < kScaleWords; ++i) {
      const int32_t at = nth_ref(i) * static_cast<int32_t>(sizeof(uint32_t));
      if (at < args_.scale_bytes) visit(i, at);
    }
  }
  __device__ void store_words(const std::byte* stage) const {
    __syncwarp();  // the refs are everybody's
    for (int n = 0; n < plan_.messages_per_token; ++n) {
      const MessageRef ref = refs_of(stage)[n];
      if (ref.rank < 0 || ref.row < 0 || ranks_[ref.rank].takes_rows == nullptr) continue;
      std::byte* const scales = ranks_[ref.rank].takes_scales;
      if (scales == nullptr) continue;
      for_own_words([&](int, int32_t at) {
        *reinterpret_cast<uint32_t*>(scales + ref.row * args_.scale_bytes + at) =
            *reinterpret_cast<const uint32_t*>(stage + args_.pieces.scales + at);
      });
    }
  }

  __device__ static int nth_ref(int i) { return static_cast<int>(device::lane_idx()) + i * kWarpThreads; }
  __device__ MessageRef* refs_of(std::byte* stage) const { return reinterpret_cast<MessageRef*>(stage + args_.pieces.entries); }
  __device__ const MessageRef* refs_of(const std::byte* stage) const {
    return reinterpret_cast<const MessageRef*>(stage + args_.pieces.entries);
  }
  __device__ uint32_t piece_size(int piece) const {
    return static_cast<uint32_t>(min(int64_t{args_.pieces.piece_bytes}, args_.row_bytes - int64_t{piece} * args_.pieces.piece_bytes));
  }

  // What lies in place, of the token that is loaded.
  __device__ const std::byte* own(const layout::PulledPart& part) const {
    const ExchangeView& exchange = args_.transfer.exchange;
    return exchange.heap(exchange.rank) + part.offset + token_ * part.stride;
  }

  // Nothing waits here: where token `nth` of the round goes, and its words, are asked for a token ahead, and which one comes after it is two ahead. Tokens begin with
  // different ranks, or all would send to the same one at a time.
  __device__ void look_ahead(int32_t nth) {
    next_token_ = static_cast<int32_t>(args_.transfer.first_token()) + nth;
    if (next_token_ >= end_token_) return;
    const int num_refs = plan_.messages_per_token;
    const int shift = (args_.transfer.exchange.rank + nth) % num_refs;
#pragma unroll
    for (int i = 0; i < kMostRefs; ++i) {
      const int ref = nth_ref(i) + shift;
      if (nth_ref(i) < num_refs) refs_ahead_[i] = plan_.messages[int64_t{next_token_} * num_refs + (ref < num_refs ? ref : ref - num_refs)];
    }
    if (by_words()) {
      const std::byte* const scales = args_.in.scales + next_token_ * args_.in.scale_token_stride_bytes;
      for_own_words([&](int i, int32_t at) { words_ahead_[i] = *reinterpret_cast<const uint32_t*>(scales + at); });
    }
    if (device::lane_idx() == 0) taken_ = atomicAdd(&args_.transfer.exchange.state->parts_taken, 1u);
  }

  const DispatchArgs& args_;
  const PlanView& plan_;
  const SourceView* const ranks_;
  const int32_t num_warps_;
  int32_t end_token_;
  int32_t token_ = 0, next_token_ = 0;
  uint32_t taken_ = 0;                                            // thread 0's
  MessageRef refs_[kMostRefs] = {}, refs_ahead_[kMostRefs] = {};  // the thread's, of the two tokens
  uint32_t words_[kScaleWords] = {}, words_ahead_[kScaleWords] = {};
  int load_piece_ = 0, store_piece_ = 0;
  int num_loads_ = 0;  // up to the question
  Open open_;
  bool has_asked_ = false, is_open_ = false;
};

// Puts the weights of the messages whose rows are delivered to their places. Thread `thread` of `num_threads`: four weights at a time.
__device__ inline void receive_weights(const DispatchArgs& args, const Transfer& transfer, const SourceView* sources, uint32_t thread,
                                       uint32_t num_threads) {
  const PlanView& plan = args.plan;
  const DispatchOutputs& out = args.out;
  const auto quads = static_cast<uint32_t>(plan.topk_stride) / 4;
  for (int i = 1; i <= transfer.num_ranks(); ++i) {
    const int nth = transfer.rank() + i, source = nth < transfer.num_ranks() ? nth : nth - transfer.num_ranks();
    const SourceView& view = sources[source];
    if (!view.delivers) continue;
    const int32_t* const chunk_begin = plan.chunks_from(source);
    const int32_t begin = plan.received_from(source) + chunk_begin[args.transfer.first_chunk];
    const auto num = static_cast<uint32_t>(chunk_begin[args.transfer.end_chunk] - chunk_begin[args.transfer.first_chunk]);
    for (uint32_t quad = thread; quad < num * quads; quad += num_threads) {
      const int32_t message = begin + static_cast<int32_t>(quad / quads), token = plan.source_token[message];
      const auto k = static_cast<int32_t>(quad % quads) * 4;
      const int4 experts = *reinterpret_cast<const int4*>(plan.received_experts + int64_t{message} * plan.topk_stride + k);
      if (!transfer.await_chunk(view, source, token)) return;
      const auto weights = *reinterpret_cast<const float4*>(view.weights + token * view.weight_stride + k * int64_t{sizeof(float)});
      *reinterpret_cast<float4*>(out.plan_weights + int64_t{message} * plan.topk_stride + k) = weights;
      if (out.topk_weights == nullptr || message >= out.num_rows) continue;
      float* const to = out.topk_weights + int64_t{message} * plan.num_topk + k;
      const int32_t left = plan.num_topk - k;
      to[0] = experts.x >= 0 ? weights.x : 0.0f;
      if (left > 1) to[1] = experts.y >= 0 ? weights.y : 0.0f;
      if (left > 2) to[2] = experts.z >= 0 ? weights.z : 0.0f;
      if (left > 3) to[3] = experts.w >= 0 ? weights.w : 0.0f;
    }
  }
}

}  // namespace tern::kernels
