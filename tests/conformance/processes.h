// SPDX-License-Identifier: Apache-2.0
// Ranks as real processes: forked from the caller, which must have no other threads. They meet over a page of shared
// memory that ends with them: an all-gather for tern_group_create_from_allgather, and a number per rank by which parent
// and children tell each other how far they are. Every wait has a deadline.
//
//   RankProcesses ranks(4, 60'000, [](RankSeat& seat) { ...; return std::string(); });   // runs in the child; returns its report
//   ranks.wait_for_stage(1, 1);  kill(ranks.pid(1), SIGKILL);
//   std::vector<RankReport> reports = ranks.join();
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace tern::conformance {

class SharedBoard;

// A child's place: what it needs to make a group, and to speak with the parent.
class RankSeat {
 public:
  RankSeat(SharedBoard& board, int32_t rank, int32_t num_ranks) : board_(board), rank_(rank), num_ranks_(num_ranks) {}

  int32_t rank() const { return rank_; }
  int32_t num_ranks() const { return num_ranks_; }

  // A tern_allgather_fn; the context is the seat. Waits for all also with no bytes. Fails at the deadline, or at once if a rank has
  // returned.
  static int allgather(void* seat, const void* send, void* recv, size_t bytes);

  // Tells everyone that this rank has reached `stage`. Stages only grow.
  void set_stage(uint64_t stage);
  // Waits until `rank` (-1: the parent) has reached `stage` or returned; throws std::runtime_error at the deadline.
  void wait_for_stage(int32_t rank, uint64_t stage) const;

 private:
  SharedBoard& board_;
  int32_t rank_, num_ranks_;
  uint64_t num_gathers_ = 0;
};

struct RankReport {
  std::string text;       // what the child returned, or the text of the exception that ended it
  bool finished = false;  // it returned by itself, in time
};

class RankProcesses {
 public:
  using Body = std::function<std::string(RankSeat& seat)>;

  RankProcesses(int32_t num_ranks, int64_t timeout_ms, const Body& body);
  // Kills and collects whoever is left.
  ~RankProcesses();
  RankProcesses(const RankProcesses&) = delete;
  RankProcesses& operator=(const RankProcesses&) = delete;

  pid_t pid(int32_t rank) const { return children_[static_cast<size_t>(rank)].pid; }
  void set_stage(uint64_t stage);  // the parent's own
  void wait_for_stage(int32_t rank, uint64_t stage) const;

  // Waits for all reports until the deadline, and ends the children.
  std::vector<RankReport> join();

 private:
  struct Child {
    pid_t pid = -1;
    int pipe = -1;
  };
  std::unique_ptr<SharedBoard> board_;
  std::vector<Child> children_;
};

}  // namespace tern::conformance
