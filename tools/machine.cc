// SPDX-License-Identifier: Apache-2.0
#include "tools/machine.h"

#include <fmt/format.h>
#include <sched.h>
#include <sys/resource.h>
#include <sys/statvfs.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <filesystem>
#include <fstream>
#include <sstream>

namespace tern::tools {
namespace {

std::optional<int64_t> parse_number(const std::string& text) {
  int64_t value = 0;
  const auto [stop, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || stop == text.data()) return std::nullopt;
  return value;
}

// The path of this process's control group below its mount: of the unified hierarchy, or of a controller of the first version.
std::string cgroup_path(const std::string& controller) {
  std::ifstream file("/proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);  // "cpu,cpuacct"; "" in the unified hierarchy
    const bool found = fmt::format(",{},", controllers).find(fmt::format(",{},", controller)) != std::string::npos;
    if (found && controllers.empty() == controller.empty()) return line.substr(second + 1);
  }
  return "/";
}

// In a container the own group is often mounted as the root, so both places are tried.
std::string read_cgroup(const std::string& controller, const std::string& name) {
  const std::string root = controller.empty() ? "/sys/fs/cgroup" : "/sys/fs/cgroup/" + controller;
  const std::string own = read_line(root + cgroup_path(controller) + "/" + name);
  return own.empty() ? read_line(root + "/" + name) : own;
}

std::optional<double> read_cpu_limit() {
  std::istringstream unified(read_cgroup("", "cpu.max"));  // "200000 100000" or "max 100000"
  double quota = 0, period = 0;
  if (unified >> quota >> period && period > 0) return quota / period;
  const auto quota_us = parse_number(read_cgroup("cpu", "cpu.cfs_quota_us")),
             period_us = parse_number(read_cgroup("cpu", "cpu.cfs_period_us"));
  if (quota_us && period_us && *quota_us > 0 && *period_us > 0) return static_cast<double>(*quota_us) / static_cast<double>(*period_us);
  return std::nullopt;
}

// What the control group still grants.
std::optional<int64_t> read_memory_left() {
  const auto left = [](const std::string& limit, const std::string& used) -> std::optional<int64_t> {
    const auto limit_bytes = parse_number(limit), used_bytes = parse_number(used);
    if (!limit_bytes || !used_bytes) return std::nullopt;
    return std::max<int64_t>(0, *limit_bytes - *used_bytes);
  };
  if (const auto unified = left(read_cgroup("", "memory.max"), read_cgroup("", "memory.current"))) return unified;
  return left(read_cgroup("memory", "memory.limit_in_bytes"), read_cgroup("memory", "memory.usage_in_bytes"));
}

// The number after `name` in /proc/meminfo; sizes there are in KiB.
int64_t meminfo(const std::string& name) {
  std::ifstream file("/proc/meminfo");
  for (std::string word; file >> word;) {
    int64_t value = 0;
    if (word == name + ":" && file >> value) return value;
    file.ignore(4096, '\n');
  }
  return 0;
}

std::string cpu_model() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    const size_t colon = line.find(':');
    if (line.starts_with("model name") && colon != std::string::npos && colon + 2 < line.size()) return line.substr(colon + 2);
  }
  return "unknown";
}

uint64_t limit_of(int resource) {
  rlimit limit{};
  if (getrlimit(static_cast<__rlimit_resource_t>(resource), &limit) != 0) return 0;
  return limit.rlim_cur == RLIM_INFINITY ? UINT64_MAX : limit.rlim_cur;
}

}  // namespace

std::string read_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

CpuFacts read_cpu_facts() {
  CpuFacts facts;
  facts.model = cpu_model();
  facts.num_cores = static_cast<int>(std::max(1L, sysconf(_SC_NPROCESSORS_ONLN)));
  cpu_set_t affinity;
  facts.num_usable = sched_getaffinity(0, sizeof affinity, &affinity) == 0 ? CPU_COUNT(&affinity) : facts.num_cores;
  facts.cgroup_limit = read_cpu_limit();
  for (int node = 0;; ++node) {
    const std::string path = fmt::format("/sys/devices/system/node/node{}/cpulist", node);
    if (!std::filesystem::exists(path)) break;
    facts.numa_node_cpus.push_back(read_line(path));
  }
  return facts;
}

MemoryFacts read_memory_facts() {
  MemoryFacts facts;
  facts.total_bytes = meminfo("MemTotal") * 1024;
  facts.available_bytes = meminfo("MemAvailable") * 1024;
  if (const auto left = read_memory_left()) facts.available_bytes = std::min(facts.available_bytes, *left);
  struct statvfs shm{};
  if (statvfs("/dev/shm", &shm) == 0) facts.shm_free_bytes = static_cast<int64_t>(shm.f_bavail * shm.f_frsize);
  facts.huge_pages = meminfo("HugePages_Total");
  facts.huge_page_bytes = meminfo("Hugepagesize") * 1024;
  facts.transparent_huge_pages = read_line("/sys/kernel/mm/transparent_hugepage/enabled");
  facts.shared_huge_pages = read_line("/sys/kernel/mm/transparent_hugepage/shmem_enabled");
  facts.locked_limit_bytes = limit_of(RLIMIT_MEMLOCK);
  facts.open_files_limit = limit_of(RLIMIT_NOFILE);
  return facts;
}

std::string kernel_release() {
  utsname names{};
  return uname(&names) == 0 ? names.release : "unknown";
}

std::string human_bytes(double num_bytes) {
  constexpr const char* kUnits[] = {"bytes", "KiB", "MiB", "GiB", "TiB", "PiB"};
  size_t unit = 0;
  for (; num_bytes >= 1024 && unit + 1 < std::size(kUnits); ++unit) num_bytes /= 1024;
  return fmt::format("{:.{}f} {}", num_bytes, unit == 0 ? 0 : 1, kUnits[unit]);
}

std::string version_text(int32_t version) { return fmt::format("{}.{}.{}", version / 10000, version / 100 % 100, version % 100); }

}  // namespace tern::tools
