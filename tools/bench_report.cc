// SPDX-License-Identifier: Apache-2.0
// The results of `tern bench` for people.
#include <fmt/format.h>

#include <algorithm>

#include "tools/bench.h"
#include "tools/cuda_facts.h"
#include "tools/machine.h"

namespace tern::tools {
namespace {

constexpr double kMega = 1e-6;
constexpr const char* kCpuRow = "{:<17} {:<7} {:>11} {:>11} {:>11} {:>9} {:>9} {:>8} {:>8} {:>9} {:>8}{}  {}\n";
constexpr const char* kNetworkCells = " {:>9} {:>8} {:>6}";
constexpr const char* kGpuRow =
    "{:<17} {:<7} {:<6} {:<6} {:>4} {:>10} {:>10} {:>8} {:>8} {:>7} {:>7} {:>7} {:>7} {:>7} {:>7} {:>7}{}  {}\n";

std::string number_or_dash(double value, int digits) { return value > 0 ? fmt::format("{:.{}f}", value, digits) : "-"; }

std::string percent_or_dash(double value, double of) { return value > 0 && of > 0 ? fmt::format("{:.0f} %", value / of * 100) : "-"; }

std::string or_dash(const std::string& text) { return text.empty() ? "-" : text; }

std::string network_cells(const BenchRecord& record) {
  const double gbps = record.gbps(record.bytes.network);
  return fmt::format(kNetworkCells, number_or_dash(gbps, 2), number_or_dash(record.network_ceiling_gbps, 2),
                     percent_or_dash(gbps, record.network_ceiling_gbps));
}

bool between_nodes(const std::vector<BenchRecord>& records) {
  return std::ranges::any_of(records, [](const BenchRecord& record) { return record.network_ceiling_gbps > 0; });
}

std::string network_head() { return fmt::format(kNetworkCells, "net GB/s", "stream", "of it"); }

void print_network_note() {
  fmt::print(
      "Net GB/s: what the rank that sends most puts to other nodes, by the time. Stream: plain writes of 1 MiB (fi_write), from every\n"
      "rank to its rails and back, all at once, in this run; what the slowest rank sends.\n");
}

void print_cpu_row(const BenchRecord& record, bool with_network) {
  fmt::print(
      kCpuRow, record.op, or_dash(record.buffers), fmt::format("{:.1f}", record.times.median_us()),
      fmt::format("{:.1f}", record.times.p99_us()), number_or_dash(static_cast<double>(record.bytes.logical) * kMega, 2),
      number_or_dash(static_cast<double>(record.bytes.wire) * kMega, 2), number_or_dash(static_cast<double>(record.bytes.link) * kMega, 2),
      number_or_dash(static_cast<double>(record.bytes.network) * kMega, 2), number_or_dash(record.gbps(record.bytes.wire), 2),
      number_or_dash(record.ceiling_gbps(), 2), record.ceiling_us > 0 ? fmt::format("{:.0f} %", record.share_of_ceiling() * 100) : "-",
      with_network ? network_cells(record) : "", record.wrong.empty() ? "yes" : "NO");
}

void print_cpu_report(const BenchSetting& setting, const std::vector<BenchRecord>& records) {
  const CpuFacts cpu = read_cpu_facts();
  fmt::print("on {}, {} cores; {} runs each, the slowest rank counts\n\n", cpu.model, cpu.num_usable, setting.options.iters);
  const bool with_network = between_nodes(records);
  fmt::print(kCpuRow, "op", "buffers", "median us", "p99 us", "logical MB", "wire MB", "link MB", "net MB", "GB/s", "ceiling", "share",
             with_network ? network_head() : "", "verified");
  for (const BenchRecord& record : records) print_cpu_row(record, with_network);
  fmt::print(
      "\nMB: one row per (token, rank) with its scales, on the rank that has most; logical holds the rank's own share, wire does not;\n"
      "link: between the ranks of a node, tokens of other nodes too; net: what the rank that sends most puts to other nodes. GB/s: wire\n"
      "bytes per rank. Ceiling: a plain memcpy of the logical bytes by all ranks at once, its GB/s counted alike; share: its time by the\n"
      "operation's. Combine may pass 100 %: it reads these bytes but writes only the sums.\n");
  if (with_network) print_network_note();
  fmt::print("Verified: every byte on every rank, before and after the timed runs.\n");
}

// The best of all numbers of SMs, either way; the copy engines are not asked.
double best_gbps(const std::vector<LinkRates>& links) {
  double best = 0;
  for (const LinkRates& rates : links) {
    if (rates.num_sms > 0) best = std::max({best, rates.push_gbps, rates.pull_gbps});
  }
  return best;
}

// What a line says of an operation on GPUs, in the order of the columns.
struct GpuCells {
  std::string sms, median_us, p99_us, wire_mb, local_mb, gbps, push_gbps, pull_gbps, of_push, of_pull, of_best, of_all;
};

GpuCells gpu_cells(const BenchRecord& record, const std::vector<LinkRates>& links) {
  const double gbps = record.gbps(record.bytes.wire), all_gbps = record.gbps(record.bytes.logical);
  return {.sms = record.num_sms > 0 ? std::to_string(record.num_sms) : "-",
          .median_us = fmt::format("{:.1f}", record.times.median_us()),
          .p99_us = fmt::format("{:.1f}", record.times.p99_us()),
          .wire_mb = number_or_dash(static_cast<double>(record.bytes.wire) * kMega, 1),
          .local_mb = number_or_dash(static_cast<double>(record.bytes.logical - record.bytes.wire) * kMega, 1),
          .gbps = number_or_dash(gbps, 1),
          .push_gbps = number_or_dash(record.links.push_gbps, 0),
          .pull_gbps = number_or_dash(record.links.pull_gbps, 0),
          .of_push = percent_or_dash(gbps, record.links.push_gbps),
          .of_pull = percent_or_dash(gbps, record.links.pull_gbps),
          .of_best = percent_or_dash(gbps, best_gbps(links)),
          .of_all = percent_or_dash(all_gbps, std::max(record.links.push_all_gbps, record.links.pull_all_gbps))};
}

void print_gpu_report(const BenchSetting& setting, const std::vector<BenchRecord>& records, const std::vector<LinkRates>& links) {
  const std::string chain = setting.options.chain > 1 ? fmt::format(" of {} operations in a row", setting.options.chain) : "";
  fmt::print("{} runs{} each, the slowest rank counts{}\n\n", setting.options.iters, chain, setting.options.cold ? "; cold L2 caches" : "");
  print_links(links);
  fmt::print("\n");
  const bool with_network = between_nodes(records);
  fmt::print(kGpuRow, "op", "buffers", "extent", "clock", "SMs", "median us", "p99 us", "wire MB", "local MB", "GB/s", "push", "pull",
             "of push", "of pull", "of best", "of all", with_network ? network_head() : "", "verified");
  for (const BenchRecord& record : records) {
    const GpuCells cells = gpu_cells(record, links);
    fmt::print(kGpuRow, record.op, or_dash(record.buffers), record.extent, record.clock, cells.sms, cells.median_us, cells.p99_us,
               cells.wire_mb, cells.local_mb, cells.gbps, cells.push_gbps, cells.pull_gbps, cells.of_push, cells.of_pull, cells.of_best,
               cells.of_all, with_network ? network_cells(record) : "", record.wrong.empty() ? "yes" : "NO");
  }
  fmt::print(
      "\nClock: stream and graph (a captured run, replayed): between events around each of many runs on the rank's stream, one behind the\n"
      "other; host: from the call until the stream is empty, ranks lined up before. MB: one row per (token, rank) with its scales, on the\n"
      "rank that has most; local: the rank's own share. GB/s: wire bytes per rank. Push, pull: plain copies of this run with as many SMs;\n"
      "of best: with the best number of SMs; of all: own shares counted on both sides. Verified: every byte that the timed runs left.\n");
  if (with_network) print_network_note();
}

}  // namespace

void print_links(const std::vector<LinkRates>& links) {
  constexpr const char* kRow = "{:<14} {:>7} {:>7} {:>16} {:>16}\n";
  fmt::print("Plain copies between all GPUs at once, GB/s per rank and direction\n");
  fmt::print(kRow, "by", "push", "pull", "push, own too", "pull, own too");
  for (const LinkRates& rates : links)
    fmt::print(kRow, rates.num_sms == 0 ? "copy engines" : fmt::format("{} SMs", rates.num_sms), number_or_dash(rates.push_gbps, 1),
               number_or_dash(rates.pull_gbps, 1), number_or_dash(rates.push_all_gbps, 1), number_or_dash(rates.pull_all_gbps, 1));
}

void print_report(const BenchSetting& setting, const std::vector<BenchRecord>& records, const std::vector<LinkRates>& links) {
  const BatchShape& shape = setting.shape;
  fmt::print("tern bench {}: {} ranks ({}), {} tokens a rank, hidden {}, top-{} of {} experts, {}, {}, routing {}, seed {}\n",
             version_text(tern_version()), shape.routing.num_ranks(), launch_name(setting.launch.kind), shape.routing.max_tokens(),
             shape.hidden, shape.routing.num_topk, shape.routing.num_experts, shape.format.name, layout_name(shape.layout),
             setting.traffic.description, setting.options.traffic.seed);
  if (setting.device.cuda()) {
    const CudaReport cuda = read_cuda();
    if (!cuda.devices.empty())
      fmt::print("on {} x {}, CUDA driver {}, runtime {}; ", cuda.devices.size(), cuda.devices.front().name, cuda_version_text(cuda.driver),
                 cuda_version_text(cuda.runtime));
    print_gpu_report(setting, records, links);
  } else {
    print_cpu_report(setting, records);
  }
  for (const BenchRecord& record : records) {
    if (!record.wrong.empty()) fmt::print(stderr, "tern: {} {}: WRONG: {}\n", record.op, record.buffers, record.wrong);
  }
  std::fflush(stdout);
}

void print_table_head() {
  fmt::print(
      "| ranks | tokens | hidden | routing | rows | layout | op | buffers | extent | clock | path | SMs | median us | p99 us | wire MB | "
      "local MB | GB/s | push | pull | of push | of pull | of best | of all | verified |\n"
      "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|\n");
}

void print_table_rows(const BenchSetting& setting, const std::vector<BenchRecord>& records, const std::vector<LinkRates>& links) {
  const BatchShape& shape = setting.shape;
  for (const BenchRecord& record : records) {
    const GpuCells cells = gpu_cells(record, links);
    const bool is_exact = shape.combines_entries() && record.op.starts_with("combine");
    fmt::print(
        "| {} | {} | {} | {} | {} | {} | {}{} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} |\n",
        shape.routing.num_ranks(), shape.routing.max_tokens(), shape.hidden, setting.traffic.description, shape.format.name,
        layout_name(shape.layout), record.op, is_exact ? " exact" : "", or_dash(record.buffers), record.extent, record.clock, record.mode,
        cells.sms, cells.median_us, cells.p99_us, cells.wire_mb, cells.local_mb, cells.gbps, cells.push_gbps, cells.pull_gbps,
        cells.of_push, cells.of_pull, cells.of_best, cells.of_all, record.wrong.empty() ? "yes" : "NO: " + record.wrong);
  }
  std::fflush(stdout);
}

}  // namespace tern::tools
