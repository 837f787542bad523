// SPDX-License-Identifier: Apache-2.0
#include "tools/gpus.h"

#include <fmt/format.h>

#include <array>

#include "base/dynamic_library.h"

namespace tern::tools {
namespace {

// The part of NVML that is used. Its functions are versioned by name and all return 0 for success; devices are opaque.
class Nvml {
 public:
  using Device = void*;

  Nvml() : library_("libnvidia-ml.so.1") {
    const auto init = library_.find<int()>("nvmlInit_v2");
    started_ = init != nullptr && init() == 0;
  }
  ~Nvml() {
    if (const auto shutdown = library_.find<int()>("nvmlShutdown"); started_ && shutdown != nullptr) shutdown();
  }
  Nvml(const Nvml&) = delete;
  Nvml& operator=(const Nvml&) = delete;

  bool present() const { return static_cast<bool>(library_); }
  bool started() const { return started_; }

  // True if the function is there and succeeds.
  template <typename... Arguments>
  bool call(const char* name, Arguments... arguments) const {
    const auto function = library_.find<int(Arguments...)>(name);
    return function != nullptr && function(arguments...) == 0;
  }

 private:
  DynamicLibrary library_;
  bool started_ = false;
};

constexpr unsigned kMostLinks = 18;
constexpr int kCapsRead = 0, kCapsNvlink = 2;  // nvmlGpuP2PCapsIndex_t

std::string link_between(const Nvml& nvml, Nvml::Device a, Nvml::Device b) {
  if (a == b) return "-";
  const auto has = [&](int capability) {
    int status = -1;
    return nvml.call("nvmlDeviceGetP2PStatus", a, b, capability, &status) && status == 0;
  };
  if (has(kCapsNvlink)) return "NVLink";
  return has(kCapsRead) ? "PCIe P2P" : "none";
}

GpuFacts read_gpu(const Nvml& nvml, Nvml::Device device) {
  GpuFacts facts;
  std::array<char, 96> name{};
  if (nvml.call("nvmlDeviceGetName", device, name.data(), static_cast<unsigned>(name.size()))) facts.name = name.data();
  struct Memory {
    unsigned long long total, free, used;
  } memory{};
  if (nvml.call("nvmlDeviceGetMemoryInfo", device, &memory)) facts.memory_bytes = static_cast<int64_t>(memory.total);
  nvml.call("nvmlDeviceGetCudaComputeCapability", device, &facts.compute_major, &facts.compute_minor);
  for (unsigned link = 0; link < kMostLinks; ++link) {
    int active = 0;
    unsigned version = 0;
    if (!nvml.call("nvmlDeviceGetNvLinkState", device, link, &active) || active != 1) continue;
    ++facts.num_nvlinks;
    if (nvml.call("nvmlDeviceGetNvLinkVersion", device, link, &version)) facts.nvlink_version = static_cast<int>(version);
  }
  return facts;
}

}  // namespace

GpuReport read_gpus() {
  GpuReport report;
  const Nvml nvml;
  if (!nvml.present()) {
    report.problem = "libnvidia-ml.so.1 is not on this machine: no NVIDIA driver";
    return report;
  }
  std::array<char, 96> driver{};
  unsigned count = 0;
  if (!nvml.started() || !nvml.call("nvmlDeviceGetCount_v2", &count)) {
    report.problem = "libnvidia-ml.so.1 is there, but the driver does not answer";
    return report;
  }
  if (nvml.call("nvmlSystemGetDriverVersion", driver.data(), static_cast<unsigned>(driver.size()))) report.driver = driver.data();
  std::vector<Nvml::Device> devices;
  for (unsigned i = 0; i < count; ++i) {
    Nvml::Device device = nullptr;
    if (nvml.call("nvmlDeviceGetHandleByIndex_v2", i, &device)) devices.push_back(device);
  }
  for (const Nvml::Device device : devices) {
    report.gpus.push_back(read_gpu(nvml, device));
    for (const Nvml::Device peer : devices) report.gpus.back().link_to.push_back(link_between(nvml, device, peer));
  }
  if (devices.empty())
    report.problem =
        count == 0 ? "the NVIDIA driver sees no GPU" : fmt::format("the NVIDIA driver lets this user open none of {} GPUs", count);
  return report;
}

}  // namespace tern::tools
