// SPDX-License-Identifier: Apache-2.0
// `tern check`: shows on this machine that the engines present compute the right thing, by the project's own conformance
// cases, with ranks as processes and as threads.
#pragma once

#include <cstdint>
#include <string>

namespace CLI {
class App;
}

namespace tern::tools {

struct CheckOptions {
  std::string device = "auto";
  int64_t timeout_ms = 10000;
  int ranks_per_node = 0;  // CPU ranks: declares nodes; 0: one
  bool verbose = false;
};

void add_check_flags(CLI::App& app, CheckOptions& options);

// 0 if every case passed.
int run_check(const CheckOptions& options);

}  // namespace tern::tools
