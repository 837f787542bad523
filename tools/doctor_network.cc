// SPDX-License-Identifier: Apache-2.0
#include "tools/doctor_network.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "base/knobs.h"
#include "paths/paths.h"
#include "tools/board_bootstrap.h"
#include "tools/launch.h"
#include "tools/progress.h"
#include "topology/bootstrap.h"

namespace tern::tools {
namespace {

void print_path(const PathReport& report, const PathPair& pair) {
  // Several are named with their rank.
  const auto device = [&](int rank) {
    const std::vector<std::string>& devices = report.ranks[static_cast<size_t>(rank)].devices;
    return devices.size() == 1 ? devices[0] : fmt::format("{} devices", devices.size());
  };
  const std::string over = device(pair.a) == device(pair.b) ? device(pair.a) : device(pair.a) + ", " + device(pair.b);
  const std::string name = fmt::format("{:<11} {:<20}", fmt::format("{} - {}", pair.a, pair.b), report.provider + " " + over);
  if (!pair.problem.empty()) {
    fmt::print("  {}  FAILED: {}\n", name, pair.problem);
    return;
  }
  fmt::print("  {} {:>9.1f} {:>9.1f} {:>8.2f} {:>8.2f} {:>8.2f} {:>8.2f}{}\n", name, pair.one_way_us, pair.one_way_p99_us, pair.there_gbps,
             pair.back_gbps, pair.both_gbps, pair.at_once_gbps,
             pair.slow.empty() ? "" : fmt::format("  SLOW: {}", fmt::join(pair.slow, ", ")));
}

PathPair median_pair(const std::vector<PathPair>& pairs) {
  PathPair result;
  for (const auto value : {&PathPair::one_way_us, &PathPair::one_way_p99_us, &PathPair::there_gbps, &PathPair::back_gbps,
                           &PathPair::both_gbps, &PathPair::at_once_gbps})
    result.*value = median_of(pairs, value);
  return result;
}

void print_paths(const PathReport& report) {
  fmt::print("Ranks\n");
  for (size_t r = 0; r < report.ranks.size(); ++r) {
    const PathRank& rank = report.ranks[r];
    fmt::print("  {:<6}node {}, host {}, {} on {}\n", r, rank.node, rank.host, report.provider, fmt::join(rank.devices, ", "));
  }
  const size_t num_devices = report.ranks[0].devices.size();  // on every rank
  fmt::print(
      "\nPaths between nodes over {} device{} of each rank, one pair at a time: one way in microseconds, bandwidth in GB/s; \"at once\" "
      "while all pairs are busy\n",
      num_devices, num_devices == 1 ? "" : "s");
  fmt::print("  {:<11} {:<20} {:>9} {:>9} {:>8} {:>8} {:>8} {:>8}\n", "ranks", "over", "median us", "p99 us", "there", "back", "both",
             "at once");
  for (const PathPair& pair : report.pairs) print_path(report, pair);
  const auto num_failed = std::ranges::count_if(report.pairs, [](const PathPair& pair) { return !pair.problem.empty(); });
  const auto num_slow = std::ranges::count_if(report.pairs, [](const PathPair& pair) { return !pair.slow.empty(); });
  const PathPair median = median_pair(report.pairs);
  fmt::print("  {:<32} {:>9.1f} {:>9.1f} {:>8.2f} {:>8.2f} {:>8.2f} {:>8.2f}\n", "median", median.one_way_us, median.one_way_p99_us,
             median.there_gbps, median.back_gbps, median.both_gbps, median.at_once_gbps);
  fmt::print("All at once: {:.2f} GB/s in all\n", report.at_once_gbps);
  fmt::print("{} pairs: {} failed, {} slow (latency over twice the median, or bandwidth under half of it)\n", report.pairs.size(),
             num_failed, num_slow);
}

using Json = nlohmann::ordered_json;

Json path_json(const PathPair& pair) {
  return {{"one_way_us", pair.one_way_us}, {"one_way_p99_us", pair.one_way_p99_us}, {"there_gbps", pair.there_gbps},
          {"back_gbps", pair.back_gbps},   {"both_gbps", pair.both_gbps},           {"at_once_gbps", pair.at_once_gbps}};
}

Json paths_json(const PathReport& report) {
  Json ranks = Json::array(), pairs = Json::array();
  for (const PathRank& rank : report.ranks) ranks.push_back({{"node", rank.node}, {"host", rank.host}, {"devices", rank.devices}});
  for (const PathPair& pair : report.pairs) {
    Json one{{"a", pair.a}, {"b", pair.b}, {"problem", pair.problem}, {"slow", pair.slow}};
    if (pair.problem.empty()) one.update(path_json(pair));
    pairs.push_back(one);
  }
  return {{"provider", report.provider},
          {"ranks", ranks},
          {"pairs", pairs},
          {"median", path_json(median_pair(report.pairs))},
          {"all_at_once_gbps", report.at_once_gbps}};
}

int examine_paths(Bootstrap& bootstrap, const DoctorOptions& options, int64_t ranks_per_node) {
  Progress line(bootstrap.rank() == 0);
  PathOptions path_options{.ranks_per_node = ranks_per_node, .rails = options.rails, .timeout_ms = options.timeout_ms};
  path_options.progress = [&](const std::string& what, int64_t done, int64_t total) { line.show(what, done, total); };
  const PathReport report = test_paths(bootstrap, path_options);
  line.clear();
  if (bootstrap.rank() == 0) {
    if (options.json != "-") print_paths(report);
    if (!options.json.empty()) write_findings(options.json, paths_json(report).dump(2));
  }
  return std::ranges::all_of(report.pairs, [](const PathPair& pair) { return pair.problem.empty(); }) ? 0 : 2;
}

}  // namespace

void write_findings(const std::string& file, const std::string& text) {
  if (file == "-") return fmt::print("{}\n", text);
  std::ofstream stream(file);
  stream << text << '\n';
  stream.close();
  if (!stream) fail_errno("write", fmt::format("findings cannot be written to {}", file));
}

int run_network_doctor(const DoctorOptions& options) {
  const int64_t ranks_per_node = options.ranks_per_node > 0 ? options.ranks_per_node : knobs().ranks_per_node;
  const auto launcher = find_launcher();
  if (launcher && launcher->num_ranks > 1) {
    if (options.num_ranks != 0 && options.num_ranks != launcher->num_ranks)
      fail(TERN_INVALID_ARGUMENT, "{} ranks are asked for, {} started {}: leave --ranks out", options.num_ranks, launcher->name,
           launcher->num_ranks);
    const auto bootstrap = make_env_bootstrap("tern doctor", Log(), Deadline::in_ms(knobs().timeout_ms));
    return examine_paths(*bootstrap, options, ranks_per_node);
  }
  // All of them are on this host, so nodes are declared in any case.
  const LaunchOptions launch_options{.num_ranks = options.num_ranks != 0 ? options.num_ranks : 2, .timeout_ms = knobs().timeout_ms};
  return launch(launch_options, [&](RankContext& context) {
    BoardBootstrap bootstrap(context);
    return examine_paths(bootstrap, options, std::max<int64_t>(ranks_per_node, 1));
  });
}

}  // namespace tern::tools
