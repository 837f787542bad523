// SPDX-License-Identifier: Apache-2.0
// One batch on all ranks: which token goes where, random rows, and what must come out. Every rank can make every rank's share
// from the seed, so that each checks its results without asking the others.
//
//   Workload workload({.num_ranks = 4, .num_tokens = 1024, .hidden = 7168, .num_experts = 256, .num_topk = 8, .seed = 1}, rank);
//   ... some exchange of workload.tokens() ...
//   workload.check(Result::kDispatched, output);
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "bench/contender.h"
#include "memory/host_segment.h"

namespace tern::bench {

struct Shape {
  int num_ranks;
  int64_t num_tokens;  // per rank
  int64_t hidden;      // of bf16
  int num_experts;
  int num_topk;
  uint64_t seed;
  int ranks_per_node;

  int num_nodes() const { return num_ranks / ranks_per_node; }
  int node_of(int rank) const { return rank / ranks_per_node; }
  int64_t row_bytes() const { return hidden * 2; }
  int rank_of_expert(int64_t expert) const { return static_cast<int>(expert / (num_experts / num_ranks)); }
};

// Memory of this process, its pages there already, in huge ones where the system gives them.
std::shared_ptr<Segment> make_private_memory(int64_t num_bytes);

// Calls visit(rank) for each rank of the mask, ascending.
template <typename Visit>
void for_each_rank(uint64_t mask, Visit visit) {
  for (; mask != 0; mask &= mask - 1) visit(std::countr_zero(mask));
}

class Workload {
 public:
  Workload(const Shape& shape, int rank);

  const Shape& shape() const { return shape_; }
  int rank() const { return rank_; }
  const std::byte* tokens() const { return tokens_->data(); }            // [num_tokens, hidden]
  const std::byte* expert_rows() const { return expert_rows_->data(); }  // [num_received, hidden], by (source rank, source token)
  const int64_t* topk_idx() const { return topk_idx_[index(rank_)].data(); }
  // The ranks that a token of this rank goes to, one bit each.
  std::span<const uint64_t> destinations() const { return destinations_[index(rank_)]; }

  // Rows that go from one rank to another, and where they start among the rows that arrive there.
  int64_t num_rows(int source, int destination) const { return num_rows_[index(source * shape_.num_ranks + destination)]; }
  int64_t first_row(int source, int destination) const;
  // Between nodes: tokens of a rank that go to any rank of a node.
  int64_t num_crossing(int source, int node) const;
  // This rank's rows for each other node, one node after the other.
  void fill_leaving(std::byte* out) const;
  int64_t num_sent() const;
  int64_t num_received() const { return first_row(shape_.num_ranks, rank_); }

  // Whether every byte of `output` is as it must be.
  bool check(Result result, std::span<const std::byte> output) const;

 private:
  static size_t index(int64_t i) { return static_cast<size_t>(i); }
  void route(int source);
  bool check_dispatched(const std::byte* output) const;
  bool check_returned(const std::byte* output) const;
  bool check_combined(const std::byte* output, int num_groups) const;
  bool goes_to_node(int source, int64_t token, int node) const;
  // Visits what leaves this rank (kLeaving), or arrives at it from its rails (kCrossed), in order.
  template <typename Visit>
  void for_each_crossing(Result result, Visit visit) const;
  bool check_crossing(Result result, const std::byte* output) const;

  Shape shape_;
  int rank_;
  std::vector<std::vector<int64_t>> topk_idx_;       // [source rank][token, k]
  std::vector<std::vector<uint64_t>> destinations_;  // [source rank][token]
  std::vector<int64_t> num_rows_;                    // [source rank, destination rank]
  std::shared_ptr<Segment> tokens_;
  std::shared_ptr<Segment> expert_rows_;
};

}  // namespace tern::bench
