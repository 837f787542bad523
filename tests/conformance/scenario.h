// SPDX-License-Identifier: Apache-2.0
// A case with everything worked out that all ranks share: the routing and where each row goes. Immutable; ranks that are
// threads share one, ranks that are processes inherit it.
#pragma once

#include <tern/tern.h>

#include <cstdint>
#include <vector>

#include "conformance/case.h"
#include "conformance/inputs.h"
#include "conformance/oracle.h"

namespace tern::conformance {

struct Scenario {
  // masked: [num_ranks], nonzero for ranks that take no part; empty: none.
  explicit Scenario(const Case& of, std::vector<uint8_t> masked_ranks = {});

  // Options of an exchange on which this case can run `num_trips` times at once.
  tern_exchange_options exchange_options(int32_t num_trips = 1) const;
  tern_plan_options plan_options() const;

  Case c;
  std::vector<uint8_t> masked;
  std::vector<RankRouting> routings;
  std::vector<Placement> placements;
};

// `count` scenarios of the shape of `c`, its own first: other routing, other numbers of tokens where the case draws them.
std::vector<Scenario> replay_scenarios(const Case& c, int count);

}  // namespace tern::conformance
