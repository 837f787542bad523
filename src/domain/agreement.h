// SPDX-License-Identifier: Apache-2.0
// How the ranks that are left agree on who goes on, through what each of them proposes.
//
// Everybody publishes the set of ranks to go on without, and takes over what the others propose, until all who go on have
// published the same set; then everybody publishes that it has seen this (commits), and is done when all have. A set only
// grows. Who does not publish until the deadline is added to the set, or is an error, as the caller chooses.
#pragma once

#include <cstdint>
#include <vector>

#include "base/deadline.h"
#include "domain/council.h"
#include "domain/domain.h"

namespace tern {

struct AgreementOptions {
  uint32_t generation = 0;    // the one to be started
  std::vector<uint8_t> mask;  // [num_ranks] ranks to go on without, in any case
  bool allow_mask = false;    // add ranks that do not answer
  int64_t timeout_ms = 0;
};

// Returns the agreed set, [num_ranks]. TERN_TIMEOUT names who did not answer; TERN_MASKED_OUT if the others go on without this rank.
std::vector<uint8_t> agree_on_mask(Council& council, const AgreementOptions& options);

// TERN_MASKED_OUT if others have agreed on the generation behind the domain's own, without this rank. Looks once, and waits for nothing.
void refuse_if_left_out(const Domain& domain);

}  // namespace tern
