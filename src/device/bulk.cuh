// SPDX-License-Identifier: Apache-2.0
// Bulk copies between global and shared memory (the copy engine of an SM: TMA, sm_90 and newer). Addresses and sizes are multiples of 16 bytes.
//
// They go through a memory proxy of their own. fence_async_proxy() orders them with ordinary accesses: on the writer's side between the
// completion of bulk stores and the release of a flag, on the reader's side between the acquire of the flag and the bulk load.
// PTX ISA, "Asynchronous Data Movement: cp.async.bulk" and "Async proxy".
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define TERN_HAS_BULK_COPIES 1
#else
#define TERN_HAS_BULK_COPIES 0
#endif

namespace tern::device {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) { return static_cast<uint32_t>(__cvta_generic_to_shared(pointer)); }

#if TERN_HAS_BULK_COPIES

// Of global memory alone: the fence of all memory also waits until everything this thread has stored is seen by the whole GPU.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// Counts the bytes of bulk loads that have arrived; `phase` alternates 0, 1, 0, ... with each use.
__device__ __forceinline__ void init_arrivals(uint64_t* arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(arrivals)) : "memory");
}
// Before the memory is used otherwise, or initialised again.
__device__ __forceinline__ void end_arrivals(uint64_t* arrivals) {
  asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(shared_address(arrivals)) : "memory");
}
// Makes initialised arrivals visible to the copy engine.
__device__ __forceinline__ void fence_arrivals_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void expect_bytes(uint64_t* arrivals, uint32_t num_bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(arrivals)), "r"(num_bytes) : "memory");
}
__device__ __forceinline__ bool try_await_bytes(uint64_t* arrivals, uint32_t phase) {
  uint32_t done;
  asm volatile("{\n .reg .pred p;\n mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;\n}"
               : "=r"(done)
               : "r"(shared_address(arrivals)), "r"(phase)
               : "memory");
  return done != 0;
}
// Ends always: a bulk load from mapped memory completes, whatever the other ranks do.
__device__ __forceinline__ void await_bytes(uint64_t* arrivals, uint32_t phase) {
  while (!try_await_bytes(arrivals, phase)) {
  }
}

__device__ __forceinline__ void bulk_load(void* to_shared, const void* from_global, uint32_t num_bytes, uint64_t* arrivals) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(to_shared)),
               "l"(from_global), "r"(num_bytes), "r"(shared_address(arrivals))
               : "memory");
}
__device__ __forceinline__ void bulk_store(void* to_global, const void* from_shared, uint32_t num_bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to_global), "r"(shared_address(from_shared)),
               "r"(num_bytes)
               : "memory");
}
// The stores of this thread since the last call become one group.
__device__ __forceinline__ void close_store_group() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Waits until all but the newest `kPending` groups have read their shared memory, or (await_stored) are complete.
template <int kPending>
__device__ __forceinline__ void await_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
template <int kPending>
__device__ __forceinline__ void await_stored() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

#else  // never called: kernels with bulk copies are not launched on these devices

__device__ __forceinline__ void fence_async_proxy() {}
__device__ __forceinline__ void init_arrivals(uint64_t*) {}
__device__ __forceinline__ void end_arrivals(uint64_t*) {}
__device__ __forceinline__ void fence_arrivals_init() {}
__device__ __forceinline__ void expect_bytes(uint64_t*, uint32_t) {}
__device__ __forceinline__ bool try_await_bytes(uint64_t*, uint32_t) { return true; }
__device__ __forceinline__ void await_bytes(uint64_t*, uint32_t) {}
__device__ __forceinline__ void bulk_load(void*, const void*, uint32_t, uint64_t*) {}
__device__ __forceinline__ void bulk_store(void*, const void*, uint32_t) {}
__device__ __forceinline__ void close_store_group() {}
template <int kPending>
__device__ __forceinline__ void await_read() {}
template <int kPending>
__device__ __forceinline__ void await_stored() {}

#endif

}  // namespace tern::device
