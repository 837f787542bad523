// SPDX-License-Identifier: Apache-2.0
// `tern bench`: measures the operations, beside a plain copy of the same bytes, and checks every byte in the same run.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "tools/batch.h"
#include "tools/bench_options.h"
#include "tools/choose_device.h"
#include "tools/link_ceiling.h"
#include "tools/meter.h"

namespace tern::tools {

// Bytes of the rows of one operation, into or out of the rank that has most: one row per (token, rank), as they cross the link.
struct TrafficBytes {
  int64_t logical = 0;  // the rank's own share included
  int64_t wire = 0;     // from or to other ranks only
  int64_t link = 0;     // within a node: from or to its other ranks, tokens of other nodes too, which the rails there send on
  int64_t network = 0;  // put to other nodes, as counted in a run: with the metadata
};

struct BenchRecord {
  std::string op;       // plan, dispatch, combine, round_trip, plan_dispatch, route_dispatch, round_trip_worst,
                        // dispatch_send, dispatch_receive, combine_send, combine_receive
  std::string buffers;  // window, caller; "" where no rows move
  std::string extent;   // exact, worst
  std::string mode;     // throughput or latency: the path that was taken
  std::string clock;    // host; on GPUs also stream (between events) or graph (a captured run between events)
  int num_sms = 0;      // that the operation took; 0: CPU
  int num_chained = 1;  // operations that were timed together; times are of one
  int ranks_per_node = 0;
  Times times;
  TrafficBytes bytes;
  double ceiling_us = 0;            // CPU: of a plain copy of the logical bytes; 0: nothing to copy
  double network_ceiling_gbps = 0;  // several nodes: of a plain stream of this run, sent by the slowest rank
  LinkRates links;                  // GPU: of plain copies with as many SMs
  std::string wrong;                // "": every byte was right on all ranks

  double gbps(int64_t num_bytes) const;
  double ceiling_gbps() const;
  double share_of_ceiling() const;
};

// What is measured. The routing of `shape` is that of `traffic`.
struct BenchSetting {
  const BenchOptions& options;
  const Traffic& traffic;
  BatchShape shape;
  LaunchOptions launch;
  ChosenDevice device;
};

// One rank, for all that it measures.
struct BenchSeat {
  RankContext& context;
  RankDevice& device;
  LinkCeiling* links = nullptr;  // GPU
};

int run_bench(const BenchOptions& options);

// `tern bench --table=KIND`: many settings, line by line, as Markdown.
int run_bench_table(const BenchOptions& options, const ChosenDevice& device);

// The batch that the options describe, routed as `traffic` says.
BatchShape batch_shape(const BenchOptions& options, const Traffic& traffic);

// On one rank: all measurements. Returns the records, equal on all ranks.
std::vector<BenchRecord> measure_all(const BenchSetting& setting, const BenchSeat& seat);
size_t bench_board_bytes(const BenchSetting& setting);

// The links with these and the usual numbers of SMs, copy engines first. Collective.
std::vector<LinkRates> measure_links(LinkCeiling& ceiling, const std::vector<int>& num_sms);

// By rank 0: what was measured, for people.
void print_report(const BenchSetting& setting, const std::vector<BenchRecord>& records, const std::vector<LinkRates>& links);
void print_links(const std::vector<LinkRates>& links);
void print_table_head();
void print_table_rows(const BenchSetting& setting, const std::vector<BenchRecord>& records, const std::vector<LinkRates>& links);

}  // namespace tern::tools
