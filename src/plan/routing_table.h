// SPDX-License-Identifier: Apache-2.0
// The routing of one batch as one rank knows it: what it sends where, what arrives from whom, and in which row each entry
// comes to lie. Pure host arithmetic; engines move the bytes.
//
// It is filled in three steps: set_routing() from the caller's top-k indices; the counts of every rank, copied to counts_of()
// as they arrive, and between nodes the batches of this rank's rail; finish(). As messages arrive, place_message() gives each its
// rows and remembers them for combine.
//
// Words: a *message* is one token on its way to one rank of its node; an *entry* is one (token, k) pair with an expert; a *batch* is
// what one rank has to send to this node. All memory is taken by the constructor. Threads: one at a time.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "plan/plan_shape.h"
#include "plan/source_batch.h"

namespace tern {

// What the caller's top-k indices have at [token * num_topk + k].
int64_t topk_at(const tern_routing& routing, int64_t idx);

// TERN_INVALID_ARGUMENT if the routing does not fit the shape, by its arguments and by what its arrays hold.
void check_routing(const PlanShape& shape, const tern_routing& routing);

class RoutingTable {
 public:
  explicit RoutingTable(const PlanShape& shape);

  // Step 1: this rank's side. Entries and messages to ranks with masked[rank] != 0 are dropped. `routing` has been checked. Between nodes,
  // ranks from which none of this node's are reached have no counts then.
  void set_routing(const tern_routing& routing, std::span<const uint8_t> masked);

  // Instead, where somebody else has counted: nothing is known yet but who is masked. All counts are step 2 then, this rank's own too, and there
  // are no batches and no placing.
  void begin_counts(std::span<const uint8_t> masked);

  // Step 2: entries per expert of this node [node_experts], messages per rank [num_ranks] and the number of tokens, of each rank; this
  // rank's own are set by step 1.
  std::span<int32_t> counts_of(int32_t rank) { return {counts_.data() + rank * num_counts(), static_cast<size_t>(num_counts())}; }
  std::span<const int32_t> counts_of(int32_t rank) const {
    return {counts_.data() + rank * num_counts(), static_cast<size_t>(num_counts())};
  }
  int32_t tokens_of(int32_t rank) const { return counts_of(rank).back(); }
  int64_t num_counts() const { return int64_t{shape_.node_experts()} + shape_.num_ranks + 1; }
  // What the ranks of another node are told: counts [num_counts] as above, and the tokens that go there with their words [route_words].
  void get_counts_for(int32_t node, std::span<int32_t> counts) const;
  std::span<const int32_t> tokens_to(int32_t node) const { return tokens_to_[static_cast<size_t>(node)]; }
  void get_words_for(int32_t node, int64_t token, std::span<int32_t> words) const;
  // By the node of the source; filled by step 1 if that is this one.
  SourceBatch& batch(int32_t node) { return batches_[static_cast<size_t>(node)]; }
  const SourceBatch& batch(int32_t node) const { return batches_[static_cast<size_t>(node)]; }
  std::span<const SourceBatch> batches() const { return batches_; }

  // Step 3: offsets of everything, on this rank and of this rank's messages elsewhere.
  void finish();

  const PlanShape& shape() const { return shape_; }
  int64_t num_tokens() const { return tokens_of(shape_.rank); }
  // The same on all ranks; where not all counts are known, what the plan allows.
  int64_t most_tokens_of_any_rank() const;

  // The first row of what the sources in that node and the ones behind have, [shape.num_row_begins()].
  void get_row_begins(int32_t node, std::span<int64_t> begins) const;

  // --- This rank as a sender.
  const SourceBatch& own() const { return batch(shape_.node()); }
  // Expert of an entry, in whichever node, -1: none (or on a masked rank).
  int32_t expert_of(int64_t token, int32_t k) const { return experts_[token * shape_.num_topk + k]; }

  // --- This rank as a receiver.
  int32_t messages_between(int32_t source, int32_t destination) const { return counts_of(source)[shape_.node_experts() + destination]; }
  int64_t num_received() const { return received_begin_.back(); }
  int64_t received_begin(int32_t source) const { return received_begin_[static_cast<size_t>(source)]; }
  int32_t received_entries(int32_t local_expert) const;
  // First row of a local expert's group; group_begin(local_experts()) is the end of the last one.
  int64_t group_begin(int32_t local_expert) const { return group_begin_[static_cast<size_t>(local_expert)]; }
  // Rows of one source in a local expert's group: how many, and the first, counted from the group's begin.
  int32_t source_entries(int32_t source, int32_t local_expert) const;
  int64_t source_begin(int32_t source, int32_t local_expert) const { return source_begin_[local_expert * shape_.num_ranks + source]; }
  // Rows that the outputs must have.
  int64_t num_rows() const;
  // True: some rows lie beyond the capacity and are left out.
  bool exceeds_capacity() const { return exceeds_capacity_; }

  // Starts placing a batch's messages from the first again.
  void restart_placing();
  // The next message of `source` has come: gives its entries their rows. `experts`: local, [num_topk], -1: not here.
  // Returns its index among all received messages.
  int64_t place_message(int32_t source, int32_t source_token, std::span<const int32_t> experts);
  // Have all messages of `source` come?
  bool has_placed_all(int32_t source) const { return next_message_[static_cast<size_t>(source)] == received_begin(source + 1); }
  int32_t source_token(int64_t message) const { return source_tokens_[message]; }
  // Row of the message's entry k in the outputs (rank_major: of the message, for any local k), -1: not here or beyond the capacity.
  int32_t placed_row(int64_t message, int32_t k) const { return placed_rows_[message * shape_.num_topk + k]; }
  int32_t received_row(int64_t message) const { return message < shape_.row_capacity ? static_cast<int32_t>(message) : -1; }

 private:
  int32_t* own_counts() { return counts_.data() + shape_.rank * num_counts(); }
  void set_topk(const tern_routing& routing, std::span<const uint8_t> masked);
  void set_token_in_rank(const tern_routing& routing, std::span<const uint8_t> masked);
  // Gives the token to the batches and lists of the nodes that it goes to.
  void add_token(int32_t token);
  void set_received();
  void set_batch_rows();
  int64_t entries_of_expert(int32_t expert_in_node) const;

  PlanShape shape_;
  std::vector<int32_t> experts_;                 // [max_tokens, num_topk]
  std::vector<int32_t> rank_bits_;               // with top-k 0: [max_tokens, num_nodes, route_words]
  std::vector<int32_t> own_entries_;             // [num_experts] of this rank's tokens
  std::vector<std::vector<int32_t>> tokens_to_;  // [num_nodes] other than this one
  std::vector<SourceBatch> batches_;             // [num_nodes]
  std::vector<int32_t> counts_;                  // [num_ranks, num_counts]
  std::vector<int64_t> received_begin_;          // [num_ranks + 1]
  std::vector<int64_t> group_begin_;             // [local_experts + 1]
  std::vector<int64_t> source_begin_;            // [local_experts, num_ranks]
  std::vector<int64_t> next_message_;            // [num_ranks] placing: next message index
  std::vector<int64_t> next_entry_;              // [local_experts, num_ranks] placing: next row in the expert's group
  std::vector<int32_t> source_tokens_;           // [max_messages]
  std::vector<int32_t> placed_rows_;             // [max_messages, num_topk]
  bool exceeds_capacity_ = false;
  bool knows_all_counts_ = true;
};

}  // namespace tern
