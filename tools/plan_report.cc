// SPDX-License-Identifier: Apache-2.0
// What `tern plan` found, for people and for programs.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "tools/machine.h"
#include "tools/plan.h"

namespace tern::tools {
namespace {

constexpr double kMega = 1e6;

void print_heading(const PlanResult& result) {
  const ForecastBatch& batch = result.forecaster.batch();
  const Places& places = batch.places;
  fmt::print("tern plan {}: {} {} ranks on {} node{} of {}, {} tokens a rank, hidden {}, top-{} of {} experts, {}, {}, routing {}\n",
             version_text(tern_version()), places.num_ranks(), result.forecaster.on_gpu() ? "GPU" : "CPU", places.num_nodes,
             places.num_nodes == 1 ? "" : "s", places.ranks_per_node, batch.num_tokens, result.hidden, batch.choices.num_topk,
             batch.choices.num_experts, result.options.dtype, result.options.layout, result.routing);
}

void print_traffic(const ForecastBatch& batch) {
  const Places& places = batch.places;
  const Load route = load_of_route(batch), dispatch = load_of_dispatch(batch), combine = load_of_combine(batch);
  constexpr const char* kRow = "  {:<28} {:>10} {:>10} {:>10}  {}\n";
  fmt::print("\nTraffic that is expected of the busiest rank, in each direction\n");
  fmt::print("  a token reaches {:.2f} of {} ranks and {:.2f} of {} nodes: {}\n", batch.reach.ranks, places.num_ranks(), batch.reach.nodes,
             places.num_nodes, batch.reach.how);
  if (batch.reach.busiest_rank > 1)
    fmt::print("  the busiest rank gets {:.2f} times the mean, the busiest node {:.2f} times\n", batch.reach.busiest_rank,
               batch.reach.busiest_node);
  fmt::print(kRow, "MB", "route", "dispatch", "combine", "how");
  const auto print = [&](const char* what, double Load::* part, const std::string& how) {
    fmt::print(kRow, what, fmt::format("{:.2f}", route.*part / kMega), fmt::format("{:.2f}", dispatch.*part / kMega),
               fmt::format("{:.2f}", combine.*part / kMega), how);
  };
  print("own share", &Load::own,
        fmt::format("{:.0f} rows (tokens x ranks reached) / {} ranks of the node", batch.rows(), places.ranks_per_node));
  print("over the link", &Load::link, "the other rows, of other nodes too, whose rails send them on");
  if (batch.layout != TERN_LAYOUT_RANK_MAJOR)
    print("rows of entries", &Load::entries, fmt::format("{:.0f} rows (tokens x experts) in the rank's memory", batch.entries()));
  if (places.num_nodes > 1)
    print("over the network", &Load::network,
          fmt::format("{:.0f} rows (tokens x other nodes reached), to the rails, with metadata", batch.network_rows()));
}

std::string name_of(const PlannedOperation& operation) {
  return operation.choice.op == "plan" ? "plan"
                                       : fmt::format("{} {}", operation.choice.op, operation.choice.in_windows ? "window" : "caller");
}

// An operation has steps.
const Stage& slowest_of(const OperationForecast& forecast) {
  return std::ranges::max_element(forecast.steps, {}, [](const Step& step) { return step.slowest().us; })->slowest();
}

void print_operations(const PlanResult& result) {
  const bool on_gpu = result.forecaster.on_gpu();
  const bool routes_within = std::ranges::any_of(result.operations, [](const auto& o) { return o.choice.op == "route_dispatch"; });
  constexpr const char* kRow = "  {:<24} {:>10} {:>5} {:>11} {:>8} {:>9} {:>9}  {}\n";
  fmt::print("\nTime\n");
  fmt::print(kRow, "operation and buffers", "path", "SMs", "us", "GB/s", "best SMs", "us then", "most time");
  for (const PlannedOperation& operation : result.operations) {
    const OperationForecast& forecast = operation.forecast;
    const bool takes_sms = on_gpu && !forecast.small_kernels && operation.choice.op != "plan";  // as far as this model knows
    fmt::print(kRow, name_of(operation), forecast.small ? "latency" : "throughput", on_gpu ? std::to_string(forecast.num_sms) : "-",
               fmt::format("{:.1f}", forecast.us()),
               forecast.wire_bytes > 0 ? fmt::format("{:.1f}", forecast.wire_bytes / forecast.us() * 1e-3) : "-",
               takes_sms ? std::to_string(operation.best_sms) : "-", takes_sms ? fmt::format("{:.1f}", operation.best_us) : "-",
               slowest_of(forecast).name);
  }
  fmt::print(
      "  GB/s: rows from and to other ranks, once for each token and rank. Window, caller: where rows lie. plan: extent exact; round_trip "
      "is\n"
      "  plan, dispatch and combine{}.{}\n",
      routes_within ? ", route_dispatch a dispatch that routes, and round_trip_worst both without the host" : "",
      on_gpu ? "\n  SMs: asked for, or the library's rule: throughput path bytes of a rank's tokens / 512 KiB, 4 to 24; small batches a "
               "block for "
               "each\n  message that may arrive, or for each part of a row that is sent if these are more, and one for the routing.\n"
               "  Best: the fewest within 1 % of the shortest time of this model."
             : "");
}

void print_stages(const PlanResult& result) {
  fmt::print("\nHow the times are computed: the slowest of the stages that overlap, and on top (+) what does not\n");
  for (const PlannedOperation& operation : result.operations) {
    if (operation.forecast.steps.size() > 1) continue;  // their steps are here
    const Step& step = operation.forecast.steps.front();
    fmt::print("  {}{}: {:.1f} us\n", name_of(operation),
               operation.forecast.num_sms > 0 ? fmt::format(", {} SMs", operation.forecast.num_sms) : "", step.us());
    for (const bool overlaps : {true, false}) {
      for (const Stage& stage : step.stages) {
        if (stage.overlaps == overlaps)
          fmt::print("    {} {:<9} {:>10.1f} us = {}\n", overlaps ? ' ' : '+', stage.name, stage.us, stage.how);
      }
    }
  }
}

void print_memory_of(const PlanResult& result) {
  const PlanMemory& memory = result.memory;
  const auto print = [](const char* what, int64_t bytes, const char* how) {
    fmt::print("  {:<28} {:>10.2f}  {}\n", what, static_cast<double>(bytes) / kMega, how);
  };
  fmt::print("\nMemory of each rank, MB, as an exchange would be made ({} lane{})\n", result.options.lanes,
             result.options.lanes == 1 ? "" : "s");
  if (memory.known()) {
    print("control", memory.control, "flags, calls, routing");
    print("staging", memory.staging, "at most TERN_STAGING_MAX_MB (CPU 256, GPU 1024 MiB): larger batches run in rounds");
  } else {
    fmt::print("  the CUDA engine is not in this build: it would know\n");
  }
  if (memory.network > 0) print("banks of the network", memory.network, "two for each lane, node and direction");
  print("window for tokens", memory.tokens_window, "zero copy, if asked for: tokens x row");
  print("window for rows", memory.rows_window,
        "zero copy, if asked for: tokens x ranks x row, all that could come; expert_padded for each expert");
}

void print_costs(const PlanResult& result) {
  const tern_device_type device = result.forecaster.on_gpu() ? TERN_DEVICE_CUDA : TERN_DEVICE_CPU;
  fmt::print("\nConstants (each has a flag of its name)\n");
  for (size_t i = 0; i < cost_table().size(); ++i) {
    const CostEntry& entry = cost_table()[i];
    const bool is_given = result.options.costs[i].has_value();
    const Cost& cost = entry.of(device);
    if (cost.source == nullptr && !is_given) continue;
    fmt::print("  {:<18} {:>7} {:<4}  {}; {}\n", entry.name, fmt::format("{:g}", result.forecaster.costs().*entry.member), entry.unit,
               entry.meaning, is_given ? "given" : cost.source);
  }
}

using Json = nlohmann::ordered_json;

// JSON knows no infinity.
Json number(double value) { return std::isfinite(value) ? Json(value) : Json(); }

Json load_json(const Load& load) {
  return {{"own_bytes", load.own}, {"link_bytes", load.link}, {"network_bytes", load.network}, {"entry_bytes", load.entries}};
}

Json operation_json(const PlannedOperation& operation) {
  Json steps = Json::array();
  for (const Step& step : operation.forecast.steps) {
    Json stages = Json::array();
    for (const Stage& stage : step.stages)
      stages.push_back({{"name", stage.name}, {"us", number(stage.us)}, {"overlaps", stage.overlaps}, {"how", stage.how}});
    steps.push_back({{"name", step.name}, {"us", number(step.us())}, {"stages", stages}});
  }
  return {{"op", operation.choice.op},
          {"buffers", operation.choice.op == "plan" ? ""
                      : operation.choice.in_windows ? "window"
                                                    : "caller"},
          {"extent", operation.choice.exact ? "exact" : "worst"},
          {"mode", operation.forecast.small ? "latency" : "throughput"},
          {"num_sms", operation.forecast.num_sms},
          {"us", number(operation.forecast.us())},
          {"wire_bytes", operation.forecast.wire_bytes},
          {"link_bytes", operation.forecast.link_bytes},
          {"network_bytes", operation.forecast.network_bytes},
          {"best_num_sms", operation.best_sms},
          {"best_us", number(operation.best_us)},
          {"steps", steps}};
}

}  // namespace

void print_plan(const PlanResult& result) {
  print_heading(result);
  print_traffic(result.forecaster.batch());
  print_operations(result);
  print_stages(result);
  print_memory_of(result);
  print_costs(result);
  if (result.forecaster.on_gpu() && result.forecaster.batch().places.num_nodes > 1)
    fmt::print(
        "\nThe rate and the trip of GPU ranks' network are assumptions, and what the host adds was measured over tcp. Give --net-gbps "
        "and --net-latency-us.\n");
  std::fflush(stdout);
}

void write_plan_json(const PlanResult& result, const std::string& path) {
  const ForecastBatch& batch = result.forecaster.batch();
  const PlanMemory& memory = result.memory;
  Json operations = Json::array(), costs = Json::object();
  for (const PlannedOperation& operation : result.operations) operations.push_back(operation_json(operation));
  for (const CostEntry& entry : cost_table()) costs[entry.name] = number(result.forecaster.costs().*entry.member);
  const Json document{{"device", result.options.device},
                      {"nodes", batch.places.num_nodes},
                      {"ranks_per_node", batch.places.ranks_per_node},
                      {"tokens", batch.num_tokens},
                      {"hidden", result.hidden},
                      {"experts", batch.choices.num_experts},
                      {"topk", batch.choices.num_topk},
                      {"dtype", result.options.dtype},
                      {"layout", result.options.layout},
                      {"routing", result.routing},
                      {"ranks_reached", batch.reach.ranks},
                      {"nodes_reached", batch.reach.nodes},
                      {"busiest_rank", batch.reach.busiest_rank},
                      {"traffic",
                       {{"route", load_json(load_of_route(batch))},
                        {"dispatch", load_json(load_of_dispatch(batch))},
                        {"combine", load_json(load_of_combine(batch))}}},
                      {"operations", operations},
                      {"memory_bytes",
                       {{"control", memory.known() ? Json(memory.control) : Json()},
                        {"staging", memory.known() ? Json(memory.staging) : Json()},
                        {"network", memory.network},
                        {"tokens_window", memory.tokens_window},
                        {"rows_window", memory.rows_window}}},
                      {"constants", costs}};
  std::ofstream file(path);
  file << document.dump(2) << '\n';
  file.close();
  if (!file) fail_errno("write", fmt::format("the plan cannot be written to {}", path));
}

}  // namespace tern::tools
