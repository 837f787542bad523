// SPDX-License-Identifier: Apache-2.0
// Built where libfabric's headers are.
#include <fmt/format.h>
#include <rdma/fabric.h>
#include <rdma/fi_errno.h>

#include <algorithm>

#include "tools/dynamic_library.h"
#include "tools/network.h"

namespace tern::tools {

void list_fabric_providers(NetworkReport& report) {
  const DynamicLibrary library("libfabric.so.1");
  const auto getinfo = library.find<decltype(fi_getinfo)>("fi_getinfo");
  const auto freeinfo = library.find<decltype(fi_freeinfo)>("fi_freeinfo");
  fi_info* list = nullptr;
  const int code = getinfo == nullptr || freeinfo == nullptr ? -FI_ENOSYS : getinfo(FI_VERSION(1, 9), nullptr, nullptr, 0, nullptr, &list);
  if (code != 0) {
    report.problem = fmt::format("fi_getinfo failed with {}", code);
    return;
  }
  for (const fi_info* info = list; info != nullptr; info = info->next) {
    if (info->fabric_attr != nullptr && info->fabric_attr->prov_name != nullptr)
      report.providers.emplace_back(info->fabric_attr->prov_name);
  }
  freeinfo(list);
  std::ranges::sort(report.providers);
  const auto repeated = std::ranges::unique(report.providers);
  report.providers.erase(repeated.begin(), repeated.end());
}

}  // namespace tern::tools
