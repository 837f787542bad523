// SPDX-License-Identifier: Apache-2.0
#include "tools/meter.h"

#include <algorithm>
#include <chrono>
#include <cmath>

namespace tern::tools {
namespace {

constexpr int64_t kMostWarmUps = 5;

int64_t now_ns() { return std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count(); }

}  // namespace

double Times::quantile_us(double share) const {
  if (us.empty()) return 0;
  std::vector<double> sorted = us;
  std::ranges::sort(sorted);
  const auto position = static_cast<size_t>(std::ceil(share * static_cast<double>(sorted.size())));
  return sorted[std::max<size_t>(position, 1) - 1];
}

std::vector<double> slowest_of_ranks(const RankContext& context, std::span<const double> mine) {
  std::vector<double> all(mine.size() * static_cast<size_t>(context.num_ranks));
  context.board.allgather(context.rank, std::as_bytes(mine), reinterpret_cast<std::byte*>(all.data()),
                          context.timeout_ms + RankContext::kPatienceMs);
  std::vector<double> slowest(mine.begin(), mine.end());
  for (size_t i = 0; i < all.size(); ++i) slowest[i % mine.size()] = std::max(slowest[i % mine.size()], all[i]);
  return slowest;
}

Times Meter::collect(const std::function<void()>& run, Span span) const {
  const auto num_iters = static_cast<size_t>(num_iters_);
  const auto num_ranks = static_cast<size_t>(context_.num_ranks);
  std::vector<Stamp> mine(num_iters), all(num_iters * num_ranks);  // all: [num_ranks, num_iters]
  for (int64_t i = 0; i < std::min(num_iters_, kMostWarmUps); ++i) run();
  for (Stamp& stamp : mine) {
    context_.align();
    const int64_t start_ns = now_ns();
    run();
    stamp = {start_ns, now_ns()};
  }
  context_.board.allgather(context_.rank, std::as_bytes(std::span(mine)), reinterpret_cast<std::byte*>(all.data()),
                           context_.timeout_ms + RankContext::kPatienceMs);
  Times times;
  for (size_t i = 0; i < num_iters; ++i) {
    int64_t slowest_ns = 0, first_ns = INT64_MAX, last_ns = 0;
    for (size_t rank = 0; rank < num_ranks; ++rank) {
      const Stamp& stamp = all[rank * num_iters + i];
      slowest_ns = std::max(slowest_ns, stamp.end_ns - stamp.start_ns);
      first_ns = std::min(first_ns, stamp.start_ns);
      last_ns = std::max(last_ns, stamp.end_ns);
    }
    times.us.push_back(static_cast<double>(span == Span::kSlowestRank ? slowest_ns : last_ns - first_ns) * 1e-3);
  }
  return times;
}

}  // namespace tern::tools
