// SPDX-License-Identifier: Apache-2.0
#include "tools/kernel_features.h"

#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

#include "base/error.h"
#include "base/fd.h"
#include "tools/machine.h"

namespace tern::tools {
namespace {

constexpr size_t kBytes = 65536;
constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE, newer than some C libraries

// A file in memory, mapped; the mapping goes with the object.
class SharedPages {
 public:
  SharedPages() : fd_(memfd_create("tern-doctor", MFD_CLOEXEC)) {
    if (fd_ && ftruncate(fd_.get(), kBytes) == 0) memory_ = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd_.get(), 0);
  }
  ~SharedPages() {
    if (works()) munmap(memory_, kBytes);
  }
  SharedPages(const SharedPages&) = delete;
  SharedPages& operator=(const SharedPages&) = delete;

  bool works() const { return memory_ != MAP_FAILED; }
  void* data() const { return memory_; }

 private:
  Fd fd_;
  void* memory_ = MAP_FAILED;
};

KernelFeature probe_pidfd() {
  const Fd pidfd(static_cast<int>(syscall(SYS_pidfd_open, getpid(), 0)));
  return {"pidfd", static_cast<bool>(pidfd), "notices that a process has ended; Linux 5.3"};
}

KernelFeature probe_ptrace_scope() {
  const std::string scope = read_line("/proc/sys/kernel/yama/ptrace_scope");
  return {"ptrace_scope", scope.empty() || scope == "0" || scope == "1",
          fmt::format("{}; from 2 on, ranks of a launcher cannot share memory by /proc", scope.empty() ? "no Yama" : scope)};
}

}  // namespace

std::vector<KernelFeature> probe_kernel_features() {
  const SharedPages pages;
  std::vector<KernelFeature> features;
  features.push_back({"memfd", pages.works(), pages.works() ? "windows leave nothing behind" : errno_text("memfd_create")});
  const bool futex = pages.works() && syscall(SYS_futex, pages.data(), FUTEX_WAKE, 1, nullptr, nullptr, 0) >= 0;
  features.push_back({"futex", futex, "ranks sleep while they wait, also across processes"});
  const bool populate = pages.works() && madvise(pages.data(), kBytes, kPopulateWrite) == 0;
  features.push_back({"MADV_POPULATE_WRITE", populate,
                      populate ? "pages are there before the first exchange" : "needs Linux 5.14; first exchanges are slower without"});
  features.push_back(probe_pidfd());
  features.push_back(probe_ptrace_scope());
  return features;
}

}  // namespace tern::tools
