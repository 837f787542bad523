// SPDX-License-Identifier: Apache-2.0
// Finds out by trying: can this process exchange tokens on an engine, with ranks as threads or as processes?
#pragma once

#include <tern/tern.h>

#include <string>

#include "tools/launch.h"

namespace tern::tools {

struct Probe {
  std::string name;
  bool works = false;
  std::string reason;  // why not, and what would help
};

// One rank, one token there and back.
Probe probe_engine(tern_device_type device);

// The same between two ranks on the CPU.
Probe probe_launch(LaunchKind kind);

// The same between two nodes of one rank each, which are declared here, with ranks as threads: over the network's loopback.
Probe probe_network();

}  // namespace tern::tools
