// SPDX-License-Identifier: Apache-2.0
#include "paths/paths.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "base/error.h"
#include "base/names.h"
#include "paths/flows.h"
#include "topology/nodes.h"
#include "topology/topology.h"

namespace tern::tools {
namespace {

constexpr int64_t kPatienceMs = 10000;  // for ranks that start late, or come from a pair that has timed out
constexpr int kWarmingPings = 20;       // connections are made at the first
constexpr Load kPings{.least_epochs = kWarmingPings + 50, .most_epochs = kWarmingPings + 1000};
constexpr Load kStream{.num_writes = Flows::kMostWrites, .num_under_way = 2, .least_epochs = 4};

// What ranks tell each other, as bytes.
struct RankText {
  std::array<char, 512> devices{};  // as names between commas
};
struct PairPart {
  double one_way_us = 0, one_way_p99_us = 0;  // of the pair's first rank
  double sent_gbps = 0, sent_both_gbps = 0;
  std::array<char, 512> problem{};
};
struct AtOncePart {
  double sent_gbps = 0;
  std::array<char, 256> problem{};
};

template <size_t kBytes>
void copy_text(std::array<char, kBytes>& to, const std::string& text) {
  std::memcpy(to.data(), text.data(), std::min(text.size(), kBytes - 1));
}

template <typename Part>
std::vector<Part> gather(Bootstrap& bootstrap, const Part& mine, const PathOptions& options) {
  std::vector<Part> all(static_cast<size_t>(bootstrap.num_ranks()));
  bootstrap.allgather(&mine, all.data(), sizeof(Part), Deadline::in_ms(options.timeout_ms + kPatienceMs));
  return all;
}

double quantile(std::vector<double> values, double share) {
  if (values.empty()) return 0;
  const auto at = values.begin() + std::lround(share * static_cast<double>(values.size() - 1));
  std::nth_element(values.begin(), at, values.end());
  return *at;
}

Load lasting(Load load, const PathOptions& options) {
  load.duration_ms = options.duration_ms;
  return load;
}

// This rank's side of a pair: pings, a stream each way, both.
class PairTest {
 public:
  PairTest(Flows& flows, const PathOptions& options, int rank, const PathPair& pair)
      : flows_(flows),
        options_(options),
        deadline_(Deadline::in_ms(options.timeout_ms)),
        first_(rank == pair.a),
        peer_(rank == pair.a ? pair.b : pair.a) {}

  PairPart run() {
    PairPart part;
    Flow pings = flow(first_, !first_, lasting(kPings, options_));
    if (first_ && pings.round_trip_us.size() > kWarmingPings) {
      pings.round_trip_us.erase(pings.round_trip_us.begin(), pings.round_trip_us.begin() + kWarmingPings);
      part.one_way_us = quantile(pings.round_trip_us, 0.5) / 2;
      part.one_way_p99_us = quantile(pings.round_trip_us, 0.99) / 2;
    }
    const Load stream = lasting(kStream, options_);
    for (const bool there : {true, false}) {
      const bool sends = there == first_;
      const Flow one_way = flow(sends, !sends, stream);
      if (sends) part.sent_gbps = one_way.sent_gbps;
    }
    part.sent_both_gbps = flow(true, true, stream).sent_gbps;
    if (problem_.empty() && !flows_.received_unchanged(peer_))
      problem_ = fmt::format("what rank {} wrote into the memory of the other rank arrived changed, or not there", peer_);
    copy_text(part.problem, problem_);
    return part;
  }

 private:
  // Nothing once there is a problem.
  Flow flow(bool sends, bool receives, const Load& load) {
    std::vector<Flow> flows{{.peer = peer_, .sends = sends, .receives = receives}};
    if (problem_.empty()) flows_.run(flows, load, deadline_);
    if (problem_.empty()) problem_ = flows[0].problem;
    return flows[0];
  }

  Flows& flows_;
  const PathOptions& options_;
  Deadline deadline_;
  bool first_;
  int peer_;
  std::string problem_;
};

std::vector<PathPair> list_pairs(const Topology& topology, bool rails) {
  std::vector<PathPair> pairs;
  for (int a = 0; a < topology.num_ranks; ++a) {
    for (int b = a + 1; b < topology.num_ranks; ++b) {
      const auto i = static_cast<size_t>(a), j = static_cast<size_t>(b);
      if (topology.node[i] == topology.node[j] || (rails && topology.rank_in_node[i] != topology.rank_in_node[j])) continue;
      pairs.push_back({.a = a, .b = b});
    }
  }
  return pairs;
}

void test_in_turn(Bootstrap& bootstrap, Flows& flows, const PathOptions& options, std::vector<PathPair>& pairs) {
  for (size_t i = 0; i < pairs.size(); ++i) {
    PathPair& pair = pairs[i];
    options.progress(fmt::format("rank {} and rank {}", pair.a, pair.b), static_cast<int64_t>(i), static_cast<int64_t>(pairs.size()));
    PairPart mine;
    if (const int rank = bootstrap.rank(); rank == pair.a || rank == pair.b) mine = PairTest(flows, options, rank, pair).run();
    const std::vector<PairPart> all = gather(bootstrap, mine, options);
    const PairPart &a = all[static_cast<size_t>(pair.a)], &b = all[static_cast<size_t>(pair.b)];
    pair.problem = a.problem[0] != '\0' ? a.problem.data() : b.problem.data();
    if (!pair.problem.empty()) continue;
    pair.one_way_us = a.one_way_us;
    pair.one_way_p99_us = a.one_way_p99_us;
    pair.there_gbps = a.sent_gbps;
    pair.back_gbps = b.sent_gbps;
    pair.both_gbps = a.sent_both_gbps + b.sent_both_gbps;
  }
}

// Pairs that have failed are left out. With many peers of a rank epochs are smaller, so that all of them come to their end.
void test_at_once(Bootstrap& bootstrap, Flows& flows, const PathOptions& options, PathReport& report) {
  options.progress("all at once", static_cast<int64_t>(report.pairs.size()), static_cast<int64_t>(report.pairs.size()));
  const int rank = bootstrap.rank();
  std::vector<Flow> mine;
  std::vector<int> num_peers(static_cast<size_t>(bootstrap.num_ranks()));
  for (const PathPair& pair : report.pairs) {
    if (!pair.problem.empty()) continue;
    ++num_peers[static_cast<size_t>(pair.a)];
    ++num_peers[static_cast<size_t>(pair.b)];
    if (rank == pair.a || rank == pair.b) mine.push_back({.peer = rank == pair.a ? pair.b : pair.a, .sends = true, .receives = true});
  }
  const int most_peers = std::max(1, std::ranges::max(num_peers));
  Load load = lasting(kStream, options);
  load.num_writes = std::max(1, load.num_writes / most_peers);
  flows.run(mine, load, Deadline::in_ms(options.timeout_ms));
  std::vector<AtOncePart> to_peers(static_cast<size_t>(bootstrap.num_ranks()));
  for (const Flow& flow : mine) {
    AtOncePart& part = to_peers[static_cast<size_t>(flow.peer)];
    part.sent_gbps = flow.problem.empty() ? flow.sent_gbps : 0;
    copy_text(part.problem, flow.problem);
  }
  // One pair after the other: all parts of all ranks together may be large.
  for (PathPair& pair : report.pairs) {
    if (!pair.problem.empty()) continue;
    AtOncePart part;
    if (rank == pair.a || rank == pair.b) part = to_peers[static_cast<size_t>(rank == pair.a ? pair.b : pair.a)];
    const std::vector<AtOncePart> all = gather(bootstrap, part, options);
    const AtOncePart &a = all[static_cast<size_t>(pair.a)], &b = all[static_cast<size_t>(pair.b)];
    const std::string problem = a.problem[0] != '\0' ? a.problem.data() : b.problem.data();
    if (!problem.empty()) pair.problem = "while all pairs were under way: " + problem;
    pair.at_once_gbps = problem.empty() ? a.sent_gbps + b.sent_gbps : 0;
    report.at_once_gbps += pair.at_once_gbps;
  }
}

}  // namespace

PathReport test_paths(Bootstrap& bootstrap, const PathOptions& options) {
  const std::string node = declared_node(bootstrap.rank(), bootstrap.num_ranks(), options.ranks_per_node);
  const Deadline deadline = Deadline::in_ms(options.timeout_ms + kPatienceMs);
  const Topology topology = discover(bootstrap, node, deadline);
  if (topology.num_nodes < 2)
    fail(TERN_INVALID_ARGUMENT,
         "network: {} ranks are on one node, there are no paths between nodes; start ranks on several hosts, or declare nodes "
         "(--ranks-per-node)",
         topology.num_ranks);
  Flows flows(bootstrap, "", deadline);
  PathReport report{.provider = flows.facts().provider, .ranks = {}, .pairs = list_pairs(topology, options.rails)};
  RankText mine;
  copy_text(mine.devices, fmt::format("{}", fmt::join(flows.facts().domains, ",")));
  const std::vector<RankText> texts = gather(bootstrap, mine, options);
  for (size_t r = 0; r < texts.size(); ++r)
    report.ranks.push_back({topology.node[r], topology.ranks[r].host_name.data(), split_names(texts[r].devices.data())});
  test_in_turn(bootstrap, flows, options, report.pairs);
  test_at_once(bootstrap, flows, options, report);
  gather(bootstrap, RankText(), options);  // nobody closes its endpoint while another one is under way
  mark_slow(report.pairs);
  return report;
}

double median_of(const std::vector<PathPair>& pairs, double PathPair::* value) {
  std::vector<double> values;
  for (const PathPair& pair : pairs) {
    if (pair.problem.empty()) values.push_back(pair.*value);
  }
  return quantile(values, 0.5);
}

void mark_slow(std::vector<PathPair>& pairs) {
  constexpr double kFar = 2;
  if (std::ranges::count_if(pairs, [](const PathPair& pair) { return pair.problem.empty(); }) < 3) return;
  const auto mark = [&](const char* name, double PathPair::* value, bool less_is_better) {
    const double median = median_of(pairs, value);
    for (PathPair& pair : pairs) {
      const bool far = less_is_better ? pair.*value > median * kFar : pair.*value * kFar < median;
      if (pair.problem.empty() && far) pair.slow.emplace_back(name);
    }
  };
  mark("latency", &PathPair::one_way_us, true);
  mark("there", &PathPair::there_gbps, false);
  mark("back", &PathPair::back_gbps, false);
  mark("both", &PathPair::both_gbps, false);
  mark("at once", &PathPair::at_once_gbps, false);
}

}  // namespace tern::tools
