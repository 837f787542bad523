// SPDX-License-Identifier: Apache-2.0
// Under TERN_ON_TIMEOUT_MASK: which ranks (of the group) were given up in the running generation. The ranks of a domain tell each other, so
// that a missing one costs them a single timeout: a set in each window, which only grows and ends with the generation.
//
// Memory: who has seen a flag that was raised after announce_given_up() sees the ranks too. Threads: any.
#pragma once

#include <span>

#include "domain/domain.h"

namespace tern {

using RankBits = std::span<const uint64_t, layout::kMaxRanks / 64>;

// As this rank's window says.
bool is_given_up(const Domain& domain, int rank_of_group);
bool is_any_given_up(const Domain& domain);

// Tells everybody in the domain, and wakes them up where it is news.
void announce_given_up(const Domain& domain, int rank_of_group);
void announce_given_up(const Domain& domain, RankBits ranks);

}  // namespace tern
