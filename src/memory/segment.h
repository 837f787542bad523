// SPDX-License-Identifier: Apache-2.0
// A range of memory that ranks share: the stuff that windows are made of. What kind of memory it is, is the implementation's
// business: HostSegment here, DeviceSegment for GPUs.
//
//   std::shared_ptr<Segment> theirs = mine->map_peer(std::move(fd));   // a descriptor that a rank of this exchange sent
//
// Lifetime: the mapping ends with the object; use shared_ptr. Threads: data() may be used by any thread; renew() by one, while
// nothing of this process uses the memory.
#pragma once

#include <cstddef>
#include <memory>

#include "base/fd.h"

namespace tern {

enum class SharedBy {
  kThreads,   // one mapping for all, no descriptor
  kProcesses  // a descriptor that can be handed to other processes
};

class Segment {
 public:
  Segment(const Segment&) = delete;
  Segment& operator=(const Segment&) = delete;
  virtual ~Segment() = default;

  // Address and size never change.
  std::byte* data() const { return data_; }
  size_t size() const { return size_bytes_; }
  int fd() const { return fd_.get(); }  // -1: there is none to hand out. Borrowed; a new one after renew()

  // Maps what a peer created, with kProcesses, as the same kind of memory. TERN_SYSTEM_ERROR if the descriptor is none of that kind.
  virtual std::shared_ptr<Segment> map_peer(Fd fd) const = 0;

  // Gives the same addresses a fresh backing with the same contents. A process that still maps the old one (a peer, or one that
  // was only stopped) reads and writes memory that nobody here looks at any more; peers that go on must be given the
  // new descriptor. Needs the memory twice for a moment; if that fails nothing has changed. Without a descriptor nothing
  // happens: a thread cannot be shut out of its own process.
  virtual void renew() = 0;

 protected:
  Segment(std::byte* data, size_t size_bytes, Fd fd) : data_(data), size_bytes_(size_bytes), fd_(std::move(fd)) {}
  void replace_fd(Fd fd) { fd_ = std::move(fd); }

 private:
  std::byte* data_;
  size_t size_bytes_;
  Fd fd_;
};

}  // namespace tern
