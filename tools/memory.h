// SPDX-License-Identifier: Apache-2.0
// `tern memory`: what exchanges of given shapes take on each rank, before anything is allocated.
#pragma once

#include <cstdint>

namespace CLI {
class App;
}

namespace tern::tools {

struct MemoryOptions {
  int32_t num_ranks = 4;
  int64_t num_tokens = 128;  // of each rank
  int64_t hidden = 7168;
  int32_t num_experts = 256;
  int32_t num_topk = 8;
  int32_t num_lanes = 1;
};

void add_memory_flags(CLI::App& app, MemoryOptions& options);

int print_memory(const MemoryOptions& options);

}  // namespace tern::tools
