// SPDX-License-Identifier: Apache-2.0
// Ordered accesses to memory that other GPUs, or the host, read and write; clocks and fences. The scope is in the name: gpu (one device) or
// sys (all devices and the host).
#pragma once

#include <cstdint>

namespace tern::device {

__device__ __forceinline__ uint64_t load_acquire_sys(const uint64_t* word) {
  uint64_t value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
  return value;
}
__device__ __forceinline__ uint64_t load_relaxed_sys(const uint64_t* word) {
  uint64_t value;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
  return value;
}
__device__ __forceinline__ uint32_t load_relaxed_sys(const uint32_t* word) {
  uint32_t value;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
}
__device__ __forceinline__ void store_release_sys(uint64_t* word, uint64_t value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(word), "l"(value) : "memory");
}
__device__ __forceinline__ void store_relaxed_sys(uint64_t* word, uint64_t value) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(word), "l"(value) : "memory");
}
__device__ __forceinline__ uint32_t load_acquire_gpu(const uint32_t* word) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
}
// Adds, and returns what was there before. Publishes what this thread has written and seen, and sees what the others published.
__device__ __forceinline__ uint32_t add_acq_rel_gpu(uint32_t* word, uint32_t value) {
  uint32_t before;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;" : "=r"(before) : "l"(word), "r"(value) : "memory");
  return before;
}
// Of the block, in shared memory: sets bits, and publishes to those who acquire them what this thread has written and seen.
__device__ __forceinline__ void or_release_block(uint64_t* word, uint64_t bits) {
  asm volatile("red.release.cta.shared::cta.or.b64 [%0], %1;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(word))), "l"(bits)
               : "memory");
}
__device__ __forceinline__ uint64_t load_acquire_gpu(const uint64_t* word) {
  uint64_t value;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
  return value;
}

__device__ __forceinline__ void store_release_gpu(uint64_t* word, uint64_t value) {
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(word), "l"(value) : "memory");
}

__device__ __forceinline__ uint64_t load_acquire_block(const uint64_t* word) {
  uint64_t value;
  asm volatile("ld.acquire.cta.shared::cta.u64 %0, [%1];"
               : "=l"(value)
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(word)))
               : "memory");
  return value;
}
__device__ __forceinline__ void fence_sys() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }

// Nanoseconds, the same clock on the whole device; it moves in steps of up to a microsecond.
__device__ __forceinline__ uint64_t global_timer_ns() {
  uint64_t time;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(time)::"memory");
  return time;
}

// About so long.
__device__ __forceinline__ void pause(uint32_t ns) { asm volatile("nanosleep.u32 %0;" ::"r"(ns)); }

__device__ __forceinline__ uint32_t lane_idx() {
  uint32_t lane;
  asm("mov.u32 %0, %laneid;" : "=r"(lane));
  return lane;
}
__device__ __forceinline__ uint32_t lanes_below() {
  uint32_t mask;
  asm("mov.u32 %0, %lanemask_lt;" : "=r"(mask));
  return mask;
}

// A kernel that was launched to follow this one closely may take its place on the GPU when all blocks have called this or ended. What it may
// read of this kernel's work it still waits for, with await_kernel_before(). Without such a kernel, and before sm_90, nothing happens.
__device__ __forceinline__ void allow_next_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Returns when the kernels before have ended, and their writes can be seen.
__device__ __forceinline__ void await_kernel_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// All threads of a warp: the bits that any of them has.
__device__ __forceinline__ uint64_t or_of_warp(uint64_t bits) {
  const uint32_t low = __reduce_or_sync(~0u, static_cast<uint32_t>(bits)), high = __reduce_or_sync(~0u, static_cast<uint32_t>(bits >> 32));
  return uint64_t{high} << 32 | low;
}

// A barrier of `num_threads` threads of the block, whole warps; 0 is __syncthreads().
__device__ __forceinline__ void sync_some_warps(int barrier, int num_threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(num_threads) : "memory");
}

// Counts the thread in at such a barrier without waiting there: those who do see what it has written before.
__device__ __forceinline__ void arrive_at_barrier(int barrier, int num_threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(num_threads) : "memory");
}

}  // namespace tern::device
