// SPDX-License-Identifier: Apache-2.0
// The epochs of a pair of banks: which one comes next, and which are open, that is sent and not yet received.
//
// Memory: allocates in the constructor only. Threads: one at a time.
#pragma once

#include <tern/tern.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "base/error.h"
#include "domain/failure.h"
#include "layout/flags.h"

namespace tern::cpu {

class Epochs {
 public:
  Epochs() { open_.reserve(layout::kNumBanks + 1); }

  void restart() {
    next_ = 1;
    num_closed_ = 0;
    open_.clear();
  }

  // TERN_INVALID_STATE if an earlier send still holds a bank that the next `num_rounds` epochs need.
  void check_room(tern_operation operation, int lane_idx, int64_t num_rounds) const {
    const uint64_t last = next_ + static_cast<uint64_t>(num_rounds) - 1;
    if (!open_.empty() && open_.front() + layout::kNumBanks <= last)
      fail(TERN_INVALID_STATE,
           "{} on lane {}: it needs the staging bank of a send that has not been received yet; at most {} sends may be under way",
           operation_name(operation), lane_idx, layout::kNumBanks);
  }

  // Takes the next `num_rounds` epochs, for which there is room, and returns the first.
  uint64_t take(int64_t num_rounds) {
    const uint64_t first = next_;
    next_ += static_cast<uint64_t>(num_rounds);
    return first;
  }

  void open(uint64_t epoch) { open_.push_back(epoch); }
  void close(uint64_t epoch) {
    open_.erase(std::remove(open_.begin(), open_.end(), epoch), open_.end());
    ++num_closed_;
  }

  uint64_t next() const { return next_; }
  // Grows with every operation, also with those that only receive.
  uint64_t progress() const { return next_ + num_closed_; }
  bool any_open() const { return !open_.empty(); }
  // Receives may come out of order: only what lies before the oldest open epoch is consumed.
  uint64_t consumed() const { return open_.empty() ? next_ - 1 : open_.front() - 1; }

 private:
  uint64_t next_ = 1;
  uint64_t num_closed_ = 0;
  std::vector<uint64_t> open_;  // ascending
};

}  // namespace tern::cpu
