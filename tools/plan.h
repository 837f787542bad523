// SPDX-License-Identifier: Apache-2.0
// `tern plan`: time, memory and SMs of dispatch and combine for ranks that are not here, and how they were computed.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "forecast/forecast.h"

namespace CLI {
class App;
}

namespace tern::tools {

struct PlanOptions {
  std::string device = "cuda";
  Places places{.num_nodes = 1, .ranks_per_node = 8};
  std::string model = "deepseek-v3";
  int64_t tokens = 4096;  // of each rank
  int64_t hidden = 0;     // 0, as the next two: the model's
  int experts = 0;
  int topk = 0;
  std::string dtype = "bf16";
  std::string layout = "rank_major";
  std::string routing;  // a generator; "": as the model routes
  double skew = 1;
  int groups = 8, max_groups = 4;
  std::vector<int> num_sms;  // none: as the library chooses
  int lanes = 1;
  CostOverrides costs;
  std::string json;
  std::string check;  // a result to compare with, instead of all else
  double within = 0;  // --check fails beyond this factor; 0: never
};

// Bytes on each rank.
struct PlanMemory {
  int64_t control = 0;
  int64_t staging = 0;
  int64_t network = 0;                         // banks of what crosses the network
  int64_t tokens_window = 0, rows_window = 0;  // of zero copy, if the caller asks for it

  bool known() const { return control > 0; }  // is the engine in this build?
};

struct PlannedOperation {
  OperationChoice choice;
  OperationForecast forecast;  // with the SMs that were asked for, or that the library takes
  int best_sms = 0;
  double best_us = 0;
};

struct PlanResult {
  const PlanOptions& options;
  const Forecaster& forecaster;
  std::string routing;
  int64_t hidden = 0;
  std::vector<PlannedOperation> operations;
  PlanMemory memory;
};

void add_plan_flags(CLI::App& app, PlanOptions& options);

// 0; with --check and --within 2 if a time or a number of bytes is further off.
int run_plan(const PlanOptions& options);

void print_plan(const PlanResult& result);
void write_plan_json(const PlanResult& result, const std::string& path);

}  // namespace tern::tools
