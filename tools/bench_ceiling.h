// SPDX-License-Identifier: Apache-2.0
// What no exchange of these bytes can beat by much: the same ranks copy the same rows' bytes at the same time with
// memcpy, contiguous for each pair of ranks, and do nothing else. A dispatch is compared with `push`, from own memory into
// memory shared with the other ranks; a combine with `pull`, the other way. The rank's own share is copied too, because it
// costs a CPU rank as much as that of any other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "tools/batch.h"
#include "tools/meter.h"

namespace tern::tools {

class CopyCeiling {
 public:
  // Bytes of the board's shared memory that it uses. The board is shared.
  static size_t board_bytes(const BatchShape& shape);

  CopyCeiling(const BatchShape& shape, const RankContext& context);

  Times push(const Meter& meter) const;
  Times pull(const Meter& meter) const;

 private:
  int64_t num_rows(int source, int destination) const { return messages_[static_cast<size_t>(source * num_ranks_ + destination)]; }

  int rank_, num_ranks_;
  std::vector<int64_t> messages_;
  std::vector<int64_t> first_row_;  // by destination: where this rank's rows lie, in rows of the shared memory
  int64_t push_row_bytes_, pull_row_bytes_;
  std::byte* shared_;
  Buffer own_;  // one row after the other for each destination in pull; the front of it is the source of push
};

}  // namespace tern::tools
