// SPDX-License-Identifier: Apache-2.0
#include "base/knobs.h"

#include <charconv>
#include <cstdlib>
#include <cstring>

#include "base/error.h"
#include "base/names.h"

namespace tern {
namespace {

// `Number` is int64_t, or that as an optional.
template <typename Number>
void parse(const char* name, const char* text, Number& value) {
  int64_t number = 0;
  const char* end = text + std::strlen(text);
  const auto [stop, error] = std::from_chars(text, end, number);
  if (error != std::errc() || stop != end || number < 0)
    fail(TERN_INVALID_ARGUMENT, "environment: {}=\"{}\" must be a whole number of at least 0", name, text);
  value = number;
}

void parse(const char*, const char* text, std::optional<std::string>& value) { value = text; }

void parse(const char*, const char* text, std::vector<std::string>& value) { value = split_names(text); }

// The table: calls visit(name, meaning, member) for each knob.
template <typename Visitor>
void for_each_knob(Knobs& k, Visitor visit) {
  visit("TERN_TIMEOUT_MS", "default deadline of every wait, milliseconds (30000)", k.timeout_ms);
  visit("TERN_LOG_LEVEL", "0 off, 1 error, 2 warning, 3 info, 4 debug (2)", k.log_level);
  visit("TERN_SPIN_US",
        "how long a CPU rank spins for a flag before it sleeps, microseconds (20 with more ranks than cores, else 50; between nodes 10000)",
        k.spin_us);
  visit("TERN_STAGING_MAX_MB", "bound of the staging that is computed from shapes, MiB (CPU ranks 256, GPU ranks 1024)", k.staging_max_mb);
  visit("TERN_LATENCY_MAX_KB",
        "batches up to this many KiB of rows per rank take the latency path (CPU ranks 32, dispatch between nodes 512; GPU ranks: by "
        "forecast of both paths, between nodes 2048)",
        k.latency_max_kb);
  visit("TERN_BULK_COPY", "0: GPU ranks copy by 16-byte loads and stores where they could use bulk copies (1)", k.bulk_copy);
  visit("TERN_SHARE_GPU", "1: processes may share a GPU; their kernels take turns there, which is slow, unless CUDA MPS is used (0)",
        k.share_gpu);
  visit("TERN_RANKS_PER_NODE",
        "declares nodes: ranks 0 to n - 1 are on the first, the next n on the second, ... (found out: a host is a node)", k.ranks_per_node);
  visit("TERN_RENDEZVOUS", "host:port at which the ranks of a launcher meet (from the launcher)", k.rendezvous);
  visit("TERN_FABRIC_PROVIDER", "libfabric's provider between hosts: verbs, efa, cxi, tcp, ... (the first of these that all ranks have)",
        k.fabric_provider);
  visit("TERN_FABRIC_DOMAIN",
        "network devices of each rank between hosts, by libfabric's names, as many on all ranks: eth0, or mlx5_0,mlx5_1 (those closest to "
        "its GPU; tcp: the first)",
        k.fabric_domain);
  visit("TERN_FABRIC_RAILS", "how many network devices each rank takes where they are not named, 1 to 8 (1)", k.fabric_rails);
  visit(
      "TERN_FABRIC_GPU_MEMORY",
      "what GPU ranks send and receive between hosts lies in memory of 0: the host, 1: the GPU where network devices reach it, 2: the GPU "
      "with any provider that takes it, for tests (1)",
      k.fabric_gpu_memory);
  visit("TERN_FABRIC_TCLASS",
        "traffic class between hosts: best_effort, low_latency, dedicated_access, bulk_data, scavenger, network_ctrl or dscp:0 to dscp:63",
        k.fabric_tclass);
}

Knobs read_environment() {
  Knobs result;
  for_each_knob(result, [](const char* name, const char*, auto& member) {
    const char* text = std::getenv(name);
    if (text != nullptr && *text != '\0') parse(name, text, member);
  });
  return result;
}

}  // namespace

const Knobs& knobs() {
  static const Knobs table = read_environment();
  return table;
}

std::vector<KnobDescription> describe_knobs() {
  Knobs unused;
  std::vector<KnobDescription> result;
  for_each_knob(unused, [&](const char* name, const char* meaning, auto&) {
    const char* text = std::getenv(name);
    result.push_back({name, meaning, text == nullptr ? "" : text});
  });
  return result;
}

}  // namespace tern
