// SPDX-License-Identifier: Apache-2.0
// A range of memory that ranks share: the stuff that the windows of the CPU engine are made of.
//
//   auto mine = Segment::create(bytes, SharedBy::kProcesses);
//   std::shared_ptr<Segment> again = Segment::map(duplicate(mine->fd()));   // as a peer does with the descriptor it received
//
// Between processes the memory has no name anywhere (memfd): it is gone with the last process that maps it, also after
// kill -9. Its size is sealed, so that no peer can cut it short under a reader.
// All pages are there when a maker returns (on the NUMA node of the calling thread), zeroed: running out of memory is
// TERN_OUT_OF_MEMORY at creation and never a signal later. Huge pages are asked for; a refusal is ignored.
// Lifetime: the mapping ends with the object; use shared_ptr. Threads: data() may be used by any thread; renew() by one, while
// no other thread of this process uses the memory.
// Memory visibility: as between threads, by the atomics that live in the memory.
#pragma once

#include <cstddef>
#include <memory>

#include "base/fd.h"

namespace tern {

enum class SharedBy {
  kThreads,   // anonymous memory: one mapping for all, no descriptor
  kProcesses  // a descriptor that can be handed to other processes
};

class Segment {
 public:
  // At least `bytes` > 0 bytes, rounded up to whole pages. TERN_OUT_OF_MEMORY, TERN_SYSTEM_ERROR.
  static std::shared_ptr<Segment> create(size_t bytes, SharedBy shared_by);

  // Maps what a peer created with kProcesses. TERN_SYSTEM_ERROR if the descriptor is no such segment.
  static std::shared_ptr<Segment> map(Fd fd);

  Segment(const Segment&) = delete;
  Segment& operator=(const Segment&) = delete;
  ~Segment();

  std::byte* data() const { return data_; }
  size_t size() const { return size_bytes_; }
  int fd() const { return fd_.get(); }  // -1: kThreads. Borrowed; a new one after renew()

  // Gives the same addresses a fresh backing with the same contents. A process that still maps the old one (a peer, or one that
  // was only stopped) reads and writes memory that nobody here looks at any more; peers that go on must be given the
  // new descriptor. Needs the memory twice for a moment; if that fails nothing has changed. With kThreads nothing
  // happens: a thread cannot be shut out of its own process.
  void renew();

 private:
  Segment(Fd fd, std::byte* data, size_t size_bytes) : fd_(std::move(fd)), data_(data), size_bytes_(size_bytes) {}

  Fd fd_;
  std::byte* data_;
  size_t size_bytes_;
};

}  // namespace tern
