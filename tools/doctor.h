// SPDX-License-Identifier: Apache-2.0
// `tern doctor`: what the library finds on this machine, which ways it would take, and what keeps it from the others.
#pragma once

#include <cstdint>
#include <string>

namespace CLI {
class App;
}

namespace tern::tools {

struct DoctorOptions {
  std::string json;  // a file; "-": standard output instead of the text
  // The paths between nodes instead (doctor_network.h).
  bool network = false;
  int num_ranks = 0;       // 0: as many as the launcher started, or 2
  int ranks_per_node = 0;  // 0: TERN_RANKS_PER_NODE; without it a host is a node, or each rank that is started here
  bool rails = false;
  int64_t timeout_ms = 10000;
};

void add_doctor_flags(CLI::App& app, DoctorOptions& options);

// 0 if tokens can be exchanged on this machine in some way.
int run_doctor(const DoctorOptions& options);

}  // namespace tern::tools
