// SPDX-License-Identifier: Apache-2.0
#include "tools/cuda_facts.h"

#include <cuda.h>

#include <algorithm>
#include <array>
#include <exception>

#include "base/error.h"
#include "devices/rank_device.h"
#include "tools/cuda_call.h"

namespace tern::tools {
namespace {

constexpr int64_t kCopiedBytes = 64 << 20;
constexpr int kNumCopies = 4;

// 0 if it cannot be asked.
int attribute(int device, cudaDeviceAttr name) {
  int value = 0;
  return cudaDeviceGetAttribute(&value, name, device) == cudaSuccess ? value : 0;
}

// Of the driver's attributes that the runtime does not have. The driver's library is opened by the runtime.
bool driver_attribute(int device, CUdevice_attribute name) {
  const auto function = [](const char* function_name) -> void* {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    if (cudaGetDriverEntryPointByVersion(function_name, &found, 12000, cudaEnableDefault, &result) != cudaSuccess) return nullptr;
    return result == cudaDriverEntryPointSuccess ? found : nullptr;
  };
  const auto device_get = reinterpret_cast<decltype(&::cuDeviceGet)>(function("cuDeviceGet"));
  const auto get_attribute = reinterpret_cast<decltype(&::cuDeviceGetAttribute)>(function("cuDeviceGetAttribute"));
  CUdevice handle = 0;
  int value = 0;
  if (device_get == nullptr || get_attribute == nullptr || device_get(&handle, device) != CUDA_SUCCESS) return false;
  return get_attribute(&value, name, handle) == CUDA_SUCCESS && value != 0;
}

CudaDeviceFacts read_device(int device) {
  CudaDeviceFacts facts;
  cudaDeviceProp properties{};
  if (cudaGetDeviceProperties(&properties, device) == cudaSuccess) {
    facts.name = properties.name;
    facts.memory_bytes = static_cast<int64_t>(properties.totalGlobalMem);
  }
  std::array<char, 32> pci_bus_id{};
  if (cudaDeviceGetPCIBusId(pci_bus_id.data(), static_cast<int>(pci_bus_id.size()), device) == cudaSuccess)
    facts.pci_bus_id = pci_bus_id.data();
  facts.compute_major = attribute(device, cudaDevAttrComputeCapabilityMajor);
  facts.compute_minor = attribute(device, cudaDevAttrComputeCapabilityMinor);
  facts.num_sms = attribute(device, cudaDevAttrMultiProcessorCount);
  facts.l2_bytes = attribute(device, cudaDevAttrL2CacheSize);
  facts.maps_memory = driver_attribute(device, CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED);
  facts.shares_by_fd = driver_attribute(device, CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED);
  facts.shares_by_fabric = driver_attribute(device, CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED);
  return facts;
}

CudaPairFacts read_pair(int from, int to) {
  CudaPairFacts facts;
  if (from == to) return facts;
  int value = 0;
  facts.reaches = cudaDeviceCanAccessPeer(&value, from, to) == cudaSuccess && value != 0;
  facts.native_atomics = cudaDeviceGetP2PAttribute(&value, cudaDevP2PAttrNativeAtomicSupported, from, to) == cudaSuccess && value != 0;
  if (cudaDeviceGetP2PAttribute(&value, cudaDevP2PAttrPerformanceRank, from, to) == cudaSuccess) facts.performance_rank = value;
  return facts;
}

void enable_access(int from, int to) {
  check_cuda(cudaSetDevice(from), "choosing a GPU");
  const cudaError_t error = cudaDeviceEnablePeerAccess(to, 0);
  if (error != cudaErrorPeerAccessAlreadyEnabled) return check_cuda(error, "access to the memory of another GPU");
  cudaGetLastError();  // clears it
}

// One GPU's memory for copies: the first half is sent, the second received.
class CopyEnd {
 public:
  explicit CopyEnd(int device)
      : device_(make_rank_device(TERN_DEVICE_CUDA, device)),
        memory_(make_cuda_memory(2 * kCopiedBytes)),
        start_(make_cuda_event()),
        end_(make_cuda_event()) {
    std::vector<uint8_t> pattern(kCopiedBytes);
    for (size_t i = 0; i < pattern.size(); ++i) pattern[i] = byte_of(i);
    device_->copy_in(memory_.get(), pattern.data(), kCopiedBytes);
  }

  ~CopyEnd() { cudaSetDevice(device_->index()); }
  CopyEnd(const CopyEnd&) = delete;
  CopyEnd& operator=(const CopyEnd&) = delete;

  // GB/s of a copy to another GPU; throws if it does not arrive.
  double copy_to(CopyEnd& other) {
    std::byte* received = other.memory_.get() + kCopiedBytes;
    other.device_->fill(received, 0, kCopiedBytes);
    other.device_->synchronise();
    check_cuda(cudaSetDevice(device_->index()), "choosing a GPU");
    const auto stream = static_cast<cudaStream_t>(device_->stream());
    const auto put_copy = [&] {
      check_cuda(cudaMemcpyPeerAsync(received, other.device_->index(), memory_.get(), device_->index(), kCopiedBytes, stream), "a copy");
    };
    put_copy();  // the first one finds cold links
    check_cuda(cudaEventRecord(start_.get(), stream), "an event");
    for (int i = 0; i < kNumCopies; ++i) put_copy();
    check_cuda(cudaEventRecord(end_.get(), stream), "an event");
    device_->synchronise();
    float ms = 0;
    check_cuda(cudaEventElapsedTime(&ms, start_.get(), end_.get()), "the time of a copy");
    std::vector<uint8_t> found(kCopiedBytes);
    other.device_->copy_out(found.data(), received, kCopiedBytes);
    for (size_t i = 0; i < found.size(); ++i) {
      if (found[i] != byte_of(i))
        fail(TERN_SYSTEM_ERROR, "byte {} of the copy arrived as {:#04x}, sent was {:#04x}", i, found[i], byte_of(i));
    }
    return static_cast<double>(kNumCopies * kCopiedBytes) / static_cast<double>(ms) * 1e-6;
  }

 private:
  static uint8_t byte_of(size_t i) { return static_cast<uint8_t>(i * 0x9E3779B97F4A7C15u >> 56); }

  std::unique_ptr<RankDevice> device_;
  CudaMemory memory_;
  CudaEvent start_, end_;
};

}  // namespace

bool built_with_cuda() { return true; }

CudaReport read_cuda() {
  CudaReport report;
  cudaRuntimeGetVersion(&report.runtime);
  if (cudaDriverGetVersion(&report.driver) != cudaSuccess) report.driver = 0;
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (report.driver == 0)
    report.problem = "there is no NVIDIA driver";
  else if (error != cudaSuccess)
    report.problem = fmt::format("CUDA cannot be used: {} ({})", cudaGetErrorString(error), cudaGetErrorName(error));
  else if (count == 0)
    report.problem = "CUDA sees no GPU (CUDA_VISIBLE_DEVICES may hide them)";
  if (!report.problem.empty()) return report;
  for (int device = 0; device < count; ++device) report.devices.push_back(read_device(device));
  for (int from = 0; from < count; ++from) {
    for (int to = 0; to < count; ++to) report.pairs.push_back(read_pair(from, to));
  }
  return report;
}

void test_cuda_pairs(CudaReport& report) {
  const size_t count = report.devices.size();
  std::vector<std::unique_ptr<CopyEnd>> ends(count);
  const auto end_at = [&](size_t device) -> CopyEnd& {
    if (ends[device] == nullptr) ends[device] = std::make_unique<CopyEnd>(static_cast<int>(device));
    return *ends[device];
  };
  for (size_t from = 0; from < count; ++from) {
    for (size_t to = 0; to < count; ++to) {
      if (from == to) continue;
      CudaPairFacts& pair = report.pairs[from * count + to];
      try {
        if (pair.reaches) enable_access(static_cast<int>(from), static_cast<int>(to));
        pair.gbps = end_at(from).copy_to(end_at(to));
      } catch (const std::exception& error) {
        pair.problem = error.what();
      }
    }
  }
}

std::string cuda_version_text(int version) { return fmt::format("{}.{}", version / 1000, version % 1000 / 10); }

}  // namespace tern::tools
