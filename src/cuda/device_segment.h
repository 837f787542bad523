// SPDX-License-Identifier: Apache-2.0
// Segments in a GPU's memory: the windows of the CUDA engine.
//
//   auto mine = DeviceSegment::create(bytes, device, sharer->shared_by());
//   auto windows = sharer->share(mine, "window-0", everyone, deadline);   // windows[r]->data() works in kernels of `device`
//
//   mine->grant(other_device);   // ranks as threads: from now on data() works in kernels of `other_device` too
//
// Pinned on the GPU (cuMemCreate), never multicast, never managed. Shared between the processes of a host as a file descriptor, so it
// has no name anywhere and is gone with the last process that maps it. Where driver and fabric allow it the memory can also be had as
// a fabric handle, which reaches other hosts of an NVL72 rack; nothing here hands such a handle out, as the ranks of an exchange are
// on one host.
// All memory is there when a maker returns, zeroed.
// Lifetime: kernels that use data() must have ended before the object does. Unmapping (cuMemUnmap, cuMemRelease) does not wait for them,
// and so not for those of other ranks on the same GPU either: CUDA does not promise that, buffers_test checks it.
// Threads: grant() from any; the rest as in segment.h, where "nothing uses the memory" means kernels and copies of this process, on all
// devices.
// Memory visibility: none by itself; kernels order their accesses with fences and flags, at system scope.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "cuda/resources.h"
#include "memory/segment.h"

namespace tern::cuda {

// Addresses, with or without memory behind them.
struct AddressRange {
  CUdeviceptr begin = 0;
  size_t size_bytes = 0;
  bool operator==(const AddressRange&) const = default;
};
void free_addresses(const AddressRange& range) noexcept;
void unmap_addresses(const AddressRange& range) noexcept;
void release_memory(CUmemGenericAllocationHandle memory) noexcept;

using Addresses = Owned<AddressRange, &free_addresses>;
using Mapping = Owned<AddressRange, &unmap_addresses>;
using DeviceMemory = Owned<CUmemGenericAllocationHandle, &release_memory>;

class DeviceSegment final : public Segment {
 public:
  // At least `bytes` > 0 bytes, rounded up to what the GPU maps (2 MiB). TERN_OUT_OF_MEMORY says how much there is. TERN_UNSUPPORTED: the
  // GPU or the driver cannot share memory this way.
  static std::shared_ptr<DeviceSegment> create(size_t bytes, int device, SharedBy shared_by);

  // For kernels of this segment's device. The peer's segment must have this one's size (windows are symmetric). TERN_UNSUPPORTED names
  // both devices if they do not reach each other.
  std::shared_ptr<Segment> map_peer(Fd fd) const override;

  // Takes the memory twice for a moment, and nothing if that fails; devices that have access keep it.
  void renew() override;

  // Lets kernels of `device` use an own segment at the same addresses. Again is allowed. TERN_UNSUPPORTED names both devices if they
  // do not reach each other.
  void grant(int device);

  // Every byte of a part of an own segment; done when it returns.
  void fill(size_t offset, size_t bytes, uint8_t value);

  int device() const { return device_; }

 private:
  DeviceSegment(int device, DeviceMemory memory, Addresses addresses, Mapping mapping, Fd fd);

  int device_;  // whose kernels use it: for an own segment, also where it lies
  DeviceMemory memory_;
  Addresses addresses_;
  Mapping mapping_;  // destroyed before addresses_ and memory_
  std::mutex mutex_;
  std::vector<int> devices_;  // with access; guarded by mutex_
};

}  // namespace tern::cuda
