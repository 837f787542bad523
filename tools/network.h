// SPDX-License-Identifier: Apache-2.0
// What could carry bytes between nodes: libfabric with its providers, and RDMA devices.
#pragma once

#include <string>
#include <vector>

#include "transport/fabric_report.h"

namespace tern::tools {

struct NetworkReport : FabricReport {
  std::vector<std::string> rdma_devices;
};

NetworkReport read_network();

}  // namespace tern::tools
