// SPDX-License-Identifier: Apache-2.0
#include "tools/bench_ceiling.h"

#include <algorithm>
#include <cstring>
#include <numeric>

namespace tern::tools {
namespace {

int64_t push_row_bytes(const BatchShape& shape) {
  return shape.format.arriving_row_bytes(shape.hidden) + shape.format.arriving_scale_bytes(shape.hidden);
}

}  // namespace

size_t CopyCeiling::board_bytes(const BatchShape& shape) {
  const auto messages = count_messages(shape.routing);
  const int64_t num_rows = std::accumulate(messages.begin(), messages.end(), int64_t{0});
  return static_cast<size_t>(num_rows * std::max(push_row_bytes(shape), shape.combine_wire_bytes()));
}

CopyCeiling::CopyCeiling(const BatchShape& shape, const RankContext& context)
    : rank_(context.rank),
      num_ranks_(context.num_ranks),
      messages_(count_messages(shape.routing)),
      push_row_bytes_(push_row_bytes(shape)),
      pull_row_bytes_(shape.combine_wire_bytes()),
      shared_(context.board.shared()) {
  int64_t num_sent = 0, first = 0;
  for (int destination = 0; destination < num_ranks_; ++destination) {
    num_sent += num_rows(rank_, destination);
    for (int source = 0; source < num_ranks_; ++source) {  // all rows to one rank lie together, by who sends them
      if (source == rank_) first_row_.push_back(first);
      first += num_rows(source, destination);
    }
  }
  own_ = Buffer::own(host_device(), num_sent * std::max(push_row_bytes_, pull_row_bytes_));
}

Times CopyCeiling::push(const Meter& meter) const {
  return meter.measure_joint([&] {
    for (int i = 0; i < num_ranks_; ++i) {
      const int destination = (rank_ + i) % num_ranks_;  // not all to the same rank at once
      std::memcpy(shared_ + first_row_[static_cast<size_t>(destination)] * push_row_bytes_, own_.data(),
                  static_cast<size_t>(num_rows(rank_, destination) * push_row_bytes_));
    }
  });
}

Times CopyCeiling::pull(const Meter& meter) const {
  return meter.measure_joint([&] {
    std::byte* out = own_.data();
    for (int i = 0; i < num_ranks_; ++i) {
      const int destination = (rank_ + i) % num_ranks_;
      const auto num_bytes = static_cast<size_t>(num_rows(rank_, destination) * pull_row_bytes_);
      std::memcpy(out, shared_ + first_row_[static_cast<size_t>(destination)] * pull_row_bytes_, num_bytes);
      out += num_bytes;
    }
  });
}

}  // namespace tern::tools
