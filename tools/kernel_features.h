// SPDX-License-Identifier: Apache-2.0
// Kernel features that CPU ranks use, each found out by using it.
#pragma once

#include <string>
#include <vector>

namespace tern::tools {

struct KernelFeature {
  std::string name;
  bool works = false;
  std::string note;  // what it is for, or what its absence means
};

std::vector<KernelFeature> probe_kernel_features();

}  // namespace tern::tools
