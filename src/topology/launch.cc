// SPDX-License-Identifier: Apache-2.0
#include "topology/launch.h"

#include <charconv>

#include "base/error.h"
#include "topology/rendezvous.h"

namespace tern {
namespace {

std::optional<std::string> text(const Environment& environment, const char* name) {
  const char* value = environment(name);
  if (value == nullptr || *value == '\0') return std::nullopt;
  return value;
}

std::optional<int64_t> number(const Environment& environment, const char* name) {
  const auto value = text(environment, name);
  if (!value) return std::nullopt;
  int64_t result = 0;
  const char* end = value->data() + value->size();
  const auto [stop, error] = std::from_chars(value->data(), end, result);
  if (error != std::errc() || stop != end) fail(TERN_INVALID_ARGUMENT, "environment: {}=\"{}\" is not a whole number", name, *value);
  return result;
}

// A batch script or an interactive shell under Slurm has SLURM_PROCID=0 and SLURM_NTASKS too, without being one of the
// tasks: it is no step, or one of the reserved ones, whose numbers are the last of 32 bits.
bool inside_slurm_step(const Environment& environment) {
  constexpr int64_t kFirstReservedStep = 0xfffffff0;
  const auto step = number(environment, "SLURM_STEP_ID");
  return step && *step < kFirstReservedStep;
}

struct RankAndSize {
  const char* launcher;
  const char* rank_name;
  const char* size_name;
};

bool read_pair(const Environment& environment, const RankAndSize& names, Launch& launch) {
  const auto rank = number(environment, names.rank_name);
  const auto size = number(environment, names.size_name);
  if (!rank || !size) return false;
  constexpr int64_t kMostRanks = 1 << 20;
  if (*size < 1 || *size > kMostRanks || *rank < 0 || *rank >= *size)
    fail(TERN_INVALID_ARGUMENT, "environment: {}={} with {}={} cannot be; ranks count from 0", names.rank_name, *rank, names.size_name,
         *size);
  launch.launcher = names.launcher;
  launch.rank = static_cast<int>(*rank);
  launch.num_ranks = static_cast<int>(*size);
  return true;
}

// What the launcher says, apart from an address that the user gave. `host` stays empty if it does not say.
Launch ask_launcher(const Environment& environment) {
  Launch launch;
  if (read_pair(environment, {"torchrun", "RANK", "WORLD_SIZE"}, launch)) {
    launch.job =
        fmt::format("torchrun {} {}", text(environment, "TORCHELASTIC_RUN_ID").value_or(""), text(environment, "MASTER_PORT").value_or(""));
    if (number(environment, "LOCAL_WORLD_SIZE") == launch.num_ranks) launch.host = "127.0.0.1";
  } else if (read_pair(environment, {"Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"}, launch)) {
    launch.job = fmt::format("Open MPI {}", text(environment, "PMIX_NAMESPACE").value_or(""));
    if (number(environment, "OMPI_COMM_WORLD_LOCAL_SIZE") == launch.num_ranks) launch.host = "127.0.0.1";
  } else if (inside_slurm_step(environment) && read_pair(environment, {"Slurm", "SLURM_PROCID", "SLURM_NTASKS"}, launch)) {
    launch.job =
        fmt::format("Slurm {}.{}", text(environment, "SLURM_JOB_ID").value_or(""), text(environment, "SLURM_STEP_ID").value_or(""));
    if (number(environment, "SLURM_STEP_NUM_NODES") == 1)
      launch.host = "127.0.0.1";
    else if (const auto hosts = text(environment, "SLURM_STEP_NODELIST"))
      launch.host = first_host(*hosts);
  } else {
    launch.launcher = "no launcher";
  }
  return launch;
}

// Below the range from which Linux takes ports for outgoing connections (32768 and up), so that few are in use.
uint16_t derived_port(const std::string& job) {
  constexpr uint64_t kFirst = 20000, kCount = 12768;
  return static_cast<uint16_t>(kFirst + stable_hash(job) % kCount);
}

uint16_t checked_port(const char* name, int64_t port) {
  if (port < 1 || port > 65535) fail(TERN_INVALID_ARGUMENT, "environment: the port {} of {} is not in 1..65535", port, name);
  return static_cast<uint16_t>(port);
}

void parse_rendezvous(const std::string& value, Launch& launch) {
  const size_t colon = value.rfind(':');
  int64_t port = 0;
  const char* end = value.data() + value.size();
  const char* begin = colon == std::string::npos ? end : value.data() + colon + 1;
  const auto [stop, error] = std::from_chars(begin, end, port);
  if (error != std::errc() || stop != end || colon == 0)
    fail(TERN_INVALID_ARGUMENT, "environment: TERN_RENDEZVOUS=\"{}\" must be host:port", value);
  launch.host = value.substr(0, colon);
  if (launch.host.size() > 2 && launch.host.front() == '[' && launch.host.back() == ']')
    launch.host = launch.host.substr(1, launch.host.size() - 2);
  launch.port = checked_port("TERN_RENDEZVOUS", port);
}

}  // namespace

Launch find_launch(const Environment& environment, const std::optional<std::string>& rendezvous) {
  Launch launch = ask_launcher(environment);
  if (launch.num_ranks == 1) return launch;

  if (rendezvous) {
    parse_rendezvous(*rendezvous, launch);
    return launch;
  }
  launch.port = derived_port(launch.job);
  if (const auto host = text(environment, "MASTER_ADDR")) {
    launch.host = *host;
    if (const auto port = number(environment, "MASTER_PORT"))
      launch.port = checked_port("MASTER_PORT", *port == 65535 ? 65534 : checked_port("MASTER_PORT", *port) + 1);
  }
  if (launch.host.empty())
    fail(TERN_INVALID_ARGUMENT,
         "environment: {} started {} ranks but does not say where rank 0 is; set TERN_RENDEZVOUS=host:port (or MASTER_ADDR and "
         "MASTER_PORT) to an address of rank 0's host, equal on all ranks",
         launch.launcher, launch.num_ranks);
  return launch;
}

std::string first_host(const std::string& list) {
  std::string host;
  for (size_t i = 0; i < list.size() && list[i] != ','; ++i) {
    if (list[i] != '[') {
      host += list[i];
      continue;
    }
    const size_t close = list.find(']', i);
    const size_t number_end = list.find_first_of("-,]", i);
    if (close == std::string::npos) break;
    host += list.substr(i + 1, number_end - i - 1);
    i = close;
  }
  return host;
}

}  // namespace tern
