// SPDX-License-Identifier: Apache-2.0
// The results of `tern bench` for people and for programs.
#include <fmt/format.h>

#include <fstream>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "tools/bench.h"
#include "tools/machine.h"

namespace tern::tools {
namespace {

constexpr const char* kRow = "{:<17} {:<7} {:>11} {:>11} {:>11} {:>9} {:>8} {:>9} {:>8}  {}\n";

std::string number_or_dash(double value, int digits) { return value > 0 ? fmt::format("{:.{}f}", value, digits) : "-"; }

void print_row(const BenchRecord& record) {
  constexpr double kMega = 1e-6;
  fmt::print(kRow, record.op, record.buffers.empty() ? "-" : record.buffers, fmt::format("{:.1f}", record.times.median_us()),
             fmt::format("{:.1f}", record.times.p99_us()), number_or_dash(static_cast<double>(record.bytes.logical) * kMega, 2),
             number_or_dash(static_cast<double>(record.bytes.wire) * kMega, 2), number_or_dash(record.gbps(record.bytes.wire), 2),
             number_or_dash(record.ceiling_gbps(), 2),
             record.ceiling_us > 0 ? fmt::format("{:.0f} %", record.share_of_ceiling() * 100) : "-", record.wrong.empty() ? "yes" : "NO");
}

nlohmann::ordered_json machine_json(const BenchSetting& setting) {
  const CpuFacts cpu = read_cpu_facts();
  return {{"cpu", cpu.model},
          {"cores", cpu.num_usable},
          {"numa_nodes", cpu.numa_node_cpus.size()},
          {"memory_bytes", read_memory_facts().total_bytes},
          {"kernel", kernel_release()},
          {"tern_version", version_text(tern_version())},
          {"launch", launch_name(setting.launch.kind)}};
}

nlohmann::ordered_json record_json(const BenchSetting& setting, const BenchRecord& record) {
  const Routing& routing = setting.shape.routing;
  return {{"op", record.op},
          {"device", "cpu"},
          {"mode", record.mode},
          {"layout", layout_name(setting.shape.layout)},
          {"dtype", setting.shape.format.name},
          {"ranks", routing.num_ranks()},
          {"tokens", routing.max_tokens()},
          {"hidden", setting.shape.hidden},
          {"topk", routing.num_topk},
          {"experts", routing.num_experts},
          {"median_us", record.times.median_us()},
          {"p99_us", record.times.p99_us()},
          {"logical_bytes", record.bytes.logical},
          {"wire_bytes", record.bytes.wire},
          {"logical_gbps", record.gbps(record.bytes.logical)},
          {"wire_gbps", record.gbps(record.bytes.wire)},
          {"ceiling_gbps", record.ceiling_gbps()},
          {"share_of_ceiling", record.share_of_ceiling()},
          {"verified", record.wrong.empty()},
          {"buffers", record.buffers},
          {"extent", record.extent},
          {"routing", setting.traffic.description},
          {"seed", setting.options.traffic.seed},
          {"iters", setting.options.iters},
          {"ceiling_us", record.ceiling_us},
          {"ceiling_logical_gbps", record.ceiling_us > 0 ? static_cast<double>(record.bytes.logical) / record.ceiling_us * 1e-3 : 0},
          {"wrong", record.wrong}};
}

}  // namespace

void print_report(const BenchSetting& setting, const std::vector<BenchRecord>& records) {
  const BatchShape& shape = setting.shape;
  const CpuFacts cpu = read_cpu_facts();
  fmt::print("tern bench {}: {} ranks ({}), {} tokens a rank, hidden {}, top-{} of {} experts, {}, {}, routing {}, seed {}\n",
             version_text(tern_version()), shape.routing.num_ranks(), launch_name(setting.launch.kind), shape.routing.max_tokens(),
             shape.hidden, shape.routing.num_topk, shape.routing.num_experts, shape.format.name, layout_name(shape.layout),
             setting.traffic.description, setting.options.traffic.seed);
  fmt::print("on {}, {} cores; {} runs each, the slowest rank counts\n\n", cpu.model, cpu.num_usable, setting.options.iters);
  fmt::print(kRow, "op", "buffers", "median us", "p99 us", "logical MB", "wire MB", "GB/s", "ceiling", "share", "verified");
  for (const BenchRecord& record : records) print_row(record);
  fmt::print(
      "\nMB: one row per (token, rank) with its scales, on the rank that has most; logical holds the rank's own share, wire does not.\n"
      "GB/s: wire bytes per rank. Ceiling: a plain memcpy of the logical bytes by all ranks at once, its GB/s counted alike;\n"
      "share: its time by the operation's. Combine may pass 100 %: it reads these bytes but writes only the sums.\n"
      "Verified: every byte on every rank, before and after the timed runs.\n");
  for (const BenchRecord& record : records) {
    if (!record.wrong.empty()) fmt::print(stderr, "tern: {} {}: WRONG: {}\n", record.op, record.buffers, record.wrong);
  }
}

void write_json(const BenchSetting& setting, const std::vector<BenchRecord>& records) {
  nlohmann::ordered_json document{{"machine", machine_json(setting)}, {"records", nlohmann::ordered_json::array()}};
  for (const BenchRecord& record : records) document["records"].push_back(record_json(setting, record));
  std::ofstream file(setting.options.json);
  file << document.dump(2) << '\n';
  file.close();
  if (!file) fail_errno("write", fmt::format("results cannot be written to {}", setting.options.json));
}

}  // namespace tern::tools
