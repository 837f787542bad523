// SPDX-License-Identifier: Apache-2.0
// Which cases are run: all options mixed at random (a seed names a case for ever), and lists for `tern check`.
#pragma once

#include <cstdint>
#include <vector>

#include "conformance/case.h"

namespace tern::conformance {

// A small shape with every option drawn from the seed.
Case random_case(uint64_t seed);

// Every layout x extent x encoding x order of scales on a small shape.
std::vector<Case> layout_cases();

// Decoding steps: a single call routes, casts and dispatches a small batch, with extent worst; as a whole and in phases, in every layout, cast,
// mode of combine and wire.
std::vector<Case> small_batch_cases(int32_t num_ranks);

// What `tern check` runs on this machine: ends in well under a minute on two cores.
std::vector<Case> check_cases();

}  // namespace tern::conformance
