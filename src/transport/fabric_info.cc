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
#include "transport/choose_devices.h"

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

bool named(const fi_info& info, std::string_view name) { return name == info.domain_attr->name; }

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

FabricInfo make_hints(uint32_t traffic_class, bool with_gpu_memory) {
  FabricInfo hints(fabric_library().dupinfo(nullptr));
  if (hints == nullptr) fail(TERN_OUT_OF_MEMORY, "transport: fi_dupinfo: no memory");
  hints->caps = FI_MSG | FI_RMA;
  hints->mode = FI_CONTEXT | FI_CONTEXT2;
  hints->ep_attr->type = FI_EP_RDM;
  hints->tx_attr->tclass = traffic_class;
  fi_domain_attr& domain = *hints->domain_attr;
  domain.mr_mode = FI_MR_LOCAL | FI_MR_VIRT_ADDR | FI_MR_ALLOCATED | FI_MR_PROV_KEY | FI_MR_ENDPOINT;
  domain.cq_data_size = sizeof(uint32_t);
  if (with_gpu_memory) {
    hints->caps |= FI_HMEM;
    domain.mr_mode |= FI_MR_HMEM;
  }
  domain.threading = FI_THREAD_DOMAIN;
  domain.control_progress = FI_PROGRESS_MANUAL;
  domain.data_progress = FI_PROGRESS_MANUAL;
  domain.resource_mgmt = FI_RM_ENABLED;
  return hints;
}

// By what the provider says of its bus. Older libfabrics say nothing for verbs, whose devices the system knows by the same names.
std::string place_of_device(const fi_info& info) {
  const fi_bus_attr* bus = info.nic == nullptr ? nullptr : info.nic->bus_attr;
  if (bus == nullptr || bus->bus_type != FI_BUS_PCI)
    return place_of(fmt::format("/sys/class/infiniband/{}/device", info.domain_attr->name));
  const fi_pci_attr& pci = bus->attr.pci;
  return pci_place(fmt::format("{:04x}:{:02x}:{:02x}.{:x}", pci.domain_id, pci.bus_id, pci.device_id, pci.function_id));
}

// 0, or libfabric's error.
int get_infos(const FabricInfo& hints, FabricInfo& infos) {
  fi_info* found = nullptr;
  const int code = fabric_library().getinfo(kFabricVersion, nullptr, nullptr, 0, hints.get(), &found);
  if (code == 0) infos.reset(found);
  return code;
}

// Providers whose devices read and write memory themselves.
bool has_direct_devices(std::string_view provider) {
  constexpr std::array<std::string_view, 3> kDirect = {"verbs", "efa", "cxi"};
  return std::ranges::count(kDirect, core_name(provider)) != 0;
}

}  // namespace

FabricChoices::FabricChoices(const EndpointOptions& options)
    : options_(options), traffic_class_(parse_traffic_class(options.traffic_class)) {
  if (const int64_t number = options.num_devices(); number < 1 || number > kMostDevices)
    problem_ = fmt::format("{} network devices are asked for (TERN_FABRIC_DOMAIN, TERN_FABRIC_RAILS), a rank can have 1 to {}", number,
                           kMostDevices);
  else if (!fabric_library())
    problem_ = fmt::format("libfabric.so.1 is not on this machine, or lacks functions; {}", kInstall);
  else
    list();
}

void FabricChoices::list() {
  if (const int code = get_infos(make_hints(traffic_class_, false), infos_); code != 0) {
    problem_ = fmt::format("no provider of libfabric has reliable remote writes with completion data: fi_getinfo: {}",
                           fabric_library().error_text(code));
    return;
  }
  if (options_.gpu_memory != kNoGpuMemory && !options_.gpu.empty()) get_infos(make_hints(traffic_class_, true), gpu_infos_);
  rank_providers();
  if (!providers_.empty()) return;
  std::vector<std::string> there;
  for (const fi_info* info = infos_.get(); info != nullptr; info = info->next) {
    const std::string name = fmt::format("{} on {}", info->fabric_attr->prov_name, info->domain_attr->name);
    if (std::ranges::count(there, name) == 0) there.push_back(name);
  }
  problem_ = fmt::format("provider {}{} is asked for (TERN_FABRIC_PROVIDER, TERN_FABRIC_DOMAIN); there are {}",
                         options_.provider.empty() ? "verbs, efa, cxi or tcp" : options_.provider,
                         options_.domains.empty() ? "" : fmt::format(" on device {}", fmt::join(options_.domains, " and ")),
                         fmt::join(there, ", "));
}

void FabricChoices::rank_providers() {
  const std::string& asked_for = options_.provider;
  for (const std::string_view provider : kPreferred)
    if ((asked_for.empty() || means(asked_for, provider)) && fits(provider)) providers_.emplace_back(provider);
  if (asked_for.empty() || !providers_.empty()) return;
  for (const fi_info* info = infos_.get(); info != nullptr; info = info->next) {
    const std::string_view provider = info->fabric_attr->prov_name;
    if (!means(asked_for, provider) || !fits(provider)) continue;
    providers_.emplace_back(provider);
    return;
  }
}

std::vector<const fi_info*> FabricChoices::listed(std::string_view provider) const {
  std::vector<const fi_info*> devices;
  for (const fi_info* info = infos_.get(); info != nullptr; info = info->next) {
    const auto is_same = [&](const fi_info* other) { return named(*other, info->domain_attr->name); };
    if (provider == info->fabric_attr->prov_name && std::ranges::none_of(devices, is_same)) devices.push_back(info);
  }
  return devices;
}

bool FabricChoices::fits(std::string_view provider) const {
  const std::vector<const fi_info*> devices = listed(provider);
  const auto is_there = [&](const std::string& name) {
    return std::ranges::any_of(devices, [&](const fi_info* info) { return named(*info, name); });
  };
  return !devices.empty() && std::ranges::all_of(options_.domains, is_there);
}

std::vector<const fi_info*> FabricChoices::closest(const std::string& provider) const {
  std::vector<const fi_info*> devices = listed(provider);
  // verbs connects by IP addresses: of devices that have none it can reach nothing.
  const auto lacks_address = [](const fi_info* info) { return info->src_addr == nullptr; };
  if (!std::ranges::all_of(devices, lacks_address)) std::erase_if(devices, lacks_address);
  std::vector<NetworkDevice> places;
  for (const fi_info* info : devices) places.push_back({info->domain_attr->name, place_of_device(*info)});
  std::vector<const fi_info*> chosen;
  for (const size_t i : choose_devices(places, {.gpu_place = pci_place(options_.gpu),
                                                .rank_idx = options_.seat.idx,
                                                .num_ranks = options_.seat.num_ranks,
                                                .num_devices = static_cast<int>(options_.num_devices())}))
    chosen.push_back(devices[i]);
  return chosen;
}

// The device with what it can do with memory of GPUs, where that is wanted and it can.
const fi_info* FabricChoices::as_asked_for(const fi_info* device) const {
  const std::string_view provider = device->fabric_attr->prov_name;
  if (options_.gpu_memory < kAnyGpuMemory && !has_direct_devices(provider)) return device;
  for (const fi_info* info = gpu_infos_.get(); info != nullptr; info = info->next)
    if (provider == info->fabric_attr->prov_name && named(*info, device->domain_attr->name)) return info;
  return device;
}

std::vector<FabricInfo> FabricChoices::devices_of(const std::string& provider) const {
  std::vector<const fi_info*> chosen;
  const std::vector<const fi_info*> devices = listed(provider);
  for (const std::string& name : options_.domains)
    chosen.push_back(*std::ranges::find_if(devices, [&](const fi_info* info) { return named(*info, name); }));
  if (chosen.empty()) chosen = closest(provider);
  std::vector<FabricInfo> copies;
  for (const fi_info* info : chosen) {
    copies.emplace_back(fabric_library().dupinfo(as_asked_for(info)));
    if (copies.back() == nullptr) fail(TERN_OUT_OF_MEMORY, "transport: fi_dupinfo: no memory");
  }
  return copies;
}

}  // namespace tern
