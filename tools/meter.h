// SPDX-License-Identifier: Apache-2.0
// Times an operation that all ranks run together. Before each run the ranks line up, so that nobody's time holds the
// lateness of another's previous run.
//
//   Meter meter(context, num_iters);                 // on every rank, same arguments
//   const Times times = meter.measure([&] { plan.dispatch(args); });
//   fmt::print("{} us\n", times.median_us());
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "tools/launch.h"

namespace tern::tools {

// One number per run, that of the whole group.
struct Times {
  std::vector<double> us;

  double median_us() const { return quantile_us(0.5); }
  double p99_us() const { return quantile_us(0.99); }
  // The least time that at least this share of the runs did not exceed.
  double quantile_us(double share) const;
};

// Of each run, the time of the slowest rank; all ranks give equally many. Waits like a barrier.
std::vector<double> slowest_of_ranks(const RankContext& context, std::span<const double> mine);

class Meter {
 public:
  Meter(const RankContext& context, int64_t num_iters) : context_(context), num_iters_(num_iters) {}

  // For operations that return when the rank's part is complete: a run's time is that of its slowest rank, from its own
  // start to its own end. Warms up first.
  Times measure(const std::function<void()>& run) const { return collect(run, Span::kSlowestRank); }

  // For work that a rank does without waiting for the others: from the first start to the last end. On one host, which has one clock.
  Times measure_joint(const std::function<void()>& run) const { return collect(run, Span::kFirstToLast); }

 private:
  enum class Span { kSlowestRank, kFirstToLast };
  struct Stamp {
    int64_t start_ns, end_ns;
  };

  Times collect(const std::function<void()>& run, Span span) const;

  const RankContext& context_;
  int64_t num_iters_;
};

}  // namespace tern::tools
