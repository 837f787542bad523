// SPDX-License-Identifier: Apache-2.0
// What the host does alike for every operation on a GPU: streams and events, epochs, rounds, how many SMs.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>

#include "cuda/exchange.h"
#include "cuda/plan.h"
#include "kernels/transfer.h"

namespace tern::cuda {

// The stream of one operation: waits for what the caller asked for at the start, and records what it asked for at the end.
class OperationStream {
 public:
  OperationStream(const CudaPlan& plan, const tern_launch& launch);
  ~OperationStream();
  OperationStream(const OperationStream&) = delete;
  OperationStream& operator=(const OperationStream&) = delete;

  cudaStream_t get() const { return stream_; }
  // Is it recorded into a graph instead of run?
  bool is_captured() const;
  void finish();

 private:
  void record_end();

  CudaLane& lane_;
  const std::shared_ptr<Event>& end_;
  const tern_launch& launch_;
  cudaStream_t stream_;
  bool finished_ = false;
};

// The blocks of a kernel, one on each SM: what the caller or the exchange asked for, or what `bytes` of traffic per rank need
// (plan/batch_path.h), within this rank's share of the GPU.
int choose_num_sms(const CudaExchange& exchange, const tern_launch& launch, int64_t bytes);
// So few SMs do not fill the link: they want more warps, and more of what is known beforehand.
inline constexpr int kFewSms = 16;

// Chunks of tokens that fit one round. TERN_OUT_OF_MEMORY says what staging would be needed if not even one does.
int32_t chunks_per_round(const CudaPlan& plan, int64_t staging_bytes, int64_t token_bytes, const char* operation);
// Rounds of an operation in which any rank may have `most_tokens`; a send must do with one.
int32_t num_rounds(const CudaPlan& plan, int32_t chunks_per_round, tern_phase phase, int64_t most_tokens, const char* operation);

// Takes the lane's next epochs, one for each round. TERN_INVALID_STATE if an open send still holds a bank that they need.
void check_room(const CudaLane& lane, tern_operation operation, int32_t num_rounds);

// Epochs by which `consumed` stays behind the lane's last, because sends are open.
int32_t consumed_lag(const CudaLane& lane);

// What the next kernel on the lane gets of the exchange. One that sends takes the lane's next epoch; a receive has that of its send.
kernels::ExchangeView enter_lane(CudaExchange& exchange, int32_t lane_idx, bool sends);

struct ChunkRange {
  int32_t begin, end;
};
// The chunks of a round, of those of a plan.
inline ChunkRange chunks_of_round(int32_t num_chunks, int32_t chunks_per_round, int32_t round) {
  return {std::min(round * chunks_per_round, num_chunks), std::min((round + 1) * chunks_per_round, num_chunks)};
}

// What a kernel works on: chunks of a batch. Between nodes its rows may lie in slots: those that arrive with a dispatch, those that a combine
// returns.
struct BatchRound {
  kernels::PlanView plan;
  ChunkRange chunks;
  int32_t node = 0;
  kernels::RailSlots slots = {};  // without banks: rows are the caller's
  bool is_first = true;           // of the operation
};

// What dispatch and combine share in the arguments of a kernel.
struct RoundOptions {
  tern_operation operation;
  tern_phase phase;
  const layout::CallShape& shape;
  ChunkRange chunks;
  uint64_t* ticket;  // in GPU memory
};
kernels::TransferArgs make_round(const CudaPlan& plan, int32_t lane_idx, const RoundOptions& options);

// A part of a token that goes through the staging at `offset` of the token's slot; absent if it has no bytes.
layout::PulledPart staged_part(const kernels::TransferArgs& transfer, const layout::StagedSlot& slot, int64_t offset, int64_t bytes);
// A part that is pulled from the caller's window memory, `step` bytes from token to token.
layout::PulledPart heap_part(int64_t heap_offset, int64_t step);

// Of a block's shared memory, what is left for its rings.
int64_t ring_bytes(int32_t num_ranks);
// How many stages of a ring fit each of `num_warps` warps, but at least so many.
int32_t ring_stages(int64_t shared_bytes, int32_t num_warps, int32_t stage_bytes, int32_t least);

// TERN_INVALID_ARGUMENT if a pointer or stride is not a multiple of 16 bytes.
void check_alignment(const char* operation, const char* name, const void* pointer, int64_t stride_bytes = 0);

// TERN_INVALID_ARGUMENT if the caller promised window memory with zero_copy and it is not.
void check_zero_copy(const CudaPlan& plan, const char* operation, const void* rows, int64_t row_bytes, bool zero_copy);

}  // namespace tern::cuda
