// SPDX-License-Identifier: Apache-2.0
#include "domain/doorbell.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <ctime>

namespace tern {

void ring(layout::Doorbell& bell) {
  std::atomic_ref<uint32_t>(bell.rings).fetch_add(1, std::memory_order_seq_cst);
  if (std::atomic_ref<uint32_t>(bell.sleepers).load(std::memory_order_seq_cst) == 0) return;
  ::syscall(SYS_futex, &bell.rings, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

uint32_t listen(layout::Doorbell& bell) {
  std::atomic_ref<uint32_t>(bell.sleepers).fetch_add(1, std::memory_order_seq_cst);
  return std::atomic_ref<uint32_t>(bell.rings).load(std::memory_order_seq_cst);
}

void stop_listening(layout::Doorbell& bell) { std::atomic_ref<uint32_t>(bell.sleepers).fetch_sub(1, std::memory_order_relaxed); }

void sleep(layout::Doorbell& bell, uint32_t heard, std::chrono::nanoseconds longest) {
  const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(longest);
  const timespec timeout{static_cast<time_t>(seconds.count()), static_cast<long>((longest - seconds).count())};
  // Returns at once if the word has changed; any other return is one of the early ones that callers allow for.
  ::syscall(SYS_futex, &bell.rings, FUTEX_WAIT, heard, &timeout, nullptr, 0);
  stop_listening(bell);
}

}  // namespace tern
