// SPDX-License-Identifier: Apache-2.0
// What the paths between ranks of different nodes can do: latency and bandwidth of every pair, over the provider, devices and traffic
// class that the library itself would take.
//
//   const PathReport report = test_paths(*bootstrap, {.ranks_per_node = 2});  // collective; the same on every rank
//   for (const PathPair& pair : report.pairs) ...
//
// Pairs are tested in turn, while the other ranks sleep, and then all at once.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "topology/bootstrap.h"

namespace tern::tools {

struct PathOptions {
  int64_t ranks_per_node = 0;  // declares nodes; 0: a host is a node
  bool rails = false;          // only pairs of ranks at the same place in their nodes, which are those that tokens take
  int64_t timeout_ms = 10000;  // of each pair
  int64_t duration_ms = 100;   // of each stream, and the most that pings take
  std::function<void(const std::string& what, int64_t done, int64_t total)> progress = [](const std::string&, int64_t, int64_t) {};
};

struct PathRank {
  int node = 0;
  std::string host;
  std::vector<std::string> devices;  // of the network
};

// Ranks a < b. Numbers are 0 where there is a problem.
struct PathPair {
  int a = 0, b = 0;
  double one_way_us = 0, one_way_p99_us = 0;  // half of a ping-pong: a word into the other's memory, one back
  double there_gbps = 0, back_gbps = 0;       // a stream of large writes from a to b; from b to a
  double both_gbps = 0;                       // both streams at a time, together
  double at_once_gbps = 0;                    // the same, while all other pairs do so too
  std::string problem{};                      // "rank 0: ..."
  std::vector<std::string> slow{};  // what is far worse than the median of all pairs: "latency", "there", "back", "both", "at once"
};

struct PathReport {
  std::string provider;
  std::vector<PathRank> ranks;
  std::vector<PathPair> pairs;
  double at_once_gbps = 0;  // of all pairs together
};

// TERN_INVALID_ARGUMENT if there are no two nodes; TERN_UNSUPPORTED with the rank that has no provider. What is wrong with a pair is in
// the report.
PathReport test_paths(Bootstrap& bootstrap, const PathOptions& options);

// Of the pairs without a problem.
double median_of(const std::vector<PathPair>& pairs, double PathPair::* value);

// Fills `slow`: a latency of more than twice the median, a bandwidth of less than half. Of less than three pairs none is.
void mark_slow(std::vector<PathPair>& pairs);

}  // namespace tern::tools
