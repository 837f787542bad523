// SPDX-License-Identifier: Apache-2.0
#include "tools/launch.h"

#include <unistd.h>

#include <charconv>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "base/error.h"
#include "tools/launch_processes.h"
#include "topology/bootstrap.h"
#include "topology/topology.h"

namespace tern::tools {
namespace {

std::optional<int> environment_number(const char* name) {
  const char* text = std::getenv(name);
  if (text == nullptr) return std::nullopt;
  int value = 0;
  const char* end = text + std::strlen(text);
  const auto [stop, error] = std::from_chars(text, end, value);
  if (error != std::errc() || stop != end) return std::nullopt;
  return value;
}

int launch_threads(const LaunchOptions& options, const RankFunction& run_rank) {
  const std::vector<Group> groups = Group::local(options.num_ranks, {.timeout_ms = options.timeout_ms});
  Board board = Board::create({options.num_ranks, options.shared_bytes});
  std::vector<int> codes(groups.size(), 0);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < options.num_ranks; ++rank) {
    threads.emplace_back([&, rank] {
      RankContext context{rank, options.num_ranks, groups[static_cast<size_t>(rank)], board, options.timeout_ms, options.num_ranks};
      codes[static_cast<size_t>(rank)] = run_and_report(board, rank, [&] { return run_rank(context); });
    });
  }
  for (std::thread& thread : threads) thread.join();
  print_failures(board);
  for (const int code : codes) {
    if (code != 0) return code;
  }
  return 0;
}

// Where the memory of rank 0's board is found by the others.
struct BoardAddress {
  int32_t pid = 0;
  int32_t fd = -1;
};

Board join_board(Bootstrap& meeting, const BoardOptions& options, Deadline deadline) {
  std::vector<BoardAddress> all(static_cast<size_t>(meeting.num_ranks()));
  std::optional<Board> board;
  BoardAddress mine;
  if (meeting.rank() == 0) {
    board.emplace(Board::create(options));
    mine = {.pid = getpid(), .fd = board->fd()};
  }
  meeting.allgather(&mine, all.data(), sizeof mine, deadline);
  if (!board) board.emplace(Board::attach(options, all[0].pid, all[0].fd));
  board->barrier(meeting.rank(), deadline.remaining_ms());
  return std::move(*board);
}

// `meeting` must outlive it.
Board make_board(Bootstrap& meeting, const Topology& hosts, const LaunchOptions& options, Deadline deadline) {
  const BoardOptions board_options{meeting.num_ranks(), options.shared_bytes};
  if (seat_on_host(hosts).num_ranks == hosts.num_ranks) return join_board(meeting, board_options, deadline);
  if (options.needs_one_host)
    fail(TERN_UNSUPPORTED, "the ranks are on several hosts, this command runs on one: start all {} ranks there", hosts.num_ranks);
  return Board::apart(board_options, [&](std::span<const std::byte> send, std::byte* recv, int64_t timeout_ms) {
    meeting.allgather(send.data(), recv, send.size(), Deadline::in_ms(timeout_ms));
  });
}

int launch_environment(const LaunchOptions& options, const RankFunction& run_rank) {
  const Group group = Group::from_env({.timeout_ms = options.timeout_ms});
  const tern_group_info info = group.info();
  if (info.num_ranks != options.num_ranks)
    fail(TERN_INVALID_ARGUMENT, "{} ranks are asked for, the launcher started {}: leave --ranks out, or give --launch to start ranks here",
         options.num_ranks, info.num_ranks);
  const Deadline deadline = Deadline::in_ms(options.timeout_ms);
  const auto meeting = make_env_bootstrap("tern command", Log(), deadline);
  const Topology hosts = discover(*meeting, "", deadline);
  Board board = make_board(*meeting, hosts, options, deadline);
  RankContext context{info.rank, info.num_ranks, group, board, options.timeout_ms, seat_on_host(hosts).num_ranks};
  const int code = run_and_report(board, info.rank, [&] { return run_rank(context); });
  if (const std::string text = board.failure_of(info.rank); !text.empty()) fmt::print(stderr, "tern: rank {}: {}\n", info.rank, text);
  return code;
}

}  // namespace

const char* launch_name(LaunchKind kind) {
  switch (kind) {
    case LaunchKind::kProcesses: return "processes";
    case LaunchKind::kThreads: return "threads";
    case LaunchKind::kEnvironment: return "environment";
  }
  return "";
}

std::optional<FoundLauncher> find_launcher() {
  struct Names {
    const char *launcher, *rank, *num_ranks, *needed;
  };
  // A Slurm batch script sees SLURM_PROCID too; only what srun has started has a step of its own.
  constexpr Names kLaunchers[] = {{"torchrun", "RANK", "WORLD_SIZE", "RANK"},
                                  {"mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"},
                                  {"srun", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_ID"}};
  for (const Names& names : kLaunchers) {
    const auto rank = environment_number(names.rank), num_ranks = environment_number(names.num_ranks);
    if (rank && num_ranks && std::getenv(names.needed) != nullptr) return FoundLauncher{names.launcher, *rank, *num_ranks};
  }
  return std::nullopt;
}

int launch(const LaunchOptions& options, const RankFunction& run_rank) {
  if (options.num_ranks < 1 || options.num_ranks > 1024) fail(TERN_INVALID_ARGUMENT, "{} ranks: must be 1 to 1024", options.num_ranks);
  switch (options.kind) {
    case LaunchKind::kProcesses: return launch_processes(options, run_rank);
    case LaunchKind::kThreads: return launch_threads(options, run_rank);
    case LaunchKind::kEnvironment: break;
  }
  return launch_environment(options, run_rank);
}

}  // namespace tern::tools
