// SPDX-License-Identifier: Apache-2.0
// The messages that a pulling warp of a dispatch gets, one after the other, and whether they have come: whether the chunks of their tokens are
// there. A look at a chunk's flag takes as long as a trip to the L2 cache, so a look is for many messages.
//   AheadArrivals   for rows that lie in place: a warp knows its next 32 messages, and little is done for each of them
//   DealtArrivals   for rows that are staged, by SMs of very different speeds: warps of all blocks take the next messages when they come to them
//
//   while (arrivals.next(message))
//     if (arrivals.has_come(message, true)) ...
//
// Threads: all of a warp. Memory: what the source has staged for a message may be read after has_come(), by bulk loads too.
#pragma once

#include "device/bulk.cuh"
#include "kernels/dispatch.h"
#include "kernels/messages.cuh"
#include "kernels/transfer.cuh"

namespace tern::kernels {

class AheadArrivals {
 public:
  __device__ AheadArrivals(const DispatchArgs& args, const Transfer& transfer, const SourceView* sources, int32_t warp, int32_t num_warps)
      : transfer_(transfer), sources_(sources), walk_(args.transfer, args.plan, warp, num_warps) {}

  // Those that are pulled.
  __device__ bool next(Message& message) {
    while (walk_.next(message))
      if (!sources_[message.source].delivers) return true;
    return false;
  }

  // For the message that next() gave last. Waits for it if it may; false then: the exchange has failed. All threads look at once, each for its own
  // message of the batch. Nobody waits for those behind this one.
  __device__ bool has_come(const Message&, bool may_wait) {
    const int at = walk_.at();
    if (walk_.num_batches() != looked_for_batch_) arrived_ = 0;
    looked_for_batch_ = walk_.num_batches();
    if ((arrived_ >> at & 1) != 0) return true;
    const Message& own = walk_.own();
    const SourceView& source = sources_[own.source];
    bool is_there = transfer_.has_chunk(source, own.source, own.token);
    arrived_ = __ballot_sync(~0u, is_there);
    if (may_wait && (arrived_ >> at & 1) == 0) {
      if (static_cast<int>(device::lane_idx()) == at) is_there = transfer_.await_chunk(source, own.source, own.token);
      arrived_ = __ballot_sync(~0u, is_there);
    }
    device::fence_async_proxy();  // what each thread has acquired, the copy engine reads from now on
    __syncwarp();                 // and all may
    return (arrived_ >> at & 1) != 0;
  }

 private:
  const Transfer& transfer_;
  const SourceView* const sources_;
  MessageWalk walk_;
  uint32_t arrived_ = 0;  // of the walk's batch: threads whose messages may be pulled
  int looked_for_batch_ = 0;
};

class DealtArrivals {
 public:
  __device__ DealtArrivals(const DispatchArgs& args, const Transfer& transfer, SourceView* sources, int32_t warp, int32_t num_warps)
      : transfer_(transfer),
        sources_(sources),
        walk_({args.transfer, args.plan, num_warps, args.pull_run}, warp, &args.transfer.exchange.state->parts_taken) {}

  // Those that are pulled.
  __device__ bool next(Message& message) {
    while (walk_.next(message))
      if (!sources_[message.source].delivers) return true;
    return false;
  }

  // Waits for it if it may; false then: the exchange has failed. The threads look at the flags of the next chunks as well, and the block's warps
  // tell each other what they have seen.
  __device__ bool has_come(const Message& message, bool may_wait) {
    SourceView& source = sources_[message.source];
    if (!source.is_staged) return true;
    const int chunk = transfer_.chunk_of(message.token);
    if (transfer_.has_seen_chunk(source, chunk) || transfer_.look_at_chunks(source, message.source, chunk)) return true;
    if (!may_wait) return false;
    const bool is_there = device::lane_idx() == 0 && transfer_.await_chunk(source, message.source, message.token);
    return transfer_.note_chunks(source, __ballot_sync(~0u, is_there), chunk);
  }

 private:
  const Transfer& transfer_;
  SourceView* const sources_;
  DealtWalk walk_;
};

}  // namespace tern::kernels
