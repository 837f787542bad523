// SPDX-License-Identifier: Apache-2.0
// Runs cases: a group, an exchange on every rank, the whole cycle of RoundTrip, and back come the differences from the
// oracle as text, none if all is right. Every wait has a deadline.
#pragma once

#include <tern/tern.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "conformance/buffer.h"
#include "conformance/scenario.h"

namespace tern::conformance {

struct RunOptions {
  tern_device_type device = TERN_DEVICE_CPU;
  int32_t num_devices = 1;  // CUDA: rank r uses device r % num_devices
  // Extent WORST: the operations are captured into a graph and replayed that often, with other routing and data each time. 0: no graph
  int num_replays = 0;
  int64_t timeout_ms = 30'000;                           // of each wait in the library
  int32_t ranks_per_node = 0;                            // declares nodes; 0: as a case says, or one
  std::vector<std::vector<uint8_t>>* outputs = nullptr;  // threads and processes: [num_ranks] what the last batch left
};

// What a rank does with its exchange, on its device; returns differences. It may throw.
using RankBody = std::function<std::vector<std::string>(int32_t rank, tern_exchange* exchange, RankDevice& device)>;

// Ranks as threads of this process, sharing one group made with tern_group_create_local.
std::vector<std::string> run_threads(int32_t num_ranks, tern_exchange_options exchange_options, const RunOptions& options,
                                     const RankBody& body);

// Ranks as processes, forked from the caller, which must have no other threads, and must not have used CUDA if they do.
std::vector<std::string> run_processes(int32_t num_ranks, tern_exchange_options exchange_options, const RunOptions& options,
                                       const RankBody& body);

std::vector<std::string> run_as_threads(const Case& c, const RunOptions& options = {});
std::vector<std::string> run_as_processes(const Case& c, const RunOptions& options = {});

// The device of a rank. Made before its exchange, and destroyed after it.
std::unique_ptr<RankDevice> make_rank_device(const RunOptions& options, int32_t rank);
// Options of the exchange of a rank on that device.
tern_exchange_options with(tern_exchange_options options, const RunOptions& run, const RankDevice& device);

// One text of several lines.
std::string join_lines(const std::vector<std::string>& lines);

}  // namespace tern::conformance
