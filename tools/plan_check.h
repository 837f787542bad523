// SPDX-License-Identifier: Apache-2.0
// Forecasts beside what `tern bench --json` has measured.
//
//   for (const CheckedLine& line : check_forecasts("bench.json", {})) fmt::print("{} {:.2f}\n", line.op, line.us.ratio());
//
// Rates of the links are those that the same run has measured, the number of SMs and cores that of its machine, unless overridden. Nodes of
// CPU ranks that were started as processes or threads share one machine's cores.
#pragma once

#include <string>
#include <vector>

#include "forecast/costs.h"

namespace tern::tools {

struct Compared {
  double predicted = 0;
  double measured = 0;

  double ratio() const { return measured > 0 ? predicted / measured : 0; }  // 0: nothing measured
};

struct CheckedLine {
  std::string batch;  // "4 ranks on 2 nodes, 8 tokens, bf16, rank_major, uniform"
  std::string op, buffers, extent;
  int num_sms = 0;  // 0: CPU
  Compared us, wire_mb, link_mb, network_mb;
};

struct ForecastCheck {
  std::vector<CheckedLine> lines;
  // Whose routing came from a file, which the result does not hold; whose bytes were wrong; or of what there is no forecast: phases, combines of
  // rows of entries, and other forms of rows on their way.
  int num_skipped = 0;
};

// Throws TERN_SYSTEM_ERROR if the file cannot be read, TERN_INVALID_ARGUMENT if it is no such result.
ForecastCheck check_forecasts(const std::string& path, const CostOverrides& overrides);

}  // namespace tern::tools
