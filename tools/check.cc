// SPDX-License-Identifier: Apache-2.0
#include "tools/check.h"

#include <fmt/format.h>
#include <CLI/CLI.hpp>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstring>
#include <exception>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "conformance/round_trip.h"
#include "conformance/runner.h"
#include "conformance/sweep.h"
#include "tools/bench_options.h"
#include "tools/choose_device.h"
#include "tools/probe.h"
#include "tools/progress.h"
#include "tools/row_format.h"
#include "tools/shared_lines.h"

namespace tern::tools {
namespace {

using Cases = std::vector<conformance::Case>;

// What is wrong with each case, "" if nothing is; none for a case that cannot be run here.
using Results = std::vector<std::optional<std::string>>;

struct Tally {
  int passed = 0, failed = 0, skipped = 0;

  void add(const Tally& other) {
    passed += other.passed;
    failed += other.failed;
    skipped += other.skipped;
  }
};

conformance::RunOptions run_options(const CheckOptions& options, const ChosenDevice& device) {
  return {.device = device.type, .num_devices = std::max(1, device.num_gpus), .timeout_ms = options.timeout_ms};
}

// Each case with ranks of its own.
Results run_one_by_one(const Cases& cases, const CheckOptions& options, const ChosenDevice& device, LaunchKind kind) {
  Results results;
  Progress progress(true);
  for (const conformance::Case& c : cases) {
    progress.show(launch_name(kind), static_cast<int64_t>(results.size()), static_cast<int64_t>(cases.size()));
    const auto run = kind == LaunchKind::kProcesses ? conformance::run_as_processes : conformance::run_as_threads;
    results.emplace_back(conformance::join_lines(run(c, run_options(options, device))));
  }
  return results;
}

std::string run_case(const conformance::Case& c, const conformance::RunOptions& options, RankContext& context, RankDevice& device) {
  try {
    const conformance::Scenario scenario(c);
    const Exchange exchange(context.group, conformance::with(scenario.exchange_options(), options, device));
    conformance::RoundTrip trip(scenario, context.rank, exchange.get(), device);
    trip.run();
    return conformance::join_lines(trip.differences());
  } catch (const std::exception& error) {
    return fmt::format("rank {}: {}", context.rank, error.what());
  }
}

// The text of every rank that has one.
std::string gather_texts(RankContext& context, const std::string& mine) {
  using Text = std::array<char, 2048>;
  Text text{};
  std::strncpy(text.data(), mine.c_str(), text.size() - 1);
  std::vector<Text> all(static_cast<size_t>(context.num_ranks));
  context.board.allgather(context.rank, std::as_bytes(std::span(text)), reinterpret_cast<std::byte*>(all.data()),
                          context.timeout_ms + RankContext::kPatienceMs);
  std::vector<std::string> lines;
  for (const Text& of_rank : all) {
    if (of_rank[0] != '\0') lines.emplace_back(of_rank.data());
  }
  return conformance::join_lines(lines);
}

// Processes on GPUs, which take seconds to start: the same ones run all cases of as many ranks, an exchange for each.
Results run_together(const Cases& cases, const CheckOptions& options, const ChosenDevice& device) {
  std::map<int, std::vector<size_t>> by_ranks;
  for (size_t i = 0; i < cases.size(); ++i) by_ranks[cases[i].num_ranks].push_back(i);
  Results results(cases.size());
  for (const auto& [num_ranks, indices] : by_ranks) {
    if (num_ranks > device.num_gpus) continue;  // processes do not share a GPU
    for (const size_t i : indices) results[i] = "the processes ended before this case was done";
    SharedLines lines;  // the number of a case; behind a space its differences, their newlines as '\r'
    const LaunchOptions launch_options{.num_ranks = num_ranks, .timeout_ms = options.timeout_ms};
    launch(launch_options, [&](RankContext& context) {
      const std::unique_ptr<RankDevice> mine = make_rank_device(device, context.rank);
      Progress progress(context.rank == 0);
      int64_t done = 0;
      for (const size_t i : indices) {
        progress.show(fmt::format("{} processes", num_ranks), done++, static_cast<int64_t>(indices.size()));
        std::string text = gather_texts(context, run_case(cases[i], run_options(options, device), context, *mine));
        std::ranges::replace(text, '\n', '\r');
        if (context.rank == 0) lines.add(fmt::format("{} {}", i, text));
      }
      return 0;
    });
    for (const std::string& line : lines.read()) {
      const size_t space = line.find(' ');
      std::string text = line.substr(space + 1);
      std::ranges::replace(text, '\r', '\n');
      results[std::stoul(line.substr(0, space))] = text;
    }
  }
  return results;
}

std::string group_of(const conformance::Case& c) {
  const char* content = c.casts() ? "cast to fp8 on the way" : "as given";
  return fmt::format("{}, {}", layout_name(c.layout), content);
}

void print_case(const conformance::Case& c, const char* launch, const std::optional<std::string>& result) {
  const char* verdict = !result ? "skip" : result->empty() ? "ok  " : "FAIL";
  fmt::print("{}  {}, {}\n{}", verdict, launch, c.name(), result && !result->empty() ? *result + "\n" : "");
}

// The cases of one device and one way to start ranks, told group by group.
Tally check_launch(const CheckOptions& options, const ChosenDevice& device, LaunchKind kind) {
  Cases cases = conformance::check_cases();
  for (conformance::Case& c : cases) {
    if (device.cuda()) continue;
    c.ranks_per_node = options.ranks_per_node;
    c.row_capacity = options.ranks_per_node > 0 ? 0 : c.row_capacity;  // drawn for as many ranks as the case had
    c = c.normalized();
  }
  const bool together = device.cuda() && kind == LaunchKind::kProcesses;
  const Results results = together ? run_together(cases, options, device) : run_one_by_one(cases, options, device, kind);
  std::map<std::string, Tally> groups;
  for (size_t i = 0; i < cases.size(); ++i) {
    Tally& tally = groups[group_of(cases[i])];
    ++(!results[i] ? tally.skipped : results[i]->empty() ? tally.passed : tally.failed);
    if (options.verbose || (results[i] && !results[i]->empty())) print_case(cases[i], launch_name(kind), results[i]);
  }
  Tally sum;
  for (const auto& [group, tally] : groups) {
    fmt::print("{}  {}: ranks as {}, {}: {} of {} cases{}\n", tally.failed == 0 ? "ok  " : "FAIL", device.cuda() ? "cuda" : "cpu",
               launch_name(kind), group, tally.passed, tally.passed + tally.failed,
               tally.skipped > 0 ? fmt::format(", {} with more ranks than GPUs skipped", tally.skipped) : "");
    sum.add(tally);
  }
  std::fflush(stdout);
  return sum;
}

// The engines that are asked for; says why one is not there.
std::vector<ChosenDevice> devices_to_check(const CheckOptions& options, Tally& sum) {
  std::vector<ChosenDevice> devices;
  if (options.device != "cuda") {
    const Probe probe = probe_engine(TERN_DEVICE_CPU);
    if (probe.works) devices.push_back({});
    if (!probe.works) fmt::print("FAIL  {}: {}\n", probe.name, probe.reason);
    sum.failed += !probe.works;
  }
  if (options.device != "cpu") {
    try {
      devices.push_back(choose_device("cuda"));
    } catch (const std::exception& error) {
      const bool demanded = options.device == "cuda";
      fmt::print("{}  CUDA engine: {}\n", demanded ? "FAIL" : "none", error.what());
      sum.failed += demanded;
    }
  }
  return devices;
}

}  // namespace

void add_check_flags(CLI::App& app, CheckOptions& options) {
  app.add_option("--device", options.device, "cpu, cuda, or auto: all engines that this machine and build have")
      ->check(CLI::IsMember({"cpu", "cuda", "auto"}))
      ->capture_default_str();
  app.add_option("--timeout", options.timeout_ms, "Deadline of every wait, milliseconds")
      ->check(CLI::Range(int64_t{1}, int64_t{86400000}))
      ->capture_default_str();
  app.add_option("--ranks-per-node", options.ranks_per_node, "CPU ranks: on declared nodes of so many ranks, over the network's loopback")
      ->check(CLI::Range(0, 1024))
      ->envname("TERN_RANKS_PER_NODE");
  app.add_flag("--verbose", options.verbose, "Name every case");
}

int run_check(const CheckOptions& options) {
  const auto start = std::chrono::steady_clock::now();
  Tally sum;
  const std::vector<ChosenDevice> devices = devices_to_check(options, sum);
  // Processes first: none may be forked once CUDA is in use here.
  for (const LaunchKind kind : {LaunchKind::kProcesses, LaunchKind::kThreads}) {
    for (const ChosenDevice& device : devices) sum.add(check_launch(options, device, kind));
  }
  fmt::print("checked in {:.1f} s\n{} passed, {} failed{}\n",
             std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(), sum.passed, sum.failed,
             sum.skipped > 0 ? fmt::format(", {} skipped", sum.skipped) : "");
  return sum.failed == 0 && sum.passed > 0 ? 0 : 2;
}

}  // namespace tern::tools
