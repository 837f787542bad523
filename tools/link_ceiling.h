// SPDX-License-Identifier: Apache-2.0
// What the links give in this run, right beside what is measured: all ranks copy to (push) or from (pull) all others at once, with kernels on
// a number of SMs or with the GPUs' copy engines, and nobody does anything else.
//
//   const auto ceiling = make_link_ceiling(context, device);   // collective
//   const LinkRates rates = ceiling->at(24);                   // collective
//   fmt::print("24 SMs push {} GB/s\n", rates.push_gbps);
//   ceiling->close();                                          // collective
//
// Rates are bytes per rank and direction by the time of the slowest rank, the median of several runs. The copied bytes are compared once.
// Lifetime: context and device outlive it. Threads: one. close() before the ranks go apart; a destructor waits for nobody.
#pragma once

#include <memory>

#include "devices/rank_device.h"
#include "tools/launch.h"

namespace tern::tools {

struct LinkRates {
  int num_sms = 0;                              // 0: copy engines
  double push_gbps = 0, pull_gbps = 0;          // bytes to or from other ranks; 0 with one rank
  double push_all_gbps = 0, pull_all_gbps = 0;  // an equal share to the rank itself is copied beside, and counted; 0: copy engines
};

class LinkCeiling {
 public:
  virtual ~LinkCeiling() = default;

  // Measured when it is first asked for. More SMs than there are count as all.
  virtual LinkRates at(int num_sms) = 0;
  virtual LinkRates copy_engines() = 0;
  virtual void close() = 0;
};

// TERN_UNSUPPORTED unless the device is a GPU that the others reach.
std::unique_ptr<LinkCeiling> make_link_ceiling(RankContext& context, RankDevice& device);

}  // namespace tern::tools
