// SPDX-License-Identifier: Apache-2.0
// The ceiling: every rank copies the same rows to the same kind of memory, and nobody tells anybody. A dispatch's rows go from the
// tokens to their final places at the destinations; a combine's rows go from the experts' ranks to the tokens' owners, not summed.
// Once with memcpy, once with stores past the caches.
#pragma once

#include "bench/contender.h"
#include "bench/processes.h"
#include "bench/workload.h"
#include "rows/rows.h"

namespace tern::bench {

class PlainCopy {
 public:
  // Collective.
  PlainCopy(const Workload& workload, const Processes& processes);

  // They borrow this object and the workload.
  void add_to(Contenders& contenders) const;

 private:
  template <typename CopyRow>
  void dispatch(CopyRow copy_row) const;
  template <typename CopyRow>
  void give_back(CopyRow copy_row) const;
  std::byte* window(int rank) const { return windows_->data() + rank * window_bytes_; }

  const Workload& workload_;
  int64_t window_bytes_;
  std::shared_ptr<Segment> windows_;
};

}  // namespace tern::bench
