// SPDX-License-Identifier: Apache-2.0
// One dispatch or combine on a GPU: its arguments become those of kernels, in as many rounds as the staging needs.
//
//   DispatchOperation operation(plan, call, launch, most_tokens);
//   operation.check(ticket, 0);            // throws what would keep it from being started; nothing has happened
//   operation.enqueue(stream, ticket);
#pragma once

#include "cuda/plan.h"
#include "cuda/transfer.h"
#include "kernels/combine.h"
#include "kernels/dispatch.h"

namespace tern::cuda {

// What ranks compare of an operation, and a dispatch's arrays as its kernels know them.
layout::CallShape dispatch_shape(const CudaPlan& plan, const DispatchCall& call);
layout::CallShape combine_shape(const CudaPlan& plan, const CombineCall& call);
// A routing for the kernels that make a plan of it, whose arguments call it by the same names.
template <typename Args>
void take_routing(const tern_routing& routing, Args& args) {
  args.topk_idx = routing.topk_idx;
  args.is_int32 = routing.topk_idx_type == TERN_INDEX_INT32;
  args.token_in_rank = routing.token_in_rank;
  args.tokens_per_expert = routing.tokens_per_expert;
  args.num_tokens = static_cast<int32_t>(routing.num_tokens);
  args.device_num_tokens = routing.device_num_tokens;
}
kernels::DispatchInputs dispatch_inputs(const DispatchCall& call);
kernels::DispatchOutputs dispatch_outputs(const CudaPlan& plan, const DispatchCall& call);

class DispatchOperation {
 public:
  // `most_tokens`: that any rank may have, for all that the host knows.
  DispatchOperation(const CudaPlan& plan, const DispatchCall& call, const tern_launch& launch, int64_t most_tokens);
  void check(const Ticket& ticket, int32_t rounds_before) const;
  void enqueue(cudaStream_t stream, Ticket& ticket) const;
  int32_t num_sms() const { return num_sms_; }

  // ---- Between nodes, the exchange within one: several batches.
  // Of one batch at a time.
  int32_t chunks_per_round() const { return chunks_per_round_; }
  const layout::CallShape& shape() const { return shape_; }
  void enqueue_round(const BatchRound& round, cudaStream_t stream) const;
  // What packing needs of it.
  kernels::DispatchArgs packing_args(const BatchRound& round) const;

 private:
  void set_parts();
  void set_delivery();
  kernels::RowPieces pieces(const kernels::WarpRoles& roles, int64_t most_bytes) const;
  int32_t stage_run(const kernels::WarpRoles& roles, const layout::StagedSlot& slot) const;
  kernels::DispatchArgs batch_args(const BatchRound& round) const;
  kernels::DispatchArgs round_args(const BatchRound& round) const;

  const CudaPlan& plan_;
  const DispatchCall& call_;
  const tern_launch& launch_;
  int64_t num_tokens_;
  int64_t rows_at_ = -1;  // in the heap, where the peers pull them; -1: they are staged
  int64_t scales_at_ = -1;
  bool delivers_ = false;       // into the outputs of the others, as far as they take rows
  int64_t takes_rows_at_ = -1;  // in the heap, where the others may write this rank's outputs
  int64_t takes_scales_at_ = -1;
  layout::StagedSlot all_;   // a token with all its parts
  layout::StagedSlot slot_;  // what goes through the staging
  layout::CallShape shape_;
  int32_t chunks_per_round_ = 0;
  int32_t num_rounds_ = 0;
  int32_t num_sms_ = 0;
};

class CombineOperation {
 public:
  CombineOperation(const CudaPlan& plan, const CombineCall& call, const tern_launch& launch);
  void check(const Ticket& ticket) const;
  void enqueue(cudaStream_t stream, Ticket& ticket) const;
  int32_t num_sms() const { return num_sms_; }

  // ---- Between nodes, the exchange within one: several batches.
  bool is_per_entry() const { return per_entry_; }
  bool sends_weights_ahead() const;
  int32_t chunks_per_round() const { return chunks_per_round_; }
  int32_t weight_chunks_per_round() const { return weight_chunks_per_round_; }
  const layout::CallShape& shape() const { return shape_; }
  void enqueue_round(const BatchRound& round, cudaStream_t stream) const;
  void enqueue_weights_round(const BatchRound& round, cudaStream_t stream) const;
  kernels::DispatchArgs weights_args(const BatchRound& round) const;
  // Of the entries of this rank's tokens, where they are applied there; nullptr: they are not.
  const float* token_weights() const;

 private:
  // Rows travel in another form than the caller's.
  bool encodes() const { return call_.args.wire != TERN_WIRE_AS_DTYPE; }
  layout::StagedSlot weight_slot() const;  // of a token's weights that go ahead
  kernels::CombineArgs round_args(const BatchRound& round) const;

  const CudaPlan& plan_;
  const CombineCall& call_;
  const tern_launch& launch_;
  bool per_entry_ = false;
  int64_t rows_at_ = -1;     // in the heap, where the owners pull them; -1: they are staged
  layout::StagedSlot slot_;  // of a token
  layout::CallShape shape_;
  int32_t chunks_per_round_ = 0;
  int32_t num_rounds_ = 0;
  int32_t num_weight_rounds_ = 0;  // that go ahead
  int32_t weight_chunks_per_round_ = 0;
  int32_t num_sms_ = 0;
};

// TERN_INVALID_ARGUMENT if a receive is not called as its send was: on the same lane, with the same shape.
void check_ticket(const Ticket& ticket, const tern_launch& launch, const layout::CallShape& shape, const char* operation);

// A send is open until its receive.
void open_ticket(CudaExchange& exchange, const tern_launch& launch, const layout::CallShape& shape, Ticket& ticket);
void close_ticket(CudaExchange& exchange, const tern_launch& launch, Ticket& ticket);

}  // namespace tern::cuda
