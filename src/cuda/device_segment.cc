// SPDX-License-Identifier: Apache-2.0
#include "cuda/device_segment.h"

#include <fcntl.h>

#include <algorithm>
#include <cstdint>

#include "base/error.h"

namespace tern::cuda {
namespace {

constexpr int64_t kCopyTimeoutMs = 60'000;

// What is wanted of memory, as CUDA says it.
CUmemAllocationProp memory_properties(int device, SharedBy shared_by) {
  CUmemAllocationProp properties = {};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = device};
  properties.requestedHandleTypes = shared_by == SharedBy::kProcesses ? CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR : CU_MEM_HANDLE_TYPE_NONE;
  properties.allocFlags.gpuDirectRDMACapable = attribute(device, CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED) != 0;
  return properties;
}

void require_virtual_memory(int device, SharedBy shared_by) {
  require_device(device);
  const bool mappable = attribute(device, CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED) != 0;
  const bool shareable =
      shared_by == SharedBy::kThreads || attribute(device, CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED) != 0;
  if (!mappable || !shareable)
    fail(TERN_UNSUPPORTED, "window on {}: its driver cannot {}; is it a virtual GPU, or under WSL? Ranks as threads need less",
         device_name(device), mappable ? "share memory between processes as file descriptors" : "map memory to chosen addresses");
}

void require_peer_access(int from, int to) {
  if (from == to) return;
  int possible = 0;
  check(cudaDeviceCanAccessPeer(&possible, from, to), fmt::format("asking whether GPU {} reaches GPU {}", from, to));
  if (possible == 0)
    fail(TERN_UNSUPPORTED,
         "window: {} does not reach the memory of {}; they need NVLink or PCIe peer access (`nvidia-smi topo -p2p r` shows the pairs)",
         device_name(from), device_name(to));
}

void check_free_memory(size_t size_bytes, int device) {
  const DeviceGuard guard(device);
  size_t free_bytes = 0, total_bytes = 0;
  check(cudaMemGetInfo(&free_bytes, &total_bytes), "asking how much memory is free");
  if (size_bytes > free_bytes)
    fail(TERN_OUT_OF_MEMORY, "window of {} bytes: {} has {} of its {} bytes free; ask for less, or free memory there", size_bytes,
         device_name(device), free_bytes, total_bytes);
}

DeviceMemory create_memory(size_t size_bytes, int device, SharedBy shared_by) {
  check_free_memory(size_bytes, device);
  CUmemAllocationProp properties = memory_properties(device, shared_by);
  CUmemGenericAllocationHandle memory = 0;
  if (shared_by == SharedBy::kProcesses && attribute(device, CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED) != 0) {
    CUmemAllocationProp with_fabric = properties;
    with_fabric.requestedHandleTypes =
        static_cast<CUmemAllocationHandleType>(CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR | CU_MEM_HANDLE_TYPE_FABRIC);
    // Refused where no fabric has been set up; only trying shows it.
    if (driver().mem_create(&memory, size_bytes, &with_fabric, 0) == CUDA_SUCCESS) return DeviceMemory(memory);
  }
  check(driver().mem_create(&memory, size_bytes, &properties, 0), fmt::format("window of {} bytes on GPU {}", size_bytes, device));
  return DeviceMemory(memory);
}

Addresses reserve_addresses(size_t size_bytes) {
  AddressRange range = {.begin = 0, .size_bytes = size_bytes};
  check(driver().mem_address_reserve(&range.begin, size_bytes, 0, 0, 0), fmt::format("reserving addresses for {} bytes", size_bytes));
  return Addresses(range);
}

Mapping map_memory(const AddressRange& range, const DeviceMemory& memory) {
  check(driver().mem_map(range.begin, range.size_bytes, 0, memory.get(), 0), fmt::format("mapping a window of {} bytes", range.size_bytes));
  return Mapping(range);
}

CUresult set_access(const AddressRange& range, const std::vector<int>& devices) {
  std::vector<CUmemAccessDesc> access;
  for (const int device : devices)
    access.push_back({.location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = device}, .flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE});
  return driver().mem_set_access(range.begin, range.size_bytes, access.data(), access.size());
}

void* pointer(const AddressRange& range) { return reinterpret_cast<void*>(range.begin); }

void fill_range(const AddressRange& range, int device, uint8_t value) {
  const DeviceGuard guard(device);
  const Stream stream(device);
  check(cudaMemsetAsync(pointer(range), value, range.size_bytes, stream.get()), "filling a window");
  stream.wait(Deadline::in_ms(kCopyTimeoutMs), "filling a window");
}

void copy(const AddressRange& from, const AddressRange& to, int device) {
  const DeviceGuard guard(device);
  const Stream stream(device);
  check(cudaMemcpyAsync(pointer(to), pointer(from), from.size_bytes, cudaMemcpyDeviceToDevice, stream.get()), "renewing a window");
  stream.wait(Deadline::in_ms(kCopyTimeoutMs), "renewing a window");
}

Fd export_descriptor(const DeviceMemory& memory) {
  int descriptor = -1;
  check(driver().mem_export_to_shareable_handle(&descriptor, memory.get(), CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0),
        "exporting a window as a file descriptor");
  Fd fd(descriptor);
  if (::fcntl(fd.get(), F_SETFD, FD_CLOEXEC) != 0) fail_errno("fcntl(F_SETFD)", "window");
  return fd;
}

size_t round_up_to_granularity(size_t bytes, int device, SharedBy shared_by) {
  const CUmemAllocationProp properties = memory_properties(device, shared_by);
  size_t granularity = 0;
  check(driver().mem_get_allocation_granularity(&granularity, &properties, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED),
        "asking for the granularity of windows");
  return (bytes + granularity - 1) / granularity * granularity;
}

}  // namespace

void free_addresses(const AddressRange& range) noexcept { driver().mem_address_free(range.begin, range.size_bytes); }
void unmap_addresses(const AddressRange& range) noexcept { driver().mem_unmap(range.begin, range.size_bytes); }
void release_memory(CUmemGenericAllocationHandle memory) noexcept { driver().mem_release(memory); }

DeviceSegment::DeviceSegment(int device, DeviceMemory memory, Addresses addresses, Mapping mapping, Fd fd)
    : Segment(static_cast<std::byte*>(pointer(addresses.get())), addresses.get().size_bytes, std::move(fd)),
      device_(device),
      memory_(std::move(memory)),
      addresses_(std::move(addresses)),
      mapping_(std::move(mapping)),
      devices_({device}) {}

std::shared_ptr<DeviceSegment> DeviceSegment::create(size_t bytes, int device, SharedBy shared_by) {
  if (bytes == 0 || bytes > SIZE_MAX / 4) fail(TERN_INVALID_ARGUMENT, "window of {} bytes cannot be", bytes);
  require_virtual_memory(device, shared_by);
  const size_t size_bytes = round_up_to_granularity(bytes, device, shared_by);
  DeviceMemory memory = create_memory(size_bytes, device, shared_by);
  Addresses addresses = reserve_addresses(size_bytes);
  Mapping mapping = map_memory(addresses.get(), memory);
  check(set_access(addresses.get(), {device}), "making a window accessible");
  fill_range(addresses.get(), device, 0);
  Fd fd = shared_by == SharedBy::kProcesses ? export_descriptor(memory) : Fd();
  return std::shared_ptr<DeviceSegment>(
      new DeviceSegment(device, std::move(memory), std::move(addresses), std::move(mapping), std::move(fd)));
}

std::shared_ptr<Segment> DeviceSegment::map_peer(Fd fd) const {
  CUmemGenericAllocationHandle handle = 0;
  check(driver().mem_import_from_shareable_handle(&handle, reinterpret_cast<void*>(static_cast<intptr_t>(fd.get())),
                                                  CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR),
        "taking over a peer's window (was it made by a GPU rank?)");
  DeviceMemory memory(handle);
  CUmemAllocationProp properties = {};
  check(driver().mem_get_allocation_properties(&properties, memory.get()), "asking where a peer's window is");
  const int owner = properties.location.id;  // as this process counts; it may be a device that is not visible here
  if (owner >= 0 && owner < num_devices()) require_peer_access(device_, owner);
  Addresses addresses = reserve_addresses(size());
  Mapping mapping = map_memory(addresses.get(), memory);
  check(set_access(addresses.get(), {device_}), fmt::format("reaching a peer's window on GPU {} from GPU {}", owner, device_));
  return std::shared_ptr<DeviceSegment>(new DeviceSegment(device_, std::move(memory), std::move(addresses), std::move(mapping), Fd()));
}

void DeviceSegment::fill(size_t offset, size_t bytes, uint8_t value) {
  if (bytes > 0) fill_range({addresses_.get().begin + offset, bytes}, device_, value);
}

void DeviceSegment::renew() {
  if (fd() < 0) return;
  const std::lock_guard lock(mutex_);
  DeviceMemory fresh = create_memory(size(), device_, SharedBy::kProcesses);
  Fd fresh_fd = export_descriptor(fresh);
  {
    const Addresses elsewhere = reserve_addresses(size());
    const Mapping there = map_memory(elsewhere.get(), fresh);
    check(set_access(elsewhere.get(), {device_}), "making a window accessible");
    copy(addresses_.get(), elsewhere.get(), device_);
  }
  {
    const Mapping unmapped = std::move(mapping_);
  }
  try {
    mapping_ = map_memory(addresses_.get(), fresh);
    check(set_access(addresses_.get(), devices_), "making a renewed window accessible");
  } catch (...) {
    {
      const Mapping unmapped = std::move(mapping_);
    }
    mapping_ = map_memory(addresses_.get(), memory_);
    check(set_access(addresses_.get(), devices_), "making a window accessible again");
    throw;
  }
  std::swap(memory_, fresh);
  replace_fd(std::move(fresh_fd));
}

void DeviceSegment::grant(int device) {
  require_device(device);
  require_peer_access(device, device_);
  const std::lock_guard lock(mutex_);
  if (std::find(devices_.begin(), devices_.end(), device) != devices_.end()) return;
  check(set_access(addresses_.get(), {device}), fmt::format("letting GPU {} use a window on GPU {}", device, device_));
  devices_.push_back(device);
}

}  // namespace tern::cuda
