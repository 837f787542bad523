// SPDX-License-Identifier: Apache-2.0
#include "topology/nodes.h"

#include <cstring>
#include <vector>

#include "base/error.h"

namespace tern {

std::string declared_node(int rank, int num_ranks, int64_t ranks_per_node) {
  if (ranks_per_node == 0) return "";
  if (num_ranks > ranks_per_node && num_ranks % ranks_per_node != 0)
    fail(TERN_INVALID_ARGUMENT, "group: {} ranks do not fill nodes of {} (ranks_per_node, or TERN_RANKS_PER_NODE)", num_ranks,
         ranks_per_node);
  return fmt::format("node {}", rank / ranks_per_node);
}

void check_nodes(const Topology& t) {
  for (int r = 0; r < t.num_ranks; ++r) {
    const auto i = static_cast<size_t>(r);
    const auto node = static_cast<size_t>(t.node[i]);
    if (t.ranks_in_node[node] != t.ranks_in_node[0])
      fail(TERN_UNSUPPORTED, "exchange: node 0 has {} ranks, node {} has {}; every node must have as many", t.ranks_in_node[0], node,
           t.ranks_in_node[node]);
    if (t.node[i] != r / t.ranks_in_node[0])
      fail(TERN_UNSUPPORTED,
           "exchange: rank {} is on node {}, but the ranks of a node must follow each other ({} on each node); let the launcher fill one "
           "node after the other",
           r, node, t.ranks_in_node[0]);
  }
}

Topology own_node(const Topology& t) {
  const int first = first_rank_of_node(t);
  return make_topology(t.rank - first, {t.ranks.begin() + first, t.ranks.begin() + first + ranks_of_node(t)});
}

NodeBootstrap::NodeBootstrap(Bootstrap& whole, const Topology& topology)
    : whole_(whole), first_rank_(first_rank_of_node(topology)), num_ranks_(ranks_of_node(topology)) {}

void NodeBootstrap::allgather(const void* send, void* recv, size_t bytes, Deadline deadline) {
  std::vector<std::byte> all(static_cast<size_t>(whole_.num_ranks()) * bytes);
  whole_.allgather(send, all.data(), bytes, deadline);
  std::memcpy(recv, all.data() + static_cast<size_t>(first_rank_) * bytes, static_cast<size_t>(num_ranks_) * bytes);
}

}  // namespace tern
