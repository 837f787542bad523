// SPDX-License-Identifier: Apache-2.0
// A set of ranks and the generation that is to start without them, as one rank writes it for the others to see.
//
// Threads: a cell has one writer; any number of ranks read it at the same time.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "layout/flags.h"

namespace tern {

struct Proposal {
  uint64_t generation = 0;  // 0: none
  bool committed = false;
  std::vector<uint8_t> mask;  // [num_ranks]
};

void write_proposal(layout::ProposalCell& cell, const Proposal& proposal);

// nullopt: it stays half written, because its owner was stopped or killed in the middle.
std::optional<Proposal> read_proposal(layout::ProposalCell& cell, int num_ranks);

}  // namespace tern
