// SPDX-License-Identifier: Apache-2.0
#include "tools/network.h"

#include <algorithm>
#include <filesystem>
#include <system_error>

namespace tern::tools {

NetworkReport read_network() {
  NetworkReport report = {read_fabric(), {}};
  std::error_code ignored;  // no such directory: no devices
  for (const auto& entry : std::filesystem::directory_iterator("/sys/class/infiniband", ignored))
    report.rdma_devices.push_back(entry.path().filename());
  std::ranges::sort(report.rdma_devices);
  return report;
}

}  // namespace tern::tools
