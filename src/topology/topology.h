// SPDX-License-Identifier: Apache-2.0
// Who the ranks are: which of them share a process, a host, a node.
//
//   Topology topology = discover(*bootstrap, "", deadline);
//   if (topology.same_host(3)) ...                      // rank 3 can be reached through shared memory
//   fail(TERN_TIMEOUT, "rank 3 did not come{}", describe_rank(topology, 3));
//
// A topology is a plain value: copy it, read it from any thread.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "base/deadline.h"
#include "topology/bootstrap.h"

namespace tern {

// What a rank tells the others about itself. Travels as bytes, so it holds no pointers.
struct RankInfo {
  uint64_t format;             // layout of this struct; ranks with another one are refused
  uint64_t network_namespace;  // inode; abstract Unix sockets reach only as far. 0: not known
  uint64_t pid_namespace;      // inode; `pid` means something only inside. 0: not known
  uint64_t start_time;         // of the process, in clock ticks since boot: tells a process from a later one of the same pid. 0: not known
  uint64_t process_nonce;      // random, one per process image (a fork keeps it): with pid, the identity of the address space
  int64_t pid;
  std::array<char, 40> boot_id;     // of the running kernel, as text; the host's name where the kernel does not say
  std::array<char, 72> host_name;   // for people to read
  std::array<char, 128> node_name;  // declared by the caller; "": the host is the node
  std::array<uint64_t, 16> cores;   // that the rank's thread could run on when it told this, a bit each; all: not known
};

struct Topology {
  int rank = 0;
  int num_ranks = 0;
  std::vector<RankInfo> ranks;  // [num_ranks]

  // Nodes are numbered in the order of their lowest rank. Ranks with the same declared name share a node; ranks without a
  // declared name share a node if they share a host.
  int num_nodes = 0;
  std::vector<int> node;           // [num_ranks] index of each rank's node
  std::vector<int> rank_in_node;   // [num_ranks] position among the ranks of the same node, ascending: its rail
  std::vector<int> ranks_in_node;  // [num_nodes]

  // Is rank r on this rank's host, so that memory can be shared with it? (Same kernel, same network namespace.)
  bool same_host(int r) const;
  // Is rank r a thread of this rank's process?
  bool same_process(int r) const;
};

// A rank among those of its host.
struct HostSeat {
  int idx = 0;  // by rank
  int num_ranks = 1;
};
HostSeat seat_on_host(const Topology& topology);

// Is there a machine with more ranks than cores that they may run on, in whatever network namespaces? Alike on every rank.
bool ranks_share_cores(const Topology& topology);

// The calling process.
RankInfo describe_self(const std::string& declared_node);

// The topology seen by `rank`, from what every rank told. Pure. TERN_MISMATCH if a rank comes from a build with another
// RankInfo.
Topology make_topology(int rank, std::vector<RankInfo> ranks);

// Tells the other ranks about this one and learns about them. One allgather. `declared_node` may be empty; it holds at
// most 127 bytes, else TERN_INVALID_ARGUMENT.
Topology discover(Bootstrap& bootstrap, const std::string& declared_node, Deadline deadline);

// For the texts of errors: "process 1234 is stopped", "process 1234 has exited", "process 1234 is running". A later process
// that was given the same pid is not mistaken for it. "" if this process cannot know: other host, other pid namespace, no
// /proc. Reads /proc; never waits.
std::string describe_process(const RankInfo& info);

// Is the rank's process known to be stopped or gone?
bool is_known_to_be_down(const Topology& topology, int rank);

// " (process 1234 is stopped)", or "" where nothing is known: to be put behind "rank 3".
std::string describe_rank(const Topology& topology, int rank);

}  // namespace tern
