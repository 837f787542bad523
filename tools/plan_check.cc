// SPDX-License-Identifier: Apache-2.0
#include "tools/plan_check.h"

#include <fmt/format.h>

#include <fstream>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "forecast/forecast.h"
#include "tools/models.h"
#include "tools/row_format.h"

namespace tern::tools {
namespace {

using Json = nlohmann::json;

constexpr double kMega = 1e6;

ForecastBatch batch_of(const Json& record, const RoutingOptions& routing) {
  const RowFormat format = parse_row_format(record.at("dtype"));
  const int num_ranks = record.at("ranks"), ranks_per_node = record.value("ranks_per_node", num_ranks);
  if (num_ranks < 1 || ranks_per_node < 1 || num_ranks % ranks_per_node != 0)
    fail(TERN_INVALID_ARGUMENT, "plan: a result has {} ranks, {} on each node, which cannot be", num_ranks, ranks_per_node);
  const int64_t hidden = record.at("hidden");
  const Places places{num_ranks / ranks_per_node, ranks_per_node};
  const Choices choices{record.at("experts"), record.at("topk")};
  return {.places = places,
          .choices = choices,
          .reach = expect_reach(places, choices, routing),
          .num_tokens = record.at("tokens"),
          .dispatch_row_bytes = format.arriving_row_bytes(hidden),
          .dispatch_scale_bytes = format.arriving_scale_bytes(hidden),
          .combine_row_bytes = format.combine_row_bytes(hidden),
          .layout = parse_layout(record.at("layout")),
          .casts = format.casts()};
}

// What the run says of its machine.
Costs costs_of(const Json& machine, const Json& record, const Places& places) {
  const bool on_gpu = record.at("device") == "cuda";
  Costs costs = default_costs(on_gpu ? TERN_DEVICE_CUDA : TERN_DEVICE_CPU);
  if (!on_gpu) {
    const bool many_machines = machine.value("launch", "processes") != "processes" && machine.value("launch", "") != "threads";
    costs.workers = machine.value("cores", costs.workers) / (many_machines ? 1 : places.num_nodes);
    return costs;
  }
  const Json gpus = machine.value("gpus", Json::object()).value("list", Json::array());
  if (!gpus.empty()) costs.workers = gpus.front().value("sms", costs.workers);
  const double pull_gbps = record.value("links", Json::object()).value("pull_gbps", 0.0);
  if (pull_gbps > 0) costs.link_gbps = pull_gbps;
  return costs;
}

std::string describe(const ForecastBatch& batch, const Json& record) {
  const Places& places = batch.places;
  return fmt::format("{} rank{}{}, {} tokens, {}, {}, {}", places.num_ranks(), places.num_ranks() == 1 ? "" : "s",
                     places.num_nodes > 1 ? fmt::format(" on {} nodes", places.num_nodes) : "", batch.num_tokens,
                     record.at("dtype").get<std::string>(), record.at("layout").get<std::string>(),
                     record.at("routing").get<std::string>());
}

CheckedLine check_record(const Json& machine, const Json& record, const RoutingOptions& routing, const CostOverrides& overrides) {
  const ForecastBatch batch = batch_of(record, routing);
  const tern_device_type device = record.at("device") == "cuda" ? TERN_DEVICE_CUDA : TERN_DEVICE_CPU;
  const Forecaster forecaster(batch, device, override_costs(costs_of(machine, record, batch.places), overrides));
  const bool has_paths = device == TERN_DEVICE_CUDA && batch.places.num_nodes == 1;
  const OperationForecast forecast = forecaster.predict({.op = record.at("op"),
                                                         .in_windows = record.at("buffers") == "window",
                                                         .exact = record.at("extent") == "exact",
                                                         .num_sms = record.value("num_sms", 0),
                                                         .mode = !has_paths                       ? TERN_MODE_AUTO
                                                                 : record.at("mode") == "latency" ? TERN_MODE_LATENCY
                                                                                                  : TERN_MODE_THROUGHPUT});
  const auto mega = [&](const char* name) { return record.value(name, 0.0) / kMega; };
  return {.batch = describe(batch, record),
          .op = record.at("op"),
          .buffers = record.at("buffers"),
          .extent = record.at("extent"),
          .num_sms = record.value("num_sms", 0),
          .us = {forecast.us(), record.at("median_us")},
          .wire_mb = {forecast.wire_bytes / kMega, mega("wire_bytes")},
          .link_mb = {forecast.link_bytes / kMega, mega("link_bytes")},
          .network_mb = {forecast.network_bytes / kMega, mega("network_bytes")}};
}

// Forecasts are of sums, one of each rank, that travel as rows do.
bool has_forecast(const Json& record) {
  const std::string op = record.at("op");
  if (op.ends_with("_send") || op.ends_with("_receive")) return false;
  if (op != "combine" && !op.starts_with("round_trip")) return true;
  const bool sums = record.value("combine_mode", "hierarchical") == "hierarchical" || record.at("layout") == "rank_major";
  return sums && record.value("wire", "dtype") == "dtype";
}

Json read_result(const std::string& path) {
  std::ifstream file(path);
  if (!file) fail_errno("open", fmt::format("the result {} cannot be read", path));
  Json result = Json::parse(file, nullptr, /*allow_exceptions=*/false);
  if (!result.is_object() || !result.contains("records"))
    fail(TERN_INVALID_ARGUMENT, "plan: {} is no result of `tern bench --json FILE`", path);
  return result;
}

}  // namespace

ForecastCheck check_forecasts(const std::string& path, const CostOverrides& overrides) {
  const Json result = read_result(path);
  const Json machine = result.value("machine", Json::object());
  ForecastCheck check;
  try {
    for (const Json& record : result.at("records")) {
      const auto routing = parse_routing(record.at("routing"));
      if (routing && record.at("verified").get<bool>() && has_forecast(record))
        check.lines.push_back(check_record(machine, record, *routing, overrides));
      else
        ++check.num_skipped;
    }
  } catch (const Json::exception& error) {
    fail(TERN_INVALID_ARGUMENT, "plan: {} is no whole result of `tern bench --json FILE`: {}", path, error.what());
  }
  return check;
}

}  // namespace tern::tools
