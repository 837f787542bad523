// SPDX-License-Identifier: Apache-2.0
// Every environment variable that the library reads, in one typed table with its default, read once.
#pragma once

#include <tern/tern.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace tern {

struct Knobs {
  int64_t timeout_ms = 30000;             // TERN_TIMEOUT_MS: default deadline of every wait
  int64_t log_level = TERN_LOG_WARNING;   // TERN_LOG_LEVEL: 0 off .. 4 debug
  std::optional<int64_t> spin_us;         // TERN_SPIN_US: how long a CPU rank spins for a flag before it sleeps
  std::optional<int64_t> staging_max_mb;  // TERN_STAGING_MAX_MB: bound of the staging computed from shapes
  std::optional<int64_t> latency_max_kb;  // TERN_LATENCY_MAX_KB: batches up to this many payload KiB per rank take the latency path
  int64_t bulk_copy = 1;                  // TERN_BULK_COPY: 0: GPU ranks copy by 16-byte loads and stores where they could use bulk copies
  int64_t share_gpu = 0;                  // TERN_SHARE_GPU: 1: processes may share a GPU, on which their kernels take turns
  int64_t ranks_per_node = 0;             // TERN_RANKS_PER_NODE: declares nodes of so many ranks each; 0: found out
  std::optional<std::string> rendezvous;  // TERN_RENDEZVOUS: host:port where the ranks of a launcher meet
  std::optional<std::string> fabric_provider;  // TERN_FABRIC_PROVIDER: libfabric's provider between hosts
  std::vector<std::string> fabric_domain;      // TERN_FABRIC_DOMAIN: its network devices, by name
  int64_t fabric_rails = 1;                    // TERN_FABRIC_RAILS: how many of them each rank takes, where they are not named
  int64_t fabric_gpu_memory = 1;               // TERN_FABRIC_GPU_MEMORY: 0: what crosses the network lies in memory of the host
  std::optional<std::string> fabric_tclass;    // TERN_FABRIC_TCLASS: traffic class of what is sent between hosts
};

// The values found in the environment at the first call; later changes of the environment are not seen.
// A value that is not a number where one is needed fails with TERN_INVALID_ARGUMENT.
const Knobs& knobs();

// Name, meaning and current value ("" if unset) of every knob, for `tern doctor` and the documentation.
struct KnobDescription {
  std::string name, meaning, value;
};
std::vector<KnobDescription> describe_knobs();

}  // namespace tern
