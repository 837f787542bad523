// SPDX-License-Identifier: Apache-2.0
// A rank on an NVIDIA GPU.
#include <cuda_runtime.h>

#include <chrono>
#include <limits>
#include <thread>
#include <type_traits>

#include "base/deadline.h"
#include "base/error.h"
#include "devices/backends.h"

namespace tern::tools {
namespace {

void check(const char* call, cudaError_t error) {
  if (error == cudaSuccess) return;
  const tern_status status = error == cudaErrorMemoryAllocation ? TERN_OUT_OF_MEMORY : TERN_SYSTEM_ERROR;
  fail(status, "{}: {} ({})", call, cudaGetErrorString(error), cudaGetErrorName(error));
}

// Owns a CUDA handle, given with the function that ends it.
template <typename Handle>
using Owned = std::unique_ptr<std::remove_pointer_t<Handle>, cudaError_t (*)(Handle)>;

// cudaStreamSynchronize would wait without end for a kernel that hangs.
void wait_for(cudaStream_t stream, int32_t device_index) {
  constexpr auto kSpin = std::chrono::milliseconds(1);
  const Deadline deadline = Deadline::in_ms(RankDevice::kWaitMs);
  const auto start = Deadline::Clock::now();
  for (;;) {
    const cudaError_t state = cudaStreamQuery(stream);
    if (state != cudaErrorNotReady) return check("cudaStreamQuery", state);
    if (deadline.passed())
      fail(TERN_TIMEOUT, "CUDA device {}: the stream is not done after {} ms; a kernel hangs", device_index, RankDevice::kWaitMs);
    if (Deadline::Clock::now() - start < kSpin)
      std::this_thread::yield();
    else
      std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
}

class CudaGraph : public DeviceGraph {
 public:
  CudaGraph(cudaGraph_t graph, cudaStream_t stream, int32_t device_index)
      : graph_(graph, cudaGraphDestroy), stream_(stream), device_index_(device_index) {
    cudaGraphExec_t executable = nullptr;
    check("cudaGraphInstantiate", cudaGraphInstantiate(&executable, graph, 0));
    executable_ = {executable, cudaGraphExecDestroy};
  }

  void replay() override {
    check("cudaSetDevice", cudaSetDevice(device_index_));
    check("cudaGraphLaunch", cudaGraphLaunch(executable_.get(), stream_));
  }

 private:
  Owned<cudaGraph_t> graph_;
  Owned<cudaGraphExec_t> executable_{nullptr, cudaGraphExecDestroy};
  cudaStream_t stream_;
  int32_t device_index_;
};

class CudaDevice : public RankDevice {
 public:
  explicit CudaDevice(int32_t index) : index_(index) {
    use();
    cudaStream_t stream = nullptr;
    check("cudaStreamCreateWithFlags", cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    stream_.reset(stream);
    cudaMemPoolProps properties = {};
    properties.allocType = cudaMemAllocationTypePinned;
    properties.location.type = cudaMemLocationTypeDevice;
    properties.location.id = index;
    cudaMemPool_t pool = nullptr;
    check("cudaMemPoolCreate", cudaMemPoolCreate(&pool, &properties));
    pool_.reset(pool);
    // Freed memory stays in the pool: giving it back to the driver may wait for the GPU.
    uint64_t keep = std::numeric_limits<uint64_t>::max();
    check("cudaMemPoolSetAttribute", cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &keep));
    load_driver_kernels();
  }

  ~CudaDevice() override { cudaSetDevice(index_); }

  tern_device_type type() const override { return TERN_DEVICE_CUDA; }
  int32_t index() const override { return index_; }
  std::string pci_address() const override {
    char address[32] = {};
    check("cudaDeviceGetPCIBusId", cudaDeviceGetPCIBusId(address, sizeof(address), index_));
    return address;
  }
  void* stream() const override { return stream_.get(); }

  void* allocate(int64_t num_bytes) override {
    use();
    void* memory = nullptr;
    check("cudaMallocFromPoolAsync",
          cudaMallocFromPoolAsync(&memory, static_cast<size_t>(num_bytes > 0 ? num_bytes : 1), pool_.get(), stream_.get()));
    wait_for(stream_.get(), index_);
    return memory;
  }

  void free(void* memory) noexcept override {
    cudaSetDevice(index_);
    cudaFreeAsync(memory, stream_.get());
  }

  void copy_in(void* device_memory, const void* host_memory, int64_t num_bytes) override {
    copy(device_memory, host_memory, num_bytes, cudaMemcpyHostToDevice);
  }
  void copy_out(void* host_memory, const void* device_memory, int64_t num_bytes) override {
    copy(host_memory, device_memory, num_bytes, cudaMemcpyDeviceToHost);
  }

  void fill(void* device_memory, uint8_t value, int64_t num_bytes) override {
    use();
    if (num_bytes > 0) check("cudaMemsetAsync", cudaMemsetAsync(device_memory, value, static_cast<size_t>(num_bytes), stream_.get()));
  }

  void synchronise() override {
    use();
    wait_for(stream_.get(), index_);
  }

  std::unique_ptr<DeviceGraph> capture(const std::function<void()>& work) override {
    use();
    check("cudaStreamBeginCapture", cudaStreamBeginCapture(stream_.get(), cudaStreamCaptureModeThreadLocal));
    cudaGraph_t graph = nullptr;
    try {
      work();
    } catch (...) {
      cudaStreamEndCapture(stream_.get(), &graph);
      if (graph != nullptr) cudaGraphDestroy(graph);
      throw;
    }
    check("cudaStreamEndCapture", cudaStreamEndCapture(stream_.get(), &graph));
    return std::make_unique<CudaGraph>(graph, stream_.get(), index_);
  }

 private:
  void use() const { check("cudaSetDevice", cudaSetDevice(index_)); }

  // A copy of pageable memory waits inside of the driver; that it finds an idle stream keeps the driver free for other ranks.
  void copy(void* to, const void* from, int64_t num_bytes, cudaMemcpyKind kind) {
    use();
    wait_for(stream_.get(), index_);
    if (num_bytes <= 0) return;
    check("cudaMemcpyAsync", cudaMemcpyAsync(to, from, static_cast<size_t>(num_bytes), kind, stream_.get()));
    wait_for(stream_.get(), index_);
  }

  // The driver may load its own kernels (fills of each width) at first use and wait for the GPU then.
  void load_driver_kernels() {
    constexpr int64_t kNumBytes = 4096;
    uint8_t host[kNumBytes] = {};
    void* memory = allocate(kNumBytes);
    for (const int64_t offset : {0, 1, 2, 4}) fill(static_cast<uint8_t*>(memory) + offset, 0, kNumBytes - 2 * offset);
    copy_in(memory, host, kNumBytes);
    copy_out(host, memory, kNumBytes);
    free(memory);
    wait_for(stream_.get(), index_);
  }

  int32_t index_;
  Owned<cudaStream_t> stream_{nullptr, cudaStreamDestroy};
  Owned<cudaMemPool_t> pool_{nullptr, cudaMemPoolDestroy};
};

}  // namespace

int32_t num_cuda_devices() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

std::unique_ptr<RankDevice> make_cuda_device(int32_t device_index) {
  const int32_t num_devices = num_cuda_devices();
  if (device_index < 0 || device_index >= num_devices)
    fail(TERN_UNSUPPORTED, "CUDA device {} is asked for, {} are there; nvidia-smi shows them", device_index, num_devices);
  return std::make_unique<CudaDevice>(device_index);
}

}  // namespace tern::tools
