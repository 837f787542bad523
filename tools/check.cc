// SPDX-License-Identifier: Apache-2.0
#include "tools/check.h"

#include <fmt/format.h>

#include <chrono>
#include <map>
#include <string>
#include <vector>

#include "conformance/runner.h"
#include "conformance/sweep.h"
#include "tools/bench_options.h"
#include "tools/probe.h"
#include "tools/progress.h"
#include "tools/row_format.h"

namespace tern::tools {
namespace {

struct Launch {
  const char* name;
  std::vector<std::string> (*run)(const conformance::Case&, const conformance::RunOptions&);
};

constexpr Launch kLaunches[] = {{"processes", conformance::run_as_processes}, {"threads", conformance::run_as_threads}};

struct Tally {
  int passed = 0, failed = 0;
};

std::string group_of(const conformance::Case& c) {
  const char* content = c.casts() ? "cast to fp8 on the way" : "as given";
  return fmt::format("{}, {}", layout_name(c.layout), content);
}

// The cases of one device and one way to start ranks, group by group.
Tally check_launch(const CheckOptions& options, tern_device_type device, const Launch& launch) {
  std::map<std::string, std::vector<conformance::Case>> groups;
  int64_t total = 0, done = 0;
  for (const conformance::Case& c : conformance::check_cases()) {
    groups[group_of(c)].push_back(c);
    ++total;
  }
  Tally sum;
  Progress progress(true);
  for (const auto& [group, cases] : groups) {
    Tally tally;
    for (const conformance::Case& c : cases) {
      progress.show(fmt::format("{}, {}", launch.name, group), done++, total);
      const auto differences = launch.run(c, {.device = device, .timeout_ms = options.timeout_ms});
      ++(differences.empty() ? tally.passed : tally.failed);
      if (differences.empty() && !options.verbose) continue;
      progress.clear();
      fmt::print("{}  {}, {}\n{}", differences.empty() ? "ok  " : "FAIL", launch.name, c.name(),
                 differences.empty() ? "" : conformance::join_lines(differences) + "\n");
    }
    progress.clear();
    fmt::print("{}  {}: ranks as {}, {}: {} of {} cases\n", tally.failed == 0 ? "ok  " : "FAIL",
               device == TERN_DEVICE_CUDA ? "cuda" : "cpu", launch.name, group, tally.passed, cases.size());
    std::fflush(stdout);
    sum.passed += tally.passed;
    sum.failed += tally.failed;
  }
  return sum;
}

}  // namespace

void add_check_flags(CLI::App& app, CheckOptions& options) {
  app.add_option("--device", options.device, "cpu, cuda, or auto: all engines that this machine and build have")
      ->check(CLI::IsMember({"cpu", "cuda", "auto"}))
      ->capture_default_str();
  app.add_option("--timeout", options.timeout_ms, "Deadline of every wait, milliseconds")
      ->check(CLI::Range(int64_t{1}, int64_t{86400000}))
      ->capture_default_str();
  app.add_flag("--verbose", options.verbose, "Name every case");
}

int run_check(const CheckOptions& options) {
  const auto start = std::chrono::steady_clock::now();
  Tally sum;
  for (const tern_device_type device : {TERN_DEVICE_CPU, TERN_DEVICE_CUDA}) {
    if (options.device != "auto" && parse_device(options.device) != device) continue;
    const Probe probe = probe_engine(device);
    if (!probe.works) {
      const bool demanded = options.device != "auto" || device == TERN_DEVICE_CPU;
      fmt::print("{}  {}: {}\n", demanded ? "FAIL" : "none", probe.name, probe.reason);
      sum.failed += demanded;
      continue;
    }
    for (const Launch& launch : kLaunches) {
      const Tally tally = check_launch(options, device, launch);
      sum.passed += tally.passed;
      sum.failed += tally.failed;
    }
  }
  fmt::print("checked in {:.1f} s\n{} passed, {} failed\n", std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(),
             sum.passed, sum.failed);
  return sum.failed == 0 && sum.passed > 0 ? 0 : 2;
}

}  // namespace tern::tools
