// SPDX-License-Identifier: Apache-2.0
// What of libfabric is on this machine, for those who look for the reason why ranks cannot reach each other.
#pragma once

#include <string>
#include <vector>

namespace tern {

struct FabricReport {
  std::string libfabric;               // its version, "" if it is absent
  std::vector<std::string> providers;  // by name, without duplicates
  std::string problem;                 // why providers are not listed
};

FabricReport read_fabric();

}  // namespace tern
