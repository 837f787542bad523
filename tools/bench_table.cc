// SPDX-License-Identifier: Apache-2.0
// `tern bench --table=KIND`: the settings that docs/performance.md shows, each measured afresh, by one set of ranks for each number of ranks.
#include <fmt/format.h>

#include <algorithm>
#include <iterator>
#include <set>
#include <string>
#include <vector>

#include "base/error.h"
#include "tools/bench.h"
#include "tools/bench_json.h"

namespace tern::tools {
namespace {

// One exchange and one batch; several operations, each with several numbers of SMs.
struct TableCase {
  std::string dtype = "fp8";
  std::string layout = "rank_major";
  std::string buffers = "window";
  std::vector<std::string> ops = {"dispatch"};
  std::vector<int> num_sms = {24};
  int64_t tokens = 4096;
  int64_t hidden = 7168;
  std::string routing = "uniform";
  int num_ranks = 0;  // 0: as many as there are
  int experts = 256;
  std::string mode = "auto";
  std::string combine = "hierarchical";
  bool graph = false;
};

using Ops = std::vector<std::string>;
const Ops kDispatchAndCombine = {"dispatch", "combine"};
const Ops kNewRouting = {"plan", "plan_dispatch", "route_dispatch"};

// Routing reused, then new; with zero copy and with the caller's memory; every number of SMs of interest.
std::vector<TableCase> operations() {
  const std::vector<int> sms{8, 16, 24, 32, 48, 64, 96, 128, 0}, sms_with_copies{16, 24, 32, 48, 64, 96, 128, 0};
  return {{.num_sms = sms},
          {.buffers = "caller", .num_sms = sms_with_copies},
          {.dtype = "bf16", .ops = kDispatchAndCombine, .num_sms = sms},
          {.dtype = "bf16", .buffers = "caller", .ops = kDispatchAndCombine, .num_sms = sms_with_copies},
          {.ops = kNewRouting},
          {.buffers = "caller", .ops = kNewRouting, .num_sms = {32}},
          {.dtype = "bf16", .ops = {"plan_dispatch", "route_dispatch", "round_trip_worst"}}};
}

std::vector<TableCase> layouts_and_encodings() {
  std::vector<TableCase> cases;
  for (const char* buffers : {"window", "caller"}) {
    cases.push_back({.layout = "expert_major", .buffers = buffers, .num_sms = {32}});
    cases.push_back({.dtype = "bf16", .layout = "expert_major", .buffers = buffers, .ops = kDispatchAndCombine, .num_sms = {32}});
    cases.push_back({.dtype = "fp8-cast", .buffers = buffers, .num_sms = {32}});
    cases.push_back(
        {.dtype = "fp8-cast", .layout = "expert_padded", .buffers = buffers, .ops = kDispatchAndCombine, .num_sms = {32}, .tokens = 512});
  }
  return cases;
}

// How time grows with tokens, rows, ranks and skew.
std::vector<TableCase> shapes(int num_ranks) {
  std::vector<TableCase> cases;
  const auto add = [&](TableCase one) {
    one.dtype = "fp8";
    one.ops = {"dispatch"};
    cases.push_back(one);
    one.buffers = "caller";
    one.num_sms = {32};
    cases.push_back(one);
    one.dtype = "bf16";
    one.ops = kDispatchAndCombine;
    cases.push_back(one);
    one.buffers = "window";
    one.num_sms = {24};
    cases.push_back(one);
  };
  for (const int64_t tokens : {512, 1024, 8192}) add({.tokens = tokens});
  for (const int64_t hidden : {2048, 2880, 4096}) add({.hidden = hidden});
  for (const char* routing : {"zipf", "one-rank"}) add({.routing = routing});
  for (int fewer = num_ranks - 1; fewer >= 2; --fewer) add({.num_ranks = fewer});
  return cases;
}

// Batches for decoding: each run is a graph's replay of one operation, or of a phase of one.
std::vector<TableCase> small_batches(int num_ranks) {
  const TableCase base{.dtype = "bf16",
                       .layout = "expert_padded",
                       .buffers = "caller",
                       .ops = {"route_dispatch", "combine", "round_trip_worst"},
                       .num_sms = {0},
                       .tokens = 128,
                       .experts = 288,
                       .graph = true};
  std::vector<TableCase> cases;
  const auto add = [&](TableCase one, const Ops& phases) {
    one.ops.insert(one.ops.end(), phases.begin(), phases.end());
    cases.push_back(one);
    one.dtype = "fp8-cast";
    one.ops = {"route_dispatch"};
    if (!phases.empty()) one.ops.emplace_back("dispatch_phases");
    cases.push_back(one);
  };
  const auto of_ranks = [&](TableCase one, int ranks) {
    one.num_ranks = ranks;
    for (const int64_t tokens : {1, 8, 32, 64, 128}) {
      one.tokens = tokens;
      add(one, {"dispatch_phases", "combine_phases"});
    }
  };
  of_ranks(base, 0);
  TableCase exact = base, without_graph = base, wider = base;
  exact.ops = {"combine", "combine_phases"};
  exact.combine = "exact";
  cases.push_back(exact);
  without_graph.graph = false;
  add(without_graph, {});
  for (const int64_t hidden : {7168, 2048, 4096, 8192}) {
    wider.hidden = hidden;
    for (const int64_t tokens : {8, 32, 64, 128, 256, 512}) {
      wider.tokens = tokens;
      if (hidden != 7168 || tokens > 128) add(wider, {});
    }
  }
  for (int fewer = num_ranks - 1; fewer >= 2; --fewer) of_ranks(base, fewer);
  return cases;
}

// The same batches by both ways, along a plan and with a routing: what the engine's choice between them rests on (src/plan/batch_path.cc). To the
// latency path it is all the same where rows lie.
std::vector<TableCase> both_paths() {
  std::vector<TableCase> cases;
  for (const char* dtype : {"fp8", "bf16"})
    for (const int64_t tokens : {32, 64, 128, 256, 512, 1024})
      for (const std::string mode : {"latency", "throughput"})
        cases.push_back({.dtype = dtype,
                         .buffers = mode == "latency" ? "caller" : "both",
                         .ops = {"dispatch", "route_dispatch", "combine"},
                         .num_sms = {8, 24, 0},
                         .tokens = tokens,
                         .mode = mode});
  return cases;
}

std::vector<TableCase> cases_of(const std::string& kind, int num_ranks) {
  if (kind == "small") return small_batches(num_ranks);
  if (kind == "paths") return both_paths();
  if (kind != "large") fail(TERN_INVALID_ARGUMENT, "--table is \"{}\", must be large, small or paths", kind);
  std::vector<TableCase> cases = operations();
  for (const auto& more : {layouts_and_encodings(), shapes(num_ranks)}) cases.insert(cases.end(), more.begin(), more.end());
  return cases;
}

BenchOptions options_of(const BenchOptions& base, const TableCase& one, int num_ranks) {
  constexpr int kTopk = 8;
  BenchOptions options = base;
  options.traffic.routing = one.routing;
  options.traffic.skew.reset();  // that of zipf is 1
  options.traffic.ranks = num_ranks;
  options.traffic.tokens = one.tokens;
  options.traffic.experts = (one.experts + num_ranks - 1) / num_ranks * num_ranks;  // experts divide by ranks
  options.traffic.topk = kTopk;
  options.hidden = one.hidden;
  options.dtype = one.dtype;
  options.layout = one.layout;
  options.alignment = one.layout == "expert_major" ? 128 : 1;
  options.buffers = one.buffers;
  options.ops = one.ops;
  options.mode = one.mode;
  options.combine = one.combine;
  options.wire = "dtype";
  options.graph = base.graph || one.graph;
  options.num_sms = one.num_sms;
  return options;
}

// The cases of one number of ranks, and those ranks.
struct TableGroup {
  const BenchOptions& options;
  const ChosenDevice& device;
  LaunchOptions launch;
  std::vector<TableCase> cases;
  bool first = false;
};

int table_rank(const TableGroup& group, RankContext& context, BenchJson& json) {
  const std::unique_ptr<RankDevice> device = make_rank_device(group.device, context.rank);
  const std::unique_ptr<LinkCeiling> ceiling = make_link_ceiling(context, *device);
  const std::vector<LinkRates> links = measure_links(*ceiling, {});
  bool all_right = true;
  for (size_t i = 0; i < group.cases.size(); ++i) {
    const BenchOptions options = options_of(group.options, group.cases[i], context.num_ranks);
    const Traffic traffic = make_traffic(options.traffic, context.num_ranks);
    const BenchSetting setting{options, traffic, batch_shape(options, traffic), group.launch, group.device};
    if (i == 0 && context.rank == 0) {
      fmt::print("\n{} ranks ({})\n\n", context.num_ranks, launch_name(group.launch.kind));
      print_links(links);
      fmt::print("\n");
      print_table_head();
      if (group.first) json.add_machine(setting, links);
    }
    const std::vector<BenchRecord> records = measure_all(setting, {context, *device, ceiling.get()});
    all_right = all_right && std::ranges::all_of(records, [](const BenchRecord& record) { return record.wrong.empty(); });
    if (context.rank != 0) continue;
    print_table_rows(setting, records, links);
    json.add(setting, records);
  }
  ceiling->close();
  return all_right ? 0 : 2;
}

}  // namespace

int run_bench_table(const BenchOptions& options, const ChosenDevice& device) {
  const LaunchOptions all_ranks = choose_launch(options.launch, options.traffic.ranks, options.timeout_ms, device);
  std::vector<TableCase> cases = cases_of(options.table, all_ranks.kind == LaunchKind::kEnvironment ? 0 : all_ranks.num_ranks);
  std::set<int, std::greater<>> rank_counts;
  for (TableCase& one : cases) {
    if (one.num_ranks == 0) one.num_ranks = all_ranks.num_ranks;
    rank_counts.insert(one.num_ranks);
  }
  BenchJson json;
  int code = 0;
  for (const int num_ranks : rank_counts) {
    TableGroup group{options, device, all_ranks, {}, num_ranks == all_ranks.num_ranks};
    group.launch.num_ranks = num_ranks;
    std::ranges::copy_if(cases, std::back_inserter(group.cases), [&](const TableCase& one) { return one.num_ranks == num_ranks; });
    const int group_code = launch(group.launch, [&](RankContext& context) { return table_rank(group, context, json); });
    if (code == 0) code = group_code;
  }
  if (!options.json.empty()) json.write(options.json);
  return code;
}

}  // namespace tern::tools
