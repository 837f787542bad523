// SPDX-License-Identifier: Apache-2.0
#include "tools/link_copy.h"

#include "device/bulk.cuh"
#include "tools/cuda_call.h"

namespace tern::tools {
namespace {

constexpr int kWarpThreads = 32;
constexpr int kBulkWarps = 8, kStages = 3;
constexpr int kVectorWarps = 16;
constexpr uint32_t kChunkBytes = 8192;

constexpr int ring_bytes(uint32_t chunk_bytes) { return static_cast<int>(kBulkWarps * kStages * chunk_bytes); }

// The chunks of one warp: every num_warps-th, in an order that uses all links at once.
struct Chunks {
  const LinkCopy& copy;
  uint32_t next, stride;

  __device__ bool done() const { return next >= copy.chunks_per_part * copy.num_parts; }
  __device__ void advance() { next += stride; }
  __device__ int64_t offset_bytes() const { return int64_t{next / copy.num_parts} * copy.chunk_bytes; }
  __device__ const std::byte* from() const { return copy.parts[next % copy.num_parts].from + offset_bytes(); }
  __device__ std::byte* to() const { return copy.parts[next % copy.num_parts].to + offset_bytes(); }
};

__device__ Chunks chunks_of_warp(const LinkCopy& copy) {
  const uint32_t num_warps = blockDim.x / kWarpThreads, warp = threadIdx.x / kWarpThreads;
  return {copy, blockIdx.x * num_warps + warp, gridDim.x * num_warps};
}

// One thread of a warp keeps up to kStages - 1 loads under way while the oldest chunk is stored.
__device__ void copy_through_ring(Chunks load, std::byte* ring, uint64_t* arrivals) {
  const uint32_t chunk_bytes = load.copy.chunk_bytes;
  Chunks store = load;
  int loads = 0;
  const auto start_load = [&] {
    const int stage = loads++ % kStages;
    device::expect_bytes(&arrivals[stage], chunk_bytes);
    device::bulk_load(ring + stage * chunk_bytes, load.from(), chunk_bytes, &arrivals[stage]);
    load.advance();
  };
  for (int i = 0; i < kStages - 1 && !load.done(); ++i) start_load();
  for (int stores = 0; !store.done(); ++stores, store.advance()) {
    const int stage = stores % kStages;
    device::await_bytes(&arrivals[stage], stores / kStages % 2);
    device::bulk_store(store.to(), ring + stage * chunk_bytes, chunk_bytes);
    device::close_store_group();
    if (load.done()) continue;
    device::await_read<1>();  // the chunk before this one has left the stage that is loaded next
    start_load();
  }
  device::await_stored<0>();
}

__global__ void __launch_bounds__(kBulkWarps* kWarpThreads) copy_by_bulk(const __grid_constant__ LinkCopy copy) {
  extern __shared__ __align__(128) std::byte rings[];
  __shared__ uint64_t arrivals[kBulkWarps][kStages];
  const int warp = threadIdx.x / kWarpThreads;
  if (threadIdx.x % kWarpThreads != 0) return;
  for (uint64_t& stage : arrivals[warp]) device::init_arrivals(&stage);
  device::fence_arrivals_init();
  copy_through_ring(chunks_of_warp(copy), rings + warp * kStages * copy.chunk_bytes, arrivals[warp]);
}

__global__ void __launch_bounds__(kVectorWarps* kWarpThreads) copy_by_vectors(const __grid_constant__ LinkCopy copy) {
  constexpr int kUnroll = 8;
  const int lane = threadIdx.x % kWarpThreads;
  for (Chunks chunks = chunks_of_warp(copy); !chunks.done(); chunks.advance()) {
    const auto* from = reinterpret_cast<const uint4*>(chunks.from()) + lane;
    auto* to = reinterpret_cast<uint4*>(chunks.to()) + lane;
    for (int at = 0; at < static_cast<int>(copy.chunk_bytes / sizeof(uint4)); at += kUnroll * kWarpThreads) {
      uint4 values[kUnroll];
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) values[i] = from[at + i * kWarpThreads];
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) to[at + i * kWarpThreads] = values[i];
    }
  }
}

}  // namespace

LinkCopyShape link_copy_shape(int device) {
  int major = 0, shared_bytes = 0;
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "the compute capability");
  check_cuda(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "the size of shared memory");
  if (major < 9) return {false, kChunkBytes};
  constexpr int kOwnBytes = 1024;  // the arrivals, and what the system keeps
  const uint32_t chunk_bytes = ring_bytes(kChunkBytes) + kOwnBytes <= shared_bytes ? kChunkBytes : kChunkBytes / 4;
  check_cuda(cudaFuncSetAttribute(copy_by_bulk, cudaFuncAttributeMaxDynamicSharedMemorySize, ring_bytes(chunk_bytes)),
             "shared memory for a plain copy");
  return {true, chunk_bytes};
}

void launch_link_copy(const LinkCopy& copy, const LinkCopyShape& shape, int num_sms, cudaStream_t stream) {
  if (shape.bulk)
    copy_by_bulk<<<num_sms, kBulkWarps * kWarpThreads, ring_bytes(shape.chunk_bytes), stream>>>(copy);
  else
    copy_by_vectors<<<num_sms, kVectorWarps * kWarpThreads, 0, stream>>>(copy);
  check_cuda(cudaGetLastError(), "a plain copy");
}

}  // namespace tern::tools
