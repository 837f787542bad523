// SPDX-License-Identifier: Apache-2.0
#include "plan/batch_path.h"

#include <algorithm>

namespace tern {
namespace {

// Of 4 H200, hidden 7168, fp8 and bf16, 32 to 1024 tokens, 8, 24 and all SMs, rank_major: medians of `tern bench --table=paths`, fitted by the mean
// of |log(forecast / measured)|. docs/performance.md says how often the faster path is found. With 2 and 3 GPUs they fit as well.
struct LatencyCosts {
  double start_us;  // launch, trips, and what is done once
  double row_us;    // a block's time of a row, whatever its length
};
struct ThroughputCosts {
  double start_us;
  double sm_gbps;
};
constexpr LatencyCosts kLatencyDispatch{12, 1.25}, kLatencyCombine{9.5, 1.55};
constexpr ThroughputCosts kThroughputDispatch{23, 50}, kThroughputCombine{25, 33};
constexpr double kRouteUs = 21;
// Where rows are pushed some of the link's time hides behind that of blocks.
constexpr double kPushGbps = 400, kPullGbps = 330;

double us_of(double bytes, double gbps) { return bytes * 1e-3 / gbps; }

double num_rows(const BatchFacts& f) { return static_cast<double>(f.num_tokens) * f.messages_per_token; }
double all_bytes(const BatchFacts& f) { return num_rows(f) * static_cast<double>(f.row_bytes); }
double link_bytes(const BatchFacts& f) { return all_bytes(f) * (f.num_ranks - 1) / f.num_ranks; }

int throughput_sms(const BatchFacts& f) { return f.are_sms_asked ? f.num_sms : sms_for_bytes(f.num_sms, f.num_tokens * f.row_bytes); }

}  // namespace

int sms_for_bytes(int most, int64_t bytes) {
  constexpr int kLeastSms = 4;
  return std::min(most, static_cast<int>(std::clamp<int64_t>(bytes / kBytesPerSm, kLeastSms, kSaturatingSms)));
}

double latency_us(const BatchFacts& f) {
  const LatencyCosts& costs = f.operation == TERN_OP_COMBINE ? kLatencyCombine : kLatencyDispatch;
  const double rows_of_block = std::max(1.0, num_rows(f) / f.num_sms);
  return costs.start_us + rows_of_block * costs.row_us + us_of(link_bytes(f), kPushGbps);
}

double throughput_us(const BatchFacts& f) {
  const ThroughputCosts& costs = f.operation == TERN_OP_COMBINE ? kThroughputCombine : kThroughputDispatch;
  const double rows_us = std::max(us_of(link_bytes(f), kPullGbps), us_of(all_bytes(f), throughput_sms(f) * costs.sm_gbps));
  return costs.start_us + (f.routes ? kRouteUs : 0) + rows_us;
}

}  // namespace tern
