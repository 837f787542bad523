// SPDX-License-Identifier: Apache-2.0
// Starts ranks and runs a function on each: as processes forked here, as threads, or as the processes that a launcher
// (torchrun, mpirun, srun) has started.
//
//   return launch({.kind = LaunchKind::kProcesses, .num_ranks = 4}, [&](RankContext& context) {
//     tern::Exchange exchange(context.group, {.device = TERN_DEVICE_CPU});
//     ...
//     return 0;
//   });
//
// Nothing outlives the call: forked ranks die with this process, and are ended when another rank fails or on Ctrl-C.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <tern/tern.hpp>

#include "tools/board.h"

namespace tern::tools {

enum class LaunchKind { kProcesses, kThreads, kEnvironment };

const char* launch_name(LaunchKind kind);

struct LaunchOptions {
  LaunchKind kind = LaunchKind::kProcesses;
  int num_ranks = 4;
  int64_t timeout_ms = 30000;  // of the group's creation; other ranks may take a minute longer to line up
  size_t shared_bytes = 0;     // of the board
  bool needs_one_host = true;  // the board must be shared by all ranks
};

struct RankContext {
  int rank = 0;
  int num_ranks = 1;
  const Group& group;
  Board& board;
  int64_t timeout_ms = 0;
  int ranks_on_host = 0;  // that are on this rank's, itself among them

  void align() const { board.barrier(rank, timeout_ms + kPatienceMs); }
  // What one rank computes while the others wait for it, checks of all bytes among it, takes no longer than this.
  static constexpr int64_t kPatienceMs = 60000;
};

// Returns the exit code of the rank.
using RankFunction = std::function<int(RankContext&)>;

// The exit code of the whole: 0 if all ranks returned 0; else that of the first that did not, with the reasons of the
// ranks that failed on standard error. Must be called before this process has other threads.
int launch(const LaunchOptions& options, const RankFunction& run_rank);

// The ranks that a launcher has started, if this process is one of them.
struct FoundLauncher {
  std::string name;
  int rank = 0;
  int num_ranks = 1;
};
std::optional<FoundLauncher> find_launcher();

}  // namespace tern::tools
