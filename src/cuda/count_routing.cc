// SPDX-License-Identifier: Apache-2.0
#include "kernels/count_routing.h"

#include "cuda/exchange.h"

namespace tern::cuda {

void CudaExchange::count_routing(const PlanShape& shape, const tern_routing& routing, const tern_launch& launch,
                                 const tern_routing_counts& counts) {
  check_routing_arguments(shape, routing);
  const CurrentContext current(facts_.context);
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  const auto clear = [stream](int32_t* array, int32_t num) {
    if (array != nullptr) check(cudaMemsetAsync(array, 0, static_cast<size_t>(num) * sizeof(int32_t), stream), "clearing counts");
  };
  clear(counts.tokens_per_rank, shape.num_ranks);
  clear(counts.tokens_per_node, shape.num_nodes);
  kernels::CountRoutingArgs args{.topk_idx = routing.topk_idx,
                                 .given_in_rank = routing.token_in_rank,
                                 .is_int32 = routing.topk_idx_type == TERN_INDEX_INT32,
                                 .num_topk = shape.num_topk,
                                 .num_tokens = routing.num_tokens,
                                 .num_ranks = shape.num_ranks,
                                 .ranks_per_node = shape.ranks_per_node(),
                                 .num_experts = shape.num_experts,
                                 .tokens_per_rank = counts.tokens_per_rank,
                                 .tokens_per_node = counts.tokens_per_node,
                                 .token_in_rank = counts.token_in_rank};
  const bool are_given = shape.num_topk == 0 && routing.tokens_per_expert != nullptr;
  if (are_given && counts.tokens_per_expert != nullptr) {
    const size_t bytes = static_cast<size_t>(shape.num_experts) * sizeof(int32_t);
    check(cudaMemcpyAsync(counts.tokens_per_expert, routing.tokens_per_expert, bytes, cudaMemcpyDeviceToDevice, stream), "copying counts");
  } else {
    clear(counts.tokens_per_expert, shape.num_experts);
    args.tokens_per_expert = counts.tokens_per_expert;
  }
  check(kernels::launch_count_routing(args, stream), "launching the kernel that counts a routing");
}

}  // namespace tern::cuda
