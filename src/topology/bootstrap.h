// SPDX-License-Identifier: Apache-2.0
// How the ranks of a group first meet: an all-gather of a few bytes, used while groups and exchanges are made and never
// by an operation.
//
//   auto bootstrap = make_env_bootstrap("tern", log, Deadline::in_ms(30000));
//   std::vector<int64_t> sizes(bootstrap->num_ranks());
//   bootstrap->allgather(&my_size, sizes.data(), sizeof(my_size), Deadline::in_ms(30000));
//
// Lifetime: a bootstrap lives as long as its group; destroying it is never collective and never waits. The ranks that are
// still there learn of it at their next allgather.
// Threads: a bootstrap belongs to one rank and is used by one thread at a time. Those of make_local_bootstraps are meant
// for one thread each.
#pragma once

#include <tern/tern.h>

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "base/deadline.h"
#include "base/log.h"

namespace tern {

class Bootstrap {
 public:
  virtual ~Bootstrap() = default;

  virtual int rank() const = 0;
  virtual int num_ranks() const = 0;

  // recv[r * bytes ...] = rank r's `send`, own rank included. Collective: every rank passes the same `bytes`. An allgather
  // that fails does so on every rank that waits in it, with the same status and a text that names the ranks at fault:
  // TERN_TIMEOUT: they did not come until the deadline; TERN_ABORTED: they have gone (destroyed their bootstrap, or
  // died); TERN_MISMATCH: they passed another size. A bootstrap that failed stays failed: later calls throw the same again.
  virtual void allgather(const void* send, void* recv, size_t bytes, Deadline deadline) = 0;
};

// Rank and size from the launcher's environment: the first complete pair of RANK and WORLD_SIZE (torchrun),
// OMPI_COMM_WORLD_RANK and OMPI_COMM_WORLD_SIZE (Open MPI), SLURM_PROCID and SLURM_NTASKS (inside a Slurm step); with none
// of them, one rank. The ranks meet over TCP at rank 0: rendezvous.h says where and how. `group_name` tells groups of one
// job apart; groups of one name may be made one after another. Collective. TERN_TIMEOUT names the ranks that did not come
// (rank 0) or says what was found at the address of rank 0 (other ranks).
std::unique_ptr<Bootstrap> make_env_bootstrap(const std::string& group_name, const Log& log, Deadline deadline);

// Uses the caller's own all-gather, which cannot be given a deadline: it must have one of its own. A return other than 0
// is TERN_SYSTEM_ERROR. `allgather` and `context` must outlive the bootstrap.
std::unique_ptr<Bootstrap> make_callback_bootstrap(int rank, int num_ranks, tern_allgather_fn allgather, void* context);

// Ranks as threads of this process: result[r] is for the thread that plays rank r. Local.
std::vector<std::unique_ptr<Bootstrap>> make_local_bootstraps(int num_ranks);

// For the texts of errors: "rank 3", "ranks 3 and 5", "ranks 3, 5 and 7".
std::string name_ranks(const std::vector<int>& ranks);

}  // namespace tern
