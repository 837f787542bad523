// SPDX-License-Identifier: Apache-2.0
// How the ranks that are left agree on who goes on, through what each of them proposes.
//
// Everybody publishes the set of ranks to go on without, and takes over what the others propose, until all who go on have
// published the same set; then everybody publishes that it has seen this (commits), and is done when all have. A set only
// grows. Who does not do as the others until the deadline is added to the set, or is an error, as the caller chooses.
// Attempts have numbers, which become that of the generation; one that fails is followed by one with another number, and who sees that
// somebody is an attempt ahead joins it.
#pragma once

#include <cstdint>
#include <vector>

#include "base/deadline.h"
#include "domain/council.h"
#include "domain/domain.h"

namespace tern {

struct AgreementOptions {
  uint64_t generation = 0;    // the one to be started: the least number, since others may be an attempt ahead
  std::vector<uint8_t> mask;  // [num_ranks] ranks to go on without, in any case
  bool allow_mask = false;    // add ranks that do not answer
  int64_t timeout_ms = 0;
};

// Returns what was agreed on. TERN_TIMEOUT names who did not answer; TERN_MASKED_OUT if the others go on without this rank.
Proposal agree_on_mask(Council& council, const AgreementOptions& options);

// TERN_MASKED_OUT if others have agreed on a generation behind the council's own, without this rank. Looks once, and waits for nothing.
void refuse_if_left_out(Council& council);

}  // namespace tern
