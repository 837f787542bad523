// SPDX-License-Identifier: Apache-2.0
// The processes of the run, which MPI has started, and memory that they share. One Processes per process, made first and
// destroyed last; one thread.
#pragma once

#include <tern/tern.hpp>

#include <memory>
#include <string>
#include <vector>

#include "memory/host_segment.h"
#include "topology/bootstrap.h"

namespace tern::bench {

class Processes {
 public:
  Processes(int* argc, char*** argv);
  Processes(const Processes&) = delete;
  Processes& operator=(const Processes&) = delete;
  ~Processes();

  int rank() const { return rank_; }
  int num_ranks() const { return num_ranks_; }
  // "Open MPI 4.1.4"
  std::string mpi_version() const;

  // One segment of the same kind as Tern's windows, made by rank 0 and mapped by all. Collective.
  std::shared_ptr<Segment> share_memory(int64_t num_bytes) const;
  // What rank 0 gives. Collective.
  std::string broadcast(std::string text) const;
  // Element by element, the largest of all ranks. Collective.
  std::vector<double> largest(std::vector<double> values) const;
  // Collective.
  bool all_true(bool value) const;
  // A Tern group of the same ranks, over MPI_Allgather. Collective.
  Group make_group() const;
  // The same for the parts of the library that need no group.
  std::unique_ptr<Bootstrap> make_bootstrap() const;

  // Ends all processes of the run.
  [[noreturn]] static void abort_all();

 private:
  int rank_ = 0;
  int num_ranks_ = 0;
};

}  // namespace tern::bench
