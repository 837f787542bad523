// SPDX-License-Identifier: Apache-2.0
// Under TERN_ON_TIMEOUT_MASK: what the ranks of a rail tell each other beside their operations: whom they have given up; that they wait for
// somebody themselves when their deadline has passed; and once somebody is missing, how far their node is. What comes from a rail goes on to the
// node.
//
// Words that only grow, put over and over again, outside of all epochs: it does not matter which of the puts arrive, and in which order.
// Threads: turn() belongs to the proxy's thread, the rest to that of the lane; hear() to both.
#pragma once

#include <atomic>
#include <vector>

#include "base/deadline.h"
#include "domain/domain.h"
#include "layout/rail.h"

namespace tern::cpu {

struct RailPlace;

class Standing {
 public:
  Standing(const Domain& domain, const RailPlace& place);

  // This rank has waited for that one until its deadline, and goes on waiting. A rank that was stopped or is gone does not say so.
  void show_late_wait(int rank_of_group);
  // The rank of the last late wait that the rail's rank in that node has shown; -1: it has shown none since.
  int late_wait_of(int node, Deadline::Clock::time_point since) const;

  // Has the rail's rank in that node told of that many ranks that it has given up? If so this rank's window knows of them.
  bool has_told(int node, int num_given_up) const;

  // This rank begins an operation; numbers grow.
  void begin(uint64_t operation);
  // Has every rank begun it, as far as there is a way to hear of it? Those that were given up do not count.
  bool have_all_begun(uint64_t operation) const;

  // Looks what the rails say: the node hears of whom they have given up, which may be this rank.
  void hear();

  // The same, and tells them what is new and, while somebody is missing, all of it now and then.
  void turn();

 private:
  layout::StandingWords read(int64_t offset) const;
  void write(int64_t offset, const layout::StandingWords& words) const;
  layout::StandingWords told_by(int node) const;
  template <typename Visitor>
  void for_each_other_node(Visitor visit) const;
  template <typename Visitor>
  void for_each_mate(Visitor visit) const;
  bool update_own();
  void tell(bool is_news);

  struct HeardWait {
    std::atomic<uint64_t> late_wait = 0;
    std::atomic<Deadline::Clock::time_point> at = {};
  };

  const Domain& domain_;
  const RailPlace& place_;
  std::vector<HeardWait> heard_waits_;  // [num_nodes]
  std::atomic<uint64_t> late_wait_ = 0;
  layout::StandingWords own_ = {};  // as told last
  Deadline next_telling_ = Deadline::in_ms(0);
};

}  // namespace tern::cpu
