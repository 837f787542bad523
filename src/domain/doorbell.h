// SPDX-License-Identifier: Apache-2.0
// Sleeping without losing a wake-up, across processes: a futex word that peers count up after they have written flags.
//
//   waiter: uint32_t heard = listen(bell); if (ready()) stop_listening(bell); else sleep_until(bell, heard, at most this long);
//   peer:   store_release(flag, ...); ring(bell);
//
// The waiter announces itself before it looks at the flag for the last time, the peer looks for waiters after it has written the flag (both
// sequentially consistent): at least one of them sees the other.
#pragma once

#include <chrono>
#include <cstdint>

#include "layout/flags.h"

namespace tern {

// Wakes everybody who sleeps at the bell. Costs a system call only if somebody does.
void ring(layout::Doorbell& bell);

// Counts the caller among the sleepers and returns what sleep() needs.
uint32_t listen(layout::Doorbell& bell);

// Ends what listen() began; sleep() does it too.
void stop_listening(layout::Doorbell& bell);

// Sleeps until the bell rings (at once if it rang since listen()), or for `longest`; may return early.
void sleep(layout::Doorbell& bell, uint32_t heard, std::chrono::nanoseconds longest);

}  // namespace tern
