// SPDX-License-Identifier: Apache-2.0
// The measured constants that forecasts are made of: one table, with where each figure comes from.
//
//   Costs costs = default_costs(TERN_DEVICE_CUDA);
//   for (const CostEntry& entry : cost_table()) fmt::print("{} {}\n", entry.name, costs.*entry.member);
//
// A worker is an SM of a GPU, or a core of a CPU. Figures are for the worker's whole time. GB are 10^9 bytes.
#pragma once

#include <tern/tern.h>

#include <limits>
#include <optional>
#include <span>
#include <vector>

namespace tern::tools {

constexpr double kUnbounded = std::numeric_limits<double>::infinity();

struct Costs {
  double workers = 0;
  double link_gbps = 0;
  double staged_link_share = 0;
  double delivered_link_share = 0;
  double copy_gbps = 0;
  double deliver_gbps = 0;
  double spread_gbps = 0;
  double stage_gbps = 0;
  double sum_gbps = 0;
  double memory_gbps = 0;
  double cache_mb = 0;
  double dispatch_us = 0;
  double stage_us = 0;
  double combine_us = 0;
  double trip_us = 0;
  double wake_us = 0;
  double route_us = 0;
  double message_ns = 0;
  double host_us = 0;
  double small_dispatch_us = 0;
  double small_route_us = 0;
  double small_combine_us = 0;
  double small_gbps = 0;
  double net_gbps = 0;
  double worker_net_gbps = 0;
  double net_latency_us = 0;
  double net_host_us = 0;
  double net_route_us = 0;
  double net_small_route_us = 0;
};

// One figure for a kind of device, and its source. A figure that the device has no use for has no source.
struct Cost {
  double value = 0;
  const char* source = nullptr;
};

struct CostEntry {
  const char* name;  // its flag is "--" name
  double Costs::* member;
  const char* unit;
  const char* meaning;
  Cost gpu, cpu;

  const Cost& of(tern_device_type device) const { return device == TERN_DEVICE_CUDA ? gpu : cpu; }
};

std::span<const CostEntry> cost_table();
Costs default_costs(tern_device_type device);

// What a caller says instead, entry by entry of the table; what it does not say stays.
using CostOverrides = std::vector<std::optional<double>>;
Costs override_costs(Costs costs, const CostOverrides& overrides);

}  // namespace tern::tools
