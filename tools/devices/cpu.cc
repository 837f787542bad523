// SPDX-License-Identifier: Apache-2.0
// A CPU rank: plain memory; operations are done when they return.
#include <cstring>
#include <new>
#include <utility>

#include "devices/backends.h"

namespace tern::tools {
namespace {

class CpuGraph : public DeviceGraph {
 public:
  explicit CpuGraph(std::function<void()> work) : work_(std::move(work)) {}
  void replay() override { work_(); }

 private:
  std::function<void()> work_;
};

class CpuDevice : public RankDevice {
 public:
  tern_device_type type() const override { return TERN_DEVICE_CPU; }
  int32_t index() const override { return 0; }
  std::string pci_address() const override { return ""; }
  void* stream() const override { return nullptr; }

  void* allocate(int64_t num_bytes) override { return ::operator new(static_cast<size_t>(num_bytes), std::align_val_t{kAlignment}); }
  void free(void* memory) noexcept override { ::operator delete(memory, std::align_val_t{kAlignment}); }

  void copy_in(void* device_memory, const void* host_memory, int64_t num_bytes) override { copy(device_memory, host_memory, num_bytes); }
  void copy_out(void* host_memory, const void* device_memory, int64_t num_bytes) override { copy(host_memory, device_memory, num_bytes); }
  void fill(void* device_memory, uint8_t value, int64_t num_bytes) override {
    if (num_bytes > 0) std::memset(device_memory, value, static_cast<size_t>(num_bytes));
  }
  void synchronise() override {}
  std::unique_ptr<DeviceGraph> capture(const std::function<void()>& work) override { return std::make_unique<CpuGraph>(work); }

 private:
  static void copy(void* to, const void* from, int64_t num_bytes) {
    if (num_bytes > 0) std::memcpy(to, from, static_cast<size_t>(num_bytes));
  }
};

}  // namespace

std::unique_ptr<RankDevice> make_cpu_device() { return std::make_unique<CpuDevice>(); }

RankDevice& host_device() {
  static CpuDevice device;
  return device;
}

}  // namespace tern::tools
