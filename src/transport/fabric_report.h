// SPDX-License-Identifier: Apache-2.0
// What of libfabric is on this machine, for those who look for the reason why ranks cannot reach each other.
#pragma once

#include <string>
#include <vector>

namespace tern {

struct FabricProvider {
  std::string name;
  std::vector<std::string> devices;  // as libfabric orders them, each once
  bool gpu_memory = false;           // says of one of them that it takes memory of GPUs
};

struct FabricReport {
  std::string libfabric;                  // its version, "" if it is absent
  std::vector<FabricProvider> providers;  // by name
  std::string problem;                    // why providers are not listed
};

FabricReport read_fabric();

}  // namespace tern
