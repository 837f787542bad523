// SPDX-License-Identifier: Apache-2.0
#include "cuda/driver.h"

#include "base/error.h"

namespace tern::cuda {
namespace {

// All functions of the table are in their present form since CUDA 12.0 at the latest.
constexpr unsigned kEntryPointVersion = 12000;

template <typename Function>
void look_up(const char* symbol, Function& function) {
  void* address = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  const cudaError_t result = cudaGetDriverEntryPointByVersion(symbol, &address, kEntryPointVersion, cudaEnableDefault, &found);
  if (result != cudaSuccess || found != cudaDriverEntryPointSuccess || address == nullptr)
    fail(TERN_UNSUPPORTED, "CUDA: the driver has no {} (asked for as of CUDA {}.{}); update the NVIDIA driver", symbol,
         kEntryPointVersion / 1000, kEntryPointVersion % 1000 / 10);
  function = reinterpret_cast<Function>(address);
}

Driver look_up_all() {
  int count = 0;
  const cudaError_t result = cudaGetDeviceCount(&count);  // starts the driver
  if (const std::string problem = old_driver(); !problem.empty())
    fail(TERN_UNSUPPORTED, "CUDA: no GPU can be used: {}; update it, or use CPU ranks (TERN_DEVICE_CPU)", problem);
  if (result != cudaSuccess || count == 0)
    fail(TERN_UNSUPPORTED, "CUDA: no GPU can be used: {}; nvidia-smi must show one, and a driver for CUDA {}.{} or later",
         result == cudaSuccess ? "the driver sees none" : cudaGetErrorString(result), CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
  Driver driver{};
  look_up("cuGetErrorName", driver.get_error_name);
  look_up("cuGetErrorString", driver.get_error_string);
  look_up("cuCtxGetCurrent", driver.ctx_get_current);
  look_up("cuCtxSetCurrent", driver.ctx_set_current);
  look_up("cuDeviceGet", driver.device_get);
  look_up("cuDeviceGetAttribute", driver.device_get_attribute);
  look_up("cuMemAddressReserve", driver.mem_address_reserve);
  look_up("cuMemAddressFree", driver.mem_address_free);
  look_up("cuMemCreate", driver.mem_create);
  look_up("cuMemRelease", driver.mem_release);
  look_up("cuMemMap", driver.mem_map);
  look_up("cuMemUnmap", driver.mem_unmap);
  look_up("cuMemSetAccess", driver.mem_set_access);
  look_up("cuMemGetAllocationGranularity", driver.mem_get_allocation_granularity);
  look_up("cuMemGetAllocationPropertiesFromHandle", driver.mem_get_allocation_properties);
  look_up("cuMemExportToShareableHandle", driver.mem_export_to_shareable_handle);
  look_up("cuMemImportFromShareableHandle", driver.mem_import_from_shareable_handle);
  return driver;
}

// What to do about it. The numbers of runtime and driver errors are the same where both have one.
const char* advice(int error) {
  switch (error) {
    case cudaErrorMemoryAllocation: return "ask for less, or free memory of this GPU (nvidia-smi shows who has it)";
    case cudaErrorInsufficientDriver: return "update the NVIDIA driver";
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction: return "this build has no code for this GPU: build Tern with its architecture in TERN_CUDA_ARCHS";
    case cudaErrorDevicesUnavailable: return "another process has this GPU for itself (nvidia-smi -q -d COMPUTE)";
    case cudaErrorInitializationError: return "was CUDA used before a fork? A child process cannot go on with it";
    case cudaErrorSystemNotReady: return "is nvidia-fabricmanager running?";
    case cudaErrorIllegalAddress:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidPc:
    case cudaErrorIllegalInstruction:
    case cudaErrorHardwareStackError:
    case cudaErrorLaunchTimeout:
    case cudaErrorAssert:
    case cudaErrorECCUncorrectable:
    case cudaErrorLaunchFailure:
      return "an earlier kernel of this process failed, Tern's or another, and its CUDA context is lost: restart the process; "
             "compute-sanitizer finds the kernel";
    default: return "the kernel log (dmesg) and nvidia-smi may know more";
  }
}

[[noreturn]] void fail_with(int error, std::string_view asked, const char* name, const char* text) {
  const tern_status status = error == cudaErrorMemoryAllocation ? TERN_OUT_OF_MEMORY : TERN_SYSTEM_ERROR;
  fail(status, "CUDA: {}: {} ({}); {}", asked, text, name, advice(error));
}

}  // namespace

int num_devices() noexcept {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();  // it has been dealt with
  return 0;
}

std::string old_driver() {
  int version = 0;
  const bool is_known = cudaDriverGetVersion(&version) == cudaSuccess && version > 0;
  if (!is_known || version / 1000 >= CUDART_VERSION / 1000) return "";
  return fmt::format("the NVIDIA driver is for CUDA {}.{}, and this build of Tern needs one for CUDA {}.0 or later", version / 1000,
                     version % 1000 / 10, CUDART_VERSION / 1000);
}

std::string device_name(int device) {
  cudaDeviceProp properties;
  if (cudaGetDeviceProperties(&properties, device) != cudaSuccess) return fmt::format("GPU {}", device);
  return fmt::format("GPU {} ({})", device, properties.name);
}

std::string pci_address(int device) {
  char address[32] = {};
  check(cudaDeviceGetPCIBusId(address, sizeof(address), device), "asking for a GPU's address on the PCI bus");
  return address;
}

void require_device(int device) {
  driver();
  const int count = num_devices();
  if (device < 0 || device >= count)
    fail(TERN_INVALID_ARGUMENT, "CUDA: device {} asked for, this process can use {} (0 to {}); see CUDA_VISIBLE_DEVICES", device, count,
         count - 1);
}

int attribute(int device, cudaDeviceAttr name) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device), "asking for an attribute of a GPU");
  return value;
}

int attribute(int device, CUdevice_attribute name) {
  CUdevice handle = 0;
  int value = 0;
  check(driver().device_get(&handle, device), "asking for a GPU");
  check(driver().device_get_attribute(&value, name, handle), "asking for an attribute of a GPU");
  return value;
}

void fail_cuda(cudaError_t result, std::string_view asked) {
  cudaGetLastError();  // it is reported here, and not to the next caller who asks
  fail_with(result, asked, cudaGetErrorName(result), cudaGetErrorString(result));
}

void fail_cuda(CUresult result, std::string_view asked) {
  const char* name = nullptr;
  const char* text = nullptr;
  driver().get_error_name(result, &name);
  driver().get_error_string(result, &text);
  fail_with(static_cast<int>(result), asked, name == nullptr ? "unknown" : name, text == nullptr ? "no text" : text);
}

const Driver& driver() {
  static const Driver table = look_up_all();
  return table;
}

}  // namespace tern::cuda
