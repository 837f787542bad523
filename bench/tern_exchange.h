// SPDX-License-Identifier: Apache-2.0
// Dispatch and combine with Tern, through its public interface: with rows in windows, which other ranks write and read in place, and
// with rows in the caller's own memory.
#pragma once

#include <tern/tern.hpp>

#include "bench/contender.h"
#include "bench/processes.h"
#include "bench/workload.h"

namespace tern::bench {

class TernExchange {
 public:
  // Collective.
  TernExchange(const Workload& workload, const Processes& processes);

  // They borrow this object and the workload.
  void add_to(Contenders& contenders);

 private:
  tern_routing routing() const;
  tern_plan_options plan_options(tern_extent extent) const;
  void dispatch(Plan& plan, void* out);
  void combine(const void* rows);

  const Workload& workload_;
  Group group_;
  Exchange exchange_;
  WindowBuffer out_window_;   // rows of every extent
  WindowBuffer rows_window_;  // the experts' rows
  std::shared_ptr<Segment> out_memory_;
  std::shared_ptr<Segment> combined_;
  Plan plan_;         // routed once, and used again
  Plan routed_plan_;  // routed anew each time
  Plan one_call_plan_;
};

}  // namespace tern::bench
