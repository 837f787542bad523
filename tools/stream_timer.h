// SPDX-License-Identifier: Apache-2.0
// Times work on a GPU's stream: many runs are put there one after the other, each between two events, and nobody waits in between.
//
//   const std::unique_ptr<StreamTimer> timer = make_stream_timer(device, {.num_runs = 100});
//   const std::vector<double> us = timer->time_us([&] { plan.dispatch(args, {.stream = device.stream()}); });
//   const auto us_of_parts = timer->time_parts_us({send, receive}, 50);
//
// Lifetime: the device outlives the timer. Threads: one.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "devices/rank_device.h"

namespace tern::tools {

struct StreamTimerOptions {
  int64_t num_runs = 100;
  bool cold = false;  // before each run, out of its time, the L2 cache is filled with something else
};

class StreamTimer {
 public:
  using PutWork = std::function<void()>;  // puts work on the device's stream

  virtual ~StreamTimer() = default;

  // Calls put_run(), which puts one run on the device's stream, once for each run and a few times before, which are not counted: in these,
  // ranks that wait for each other come into step. Returns when all is done.
  std::vector<double> time_us(const PutWork& put_run) { return time_parts_us({put_run}, 0).front(); }

  // Runs of several parts, one behind the other; of each part the times in all runs. Before each one the stream does nothing for `pause_us`, which
  // does not count: what a part sends has then arrived when the next one begins, and the host is ahead of the GPU.
  virtual std::vector<std::vector<double>> time_parts_us(const std::vector<PutWork>& parts, double pause_us) = 0;
};

// TERN_UNSUPPORTED unless the device is a GPU.
std::unique_ptr<StreamTimer> make_stream_timer(RankDevice& device, const StreamTimerOptions& options);

}  // namespace tern::tools
