// SPDX-License-Identifier: Apache-2.0
// Segments in the host's memory: the windows of the CPU engine.
//
//   auto mine = HostSegment::create(bytes, SharedBy::kProcesses);
//   std::shared_ptr<Segment> again = HostSegment::map(duplicate(mine->fd()));   // as a peer does with the descriptor it received
//
// Between processes the memory has no name anywhere (memfd): it is gone with the last process that maps it, also after
// kill -9. Its size is sealed, so that no peer can cut it short under a reader.
// All pages are there when a maker returns (on the NUMA node of the calling thread), zeroed: running out of memory is
// TERN_OUT_OF_MEMORY at creation and never a signal later. Huge pages are asked for; a refusal is ignored.
// Memory visibility: as between threads, by the atomics that live in the memory.
#pragma once

#include <memory>

#include "memory/segment.h"

namespace tern {

class HostSegment final : public Segment {
 public:
  // At least `bytes` > 0 bytes, rounded up to whole pages. TERN_OUT_OF_MEMORY, TERN_SYSTEM_ERROR.
  static std::shared_ptr<HostSegment> create(size_t bytes, SharedBy shared_by);

  // Maps what a peer created with kProcesses. TERN_SYSTEM_ERROR if the descriptor is no such segment.
  static std::shared_ptr<HostSegment> map(Fd fd);

  ~HostSegment() override;

  std::shared_ptr<Segment> map_peer(Fd fd) const override { return map(std::move(fd)); }
  void renew() override;

 private:
  using Segment::Segment;
};

}  // namespace tern
