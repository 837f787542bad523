// SPDX-License-Identifier: Apache-2.0
// `tern run`: a whole MoE layer of DeepSeek-V3's shape on several ranks, compared with the same layer computed densely by
// one process in double precision.
#pragma once

#include <cstdint>
#include <string>

namespace CLI {
class App;
}

namespace tern::tools {

struct RunOptions {
  int ranks = 0;
  std::string device = "auto";
  std::string launch;
  int64_t tokens = 32;
  int64_t width = 32;
  int64_t iters = 5;
  uint64_t seed = 1;
  int64_t timeout_ms = 30000;
  std::string trace;  // file for a timeline; "": none
};

void add_run_flags(CLI::App& app, RunOptions& options);
int run_layer(const RunOptions& options);

}  // namespace tern::tools
