// SPDX-License-Identifier: Apache-2.0
// Operations of small batches: one kernel, which pushes rows, in place of those of operations.h.
//
//   if (takes_latency_path(plan, call, launch)) {
//     LatencyDispatch operation(plan, call, launch);
//     operation.check(ticket);               // throws what would keep it from being started; nothing has happened
//     operation.enqueue(stream, ticket);
//   }
#pragma once

#include "cuda/plan.h"
#include "kernels/latency.h"

namespace tern::cuda {

// In TERN_MODE_AUTO there is room for rows of so many bytes of a rank.
int64_t most_latency_bytes();

// The same answer on every rank. A receive goes the way of its send.
bool takes_latency_path(const CudaPlan& plan, const DispatchCall& call, const tern_launch& launch);
bool takes_latency_path(const CudaPlan& plan, const CombineCall& call);
bool took_latency_path(const Ticket& ticket);
// Between nodes: can one kernel take all batches within the node (kernels::LatencyBatches), which the rail has brought in one round?
bool takes_batches_at_once(const CudaPlan& plan, const DispatchCall& call);
bool takes_batches_at_once(const CudaPlan& plan, const CombineCall& call);

class LatencyDispatch {
 public:
  LatencyDispatch(const CudaPlan& plan, const DispatchCall& call, const tern_launch& launch);
  void check(const Ticket& ticket) const;
  // Of a receive the ticket says whether its send has routed.
  void enqueue(cudaStream_t stream, Ticket& ticket) const;
  // Between nodes, in place of the two; `launch` is of a whole operation. `routes`: the experts of all batches' tokens are known here, and no more.
  void enqueue_batches(const kernels::LatencyBatches& batches, bool routes, cudaStream_t stream) const;
  int32_t num_sms() const { return num_sms_; }

 private:
  kernels::LatencyDispatchArgs args(bool routes, int32_t lag_before) const;

  const CudaPlan& plan_;
  const DispatchCall& call_;
  const tern_launch& launch_;
  layout::CallShape shape_;
  int32_t parts_log2_;  // of a row
  int32_t num_sms_;
};

class LatencyCombine {
 public:
  LatencyCombine(const CudaPlan& plan, const CombineCall& call, const tern_launch& launch);
  void check(const Ticket& ticket) const;
  void enqueue(cudaStream_t stream, Ticket& ticket) const;
  void enqueue_batches(const kernels::LatencyBatches& batches, cudaStream_t stream) const;
  int32_t num_sms() const { return num_sms_; }

 private:
  kernels::LatencyCombineArgs args(int32_t lag_before) const;

  const CudaPlan& plan_;
  const CombineCall& call_;
  const tern_launch& launch_;
  layout::CallShape shape_;
  int32_t parts_log2_;  // of a row
  int32_t num_sms_;
};

}  // namespace tern::cuda
