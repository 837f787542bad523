// SPDX-License-Identifier: Apache-2.0
// `tern bench`: measures the operations, beside a plain copy of the same bytes, and checks every byte in the same run.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "tools/batch.h"
#include "tools/bench_options.h"
#include "tools/meter.h"

namespace tern::tools {

// Bytes of the rows of one operation, on the rank that has most: one row per (token, rank), as they cross the link.
struct TrafficBytes {
  int64_t logical = 0;  // the rank's own share included
  int64_t wire = 0;     // from or to other ranks only
};

struct BenchRecord {
  std::string op;       // plan, dispatch, combine, round_trip, route_dispatch, round_trip_worst
  std::string buffers;  // window, caller; "" where no rows move
  std::string extent;   // exact, worst
  std::string mode;     // throughput or latency: the path that was taken
  Times times;
  TrafficBytes bytes;
  double ceiling_us = 0;  // of a plain copy of the logical bytes; 0: nothing to copy
  std::string wrong;      // "": every byte was right on all ranks

  double gbps(int64_t num_bytes) const;
  double ceiling_gbps() const;
  double share_of_ceiling() const;
};

// What was measured, for the report.
struct BenchSetting {
  const BenchOptions& options;
  const Traffic& traffic;
  BatchShape shape;
  LaunchOptions launch;
};

int run_bench(const BenchOptions& options);

// On one rank: all measurements. Returns the records, equal on all ranks.
std::vector<BenchRecord> measure_all(const BenchSetting& setting, RankContext& context);
size_t bench_board_bytes(const BenchSetting& setting);

// By rank 0: the table, and the file if one is asked for.
void print_report(const BenchSetting& setting, const std::vector<BenchRecord>& records);
void write_json(const BenchSetting& setting, const std::vector<BenchRecord>& records);

}  // namespace tern::tools
