// SPDX-License-Identifier: Apache-2.0
#include "cuda/buffers.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "base/error.h"

namespace tern::cuda {
namespace {

constexpr int64_t kZeroingTimeoutMs = 60'000;

// Pinned blocks of this process that nobody uses at the moment, by device and size.
//
// They are never freed: cudaFreeHost may wait for all work of the GPU, and so may cudaHostUnregister, so that there is no moment at which
// a rank may call them while another one still works. Sizes are powers of two and a block serves its own size alone, so what is kept is at
// the most what was in use at once, of each size.
class FreeBlocks {
 public:
  // Not destroyed: buffers in static objects may end later, and CUDA earlier.
  static FreeBlocks& instance() {
    static auto& blocks = *new FreeBlocks;
    return blocks;
  }

  // Without data if there is none.
  PinnedBlock take(int device, size_t size_bytes) {
    const std::lock_guard lock(mutex_);
    std::vector<void*>& blocks = blocks_[{device, size_bytes}];
    PinnedBlock block{device, size_bytes, nullptr};
    if (blocks.empty()) return block;
    block.data = blocks.back();
    blocks.pop_back();
    return block;
  }
  void give_back(const PinnedBlock& block) {
    const std::lock_guard lock(mutex_);
    blocks_[{block.device, block.size_bytes}].push_back(block.data);
  }

 private:
  std::mutex mutex_;
  std::map<std::pair<int, size_t>, std::vector<void*>> blocks_;
};

}  // namespace

DevicePool::DevicePool(int device) : device_(device), stream_(device) {
  const DeviceGuard guard(device);
  cudaMemPoolProps properties = {};
  properties.allocType = cudaMemAllocationTypePinned;
  properties.handleTypes = cudaMemHandleTypeNone;
  properties.location = {.type = cudaMemLocationTypeDevice, .id = device};
  cudaMemPool_t pool = nullptr;
  check(cudaMemPoolCreate(&pool, &properties), fmt::format("making a memory pool on device {}", device));
  pool_ = decltype(pool_)({pool, device});
  // Or it would give memory back to the system whenever somebody waits for a stream.
  uint64_t kept_bytes = UINT64_MAX;
  check(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &kept_bytes), "setting up a memory pool");
}

void* DevicePool::allocate(size_t num_bytes) const {
  const DeviceGuard guard(device_);
  void* data = nullptr;
  check(cudaMallocFromPoolAsync(&data, std::max<size_t>(num_bytes, 1), pool_.get().handle, stream_.get()),
        fmt::format("allocating {} bytes on device {}", num_bytes, device_));
  try {
    check(cudaMemsetAsync(data, 0, num_bytes, stream_.get()), "zeroing device memory");
    stream_.wait(Deadline::in_ms(kZeroingTimeoutMs), "zeroing device memory");
  } catch (...) {
    free(data);
    throw;
  }
  return data;
}

void DevicePool::free(void* memory) const noexcept {
  try {
    const DeviceGuard guard(device_);
    cudaFreeAsync(memory, stream_.get());
  } catch (const std::exception&) {
    // Lost with its context.
  }
}

// Few sizes, so that blocks are used again; of large ones not much more than is needed.
size_t block_bytes(size_t num_bytes) {
  constexpr size_t kSmallestBytes = 256;  // cache lines of its own
  constexpr size_t kLargeBytes = 2 << 20;
  if (num_bytes < kLargeBytes) return std::bit_ceil(std::max(num_bytes, kSmallestBytes));
  return (num_bytes + kLargeBytes - 1) / kLargeBytes * kLargeBytes;
}

PinnedBlock take_pinned(int device, size_t num_bytes) {
  PinnedBlock block = FreeBlocks::instance().take(device, block_bytes(num_bytes));
  if (block.data == nullptr) {
    const DeviceGuard guard(device);
    check(cudaHostAlloc(&block.data, block.size_bytes, cudaHostAllocPortable | cudaHostAllocMapped),
          fmt::format("allocating {} bytes of pinned host memory", block.size_bytes));
  }
  std::memset(block.data, 0, num_bytes);
  return block;
}

void give_back_pinned(const PinnedBlock& block) noexcept {
  try {
    FreeBlocks::instance().give_back(block);
  } catch (const std::exception&) {
    // It is lost: there is no memory to note it down.
  }
}

}  // namespace tern::cuda
