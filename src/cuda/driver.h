// SPDX-License-Identifier: Apache-2.0
// How the CUDA engine speaks with CUDA: errors become tern::Failure, and the driver's own functions come from a table.
//
//   check(cudaMemsetAsync(pointer, 0, bytes, stream), "zeroing a window");
//   check(driver().mem_map(address, bytes, 0, memory, 0), "mapping a window");
//
// libcuda is never linked: the runtime, which is inside this library, opens it. So the same binary runs on machines without a
// GPU or a driver; there num_devices() is 0 and everything else throws TERN_UNSUPPORTED.
// A process that called any of this may not fork and go on using CUDA in the child: that is a rule of CUDA.
// Threads: any.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <string>
#include <string_view>

namespace tern::cuda {

// GPUs that this process can use; 0 also where there is no driver, or one too old. Never throws.
int num_devices() noexcept;

// What is wrong where the driver is older than this build can use: for people, and not a sentence; "" otherwise.
std::string old_driver();

// For people: "GPU 2 (NVIDIA H200)".
std::string device_name(int device);

// On the PCI bus: "0000:1B:00.0".
std::string pci_address(int device);

// TERN_INVALID_ARGUMENT if there is no such device, TERN_UNSUPPORTED if there are none at all.
void require_device(int device);

// Of a device: cudaDevAttr... and CU_DEVICE_ATTRIBUTE_...
int attribute(int device, cudaDeviceAttr name);
int attribute(int device, CUdevice_attribute name);

[[noreturn]] void fail_cuda(cudaError_t result, std::string_view asked);
[[noreturn]] void fail_cuda(CUresult result, std::string_view asked);

// `asked` says what was tried: "mapping a window". TERN_OUT_OF_MEMORY when memory is what is missing, else TERN_SYSTEM_ERROR.
inline void check(cudaError_t result, std::string_view asked) {
  if (result != cudaSuccess) [[unlikely]]
    fail_cuda(result, asked);
}
inline void check(CUresult result, std::string_view asked) {
  if (result != CUDA_SUCCESS) [[unlikely]]
    fail_cuda(result, asked);
}

// The driver functions that are used, each with its own type.
struct Driver {
  decltype(&::cuGetErrorName) get_error_name;
  decltype(&::cuGetErrorString) get_error_string;
  decltype(&::cuCtxGetCurrent) ctx_get_current;
  decltype(&::cuCtxSetCurrent) ctx_set_current;
  decltype(&::cuDeviceGet) device_get;
  decltype(&::cuDeviceGetAttribute) device_get_attribute;
  decltype(&::cuMemAddressReserve) mem_address_reserve;
  decltype(&::cuMemAddressFree) mem_address_free;
  decltype(&::cuMemCreate) mem_create;
  decltype(&::cuMemRelease) mem_release;
  decltype(&::cuMemMap) mem_map;
  decltype(&::cuMemUnmap) mem_unmap;
  decltype(&::cuMemSetAccess) mem_set_access;
  decltype(&::cuMemGetAllocationGranularity) mem_get_allocation_granularity;
  decltype(&::cuMemGetAllocationPropertiesFromHandle) mem_get_allocation_properties;
  decltype(&::cuMemExportToShareableHandle) mem_export_to_shareable_handle;
  decltype(&::cuMemImportFromShareableHandle) mem_import_from_shareable_handle;
};

// TERN_UNSUPPORTED without a driver and a GPU. Looked up once.
const Driver& driver();

}  // namespace tern::cuda
