// SPDX-License-Identifier: Apache-2.0
// Ranks as forked processes, and what all ways of starting ranks share: how a rank's failure is kept and told.
#pragma once

#include <functional>

#include "tools/launch.h"

namespace tern::tools {

int launch_processes(const LaunchOptions& options, const RankFunction& run_rank);

// Runs, and turns an exception into a failure on the board and an exit code of 1.
int run_and_report(Board& board, int rank, const std::function<int()>& run) noexcept;

// One line for each different reason, with the ranks that gave it; ranks that only stopped because another one failed
// are left out, unless there is nothing else to say.
void print_failures(const Board& board);

}  // namespace tern::tools
