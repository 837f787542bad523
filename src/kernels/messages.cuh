// SPDX-License-Identifier: Apache-2.0
// The walks of a warp over the messages that this rank has received, in the order in which their sources send them. Messages are dealt out to the
// warps in runs: the first run of every source, then the second of every source, ... So all sources are met in turn, and one that sends little, or
// late, keeps no warp from the others' messages.
//   MessageWalk   the runs of a warp are known beforehand, so it sees many messages ahead
//   DealtWalk     warps take the next run when they come to it, so the faster ones have more of them, and runs are done in about their order
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

// The runs of a round, of 1, 2, 4, ..., or 32 messages.
class MessageRuns {
 public:
  // All threads of the warp.
  __device__ MessageRuns(const TransferArgs& transfer, const PlanView& plan, int32_t num_warps, int run)
      : transfer_(transfer), plan_(plan), num_ranks_(transfer.exchange.num_ranks), run_(run), num_warps_(num_warps) {
    for (int source = static_cast<int>(device::lane_idx()); source < num_ranks_; source += 32) most_ = max(most_, range_of(source).count);
#pragma unroll
    for (int step = 16; step > 0; step /= 2) most_ = max(most_, __shfl_xor_sync(~0u, most_, step));
  }

  __device__ int run() const { return run_; }
  __device__ int32_t num_warps() const { return num_warps_; }
  // Is there run `idx`, or one after it?
  __device__ bool has(int32_t idx) const { return idx / num_ranks_ * run_ < most_; }

  // Message i of the run. False: the source has no such message; `source` and `token` are not out of bounds then.
  __device__ bool fetch(int32_t idx, int i, Message& message) const {
    const int32_t nth_run = idx / num_ranks_, nth = nth_run * run_ + i;
    const int32_t turns = nth_run / max(1, num_warps_ / num_ranks_);  // or a warp would meet the same source each time
    message.source = (transfer_.exchange.rank + 1 + idx + turns) % num_ranks_;
    const SourceRange range = range_of(message.source);
    message.index = range.begin + nth;
    message.token = nth < range.count ? plan_.source_token[message.index] : 0;
    return nth < range.count;
  }

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

  const TransferArgs& transfer_;
  const PlanView& plan_;
  const int num_ranks_;
  const int run_;
  const int32_t num_warps_;
  int32_t most_ = 0;  // messages of any source
};

__device__ __forceinline__ Message message_of_lane(const Message& own, int lane) {
  return {__shfl_sync(~0u, own.source, lane), __shfl_sync(~0u, own.index, lane), __shfl_sync(~0u, own.token, lane)};
}

class MessageWalk {
 public:
  // Warp `warp` of `num_warps`. All its threads call this and next().
  __device__ MessageWalk(const TransferArgs& transfer, const PlanView& plan, int32_t warp, int32_t num_warps, int run = 1)
      : runs_(transfer, plan, num_warps, run), next_run_(warp) {
    load_batch();
  }

  // False: there are no more.
  __device__ bool next(Message& message) {
    while (valid_ == 0)
      if (!load_batch()) return false;
    at_ = __ffs(static_cast<int>(valid_)) - 1;
    valid_ &= valid_ - 1;
    message = message_of_lane(ahead_, at_);
    return true;
  }

  // Messages are fetched in batches, each thread has one of the batch. The thread whose message is visited, and this thread's own message;
  // if it has one: `source` and `token` are never out of bounds.
  __device__ int at() const { return at_; }
  __device__ const Message& own() const { return ahead_; }
  __device__ int num_batches() const { return num_batches_; }  // so far

 private:
  // Each thread fetches one of the warp's next 32 messages.
  __device__ bool load_batch() {
    if (!runs_.has(next_run_)) return false;
    ++num_batches_;
    const int lane = static_cast<int>(device::lane_idx());
    valid_ = __ballot_sync(~0u, runs_.fetch(next_run_ + lane / runs_.run() * runs_.num_warps(), lane % runs_.run(), ahead_));
    next_run_ += 32 / runs_.run() * runs_.num_warps();
    return true;
  }

  const MessageRuns runs_;
  int32_t next_run_;
  Message ahead_ = {};
  uint32_t valid_ = 0;  // threads whose message has not been visited
  int at_ = 0;
  int num_batches_ = 0;
};

class DealtWalk {
 public:
  // The first run of a warp is known; `num_taken` counts the others, which the warps take, in global memory. All threads of the warp call this
  // and next().
  __device__ DealtWalk(const MessageRuns& runs, int32_t warp, uint32_t* num_taken) : runs_(runs), num_taken_(num_taken) {
    fetch(warp);
    take();
  }

  // False: there are no more.
  __device__ bool next(Message& message) {
    while (valid_ == 0) {
      if (!has_run_) return false;
      current_ = fetched_;
      valid_ = __ballot_sync(~0u, has_fetched_);
      fetch(runs_.num_warps() + __shfl_sync(~0u, static_cast<int32_t>(taken_), 0));
      take();
    }
    const int lane = __ffs(static_cast<int>(valid_)) - 1;
    valid_ &= valid_ - 1;
    message = message_of_lane(current_, lane);
    return true;
  }

 private:
  // Nothing waits here: what is fetched is visited after the current run, and the run that is taken is fetched after that.
  __device__ void fetch(int32_t run_idx) {
    has_run_ = runs_.has(run_idx);
    const int lane = static_cast<int>(device::lane_idx());
    has_fetched_ = has_run_ && lane < runs_.run() && runs_.fetch(run_idx, lane, fetched_);
  }
  __device__ void take() {
    if (has_run_ && device::lane_idx() == 0) taken_ = atomicAdd(num_taken_, 1u);
  }

  const MessageRuns runs_;
  uint32_t* const num_taken_;
  Message current_ = {}, fetched_ = {};  // the thread's of the run
  uint32_t valid_ = 0;                   // threads whose message of the current run has not been visited
  bool has_run_ = false;                 // that was fetched
  bool has_fetched_ = false;             // the thread's message of it
  uint32_t taken_ = 0;                   // thread 0's
};

}  // namespace tern::kernels
