// SPDX-License-Identifier: Apache-2.0
#include "transport/fabric_info.h"

#include <fmt/ranges.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <rdma/fi_errno.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <string_view>

#include "base/error.h"

namespace tern {
namespace {

// RDMA first; of the ways over TCP the ones without a layer in between: libfabric 1.17 calls "net" what is "tcp" from 1.18 on, and its
// tcp;ofi_rxm crashes when an endpoint closes while a message is half received.
constexpr std::array<std::string_view, 6> kPreferred = {"verbs;ofi_rxm", "efa", "cxi", "tcp", "net", "tcp;ofi_rxm"};

constexpr const char* kInstall = "install libfabric (Debian and Ubuntu: libfabric1)";

std::string_view core_name(std::string_view provider) { return provider.substr(0, provider.find(';')); }

bool means(const std::string& asked_for, std::string_view provider) {
  return asked_for == provider || asked_for == core_name(provider) || (asked_for == "tcp" && provider == "net");
}

struct TrafficClass {
  std::string_view name;
  uint32_t value;
};
constexpr TrafficClass kTrafficClasses[] = {
    {"best_effort", FI_TC_BEST_EFFORT}, {"low_latency", FI_TC_LOW_LATENCY}, {"dedicated_access", FI_TC_DEDICATED_ACCESS},
    {"bulk_data", FI_TC_BULK_DATA},     {"scavenger", FI_TC_SCAVENGER},     {"network_ctrl", FI_TC_NETWORK_CTRL}};

uint32_t parse_traffic_class(const std::string& text) {
  if (text.empty()) return FI_TC_UNSPEC;
  for (const TrafficClass& known : kTrafficClasses)
    if (text == known.name) return known.value;
  constexpr std::string_view kDscp = "dscp:";
  if (text.starts_with(kDscp)) {
    unsigned number = 0;
    const char* end = text.data() + text.size();
    const auto [stop, error] = std::from_chars(text.data() + kDscp.size(), end, number);
    if (error == std::errc() && stop == end && number < 64) return FI_TC_DSCP | number;
  }
  fail(TERN_INVALID_ARGUMENT,
       "transport: traffic class \"{}\" (TERN_FABRIC_TCLASS) must be best_effort, low_latency, dedicated_access, bulk_data, scavenger, "
       "network_ctrl, or dscp:0 to dscp:63",
       text);
}

FabricInfo make_hints(uint32_t traffic_class) {
  FabricInfo hints(fabric_library().dupinfo(nullptr));
  if (hints == nullptr) fail(TERN_OUT_OF_MEMORY, "transport: fi_dupinfo: no memory");
  hints->caps = FI_MSG | FI_RMA;
  hints->mode = FI_CONTEXT | FI_CONTEXT2;
  hints->ep_attr->type = FI_EP_RDM;
  hints->tx_attr->tclass = traffic_class;
  fi_domain_attr& domain = *hints->domain_attr;
  domain.mr_mode = FI_MR_LOCAL | FI_MR_VIRT_ADDR | FI_MR_ALLOCATED | FI_MR_PROV_KEY | FI_MR_ENDPOINT;
  domain.cq_data_size = sizeof(uint32_t);
  domain.threading = FI_THREAD_DOMAIN;
  domain.control_progress = FI_PROGRESS_MANUAL;
  domain.data_progress = FI_PROGRESS_MANUAL;
  domain.resource_mgmt = FI_RM_ENABLED;
  return hints;
}

}  // namespace

FabricChoices::FabricChoices(const EndpointOptions& options)
    : domain_(options.domain), traffic_class_(parse_traffic_class(options.traffic_class)) {
  if (!fabric_library()) {
    problem_ = fmt::format("libfabric.so.1 is not on this machine, or lacks functions; {}", kInstall);
    return;
  }
  list(options);
}

void FabricChoices::list(const EndpointOptions& options) {
  const FabricInfo hints = make_hints(traffic_class_);
  fi_info* found = nullptr;
  const int code = fabric_library().getinfo(kFabricVersion, nullptr, nullptr, 0, hints.get(), &found);
  if (code != 0) {
    problem_ = fmt::format("no provider of libfabric has reliable remote writes with completion data: fi_getinfo: {}",
                           fabric_library().error_text(code));
    return;
  }
  infos_.reset(found);
  rank_providers(options.provider);
  if (!providers_.empty()) return;
  std::vector<std::string> there;
  for (const fi_info* info = infos_.get(); info != nullptr; info = info->next) {
    const std::string name = fmt::format("{} on {}", info->fabric_attr->prov_name, info->domain_attr->name);
    if (std::ranges::count(there, name) == 0) there.push_back(name);
  }
  problem_ = fmt::format("provider {}{} is asked for (TERN_FABRIC_PROVIDER, TERN_FABRIC_DOMAIN); there are {}",
                         options.provider.empty() ? "verbs, efa, cxi or tcp" : options.provider,
                         domain_.empty() ? "" : " on device " + domain_, fmt::join(there, ", "));
}

void FabricChoices::rank_providers(const std::string& asked_for) {
  const auto offered = [&](std::string_view provider) {
    for (const fi_info* info = infos_.get(); info != nullptr; info = info->next)
      if (provider == info->fabric_attr->prov_name && fits(*info)) return true;
    return false;
  };
  for (const std::string_view provider : kPreferred)
    if ((asked_for.empty() || means(asked_for, provider)) && offered(provider)) providers_.emplace_back(provider);
  if (asked_for.empty() || !providers_.empty()) return;
  for (const fi_info* info = infos_.get(); info != nullptr; info = info->next)
    if (means(asked_for, info->fabric_attr->prov_name) && fits(*info)) {
      providers_.emplace_back(info->fabric_attr->prov_name);
      return;
    }
}

bool FabricChoices::fits(const fi_info& info) const { return domain_.empty() || domain_ == info.domain_attr->name; }

FabricInfo FabricChoices::first_of(const std::string& provider) const {
  const fi_info* info = infos_.get();
  while (info != nullptr && (provider != info->fabric_attr->prov_name || !fits(*info))) info = info->next;
  if (info == nullptr) fail(TERN_INTERNAL_ERROR, "transport: provider {} was offered and is not there", provider);
  FabricInfo copy(fabric_library().dupinfo(info));
  if (copy == nullptr) fail(TERN_OUT_OF_MEMORY, "transport: fi_dupinfo: no memory");
  return copy;
}

}  // namespace tern
