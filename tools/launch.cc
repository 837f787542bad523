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
      RankContext context{rank, options.num_ranks, groups[static_cast<size_t>(rank)], board, options.timeout_ms};
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
  int64_t padding = 0;  // rows are multiples of 16 bytes
};

// Gathers one small struct from every rank by the one thing at hand: a dispatch of one token to all ranks.
std::vector<BoardAddress> gather_addresses(const Group& group, const BoardAddress& mine, int64_t timeout_ms) {
  const int num_ranks = group.num_ranks();
  Exchange exchange(group, {.device = TERN_DEVICE_CPU,
                            .max_tokens = 1,
                            .max_row_bytes = sizeof mine,
                            .max_topk = 1,
                            .max_experts = num_ranks,
                            .timeout_ms = timeout_ms});
  Plan plan(exchange, {.max_tokens = 1, .num_experts = num_ranks});
  const std::vector<uint8_t> to_all(static_cast<size_t>(num_ranks), 1);
  plan.route({.num_tokens = 1, .token_in_rank = to_all.data()});
  std::vector<BoardAddress> all(static_cast<size_t>(num_ranks));
  plan.dispatch({.tokens = &mine, .dtype = TERN_DTYPE_BYTES, .hidden = sizeof mine, .out_tokens = all.data()});
  return all;
}

Board join_board(const Group& group, const LaunchOptions& options) {
  const BoardOptions board_options{group.num_ranks(), options.shared_bytes};
  if (group.rank() != 0) {
    const BoardAddress rank_0 = gather_addresses(group, {}, options.timeout_ms)[0];
    Board board = Board::attach(board_options, rank_0.pid, rank_0.fd);
    board.barrier(group.rank(), options.timeout_ms);
    return board;
  }
  Board board = Board::create(board_options);
  gather_addresses(group, {.pid = getpid(), .fd = board.fd()}, options.timeout_ms);
  board.barrier(0, options.timeout_ms);
  return board;
}

int launch_environment(const LaunchOptions& options, const RankFunction& run_rank) {
  const Group group = Group::from_env({.timeout_ms = options.timeout_ms});
  const tern_group_info info = group.info();
  if (info.num_ranks != options.num_ranks)
    fail(TERN_INVALID_ARGUMENT, "{} ranks are asked for, the launcher started {}: leave --ranks out, or give --launch to start ranks here",
         options.num_ranks, info.num_ranks);
  // The board, over which ranks compare times and results, is shared memory: nodes may only be declared.
  if (info.num_nodes > 1 && std::getenv("TERN_RANKS_PER_NODE") == nullptr)
    fail(TERN_UNSUPPORTED, "the ranks are on {} nodes, this command runs on one host: start all {} ranks there", info.num_nodes,
         info.num_ranks);
  Board board = join_board(group, options);
  RankContext context{info.rank, info.num_ranks, group, board, options.timeout_ms};
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
