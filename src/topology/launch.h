// SPDX-License-Identifier: Apache-2.0
// What the launcher's environment says about this process: its rank, and where the ranks can meet. The rules are in
// rendezvous.h.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>

namespace tern {

struct Launch {
  std::string launcher;  // for people to read: "torchrun"
  std::string job;       // equal on all ranks of a job, and on no other job of the machine if the launcher can tell
  int rank = 0;
  int num_ranks = 1;
  std::string host;  // where rank 0 listens; "" with one rank
  uint16_t port = 0;
};

// The value of a variable of the environment, nullptr if it is not set.
using Environment = std::function<const char*(const char* name)>;

// `rendezvous` is the value of TERN_RENDEZVOUS. TERN_INVALID_ARGUMENT says which variable is missing or wrong.
Launch find_launch(const Environment& environment, const std::optional<std::string>& rendezvous);

// The first host of a Slurm host list: "gpu[07-12,20],login" -> "gpu07".
std::string first_host(const std::string& slurm_host_list);

}  // namespace tern
