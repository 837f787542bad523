// SPDX-License-Identifier: Apache-2.0
// What the network between the nodes of a run does at best: every rank writes a plain stream of large pieces (fi_write) to all of its
// rails and takes theirs, all ranks at once, over the library's transport. What an operation's network bytes are compared with.
//
//   NetworkCeiling network(context, device);  // on every rank, as all that follows
//   const double gbps = network.measure();
//
// Its memory and endpoint are its own, and idle between measurements. Threads: one.
#pragma once

#include "devices/rank_device.h"
#include "paths/flows.h"
#include "tools/board_bootstrap.h"
#include "tools/launch.h"

namespace tern::tools {

class NetworkCeiling {
 public:
  // The ranks are on several nodes. Over the network devices that the library takes for this device of the rank.
  NetworkCeiling(const RankContext& context, const RankDevice& device);

  // What each rank sends to all others together, GB/s: that of the slowest.
  double measure();

 private:
  const RankContext& context_;
  BoardBootstrap bootstrap_;
  Flows flows_;
  std::vector<int> rails_;
};

}  // namespace tern::tools
