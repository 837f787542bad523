// SPDX-License-Identifier: Apache-2.0
#include "tools/network.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <system_error>

#include "tools/dynamic_library.h"

namespace tern::tools {

NetworkReport read_network() {
  NetworkReport report;
  std::error_code ignored;  // no such directory: no devices
  for (const auto& entry : std::filesystem::directory_iterator("/sys/class/infiniband", ignored))
    report.rdma_devices.push_back(entry.path().filename());
  std::ranges::sort(report.rdma_devices);

  const DynamicLibrary library("libfabric.so.1");
  const auto version = library.find<uint32_t()>("fi_version");
  if (version == nullptr) {
    report.problem = "libfabric.so.1 is not on this machine";
    return report;
  }
  report.libfabric = fmt::format("{}.{}", version() >> 16, version() & 0xFFFF);
  list_fabric_providers(report);
  return report;
}

}  // namespace tern::tools
