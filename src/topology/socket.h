// SPDX-License-Identifier: Apache-2.0
// TCP with deadlines on everything. Sockets are non-blocking; the only waits are polls until a deadline.
#pragma once

#include <poll.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "base/deadline.h"
#include "base/fd.h"

namespace tern {

// False: the deadline passed before anything happened.
bool poll_until(std::span<pollfd> fds, Deadline deadline);

enum class Io { kDone, kClosed, kTimedOut };

Io send_all(int fd, const void* data, size_t bytes, Deadline deadline);

// Bytes on their way in from one peer.
struct Inbound {
  int fd = -1;
  void* data = nullptr;
  size_t bytes = 0;
  size_t received_bytes = 0;
  bool closed = false;
  bool complete() const { return received_bytes == bytes; }
};

// Fills all of `inbound` at once, in whatever order the bytes come. Stops early (kClosed) when a peer has gone.
Io receive_all(std::span<Inbound> inbound, Deadline deadline);
Io receive_all(int fd, void* data, size_t bytes, Deadline deadline);

// A listener, or nothing and why.
struct Opened {
  Fd fd;
  std::string why_not;
};

// Listens at `host` if that is the loopback by name, else at every address: a host's own name often leads to an address that
// others cannot reach.
Opened listen_at(const std::string& host, uint16_t port);

// Tries every address of `host`. The look-up of a name has the time limits of the system's resolver.
Opened connect_to(const std::string& host, uint16_t port, Deadline deadline);

// The next connection, non-blocking; empty if there is none after all.
Fd accept_from(int listener);

}  // namespace tern
