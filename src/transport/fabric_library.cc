// SPDX-License-Identifier: Apache-2.0
#include "transport/fabric_library.h"

#include <fmt/core.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_errno.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <utility>

#include "transport/fabric_report.h"

namespace tern {

FabricLibrary::FabricLibrary()
    : library_("libfabric.so.1"),
      version(library_.find<decltype(fi_version)>("fi_version")),
      getinfo(library_.find<decltype(fi_getinfo)>("fi_getinfo")),
      freeinfo(library_.find<decltype(fi_freeinfo)>("fi_freeinfo")),
      dupinfo(library_.find<decltype(fi_dupinfo)>("fi_dupinfo")),
      strerror(library_.find<decltype(fi_strerror)>("fi_strerror")),
      fabric(library_.find<decltype(fi_fabric)>("fi_fabric")) {}

std::string FabricLibrary::error_text(int code) const { return fmt::format("{} ({})", strerror(std::abs(code)), code); }

const FabricLibrary& fabric_library() {
  static const FabricLibrary* const library = new FabricLibrary();
  return *library;
}

FabricReport read_fabric() {
  FabricReport report;
  const FabricLibrary& library = fabric_library();
  if (!library) {
    report.problem = "libfabric.so.1 is not on this machine";
    return report;
  }
  const uint32_t version = library.version();
  report.libfabric = fmt::format("{}.{}", FI_MAJOR(version), FI_MINOR(version));
  fi_info* list = nullptr;
  if (const int code = library.getinfo(kFabricVersion, nullptr, nullptr, 0, nullptr, &list); code != 0) {
    report.problem = fmt::format("fi_getinfo: {}", library.error_text(code));
    return report;
  }
  const FabricInfo owned(list);
  std::map<std::string, std::vector<std::string>> devices;  // of each provider
  for (const fi_info* info = list; info != nullptr; info = info->next) {
    if (info->fabric_attr == nullptr || info->fabric_attr->prov_name == nullptr) continue;
    std::vector<std::string>& known = devices[info->fabric_attr->prov_name];
    const bool has_name = info->domain_attr != nullptr && info->domain_attr->name != nullptr;
    if (has_name && std::ranges::count(known, info->domain_attr->name) == 0) known.emplace_back(info->domain_attr->name);
  }
  for (auto& [name, names] : devices) report.providers.push_back({name, std::move(names)});
  return report;
}

}  // namespace tern
