// SPDX-License-Identifier: Apache-2.0
// The NVIDIA GPUs of this machine and how they are linked, asked of the driver's management library if it is there.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace tern::tools {

struct GpuFacts {
  std::string name;
  int64_t memory_bytes = 0;
  int compute_major = 0, compute_minor = 0;
  int num_nvlinks = 0;               // active
  int nvlink_version = 0;            // as NVML counts them; 0: no link, or not told
  std::vector<std::string> link_to;  // [num_gpus] "NVLink", "PCIe P2P", "none", "-" (itself)
};

struct GpuReport {
  std::string driver;   // "" if the library is absent
  std::string problem;  // why there are none
  std::vector<GpuFacts> gpus;
};

GpuReport read_gpus();

}  // namespace tern::tools
