// SPDX-License-Identifier: Apache-2.0
// The ceiling between nodes: what crosses them, each token's row once for each other node that it goes to, put as one piece (fi_write) from where it
// lies ready to where it stays, over the library's transport. Nothing is packed, sent on or summed; a combine's rows go the other way.
#pragma once

#include <memory>
#include <vector>

#include "bench/contender.h"
#include "bench/processes.h"
#include "bench/workload.h"
#include "topology/bootstrap.h"
#include "transport/endpoint.h"

namespace tern::bench {

class PlainStream {
 public:
  // Collective. The ranks are on several nodes.
  PlainStream(const Workload& workload, const Processes& processes);

  // They borrow this object and the workload.
  void add_to(Contenders& contenders);

 private:
  // Pieces of one direction, one for each rail, in memory of this rank.
  struct Side {
    std::shared_ptr<Segment> memory;
    std::vector<size_t> begins;  // [rails + 1]
    std::vector<size_t> places;  // [rails] where those that belong to them begin there
    std::unique_ptr<Region> region;
    std::vector<RemoteRegion> remotes;  // [ranks] where the others take such pieces
  };

  void move(const Side& from, const Side& to);

  const Workload& workload_;
  std::vector<int> rails_;
  std::unique_ptr<Endpoint> endpoint_;
  Side leaving_, arriving_;
  int64_t epoch_ = 0;
};

}  // namespace tern::bench
