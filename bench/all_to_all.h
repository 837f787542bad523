// SPDX-License-Identifier: Apache-2.0
// The all-to-all of a library that knows bytes only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "bench/processes.h"

namespace tern::bench {

// Rows lie in the order of ranks, in both buffers.
struct RowTraffic {
  const std::byte* send;
  std::span<const int64_t> num_sent;  // [num_ranks] rows
  std::byte* receive;
  std::span<const int64_t> num_received;  // [num_ranks] rows
  int64_t row_bytes;
};

class AllToAll {
 public:
  virtual ~AllToAll() = default;
  virtual std::string name() const = 0;
  // One number to each rank, and one from each. Collective.
  virtual void exchange_counts(std::span<const int64_t> send, std::span<int64_t> receive) = 0;
  // Collective.
  virtual void exchange_rows(const RowTraffic& traffic) = 0;
};

std::unique_ptr<AllToAll> make_mpi_all_to_all(const Processes& processes);
// nullptr where gloo is not installed. Collective.
std::unique_ptr<AllToAll> make_gloo_all_to_all(const Processes& processes);

}  // namespace tern::bench
