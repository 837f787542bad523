// SPDX-License-Identifier: Apache-2.0
// How segments reach the other ranks of a host.
//
//   auto sharer = make_segment_sharer(topology, *bootstrap, deadline);
//   std::shared_ptr<Segment> mine = HostSegment::create(bytes, sharer->shared_by());
//   auto windows = sharer->share(mine, "windows-0", all_ranks, deadline);    // windows[r]->data() is rank r's window
//
// Lifetime: neither the bootstrap nor the topology is needed once the sharer is made; segments outlive the sharer.
// Threads: a sharer belongs to one rank; calls with different tags may come from different threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/deadline.h"
#include "memory/segment.h"
#include "topology/topology.h"

namespace tern {

class SegmentSharer {
 public:
  virtual ~SegmentSharer() = default;

  // Gives `mine` to every member and returns theirs by rank: nullptr for the others, own entry = mine. Collective among the
  // members, this rank one of them; is_member[r] != 0 says who, alike on all. `tag` names the call: equal on all members, new
  // each time, at most 48 bytes. Needs no bootstrap, so that survivors can use it after a rank died.
  // All segments of a call are of one kind and size.
  // TERN_TIMEOUT names the members that did not come and what their processes do. That it returns here does not say that it
  // returns everywhere: a member may fail after it has served this one.
  virtual std::vector<std::shared_ptr<Segment>> share(std::shared_ptr<Segment> mine, const std::string& tag,
                                                      std::span<const uint8_t> is_member, Deadline deadline) = 0;

  // True: the ranks are threads of one process and every entry that share() returns is the owner's own segment.
  virtual bool shares_address_space() const = 0;

  // What a segment must be made for, so that share() can give it away.
  SharedBy shared_by() const { return shares_address_space() ? SharedBy::kThreads : SharedBy::kProcesses; }
};

// All ranks threads of one process: handed over inside it, one mapping for all. Otherwise (also when some of the ranks
// share a process) file descriptors travel over abstract Unix sockets, whose names hold a random key that the ranks agree
// on here; processes of another user are refused. One allgather, collective.
// TERN_UNSUPPORTED, on every rank, if the ranks are not all on one host.
std::unique_ptr<SegmentSharer> make_segment_sharer(const Topology& topology, Bootstrap& bootstrap, Deadline deadline);

}  // namespace tern
