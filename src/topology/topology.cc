// SPDX-License-Identifier: Apache-2.0
#include "topology/topology.h"

#include <sched.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <csignal>
#include <cstring>
#include <fstream>
#include <functional>
#include <iterator>
#include <map>
#include <optional>
#include <sstream>
#include <tuple>
#include <type_traits>

#include "base/error.h"
#include "base/random.h"

namespace tern {
namespace {

static_assert(std::is_trivially_copyable_v<RankInfo>);
constexpr uint64_t kFormat = 0x5445524e'0000'0002;  // grows with every change of RankInfo

template <size_t kBytes>
void copy_text(std::array<char, kBytes>& to, const std::string& from) {
  to.fill('\0');
  from.copy(to.data(), kBytes - 1);
}

uint64_t inode(const char* path) {
  struct stat status;
  return ::stat(path, &status) == 0 ? status.st_ino : 0;
}

std::string host_name() {
  char name[256] = {};
  return ::gethostname(name, sizeof(name) - 1) == 0 ? name : "unknown";
}

std::string read_boot_id() {
  std::string id;
  std::ifstream("/proc/sys/kernel/random/boot_id") >> id;
  return id.empty() ? host_name() : id;
}

using Cores = decltype(RankInfo::cores);

// All, if the kernel does not say, as where it has numbers for more cores than fit.
Cores usable_cores() {
  cpu_set_t set;
  Cores cores;
  static_assert(sizeof(set) == sizeof(cores));
  cores.fill(~uint64_t{0});
  if (::sched_getaffinity(0, sizeof(set), &set) == 0) std::memcpy(cores.data(), &set, sizeof(set));
  return cores;
}

struct ProcessStat {
  char state;
  uint64_t start_time;
};

std::optional<ProcessStat> read_stat(int64_t pid) {
  std::ifstream file(fmt::format("/proc/{}/stat", pid));
  const std::string line{std::istreambuf_iterator<char>(file), {}};
  // "pid (name) state ...": the name may hold anything, parentheses too. The start time is the 22nd field of all.
  const size_t name_end = line.rfind(')');
  if (name_end == std::string::npos) return std::nullopt;
  std::istringstream fields(line.substr(name_end + 1));
  ProcessStat stat = {};
  std::string skipped;
  fields >> stat.state;
  for (int field = 4; field < 22; ++field) fields >> skipped;
  fields >> stat.start_time;
  if (!fields) return std::nullopt;
  return stat;
}

uint64_t process_nonce() {
  static const auto nonce = random_value<uint64_t>("topology");
  return nonce;
}

}  // namespace

RankInfo describe_self(const std::string& declared_node) {
  RankInfo info = {};
  if (declared_node.size() >= info.node_name.size())
    fail(TERN_INVALID_ARGUMENT, "group: the node's name has {} bytes, at most {} are allowed", declared_node.size(),
         info.node_name.size() - 1);
  info.format = kFormat;
  info.network_namespace = inode("/proc/self/ns/net");
  info.pid_namespace = inode("/proc/self/ns/pid");
  info.pid = ::getpid();
  if (const auto stat = read_stat(info.pid)) info.start_time = stat->start_time;
  info.process_nonce = process_nonce();
  copy_text(info.boot_id, read_boot_id());
  info.cores = usable_cores();
  copy_text(info.host_name, host_name());
  copy_text(info.node_name, declared_node);
  return info;
}

Topology make_topology(int rank, std::vector<RankInfo> ranks) {
  Topology t;
  t.rank = rank;
  t.num_ranks = static_cast<int>(ranks.size());
  t.ranks = std::move(ranks);
  // Declared name, or what makes up a host where none is declared.
  using NodeKey = std::tuple<std::string, std::string, uint64_t>;
  std::map<NodeKey, int> index_of;
  for (int r = 0; r < t.num_ranks; ++r) {
    const RankInfo& info = t.ranks[r];
    if (info.format != kFormat)
      fail(TERN_MISMATCH, "group: rank {} runs another version of Tern than rank {}; all ranks must run the same", r, rank);
    const bool declared = info.node_name[0] != '\0';
    const NodeKey key = declared ? NodeKey(info.node_name.data(), "", 0) : NodeKey("", info.boot_id.data(), info.network_namespace);
    const auto [entry, is_new] = index_of.try_emplace(key, t.num_nodes);
    if (is_new) {
      ++t.num_nodes;
      t.ranks_in_node.push_back(0);
    }
    t.node.push_back(entry->second);
    t.rank_in_node.push_back(t.ranks_in_node[entry->second]++);
  }
  return t;
}

Topology discover(Bootstrap& bootstrap, const std::string& declared_node, Deadline deadline) {
  const RankInfo self = describe_self(declared_node);
  std::vector<RankInfo> ranks(bootstrap.num_ranks());
  bootstrap.allgather(&self, ranks.data(), sizeof(self), deadline);
  return make_topology(bootstrap.rank(), std::move(ranks));
}

bool Topology::same_host(int r) const {
  const RankInfo& a = ranks[rank];
  const RankInfo& b = ranks[r];
  return a.boot_id == b.boot_id && a.network_namespace == b.network_namespace;
}

bool Topology::same_process(int r) const {
  const RankInfo& a = ranks[rank];
  const RankInfo& b = ranks[r];
  return same_host(r) && a.pid_namespace == b.pid_namespace && a.pid == b.pid && a.process_nonce == b.process_nonce;
}

bool ranks_share_cores(const Topology& topology) {
  struct Machine {
    Cores cores = {};
    int num_ranks = 0;
  };
  std::map<decltype(RankInfo::boot_id), Machine> machines;
  for (const RankInfo& rank : topology.ranks) {
    Machine& machine = machines[rank.boot_id];
    ++machine.num_ranks;
    std::ranges::transform(machine.cores, rank.cores, machine.cores.begin(), std::bit_or());
  }
  return std::ranges::any_of(machines, [](const auto& entry) {
    const auto& [cores, num_ranks] = entry.second;
    int num_cores = 0;
    for (const uint64_t word : cores) num_cores += std::popcount(word);
    return num_ranks > num_cores;
  });
}

HostSeat seat_on_host(const Topology& topology) {
  HostSeat seat{0, 0};
  for (int r = 0; r < topology.num_ranks; ++r) {
    if (!topology.same_host(r)) continue;
    ++seat.num_ranks;
    if (r < topology.rank) ++seat.idx;
  }
  return seat;
}

std::string describe_process(const RankInfo& info) {
  const RankInfo self = describe_self("");
  const bool visible =
      info.boot_id == self.boot_id && info.pid_namespace != 0 && info.pid_namespace == self.pid_namespace && info.start_time != 0;
  if (!visible) return "";
  const auto stat = read_stat(info.pid);
  if (!stat) {
    // Hidden from us, or not there?
    const bool gone = ::kill(static_cast<pid_t>(info.pid), 0) != 0 && errno == ESRCH;
    return gone ? fmt::format("process {} has exited", info.pid) : "";
  }
  if (stat->start_time != info.start_time || stat->state == 'Z' || stat->state == 'X')
    return fmt::format("process {} has exited", info.pid);
  if (stat->state == 'T' || stat->state == 't') return fmt::format("process {} is stopped", info.pid);
  return fmt::format("process {} is running", info.pid);
}

bool is_known_to_be_down(const Topology& topology, int rank) {
  const std::string text = describe_process(topology.ranks[rank]);
  return !text.empty() && !text.ends_with("is running");
}

std::string describe_rank(const Topology& topology, int rank) {
  const std::string text = describe_process(topology.ranks[rank]);
  return text.empty() ? "" : fmt::format(" ({})", text);
}

}  // namespace tern
