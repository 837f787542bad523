// SPDX-License-Identifier: Apache-2.0
// The walk of one warp over the messages that this rank has received, in the order in which their sources send them.
#pragma once

#include "device/order.cuh"
#include "kernels/exchange_view.h"
#include "kernels/transfer.h"

namespace tern::kernels {

struct Message {
  int32_t source;
  int32_t index;  // among all received messages
  int32_t token;  // at its source
};

// Visits the messages of a round in runs of `run` (1, 2, 4, ..., 32): the first run of every source, then the second of every source, ... dealt out
// to the warps in turn. Each warp meets all sources, so that one which sends little, or late, keeps no warp from the others'.
class MessageWalk {
 public:
  // Warp `warp` of `num_warps`. All its threads call this and next().
  __device__ MessageWalk(const TransferArgs& transfer, const PlanView& plan, int32_t warp, int32_t num_warps, int run = 1)
      : transfer_(transfer), plan_(plan), num_ranks_(transfer.exchange.num_ranks), run_(run), next_item_(warp), num_warps_(num_warps) {
    for (int source = static_cast<int>(device::lane_idx()); source < num_ranks_; source += 32) most_ = max(most_, range_of(source).count);
#pragma unroll
    for (int step = 16; step > 0; step /= 2) most_ = max(most_, __shfl_xor_sync(~0u, most_, step));
    load_batch();
  }

  // False: there are no more.
  __device__ bool next(Message& message) {
    while (valid_ == 0)
      if (!load_batch()) return false;
    at_ = __ffs(static_cast<int>(valid_)) - 1;
    valid_ &= valid_ - 1;
    message = {__shfl_sync(~0u, ahead_.source, at_), __shfl_sync(~0u, ahead_.index, at_), __shfl_sync(~0u, ahead_.token, at_)};
    return true;
  }

  // Messages are fetched in batches, each thread has one of the batch. The thread whose message is visited, and this thread's own message;
  // if it has one: `source` and `token` are never out of bounds.
  __device__ int at() const { return at_; }
  __device__ const Message& own() const { return ahead_; }
  __device__ int num_batches() const { return num_batches_; }  // so far

 private:
  struct SourceRange {
    int32_t begin, count;
  };

  // The source's messages in this round.
  __device__ SourceRange range_of(int source) const {
    const int32_t* chunk_begin = plan_.chunks_from(source);
    const int32_t begin = chunk_begin[transfer_.first_chunk];
    return {plan_.received_from(source) + begin, chunk_begin[transfer_.end_chunk] - begin};
  }

  // Each thread fetches one of the warp's next 32 messages.
  __device__ bool load_batch() {
    if (next_item_ / num_ranks_ * run_ >= most_) return false;
    ++num_batches_;
    const int lane = static_cast<int>(device::lane_idx());
    const int32_t item = next_item_ + lane / run_ * num_warps_;
    next_item_ += 32 / run_ * num_warps_;
    const int32_t nth_run = item / num_ranks_, nth = nth_run * run_ + lane % run_;
    const int32_t turns = nth_run / max(1, num_warps_ / num_ranks_);  // or a warp would meet the same source each time
    ahead_.source = (transfer_.exchange.rank + 1 + item + turns) % num_ranks_;
    const SourceRange range = range_of(ahead_.source);
    const bool valid = nth < range.count;
    ahead_.index = range.begin + nth;
    ahead_.token = valid ? plan_.source_token[ahead_.index] : 0;
    valid_ = __ballot_sync(~0u, valid);
    return true;
  }

  const TransferArgs& transfer_;
  const PlanView& plan_;
  const int num_ranks_;
  const int run_;
  int32_t next_item_;  // a run
  const int32_t num_warps_;
  int32_t most_ = 0;  // messages of any source
  Message ahead_ = {};
  uint32_t valid_ = 0;  // threads whose message has not been visited
  int at_ = 0;
  int num_batches_ = 0;
};

}  // namespace tern::kernels
