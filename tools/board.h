// SPDX-License-Identifier: Apache-2.0
// Shared memory between the ranks of one host, apart from the library: the ranks line up on it before something is
// timed, and leave results there for each other.
//
//   Board board = Board::create({.num_ranks = 4, .shared_bytes = 1 << 20});  // before the ranks are started
//   board.barrier(rank, timeout_ms);                                         // on every rank
//
// Lifetime: the memory goes with the last rank that maps it; nothing stays behind. Threads: one thread per rank.
// Memory: what a rank wrote to shared() before a barrier is seen by all ranks after it.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "base/fd.h"

namespace tern::tools {

struct BoardOptions {
  int num_ranks = 1;
  size_t shared_bytes = 0;
};

class Board {
 public:
  // In this process and those it forks.
  static Board create(const BoardOptions& options);
  // That of another process of the same user, who names its own pid and fd().
  static Board attach(const BoardOptions& options, pid_t owner, int owner_fd);
  // Of ranks on several hosts, who meet by `gather`: its shared memory is this process's alone, and so are failures. Barriers take trips
  // of the network, and ranks leave them as far apart.
  using Gather = std::function<void(std::span<const std::byte> send, std::byte* recv, int64_t timeout_ms)>;
  static Board apart(const BoardOptions& options, Gather gather);

  Board(Board&& other) noexcept;
  Board& operator=(Board&&) = delete;
  ~Board();

  int fd() const { return fd_.get(); }
  bool is_shared() const { return gather_ == nullptr; }
  int num_ranks() const { return num_ranks_; }

  // Returns when all ranks have called it. TERN_TIMEOUT names the ranks that do not come; TERN_ABORTED if one has failed.
  void barrier(int rank, int64_t timeout_ms);

  // Gathers send.size() bytes of every rank into recv, in the order of ranks. Waits like barrier.
  void allgather(int rank, std::span<const std::byte> send, std::byte* recv, int64_t timeout_ms);

  // Wakes all ranks that wait in a barrier, which then fail, and keeps the reason.
  void post_failure(int rank, const std::string& text) noexcept;
  bool failed() const;
  std::string failure_of(int rank) const;  // "" if it has not failed

  std::byte* shared() const { return shared_; }
  template <typename T>
  T* shared_as(size_t offset_bytes = 0) const {
    return reinterpret_cast<T*>(shared_ + offset_bytes);
  }

 private:
  struct Control;
  struct RankArea;
  Board(const BoardOptions& options, Fd fd);
  std::vector<int> missing_ranks(uint32_t phase) const;

  Fd fd_;
  int num_ranks_;
  size_t mapped_bytes_;
  Control* control_;
  RankArea* areas_;
  std::byte* shared_;
  Gather gather_;
};

}  // namespace tern::tools
