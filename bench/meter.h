// SPDX-License-Identifier: Apache-2.0
// Times exchanges on all ranks at once.
//
// A sample begins at one moment for all ranks: when the last of them has come to the barrier before it. It ends when the
// last rank has finished. So the time that ranks wait for a core, where there are more of them than cores, is in it for every
// contender alike. Samples of all contenders are taken in turn, in an order that is shuffled anew each time.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "bench/contender.h"
#include "bench/processes.h"
#include "bench/workload.h"

namespace tern::bench {

struct Repetition {
  int num_warm_ups;
  int num_samples;
  int num_chained;  // exchanges one after the other in a sample, with nothing between them; a sample's time is divided by it
};

struct Measurement {
  double median_us;
  double p99_us;
};

class Meter {
 public:
  // Collective.
  explicit Meter(const Processes& processes);

  // Poisons the output, runs once, and checks every byte on every rank. Collective.
  bool verify(const Workload& workload, const Contender& contender) const;

  // In the order of the contenders, equal on all ranks. Collective.
  std::vector<Measurement> measure(const Contenders& contenders, const Repetition& repetition) const;

 private:
  struct Board;
  Board& board() const;
  void meet() const;               // asleep until all are there: ranks that still work need the cores
  int64_t start_together() const;  // awake: when the last one came, in ns
  double take_sample(const Contender& contender, int num_chained) const;

  const Processes& processes_;
  std::shared_ptr<Segment> memory_;
};

}  // namespace tern::bench
