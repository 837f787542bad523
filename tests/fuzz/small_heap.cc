// SPDX-License-Identifier: Apache-2.0
// Replaces the program's operators new and delete.
#include "small_heap.h"

#include <atomic>
#include <cstdlib>
#include <new>

namespace {

constexpr std::size_t kMostBytes = std::size_t{8} << 20;

std::atomic<bool> is_small{false};

void* allocate(std::size_t bytes) noexcept { return is_small && bytes > kMostBytes ? nullptr : std::malloc(bytes == 0 ? 1 : bytes); }

void* allocate_or_throw(std::size_t bytes) {
  void* memory = allocate(bytes);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

}  // namespace

namespace tern::fuzz {

SmallHeap::SmallHeap() { is_small = true; }
SmallHeap::~SmallHeap() { is_small = false; }

}  // namespace tern::fuzz

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
