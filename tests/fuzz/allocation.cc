// SPDX-License-Identifier: Apache-2.0
// The heap of a small machine: what asks for more than a few MiB at once gets std::bad_alloc, also under sanitizers, which would
// end the process. So an absurd size that is not refused before memory is asked for fails alike everywhere.
#include <cstdlib>
#include <new>

namespace {

constexpr std::size_t kMostBytes = std::size_t{8} << 20;

void* allocate(std::size_t bytes) noexcept { return bytes > kMostBytes ? nullptr : std::malloc(bytes == 0 ? 1 : bytes); }

void* allocate_or_throw(std::size_t bytes) {
  void* memory = allocate(bytes);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

}  // namespace

void* operator new(std::size_t bytes) { return allocate_or_throw(bytes); }
void* operator new[](std::size_t bytes) { return allocate_or_throw(bytes); }
void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept { return allocate(bytes); }
void* operator new[](std::size_t bytes, const std::nothrow_t&) noexcept { return allocate(bytes); }
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete(void* memory, const std::nothrow_t&) noexcept { std::free(memory); }
void operator delete[](void* memory, const std::nothrow_t&) noexcept { std::free(memory); }
