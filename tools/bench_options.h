// SPDX-License-Identifier: Apache-2.0
// What `tern bench` and `tern routing` are asked to do: the flags, and what they amount to.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "routing/routing.h"
#include "tools/batch.h"
#include "tools/choose_device.h"
#include "tools/launch.h"

namespace CLI {
class App;
}

namespace tern::tools {

// The flags that choose a routing; 0 or "" means: from the model.
struct TrafficOptions {
  std::string model = "deepseek-v3";
  std::string routing;  // a generator's name or a file
  int ranks = 0;
  int64_t tokens = 0;
  int experts = 0;
  int topk = 0;
  std::optional<double> skew;
  uint64_t seed = 1;
};

struct BenchOptions {
  TrafficOptions traffic;
  std::string device = "auto";
  std::string launch;
  std::string dtype = "bf16";
  std::string layout = "rank_major";
  std::string wire = "dtype";
  std::string mode = "auto";
  std::string on_timeout = "abort";
  std::string buffers = "both";
  std::string json;
  std::string combine = "hierarchical";
  int64_t hidden = 0;
  int64_t iters = 0;  // 0: 30, on GPUs 100
  int64_t timeout_ms = 30000;
  int32_t alignment = 1;
  std::vector<std::string> ops;  // none: all
  std::vector<int> num_sms;      // each is measured; none: as the engine chooses
  bool graph = false;
  int32_t chain = 1;
  bool cold = false;
  std::string table;  // none, large, small or paths

  bool wants(const std::string& op) const { return ops.empty() || std::ranges::find(ops, op) != ops.end(); }
};

struct Traffic {
  Routing routing;
  std::string description;  // "uniform", "zipf 1.2", "file layer.routing"
  int64_t model_hidden = 0;
};

// `default_ranks`: in words, for the help.
void add_traffic_flags(CLI::App& app, TrafficOptions& options, const char* default_ranks);
void add_bench_flags(CLI::App& app, BenchOptions& options);

// Generates the routing, or reads it. `num_ranks` is used where neither a flag nor a file says it.
Traffic make_traffic(const TrafficOptions& options, int num_ranks);

// Processes of a launcher where one is found and `launch` is "", else what is asked for; `ranks` 0: one for each GPU, 4 on the CPU.
LaunchOptions choose_launch(const std::string& launch, int ranks, int64_t timeout_ms, const ChosenDevice& device);

tern_device_type parse_device(const std::string& name);
tern_mode parse_mode(const std::string& name);
tern_timeout_policy parse_timeout_policy(const std::string& name);

}  // namespace tern::tools
