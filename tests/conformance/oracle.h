// SPDX-License-Identifier: Apache-2.0
// The plain oracle: what every rank must have after each operation, computed in one thread by a program that knows the
// inputs of all ranks, and that is as simple as we can make it. It shares no code with the library.
//
//   const std::vector<Placement> placements = place(c, routings, masked);
//   const DispatchBytes expected = dispatch_oracle(c, placements, batch, rank);
//
// Arrays start out filled with kPoison; what the contract does not write stays so, and is compared too.
// Pure functions, any thread.
#pragma once

#include <cstdint>
#include <vector>

#include "conformance/case.h"
#include "conformance/inputs.h"

namespace tern::conformance {

constexpr uint8_t kPoison = 0xA5;

// Which entry a row of an output holds.
struct Origin {
  enum class Kind { kToken, kPadding, kUnused };
  Kind kind = Kind::kUnused;
  int32_t source_rank = -1;
  int32_t source_token = -1;
  int32_t k = -1;             // expert layouts: which of the token's entries
  int32_t local_expert = -1;  // expert layouts
};

// Where everything goes on one rank: the result of routing.
struct Placement {
  int64_t num_tokens = 0;                    // that this rank routes
  std::vector<Origin> rows;                  // of the outputs
  bool overflow = false;                     // more rows than the capacity
  int64_t num_received = 0;                  // messages
  std::vector<int32_t> received_per_rank;    // [num_ranks]
  std::vector<int32_t> received_per_expert;  // [experts_per_rank]
  std::vector<int32_t> sent_per_rank;        // [num_ranks]
  std::vector<int64_t> expert_offsets;       // expert layouts: [experts_per_rank + 1]
  std::vector<int64_t> expert_rank_ranges;   // expert layouts: [experts_per_rank, num_ranks]
  std::vector<int64_t> topk_idx;             // this rank's own, entries to masked ranks replaced by -1
};

// masked: [num_ranks], nonzero for ranks that take no part; empty: none. With nodes, a masked rank's rail is out of service too: tokens of
// the ranks with its index do not reach its node.
bool reaches(const Case& c, const std::vector<uint8_t>& masked, int32_t source, int32_t target);

std::vector<Placement> place(const Case& c, const std::vector<RankRouting>& routings, const std::vector<uint8_t>& masked);

// With nodes: what a rank passes on within its node, as tern_plan_info says.
struct RailCounts {
  std::vector<int32_t> tokens;         // [num_nodes]
  std::vector<uint8_t> token_in_rank;  // [sum of tokens, ranks_per_node]
};
RailCounts rail_oracle(const Case& c, const std::vector<Placement>& placements, const std::vector<RankRouting>& routings,
                       const std::vector<uint8_t>& masked, int32_t rank);

using Bytes = std::vector<uint8_t>;

// The outputs of a dispatch, in the order and with the names of tern_dispatch_args. Arrays that the layout does not have are empty.
template <typename Array>
struct DispatchArrays {
  Array tokens, scales, topk_idx, topk_weights, source_token, source_rank, row_expert, expert_offsets, expert_counts, rank_counts,
      expert_rank_ranges;

  // visit(name, array)
  template <typename Visitor>
  void for_each(Visitor visit) {
    visit("out_tokens", tokens);
    visit("out_scales", scales);
    visit("out_topk_idx", topk_idx);
    visit("out_topk_weights", topk_weights);
    visit("out_source_token", source_token);
    visit("out_source_rank", source_rank);
    visit("out_row_expert", row_expert);
    visit("out_expert_offsets", expert_offsets);
    visit("out_expert_counts", expert_counts);
    visit("out_rank_counts", rank_counts);
    visit("out_expert_rank_ranges", expert_rank_ranges);
  }
};
using DispatchBytes = DispatchArrays<Bytes>;

DispatchBytes dispatch_oracle(const Case& c, const std::vector<Placement>& placements, int batch, int32_t rank);

// The cast of one row to fp8, as tern_encoding describes it: values [hidden], scales [arriving_scale_bytes].
void cast_oracle(const Case& c, const Bytes& row, Bytes& values, Bytes& scales);

struct CombineBytes {
  Bytes tokens;   // [num_tokens, combine_hidden]
  Bytes weights;  // [num_tokens, num_topk]; empty unless they are handed back
};

CombineBytes combine_oracle(const Case& c, const std::vector<Placement>& placements, int batch, int32_t rank);

}  // namespace tern::conformance
