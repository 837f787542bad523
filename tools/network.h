// SPDX-License-Identifier: Apache-2.0
// What could carry bytes between nodes: libfabric with its providers, and RDMA devices.
#pragma once

#include <string>
#include <vector>

namespace tern::tools {

struct NetworkReport {
  std::string libfabric;               // its version, "" if it is absent
  std::vector<std::string> providers;  // by name, without duplicates
  std::string problem;                 // why providers are not listed
  std::vector<std::string> rdma_devices;
};

NetworkReport read_network();

// Fills `providers` or `problem`. One file knows libfabric's headers, another stands in where the build had none.
void list_fabric_providers(NetworkReport& report);

}  // namespace tern::tools
