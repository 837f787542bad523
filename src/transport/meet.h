// SPDX-License-Identifier: Apache-2.0
// The ranks of an endpoint agree on a provider, and on what all must have alike. Needs nothing of libfabric.
#pragma once

#include <string>
#include <vector>

#include "topology/bootstrap.h"

namespace tern {

struct Offer {
  std::vector<std::string> providers;  // this rank's, best first
  std::string problem;                 // if there are none: why
  int num_channels = 1;
  int num_devices = 1;
};

// Collective. The first of the first rank's providers that all have. TERN_UNSUPPORTED, on every rank, if there is none: with the problem of the
// first rank that offers nothing, else with what the ranks have. TERN_MISMATCH if they do not have as many channels or network devices.
// `absent` as in EndpointOptions.
std::string agree_on_provider(Bootstrap& bootstrap, const Offer& offer, const std::vector<uint8_t>& absent, Deadline deadline);

}  // namespace tern
