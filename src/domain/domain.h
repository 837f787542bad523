// SPDX-License-Identifier: Apache-2.0
// The windows of one generation as one rank sees them: typed access to what src/layout says lies where.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "layout/message.h"
#include "layout/window.h"
#include "memory/segment.h"
#include "topology/topology.h"

namespace tern {

// Words that several ranks see are only touched through these.
inline uint64_t load_acquire(const uint64_t& word) {
  return std::atomic_ref<uint64_t>(const_cast<uint64_t&>(word)).load(std::memory_order_acquire);
}
inline void store_release(uint64_t& word, uint64_t value) { std::atomic_ref<uint64_t>(word).store(value, std::memory_order_release); }

// Ranks are numbered within the domain, unless a comment says "of the group": there this domain's first rank is `first_rank`.
struct Domain {
  int rank = 0;
  int num_ranks = 0;
  int first_rank = 0;
  uint32_t generation = 0;
  layout::WindowLayout layout;
  Topology topology;                              // of the group
  std::vector<uint8_t> masked;                    // [num_ranks]
  std::vector<std::shared_ptr<Segment>> windows;  // [num_ranks] internal window, nullptr: masked
  std::vector<std::shared_ptr<Segment>> heaps;    // [num_ranks] memory of tern_window_alloc; all nullptr: none

  int rank_of_group(int r) const { return first_rank + r; }
  bool is_masked(int r) const { return masked[static_cast<size_t>(r)] != 0; }
  std::byte* window(int owner) const { return windows[static_cast<size_t>(owner)]->data(); }
  std::byte* heap(int owner) const { return heaps[static_cast<size_t>(owner)]->data(); }

  layout::FlagCell& cell(int owner, int lane, int source) const { return at<layout::FlagCell>(owner, layout.cell(lane, source)); }
  layout::Doorbell& doorbell(int owner, int lane) const { return at<layout::Doorbell>(owner, layout.doorbell(lane)); }
  layout::FailureCell& failure(int owner) const { return at<layout::FailureCell>(owner, layout.failure()); }
  layout::GivenUpCell& given_up(int owner) const { return at<layout::GivenUpCell>(owner, layout.given_up()); }
  layout::BegunCell& begun(int owner) const { return at<layout::BegunCell>(owner, layout.begun()); }
  std::byte* bank(int owner, int lane, uint64_t epoch, int source) const { return window(owner) + layout.bank(lane, epoch, source); }
  const layout::MessageHeader& header(int lane, uint64_t epoch, int source) const {
    return *reinterpret_cast<const layout::MessageHeader*>(bank(rank, lane, epoch, source));
  }

  // Calls visit(r) for each rank that is not masked, this one first, then in ascending order around the ring: ranks start
  // with different peers, so that they do not all write to one at the same time.
  template <typename Visitor>
  void for_each_member(Visitor visit) const {
    for (int i = 0; i < num_ranks; ++i) {
      const int r = (rank + i) % num_ranks;
      if (!is_masked(r)) visit(r);
    }
  }

 private:
  template <typename T>
  T& at(int owner, int64_t offset) const {
    return *reinterpret_cast<T*>(window(owner) + offset);
  }
};

}  // namespace tern
