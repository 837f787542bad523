// SPDX-License-Identifier: Apache-2.0
// Dispatch and combine as they are made from an all-to-all. Dispatch: each token's row is packed once for every rank that it goes
// to, grouped by rank, and exchanged; it arrives in the order of ranks and tokens, so nothing is unpacked. Combine: the experts'
// rows lie in that order, so they go back unpacked; the owner sums them where they arrive, with the sums that Tern uses.
#pragma once

#include <vector>

#include "bench/all_to_all.h"
#include "bench/contender.h"
#include "bench/workload.h"
#include "rows/rows.h"

namespace tern::bench {

class PackedExchange {
 public:
  PackedExchange(const Workload& workload, AllToAll& all_to_all);

  // They borrow this object, the workload and the all-to-all.
  void add_to(Contenders& contenders);

 private:
  void route();
  void dispatch();
  void combine();
  void pack();

  const Workload& workload_;
  AllToAll& all_to_all_;
  // The routing: which ranks each token goes to, and the rows to and from each rank.
  std::vector<uint64_t> destinations_;
  std::vector<int64_t> num_sent_;
  std::vector<int64_t> num_received_;
  std::vector<std::byte*> next_row_;
  std::vector<cpu::SumTerm> terms_;
  std::shared_ptr<Segment> packed_;
  std::shared_ptr<Segment> received_;
  std::shared_ptr<Segment> returned_;
  std::shared_ptr<Segment> combined_;
};

}  // namespace tern::bench
