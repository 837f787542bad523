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
  std::map<std::string, FabricProvider> providers;
  const auto list = [&](const FabricInfo& hints) {
    fi_info* first = nullptr;
    const int code = library.getinfo(kFabricVersion, nullptr, nullptr, 0, hints.get(), &first);
    const FabricInfo owned(first);
    for (const fi_info* info = first; info != nullptr; info = info->next) {
      if (info->fabric_attr == nullptr || info->fabric_attr->prov_name == nullptr) continue;
      FabricProvider& provider = providers[info->fabric_attr->prov_name];
      provider.gpu_memory = provider.gpu_memory || hints != nullptr;
      const bool has_name = info->domain_attr != nullptr && info->domain_attr->name != nullptr;
      if (has_name && std::ranges::count(provider.devices, info->domain_attr->name) == 0)
        provider.devices.emplace_back(info->domain_attr->name);
    }
    return code;
  };
  if (const int code = list(nullptr); code != 0) {
    report.problem = fmt::format("fi_getinfo: {}", library.error_text(code));
    return report;
  }
  if (const FabricInfo hints(library.dupinfo(nullptr)); hints != nullptr) {
    hints->caps = FI_MSG | FI_RMA | FI_HMEM;
    hints->domain_attr->mr_mode = FI_MR_LOCAL | FI_MR_VIRT_ADDR | FI_MR_ALLOCATED | FI_MR_PROV_KEY | FI_MR_ENDPOINT | FI_MR_HMEM;
    list(hints);
  }
  for (auto& [name, provider] : providers) {
    provider.name = name;
    report.providers.push_back(std::move(provider));
  }
  return report;
}

}  // namespace tern
