// SPDX-License-Identifier: Apache-2.0
#include "kernels/count_routing.h"

#include <algorithm>

#include "kernels/shared_memory.h"

namespace tern::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 64;
constexpr int64_t kMostCounterBytes = 48 << 10;  // in a block's shared memory

// The counters of a block, behind each other in its shared memory; where those do not fit, the caller's.
struct Counters {
  int32_t* ranks;
  int32_t* nodes;
  int32_t* experts;
};

__host__ __device__ int64_t num_counters(const CountRoutingArgs& args) {
  return int64_t{args.num_ranks} + args.num_ranks / args.ranks_per_node + args.num_experts;
}

int64_t counter_bytes(const CountRoutingArgs& args) { return num_counters(args) * static_cast<int64_t>(sizeof(int32_t)); }

__device__ void add(int32_t* counters, int32_t idx) {
  if (counters != nullptr) atomicAdd(counters + idx, 1);
}

// One token, by one thread.
class Token {
 public:
  __device__ Token(const CountRoutingArgs& args, int64_t token) : args_(args), token_(token) {}

  __device__ void count(const Counters& counters) const {
    if (args_.given_in_rank == nullptr)
      count_entries(counters);
    else
      count_ranks(counters);
  }

 private:
  // -1: none.
  __device__ int32_t expert(int32_t k) const {
    const int64_t at = token_ * args_.num_topk + k;
    const int64_t expert =
        args_.is_int32 ? static_cast<const int32_t*>(args_.topk_idx)[at] : static_cast<const int64_t*>(args_.topk_idx)[at];
    return expert >= 0 && expert < args_.num_experts ? static_cast<int32_t>(expert) : -1;
  }

  __device__ void count_entries(const Counters& counters) const {
    if (args_.token_in_rank != nullptr)
      for (int32_t rank = 0; rank < args_.num_ranks; ++rank) args_.token_in_rank[token_ * args_.num_ranks + rank] = 0;
    const int32_t experts_per_rank = args_.num_experts / args_.num_ranks;
    for (int32_t k = 0; k < args_.num_topk; ++k) {
      const int32_t own = expert(k);
      if (own < 0) continue;
      add(counters.experts, own);
      // An entry before it may have the same rank, or node.
      const int32_t rank = own / experts_per_rank, node = rank / args_.ranks_per_node;
      bool is_first_of_rank = true, is_first_of_node = true;
      for (int32_t before = 0; before < k; ++before) {
        const int32_t other = expert(before);
        if (other < 0) continue;
        is_first_of_rank &= other / experts_per_rank != rank;
        is_first_of_node &= other / experts_per_rank / args_.ranks_per_node != node;
      }
      if (is_first_of_node) add(counters.nodes, node);
      if (!is_first_of_rank) continue;
      add(counters.ranks, rank);
      if (args_.token_in_rank != nullptr) args_.token_in_rank[token_ * args_.num_ranks + rank] = 1;
    }
  }

  __device__ void count_ranks(const Counters& counters) const {
    int32_t last_node = -1;
    for (int32_t rank = 0; rank < args_.num_ranks; ++rank) {
      const bool goes = args_.given_in_rank[token_ * args_.num_ranks + rank] != 0;
      if (args_.token_in_rank != nullptr) args_.token_in_rank[token_ * args_.num_ranks + rank] = goes ? 1 : 0;
      if (!goes) continue;
      add(counters.ranks, rank);
      const int32_t node = rank / args_.ranks_per_node;
      if (node != last_node) add(counters.nodes, node);
      last_node = node;
    }
  }

  const CountRoutingArgs& args_;
  const int64_t token_;
};

__device__ void add_all(const int32_t* from, int32_t* to, int32_t num) {
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < num && to != nullptr; i += kThreads)
    if (from[i] != 0) atomicAdd(to + i, from[i]);
}

template <bool kShared>
__global__ void __launch_bounds__(kThreads) count_routing_kernel(const __grid_constant__ CountRoutingArgs args) {
  extern __shared__ int32_t shared[];
  const int32_t num_nodes = args.num_ranks / args.ranks_per_node;
  Counters counters{args.tokens_per_rank, args.tokens_per_node, args.tokens_per_expert};
  if constexpr (kShared) {
    counters = {shared, shared + args.num_ranks, shared + args.num_ranks + num_nodes};
    for (int64_t i = threadIdx.x; i < num_counters(args); i += kThreads) shared[i] = 0;
    __syncthreads();
  }
  for (int64_t token = int64_t{blockIdx.x} * kThreads + threadIdx.x; token < args.num_tokens; token += int64_t{gridDim.x} * kThreads)
    Token(args, token).count(counters);
  if constexpr (!kShared) return;
  __syncthreads();
  add_all(counters.ranks, args.tokens_per_rank, args.num_ranks);
  add_all(counters.nodes, args.tokens_per_node, num_nodes);
  add_all(counters.experts, args.tokens_per_expert, args.num_experts);
}

}  // namespace

cudaError_t prepare_count_routing() {
  const cudaError_t error = allow_shared(count_routing_kernel<false>, 0);
  return error != cudaSuccess ? error : allow_shared(count_routing_kernel<true>, kMostCounterBytes);
}

cudaError_t launch_count_routing(const CountRoutingArgs& args, cudaStream_t stream) {
  const auto num_blocks = static_cast<int>(std::clamp<int64_t>((args.num_tokens + kThreads - 1) / kThreads, 1, kMostBlocks));
  const bool fits = counter_bytes(args) <= kMostCounterBytes;
  const LaunchShape shape{num_blocks, kThreads, fits ? counter_bytes(args) : 0, false};
  return launch(fits ? count_routing_kernel<true> : count_routing_kernel<false>, shape, stream, args);
}

}  // namespace tern::kernels
