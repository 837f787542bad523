// SPDX-License-Identifier: Apache-2.0
// Memory for kernels: of a GPU, and of the host.
//
//   auto pool = std::make_shared<DevicePool>(device);
//   DeviceBuffer<uint64_t> epochs(pool, num_lanes);   // zeroed
//   PinnedBuffer<Mailbox> mailbox(device, 1);         // zeroed
//
// Ending a buffer waits for nothing. Ranks that share a GPU wait for each other's kernels; a rank that waited for the whole GPU, as
// cudaFree and cudaFreeHost may do, would keep itself from the operation that its neighbour's kernel waits for.
// Lifetime: kernels and copies that use a buffer must have ended before it does. Buffers keep their pool.
// CUDA graphs: making and ending a buffer works in the middle of a capture, and is no part of the graph.
// Threads: making and destroying in any thread; the thread's current device stays what it was.
// Memory visibility: the zeros are there when a constructor returns.
#pragma once

#include <cstddef>
#include <memory>
#include <type_traits>

#include "cuda/resources.h"

namespace tern::cuda {

// A GPU's memory for one owner. What its buffers gave back stays here for later ones, until the pool ends.
class DevicePool {
 public:
  explicit DevicePool(int device);

  int device() const { return device_; }
  // Idle but for zeros that are being written: also for the owner's own small copies.
  const Stream& stream() const { return stream_; }

  // Zeroed, at least a byte.
  void* allocate(size_t num_bytes) const;
  void free(void* memory) const noexcept;

 private:
  int device_;
  Stream stream_;
  // Its end returns at once; what is still being freed then follows by itself.
  OwnedOnDevice<cudaMemPool_t, &cudaMemPoolDestroy> pool_;
};

struct PooledBytes {
  std::shared_ptr<const DevicePool> pool;
  void* data = nullptr;
  bool operator==(const PooledBytes&) const = default;
};
inline void free_pooled(const PooledBytes& bytes) noexcept { bytes.pool->free(bytes.data); }

// `size` elements in a GPU's memory.
template <typename T>
class DeviceBuffer {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  DeviceBuffer() = default;
  DeviceBuffer(std::shared_ptr<const DevicePool> pool, size_t size) : size_(size) {
    void* data = pool->allocate(size * sizeof(T));
    bytes_ = Bytes({std::move(pool), data});
  }
  T* data() const { return static_cast<T*>(bytes_.get().data); }
  size_t size() const { return size_; }

 private:
  using Bytes = Owned<PooledBytes, &free_pooled>;
  Bytes bytes_;
  size_t size_ = 0;
};

// Host memory of the process's cache.
struct PinnedBlock {
  int device = 0;
  size_t size_bytes = 0;
  void* data = nullptr;
  bool operator==(const PinnedBlock&) const = default;
};
PinnedBlock take_pinned(int device, size_t num_bytes);
void give_back_pinned(const PinnedBlock& block) noexcept;

// `size` elements in host memory that every GPU can read and write at the same address.
template <typename T>
class PinnedBuffer {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  PinnedBuffer() = default;
  // `device`: that uses it.
  PinnedBuffer(int device, size_t size) : block_(take_pinned(device, size * sizeof(T))), size_(size) {}
  T* data() const { return static_cast<T*>(block_.get().data); }
  size_t size() const { return size_; }
  T& operator[](size_t i) const { return data()[i]; }
  T* begin() const { return data(); }
  T* end() const { return data() + size_; }

 private:
  Owned<PinnedBlock, &give_back_pinned> block_;
  size_t size_ = 0;
};

}  // namespace tern::cuda
