// SPDX-License-Identifier: Apache-2.0
#include "tools/plan.h"

#include <fmt/ranges.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <tern/tern.hpp>

#include "base/error.h"
#include "plan/window_sizing.h"
#include "tools/models.h"
#include "tools/plan_check.h"
#include "tools/row_format.h"

namespace tern::tools {
namespace {

constexpr int kMostRanks = 2048;

tern_device_type device_of(const PlanOptions& options) { return options.device == "cuda" ? TERN_DEVICE_CUDA : TERN_DEVICE_CPU; }

RoutingOptions routing_of(const PlanOptions& options, const Model& model) {
  RoutingOptions routing{.kind = model.routing, .skew = options.skew, .num_groups = options.groups, .max_groups = options.max_groups};
  if (!options.routing.empty()) routing.kind = *find_generator(options.routing);
  return routing;
}

int64_t hidden_of(const PlanOptions& options, const Model& model) { return options.hidden != 0 ? options.hidden : model.hidden; }

ForecastBatch batch_of(const PlanOptions& options, const Model& model, const RoutingOptions& routing) {
  const Choices choices{options.experts != 0 ? options.experts : model.experts, options.topk != 0 ? options.topk : model.topk};
  const int64_t hidden = hidden_of(options, model);
  if (choices.num_experts == 0 || choices.num_topk == 0 || hidden == 0)
    fail(TERN_INVALID_ARGUMENT, "--model custom needs --experts, --topk and --hidden");
  if (options.places.num_ranks() > kMostRanks)
    fail(TERN_INVALID_ARGUMENT, "plan: {} nodes of {} ranks are {} ranks, at most {} can be planned", options.places.num_nodes,
         options.places.ranks_per_node, options.places.num_ranks(), kMostRanks);
  const RowFormat format = parse_row_format(options.dtype);
  return {.places = options.places,
          .choices = choices,
          .reach = expect_reach(options.places, choices, routing),
          .num_tokens = options.tokens,
          .dispatch_row_bytes = format.arriving_row_bytes(hidden),
          .dispatch_scale_bytes = format.arriving_scale_bytes(hidden),
          .combine_row_bytes = format.combine_row_bytes(hidden),
          .layout = parse_layout(options.layout),
          .casts = format.casts()};
}

// By the functions that an exchange is made with. GPU ranks are asked for as one node, and the banks of the network are those of CPU ranks.
PlanMemory memory_of(const PlanOptions& options, const ForecastBatch& batch) {
  const Places& places = batch.places;
  const int64_t row_bytes = std::max(batch.dispatch_row_bytes + batch.dispatch_scale_bytes, batch.combine_row_bytes);
  const tern_exchange_options exchange = complete_options({.device = device_of(options),
                                                           .max_tokens = batch.num_tokens,
                                                           .max_row_bytes = row_bytes,
                                                           .max_topk = batch.choices.num_topk,
                                                           .max_experts = batch.choices.num_experts,
                                                           .num_lanes = options.lanes});
  const int64_t most_rows = places.num_ranks() * batch.num_tokens;
  const int64_t per_expert = batch.layout == TERN_LAYOUT_EXPERT_PADDED ? batch.choices.num_experts / places.num_ranks() : 1;
  PlanMemory memory{.network = num_rail_banks(exchange, places.num_nodes) * rail_bank_bytes(exchange, places.num_ranks(), places.num_nodes),
                    .tokens_window = batch.num_tokens * row_bytes,
                    .rows_window = most_rows * per_expert * row_bytes};
  if (exchange.device == TERN_DEVICE_CUDA) {
    // Said here, so that nodes are not those of the environment.
    const std::vector<Group> ranks = Group::local(places.ranks_per_node, {.ranks_per_node = places.ranks_per_node});
    const tern_memory_info info = Exchange::query_memory(ranks.front(), exchange);
    memory.control = info.control_bytes;
    memory.staging = info.staging_bytes;
  } else {
    const layout::WindowLayout window = make_window_layout(exchange, places.num_ranks(), places.num_nodes);
    memory.control = window.control_bytes();
    memory.staging = window.staging_bytes();
  }
  return memory;
}

std::vector<PlannedOperation> plan_operations(const PlanOptions& options, const Forecaster& forecaster) {
  std::vector<OperationChoice> choices{{.op = "plan"}};
  for (const char* op : {"dispatch", "combine", "round_trip"}) {
    for (const bool in_windows : {true, false}) choices.push_back({.op = op, .in_windows = in_windows});
  }
  const bool is_small = forecaster.predict({.op = "route_dispatch", .exact = false}).small;
  if (is_small) {
    for (const char* op : {"route_dispatch", "round_trip_worst"}) choices.push_back({.op = op, .in_windows = false, .exact = false});
  }
  const std::vector<int> as_chosen{0};
  std::vector<PlannedOperation> operations;
  for (OperationChoice& choice : choices) {
    for (const int num_sms : options.num_sms.empty() ? as_chosen : options.num_sms) {
      choice.num_sms = num_sms;
      PlannedOperation operation{choice, forecaster.predict(choice)};
      operation.best_sms = forecaster.best_sms(choice);
      choice.num_sms = operation.best_sms;
      operation.best_us = forecaster.predict(choice).us();
      operations.push_back(std::move(operation));
    }
  }
  return operations;
}

bool is_within(const Compared& compared, double factor) {
  return compared.measured == 0 || (compared.ratio() <= factor && compared.ratio() >= 1 / factor);
}

std::string mega_pair(const Compared& mb) { return mb.measured > 0 ? fmt::format("{:.2f} / {:.2f}", mb.predicted, mb.measured) : "-"; }

int print_check(const PlanOptions& options) {
  const ForecastCheck check = check_forecasts(options.check, options.costs);
  constexpr const char* kRow = "{:<17} {:<7} {:<6} {:>4} {:>12} {:>12} {:>7} {:>17} {:>17} {:>17}\n";
  std::string batch;
  std::vector<double> ratios;
  bool all_within = true;
  for (const CheckedLine& line : check.lines) {
    if (line.batch != batch) {
      fmt::print("{}{}\n", batch.empty() ? "" : "\n", line.batch);
      fmt::print(kRow, "op", "buffers", "extent", "SMs", "predicted us", "measured us", "ratio", "wire MB p / m", "link MB p / m",
                 "net MB p / m");
    }
    batch = line.batch;
    fmt::print(kRow, line.op, line.buffers.empty() ? "-" : line.buffers, line.extent, line.num_sms > 0 ? std::to_string(line.num_sms) : "-",
               fmt::format("{:.1f}", line.us.predicted), fmt::format("{:.1f}", line.us.measured), fmt::format("{:.2f}", line.us.ratio()),
               mega_pair(line.wire_mb), mega_pair(line.link_mb), mega_pair(line.network_mb));
    ratios.push_back(line.us.ratio());
    for (const Compared& compared : {line.us, line.wire_mb, line.link_mb, line.network_mb})
      all_within &= options.within == 0 || is_within(compared, options.within);
  }
  std::ranges::sort(ratios);
  if (!ratios.empty())
    fmt::print("\n{} lines, predicted by measured time: {:.2f} to {:.2f}, median {:.2f}\n", ratios.size(), ratios.front(), ratios.back(),
               ratios[ratios.size() / 2]);
  if (check.num_skipped > 0)
    fmt::print(
        "{} skipped: routed by a file, not verified, or without a forecast (phases, --combine exact of expert layouts, --wire fp32)\n",
        check.num_skipped);
  if (!all_within) fmt::print(stderr, "tern: a prediction is off by more than a factor of {:g}\n", options.within);
  return all_within ? 0 : 2;
}

}  // namespace

void add_plan_flags(CLI::App& app, PlanOptions& options) {
  constexpr int64_t kMost = int64_t{1} << 24;
  app.add_option("--device", options.device, "cuda or cpu: whose constants are taken")
      ->check(CLI::IsMember({"cuda", "cpu"}))
      ->capture_default_str();
  app.add_option("--nodes", options.places.num_nodes, "Nodes")->check(CLI::Range(1, kMostRanks))->capture_default_str();
  app.add_option("--ranks-per-node", options.places.ranks_per_node, "Ranks that reach each other's memory")
      ->check(CLI::Range(1, layout::kMaxRanks))
      ->capture_default_str();
  app.add_option("--model", options.model, fmt::format("Shape to take: {}", fmt::join(model_names(), ", ")))
      ->check(CLI::IsMember(model_names()))
      ->capture_default_str();
  app.add_option("--tokens", options.tokens, "Tokens of each rank")->check(CLI::Range(int64_t{1}, kMost))->capture_default_str();
  app.add_option("--experts", options.experts, "Experts in all, copies counted; default: the model's")->check(CLI::Range(1, 1 << 20));
  app.add_option("--topk", options.topk, "Experts of each token; default: the model's")->check(CLI::Range(1, 64));
  app.add_option("--hidden", options.hidden, "Elements of a row; default: the model's")->check(CLI::Range(int64_t{1}, kMost));
  app.add_option("--dtype", options.dtype, fmt::format("{}", fmt::join(row_format_names(), ", ")))
      ->check(CLI::IsMember(row_format_names()))
      ->capture_default_str();
  app.add_option("--layout", options.layout, fmt::format("{}", fmt::join(layout_names(), ", ")))
      ->check(CLI::IsMember(layout_names()))
      ->capture_default_str();
  app.add_option("--routing", options.routing, fmt::format("{}; default: as the model routes", fmt::join(generator_names(), ", ")))
      ->check(CLI::IsMember(generator_names()));
  app.add_option("--skew", options.skew, "zipf: popularity of experts falls as 1 / position^SKEW")
      ->check(CLI::Range(0.0, 16.0))
      ->capture_default_str();
  app.add_option("--groups", options.groups, "group-limited: groups of experts")->check(CLI::Range(1, 1 << 20))->capture_default_str();
  app.add_option("--max-groups", options.max_groups, "group-limited: of these, a token's experts lie in so many")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  app.add_option("--num-sms", options.num_sms, "GPUs: SMs of an operation, several numbers one by one; default: as the library chooses")
      ->delimiter(',')
      ->check(CLI::Range(1, 1024));
  app.add_option("--lanes", options.lanes, "Lanes of the exchange: memory")->check(CLI::Range(1, 16))->capture_default_str();
  app.add_option("--json", options.json, "Also write the plan to this file");
  CLI::Option* check = app.add_option(
      "--check", options.check, "Compare with this result of `tern bench --json`; of the other flags only constants and --within count");
  app.add_option("--within", options.within, "--check: fail if a time or a number of bytes is off by more than this factor")
      ->check(CLI::Range(1.0, 1e6))
      ->needs(check);
  options.costs.resize(cost_table().size());
  for (size_t i = 0; i < options.costs.size(); ++i) {
    const CostEntry& entry = cost_table()[i];
    app.add_option("--" + std::string(entry.name), options.costs[i],
                   fmt::format("{}{}{}", *entry.unit != '\0' ? entry.unit : "number", ": ", entry.meaning))
        ->check(CLI::PositiveNumber)
        ->group("Constants, instead of those that were measured (GB/s: 10^9 bytes)");
  }
}

int run_plan(const PlanOptions& options) {
  if (!options.check.empty()) return print_check(options);
  const Model& model = find_model(options.model);
  const RoutingOptions routing = routing_of(options, model);
  const Forecaster forecaster(batch_of(options, model, routing), device_of(options),
                              override_costs(default_costs(device_of(options)), options.costs));
  const PlanResult result{options,
                          forecaster,
                          describe_routing(routing),
                          hidden_of(options, model),
                          plan_operations(options, forecaster),
                          memory_of(options, forecaster.batch())};
  print_plan(result);
  if (!options.json.empty()) write_plan_json(result, options.json);
  return 0;
}

}  // namespace tern::tools
