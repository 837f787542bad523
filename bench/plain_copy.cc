// SPDX-License-Identifier: Apache-2.0
#include "bench/plain_copy.h"

#include <algorithm>
#include <cstring>

namespace tern::bench {
namespace {

int64_t most_rows(const Workload& workload) {
  const Shape& shape = workload.shape();
  return shape.num_tokens * shape.num_ranks;  // what arrives, or what comes back, at most
}

void copy_plainly(std::byte* to, const std::byte* from, int64_t num_bytes) { std::memcpy(to, from, static_cast<size_t>(num_bytes)); }

void copy_past_caches(std::byte* to, const std::byte* from, int64_t num_bytes) {
  cpu::copy_row(to, from, static_cast<size_t>(num_bytes), cpu::Store::kStreaming);
}

}  // namespace

PlainCopy::PlainCopy(const Workload& workload, const Processes& processes)
    : workload_(workload),
      window_bytes_(most_rows(workload) * workload.shape().row_bytes()),
      windows_(processes.share_memory(window_bytes_ * workload.shape().num_ranks)) {}

// A token's row is read once for all its destinations.
template <typename CopyRow>
void PlainCopy::dispatch(CopyRow copy_row) const {
  const Shape& shape = workload_.shape();
  std::byte* next[64];
  for (int rank = 0; rank < shape.num_ranks; ++rank)
    next[rank] = window(rank) + workload_.first_row(workload_.rank(), rank) * shape.row_bytes();
  const std::byte* token = workload_.tokens();
  for (const uint64_t destinations : workload_.destinations()) {
    for_each_rank(destinations, [&](int rank) {
      copy_row(next[rank], token, shape.row_bytes());
      next[rank] += shape.row_bytes();
    });
    token += shape.row_bytes();
  }
  cpu::store_fence();
}

template <typename CopyRow>
void PlainCopy::give_back(CopyRow copy_row) const {
  const Shape& shape = workload_.shape();
  const std::byte* row = workload_.expert_rows();
  for (int owner = 0; owner < shape.num_ranks; ++owner) {
    int64_t first = 0;
    for (int rank = 0; rank < workload_.rank(); ++rank) first += workload_.num_rows(owner, rank);
    std::byte* to = window(owner) + first * shape.row_bytes();
    const std::byte* end = row + workload_.num_rows(owner, workload_.rank()) * shape.row_bytes();
    for (; row < end; row += shape.row_bytes(), to += shape.row_bytes()) copy_row(to, row, shape.row_bytes());
  }
  cpu::store_fence();
}

void PlainCopy::add_to(Contenders& contenders) const {
  const auto rows = [&](int64_t num_rows) {
    return std::span(window(workload_.rank()), static_cast<size_t>(num_rows * workload_.shape().row_bytes()));
  };
  const auto add = [&](const char* operation, const char* name, Result result, std::function<void()> run) {
    const auto output = rows(result == Result::kDispatched ? workload_.num_received() : workload_.num_sent());
    contenders.push_back({operation, name, Kind::kCeiling, result, output, std::move(run)});
  };
  add("dispatch", "plain copy", Result::kDispatched, [this] { dispatch(copy_plainly); });
  add("dispatch", "plain copy, streaming stores", Result::kDispatched, [this] { dispatch(copy_past_caches); });
  add("combine", "plain copy", Result::kReturned, [this] { give_back(copy_plainly); });
  add("combine", "plain copy, streaming stores", Result::kReturned, [this] { give_back(copy_past_caches); });
}

}  // namespace tern::bench
