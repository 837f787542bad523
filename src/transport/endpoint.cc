// SPDX-License-Identifier: Apache-2.0
#include "transport/endpoint.h"

#include <sched.h>

#include <algorithm>
#include <chrono>
#include <thread>
#include <utility>

#include "base/error.h"

namespace tern {

Region::Region(std::byte* address, size_t num_bytes, std::vector<Registration> registrations, int gpu)
    : address_(address), registrations_(std::move(registrations)), gpu_(gpu) {
  remote_.num_bytes = num_bytes;
  for (size_t i = 0; i < registrations_.size(); ++i) remote_.devices[i] = registrations_[i].access;
}

void Endpoint::put(Put put, Deadline deadline) {
  // A provider that cannot take more now does not always say when it can.
  constexpr int kRetryMs = 1;
  while (!try_put(put)) {
    if (deadline.passed())
      fail(TERN_TIMEOUT, "transport: could not put {} bytes to rank {} until the deadline (channel {}, epoch {}, {} messages under way)",
           put.num_bytes, put.peer, put.channel, put.epoch, num_outstanding());
    wait(Deadline::in_ms(std::min(kRetryMs, deadline.remaining_ms())));
  }
}

bool Endpoint::wait(Deadline deadline) {
  constexpr int kNumYields = 20;
  constexpr std::chrono::microseconds kFirstPause(10), kMostPause(500);
  std::chrono::microseconds pause = kFirstPause;
  for (int turn = 0; !progress(); ++turn) {
    if (deadline.passed()) return false;
    if (turn < kNumYields) {
      ::sched_yield();
      continue;
    }
    std::this_thread::sleep_for(std::min<std::chrono::nanoseconds>(pause, deadline.remaining()));
    pause = std::min(pause * 2, kMostPause);
  }
  return true;
}

}  // namespace tern
