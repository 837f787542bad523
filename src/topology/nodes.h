// SPDX-License-Identifier: Apache-2.0
// Nodes of a group: what must hold of them, and one node by itself.
//
//   check_nodes(topology);                                       // before anything that is between nodes
//   const Topology node = own_node(topology);                    // ranks 0 .. n - 1
//   NodeBootstrap bootstrap(whole_bootstrap, topology);          // gathers among them
#pragma once

#include <string>

#include "topology/bootstrap.h"
#include "topology/topology.h"

namespace tern {

// The name of a rank's node where nodes are declared by their size, "" with 0. TERN_INVALID_ARGUMENT if the ranks do not fill the nodes;
// fewer than one node has are one node.
std::string declared_node(int rank, int num_ranks, int64_t ranks_per_node);

// TERN_UNSUPPORTED unless all nodes have as many ranks, which follow each other. Alike on every rank.
void check_nodes(const Topology& topology);

inline int first_rank_of_node(const Topology& t) { return t.rank - t.rank_in_node[static_cast<size_t>(t.rank)]; }
inline int ranks_of_node(const Topology& t) { return t.ranks_in_node[static_cast<size_t>(t.node[static_cast<size_t>(t.rank)])]; }

// The calling rank's node as a group of its own. The nodes are as check_nodes() wants them.
Topology own_node(const Topology& topology);

// Gathers among the ranks of the node. Every rank of the whole group makes the same calls, since the whole bootstrap does the work, and
// must outlive it.
class NodeBootstrap final : public Bootstrap {
 public:
  NodeBootstrap(Bootstrap& whole, const Topology& topology);

  int rank() const override { return whole_.rank() - first_rank_; }
  int num_ranks() const override { return num_ranks_; }
  void allgather(const void* send, void* recv, size_t bytes, Deadline deadline) override;

 private:
  Bootstrap& whole_;
  int first_rank_;
  int num_ranks_;
};

}  // namespace tern
