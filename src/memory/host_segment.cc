// SPDX-License-Identifier: Apache-2.0
#include "memory/host_segment.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <string>

#include "base/error.h"

// Of Linux 5.14; older headers do not have it.
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

namespace tern {
namespace {

constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;

struct Backing {
  Fd fd;
  std::byte* data;
};

size_t page_bytes() { return static_cast<size_t>(::sysconf(_SC_PAGESIZE)); }

[[noreturn]] void fail_memory(const char* call, size_t bytes) {
  const std::string cause = errno_text(call);
  const bool exhausted = errno == ENOMEM || errno == ENOSPC || errno == EFAULT;
  fail(exhausted ? TERN_OUT_OF_MEMORY : TERN_SYSTEM_ERROR,
       "segment of {} bytes: {}; fewer bytes, or more memory for this machine or container", bytes, cause);
}

// What the system can give without killing anybody for it; the largest number if it does not say.
uint64_t available_bytes() {
  uint64_t available = 0;
  bool known = false;
  std::ifstream meminfo("/proc/meminfo");
  std::string name, unit;
  for (uint64_t kib = 0; meminfo >> name >> kib && std::getline(meminfo, unit);) {
    if (name != "MemAvailable:" && name != "SwapFree:") continue;
    available += kib << 10;
    known = true;
  }
  if (!known) available = UINT64_MAX;
  uint64_t limit = 0;  // of this container; the word "max" does not parse and leaves no limit
  if (std::ifstream("/sys/fs/cgroup/memory.max") >> limit) available = std::min(available, limit);
  return available;
}

// Linux promises memory that it does not have, and kills a process when the promise is called in. So what can be known
// beforehand is checked beforehand.
void check_available(size_t bytes) {
  const uint64_t available = available_bytes();
  if (bytes > available)
    fail(TERN_OUT_OF_MEMORY, "segment of {} bytes: the system has {} bytes left; ask for less, or give this machine or container more",
         bytes, available);
}

// Without MADV_POPULATE_WRITE: reserve the pages in the file, then touch them.
void populate_by_touching(int fd, std::byte* data, size_t bytes) {
  if (fd >= 0 && ::fallocate(fd, 0, 0, static_cast<off_t>(bytes)) != 0) fail_memory("fallocate", bytes);
  for (size_t i = 0; i < bytes; i += page_bytes()) {
    auto* byte = reinterpret_cast<volatile unsigned char*>(data + i);
    *byte = *byte;
  }
}

void populate(int fd, std::byte* data, size_t bytes) {
  ::madvise(data, bytes, MADV_HUGEPAGE);
  while (::madvise(data, bytes, MADV_POPULATE_WRITE) != 0) {
    if (errno == EINTR || errno == EAGAIN) continue;
    if (errno != EINVAL) fail_memory("madvise", bytes);
    return populate_by_touching(fd, data, bytes);
  }
}

std::byte* map_memory(int fd, size_t bytes) {
  const int flags = fd >= 0 ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS;
  void* data = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, fd, 0);
  if (data == MAP_FAILED) fail_memory("mmap", bytes);
  try {
    populate(fd, static_cast<std::byte*>(data), bytes);
  } catch (...) {
    ::munmap(data, bytes);
    throw;
  }
  return static_cast<std::byte*>(data);
}

Backing make_backing(size_t bytes, SharedBy shared_by) {
  check_available(bytes);
  Fd fd;
  if (shared_by == SharedBy::kProcesses) {
    fd = Fd(::memfd_create("tern", MFD_CLOEXEC | MFD_ALLOW_SEALING));
    if (!fd) fail_errno("memfd_create", "segment");
    if (::ftruncate(fd.get(), static_cast<off_t>(bytes)) != 0) fail_memory("ftruncate", bytes);
    if (::fcntl(fd.get(), F_ADD_SEALS, kSeals) != 0) fail_errno("fcntl(F_ADD_SEALS)", "segment");
  }
  std::byte* data = map_memory(fd.get(), bytes);
  return {std::move(fd), data};
}

}  // namespace

std::shared_ptr<HostSegment> HostSegment::create(size_t bytes, SharedBy shared_by) {
  const size_t page = page_bytes();
  if (bytes == 0 || bytes > SIZE_MAX / 4) fail(TERN_INVALID_ARGUMENT, "segment of {} bytes cannot be", bytes);
  const size_t rounded_bytes = (bytes + page - 1) / page * page;
  Backing backing = make_backing(rounded_bytes, shared_by);
  return std::shared_ptr<HostSegment>(new HostSegment(backing.data, rounded_bytes, std::move(backing.fd)));
}

std::shared_ptr<HostSegment> HostSegment::map(Fd fd) {
  struct stat status;
  if (::fstat(fd.get(), &status) != 0) fail_errno("fstat", "segment of a peer");
  const int seals = ::fcntl(fd.get(), F_GET_SEALS);
  if (seals < 0 || (seals & kSeals) != kSeals || status.st_size <= 0)
    fail(TERN_SYSTEM_ERROR,
         "segment of a peer: the descriptor is no sealed memory (size {}, seals {}); it was not made by HostSegment::create",
         static_cast<int64_t>(status.st_size), seals);
  const auto size_bytes = static_cast<size_t>(status.st_size);
  std::byte* data = map_memory(fd.get(), size_bytes);
  return std::shared_ptr<HostSegment>(new HostSegment(data, size_bytes, std::move(fd)));
}

HostSegment::~HostSegment() { ::munmap(data(), size()); }

void HostSegment::renew() {
  if (fd() < 0) return;
  Backing fresh = make_backing(size(), SharedBy::kProcesses);
  std::memcpy(fresh.data, data(), size());
  // Moves the fresh pages over the old ones in one step: at no moment is there a hole, or an address that somebody else may take.
  if (::mremap(fresh.data, size(), size(), MREMAP_MAYMOVE | MREMAP_FIXED, data()) == MAP_FAILED) {
    const std::string cause = errno_text("mremap");
    ::munmap(fresh.data, size());
    fail(TERN_SYSTEM_ERROR, "renewing a segment of {} bytes: {}", size(), cause);
  }
  replace_fd(std::move(fresh.fd));
}

}  // namespace tern
