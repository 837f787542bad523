// SPDX-License-Identifier: Apache-2.0
#include "conformance/runner.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <tern/tern.hpp>
#include <thread>

#include "conformance/processes.h"
#include "conformance/round_trip.h"

namespace tern::conformance {
namespace {

// Groups of one machine must not meet by accident.
std::string group_name() {
  static std::atomic<int> counter{0};
  return fmt::format("conformance-{}-{}", getpid(), counter++);
}

std::vector<std::string> run_rank(const Group& group, const tern_exchange_options& exchange_options, const RunOptions& options,
                                  const RankBody& body) {
  const int32_t rank = group.rank();
  try {
    const std::unique_ptr<RankDevice> device = make_rank_device(options, rank);
    const Exchange exchange(group, with(exchange_options, options, *device));
    return body(rank, exchange.get(), *device);
  } catch (const std::exception& error) {
    return {fmt::format("rank {}: {}", rank, error.what())};
  }
}

RunOptions on_nodes_of(const Case& c, const RunOptions& options) {
  RunOptions result = options;
  if (c.ranks_per_node > 0) result.ranks_per_node = c.ranks_per_node;
  return result;
}

// The scenarios that a graph is replayed with, or the one that is run plainly.
std::vector<Scenario> scenarios_of(Case c, const RunOptions& options) {
  constexpr int kMostScenarios = 8;
  const bool as_graph = options.num_replays > 0 && c.extent == TERN_EXTENT_WORST;
  return replay_scenarios(c, as_graph ? std::min(options.num_replays, kMostScenarios) : 1);
}

RankBody round_trip_body(const std::vector<Scenario>& scenarios, const RunOptions& options) {
  return [&](int32_t rank, tern_exchange* exchange, RankDevice& device) {
    RoundTrip trip(scenarios.front(), rank, exchange, device);
    if (options.num_replays > 0 && scenarios.front().c.extent == TERN_EXTENT_WORST)
      trip.run_graph(scenarios, options.num_replays);
    else
      trip.run();
    if (options.outputs != nullptr) (*options.outputs)[static_cast<size_t>(rank)] = trip.output_bytes();
    return trip.differences();
  };
}

// A report is lines of text, then, after an empty line, the outputs.
constexpr const char* kOutputsMark = "\n\noutputs\n";

}  // namespace

std::vector<std::string> run_threads(int32_t num_ranks, tern_exchange_options exchange_options, const RunOptions& options,
                                     const RankBody& body) {
  tern_group_options group_options;
  const std::string name = group_name();
  group_options.name = name.c_str();
  group_options.timeout_ms = options.timeout_ms;
  group_options.ranks_per_node = options.ranks_per_node;
  const std::vector<Group> groups = Group::local(num_ranks, group_options);
  std::vector<std::vector<std::string>> differences(groups.size());
  std::vector<std::thread> threads;
  for (size_t rank = 0; rank < groups.size(); ++rank)
    threads.emplace_back([&, rank] { differences[rank] = run_rank(groups[rank], exchange_options, options, body); });
  for (std::thread& thread : threads) thread.join();

  std::vector<std::string> result;
  for (const auto& of_rank : differences) result.insert(result.end(), of_rank.begin(), of_rank.end());
  return result;
}

std::vector<std::string> run_processes(int32_t num_ranks, tern_exchange_options exchange_options, const RunOptions& options,
                                       const RankBody& body) {
  const std::string name = group_name();
  std::vector<std::vector<uint8_t>> own_outputs(static_cast<size_t>(num_ranks));
  std::vector<std::vector<uint8_t>>& outputs = options.outputs != nullptr ? *options.outputs : own_outputs;
  RankProcesses ranks(num_ranks, 8 * options.timeout_ms, [&](RankSeat& seat) {
    tern_group_options group_options;
    group_options.name = name.c_str();
    group_options.timeout_ms = options.timeout_ms;
    group_options.ranks_per_node = options.ranks_per_node;
    const Group group = Group::from_allgather(seat.rank(), seat.num_ranks(), RankSeat::allgather, &seat, group_options);
    std::string report = join_lines(run_rank(group, exchange_options, options, body));
    const std::vector<uint8_t>& left = outputs[static_cast<size_t>(seat.rank())];
    if (!left.empty()) report.append(kOutputsMark).append(left.begin(), left.end());
    return report;
  });

  std::vector<std::string> result;
  const std::vector<RankReport> reports = ranks.join();
  for (size_t rank = 0; rank < reports.size(); ++rank) {
    const std::string& text = reports[rank].text;
    const size_t mark = text.find(kOutputsMark);
    const std::string lines = text.substr(0, mark);
    if (!reports[rank].finished)
      result.push_back(fmt::format("rank {}: the process ended or hung without a report: {}", rank, lines));
    else if (!lines.empty())
      result.push_back(lines);
    if (mark != std::string::npos)
      outputs[rank].assign(text.begin() + static_cast<int64_t>(mark + std::string(kOutputsMark).size()), text.end());
  }
  return result;
}

std::vector<std::string> run_as_threads(const Case& c, const RunOptions& options) {
  const std::vector<Scenario> scenarios = scenarios_of(c, options);
  if (options.outputs != nullptr) options.outputs->assign(static_cast<size_t>(c.num_ranks), {});
  return run_threads(c.num_ranks, scenarios.front().exchange_options(), on_nodes_of(c, options), round_trip_body(scenarios, options));
}

std::vector<std::string> run_as_processes(const Case& c, const RunOptions& options) {
  const std::vector<Scenario> scenarios = scenarios_of(c, options);
  if (options.outputs != nullptr) options.outputs->assign(static_cast<size_t>(c.num_ranks), {});
  return run_processes(c.num_ranks, scenarios.front().exchange_options(), on_nodes_of(c, options), round_trip_body(scenarios, options));
}

std::unique_ptr<RankDevice> make_rank_device(const RunOptions& options, int32_t rank) {
  return tools::make_rank_device(options.device, options.device == TERN_DEVICE_CPU ? 0 : rank % options.num_devices);
}

tern_exchange_options with(tern_exchange_options options, const RunOptions& run, const RankDevice& device) {
  options.device = device.type();
  options.device_index = device.index();
  options.timeout_ms = run.timeout_ms;
  return options;
}

std::string join_lines(const std::vector<std::string>& lines) {
  std::string result;
  for (const std::string& line : lines) result.append(result.empty() ? "" : "\n").append(line);
  return result;
}

}  // namespace tern::conformance
