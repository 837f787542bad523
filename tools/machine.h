// SPDX-License-Identifier: Apache-2.0
// Facts about this machine that the command reports and decides by. All from /proc, /sys and system calls; what cannot
// be read is left at its default.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace tern::tools {

struct CpuFacts {
  std::string model = "unknown";
  int num_cores = 1;                        // online
  int num_usable = 1;                       // in this process's affinity
  std::optional<double> cgroup_limit;       // cores' worth of time that the control group grants
  std::vector<std::string> numa_node_cpus;  // "0-15" per node
};

struct MemoryFacts {
  int64_t total_bytes = 0;
  int64_t available_bytes = 0;            // the kernel's estimate, bounded by the control group
  std::optional<int64_t> shm_free_bytes;  // /dev/shm
  int64_t huge_pages = 0;
  int64_t huge_page_bytes = 0;
  std::string transparent_huge_pages;  // "always [madvise] never"
  std::string shared_huge_pages;
  uint64_t locked_limit_bytes = 0;  // UINT64_MAX: none
  uint64_t open_files_limit = 0;
};

CpuFacts read_cpu_facts();
MemoryFacts read_memory_facts();
std::string kernel_release();

// The first line of a small file, without the newline; "" if it cannot be read.
std::string read_line(const std::string& path);

// "14.2 MiB": for people.
std::string human_bytes(double num_bytes);

// "0.1.0"
std::string version_text(int32_t version);

}  // namespace tern::tools
