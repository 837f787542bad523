// SPDX-License-Identifier: Apache-2.0
#include "bench/meter.h"

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <climits>
#include <cmath>
#include <cstring>
#include <ctime>
#include <numeric>
#include <random>

#include "base/deadline.h"
#include "base/error.h"

namespace tern::bench {
namespace {

constexpr int64_t kTimeoutMs = 60'000;

// One clock for all processes of the machine.
int64_t now_ns() { return std::chrono::steady_clock::now().time_since_epoch().count(); }

struct Barrier {
  std::atomic<uint32_t> arrived;
  std::atomic<uint32_t> passes;

  // `on_last` runs on the last rank before the others go on; `wait(pass)` may return early.
  template <typename OnLast, typename Wait>
  void await(int num_ranks, OnLast on_last, Wait wait) {
    const uint32_t pass = passes.load(std::memory_order_acquire);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == static_cast<uint32_t>(num_ranks)) {
      arrived.store(0, std::memory_order_relaxed);
      on_last();
      passes.fetch_add(1, std::memory_order_release);
      ::syscall(SYS_futex, &passes, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
      return;
    }
    const Deadline deadline = Deadline::in_ms(kTimeoutMs);
    while (passes.load(std::memory_order_acquire) == pass) {
      if (deadline.passed()) fail(TERN_TIMEOUT, "a rank did not come to the barrier within {} s", kTimeoutMs / 1000);
      wait(pass);
    }
  }
};

double quantile(const std::vector<double>& sorted, double share) {
  const auto nearest = static_cast<size_t>(std::ceil(share * static_cast<double>(sorted.size())));
  return sorted[std::max<size_t>(nearest, 1) - 1];
}

}  // namespace

struct Meter::Board {
  alignas(64) Barrier meeting;
  alignas(64) Barrier start;
  alignas(64) int64_t started_ns;
};

Meter::Meter(const Processes& processes) : processes_(processes), memory_(processes.share_memory(sizeof(Board))) {}

// Shared memory begins as zeros, which is how a board begins.
Meter::Board& Meter::board() const { return *reinterpret_cast<Board*>(memory_->data()); }

void Meter::meet() const {
  Barrier& barrier = board().meeting;
  const auto sleep = [&](uint32_t pass) {
    const timespec longest{0, 100'000'000};
    ::syscall(SYS_futex, &barrier.passes, FUTEX_WAIT, pass, &longest, nullptr, 0);
  };
  barrier.await(processes_.num_ranks(), [] {}, sleep);
}

int64_t Meter::start_together() const {
  const auto stamp = [&] { board().started_ns = now_ns(); };
  board().start.await(processes_.num_ranks(), stamp, [](uint32_t) { ::sched_yield(); });
  return board().started_ns;
}

double Meter::take_sample(const Contender& contender, int num_chained) const {
  meet();
  const int64_t start_ns = start_together();
  for (int i = 0; i < num_chained; ++i) contender.run();
  return static_cast<double>(now_ns() - start_ns) / 1e3 / num_chained;
}

bool Meter::verify(const Workload& workload, const Contender& contender) const {
  std::memset(contender.output.data(), 0xff, contender.output.size());
  meet();
  contender.run();
  meet();
  return processes_.all_true(workload.check(contender.result, contender.output));
}

std::vector<Measurement> Meter::measure(const Contenders& contenders, const Repetition& repetition) const {
  std::vector<std::vector<double>> samples(contenders.size());
  std::vector<size_t> order(contenders.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::mt19937 random(1);  // the same on every rank
  for (int i = -repetition.num_warm_ups; i < repetition.num_samples; ++i) {
    std::shuffle(order.begin(), order.end(), random);
    for (const size_t contender_idx : order) {
      const double sample_us = take_sample(contenders[contender_idx], repetition.num_chained);
      if (i >= 0) samples[contender_idx].push_back(sample_us);
    }
  }
  std::vector<Measurement> result;
  for (const auto& own : samples) {
    std::vector<double> slowest = processes_.largest(own);
    std::sort(slowest.begin(), slowest.end());
    result.push_back({quantile(slowest, 0.5), quantile(slowest, 0.99)});
  }
  return result;
}

}  // namespace tern::bench
