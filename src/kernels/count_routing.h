// SPDX-License-Identifier: Apache-2.0
// Counts of one routing by itself: tern_count_routing.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace tern::kernels {

struct CountRoutingArgs {
  // One of the two: [num_tokens, num_topk], int64 or int32, or [num_tokens, num_ranks].
  const void* topk_idx = nullptr;
  const uint8_t* given_in_rank = nullptr;
  bool is_int32 = false;
  int32_t num_topk = 0;
  int64_t num_tokens = 0;
  int32_t num_ranks = 0;
  int32_t ranks_per_node = 0;
  int32_t num_experts = 0;
  // Counts are added to; nullptr: not wanted.
  int32_t* tokens_per_rank = nullptr;
  int32_t* tokens_per_node = nullptr;
  int32_t* tokens_per_expert = nullptr;  // not with given_in_rank
  uint8_t* token_in_rank = nullptr;      // [num_tokens, num_ranks]
};

cudaError_t prepare_count_routing();
cudaError_t launch_count_routing(const CountRoutingArgs& args, cudaStream_t stream);

}  // namespace tern::kernels
