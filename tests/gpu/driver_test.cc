// SPDX-License-Identifier: Apache-2.0
// How the CUDA engine speaks with CUDA, with and without a GPU.
#include "cuda/driver.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <thread>

#include "cuda/buffers.h"
#include "gpu/gpus.h"
#include "unit/test_ranks.h"

namespace tern::cuda {
namespace {

using namespace test;

void alone(const std::function<void()>& body) {
  expect_all_done(run_ranks(1, [&](RankSeat&) { body(); }));
}

TEST(Driver, WithoutAGpuEverythingSaysSo) {
  if (num_gpus() > 0) GTEST_SKIP() << "this machine has GPUs";
  alone([] {
    for (const std::string& text : {outcome([] { driver(); }), outcome([] { require_device(0); }), outcome([] { Stream stream(0); })})
      require(text.starts_with("TERN_UNSUPPORTED: CUDA: no GPU can be used: "), text);
  });
}

TEST(Driver, RefusesDevicesThatAreNotThere) {
  if (num_gpus() < 1) GTEST_SKIP() << too_few_gpus(1);
  alone([] {
    require_device(num_devices() - 1);
    for (const int device : {-1, num_devices()}) {
      const std::string text = outcome([&] { require_device(device); });
      require(text.starts_with("TERN_INVALID_ARGUMENT: CUDA: device ") && text.find("CUDA_VISIBLE_DEVICES") != std::string::npos, text);
    }
  });
}

TEST(Driver, ErrorsSayWhatWasTriedAndWhatCudaSaid) {
  if (num_gpus() < 1) GTEST_SKIP() << too_few_gpus(1);
  alone([] {
    const std::string runtime = outcome([] { check(cudaErrorInvalidValue, "testing"); });
    require(runtime.starts_with("TERN_SYSTEM_ERROR: CUDA: testing: invalid argument (cudaErrorInvalidValue); "), runtime);
    const std::string memory = outcome([] { check(CUDA_ERROR_OUT_OF_MEMORY, "testing"); });
    require(memory.starts_with("TERN_OUT_OF_MEMORY: CUDA: testing: out of memory (CUDA_ERROR_OUT_OF_MEMORY); "), memory);
    check(cudaGetLastError(), "an error that was reported is not reported again");
  });
}

TEST(Resources, BuffersAreZeroedAndHoldWhatIsCopied) {
  if (num_gpus() < 1) GTEST_SKIP() << too_few_gpus(1);
  alone([] {
    const Stream stream(0, StreamPriority::kHighest);
    const DeviceBuffer<uint32_t> device(std::make_shared<DevicePool>(0), 1000);
    const PinnedBuffer<uint32_t> host(0, 1000), back(0, 1000);
    require(std::count(host.begin(), host.end(), 0u) == 1000, "zeros on the host");
    std::fill(back.begin(), back.end(), 7u);
    const auto copy = [&](void* to, const void* from) {
      check(cudaMemcpyAsync(to, from, 4000, cudaMemcpyDefault, stream.get()), "copying");
      stream.wait(ample(), "copying");
    };
    copy(back.data(), device.data());
    require(std::count(back.begin(), back.end(), 0u) == 1000, "zeros on the device");
    for (size_t i = 0; i < host.size(); ++i) host[i] = static_cast<uint32_t>(i * i);
    copy(device.data(), host.data());
    copy(back.data(), device.data());
    require(std::equal(host.begin(), host.end(), back.begin()), "there and back");
  });
}

// A context costs hundreds of megabytes; device 0 must not pay for the ranks of the others.
TEST(Resources, NoContextOnOtherDevices) {
  if (num_gpus() < 2) GTEST_SKIP() << too_few_gpus(2);
  alone([] {
    const int last = num_devices() - 1;
    {
      Stream stream(last);
      Event event(last);
      DeviceBuffer<char> buffer(std::make_shared<DevicePool>(last), 100);
      PinnedBuffer<char> pinned(last, 100);
      // Freed by a thread that has no context.
      std::thread([stream = std::move(stream), event = std::move(event), buffer = std::move(buffer), pinned = std::move(pinned)] {
        stream.wait(ample(), "nothing");
      }).join();
    }
    decltype(&::cuDevicePrimaryCtxGetState) get_state = nullptr;
    check(cudaGetDriverEntryPointByVersion("cuDevicePrimaryCtxGetState", reinterpret_cast<void**>(&get_state), 12000, cudaEnableDefault),
          "looking up a function");
    const auto is_active = [&](int device) {
      unsigned flags = 0;
      int active = 0;
      check(get_state(device, &flags, &active), "asking for the state of a context");
      return active != 0;
    };
    require(is_active(last), "a context on the device that was used");
    require(!is_active(0), "none on device 0");
  });
}

TEST(Resources, TheCurrentDeviceStaysWhatItWas) {
  if (num_gpus() < 1) GTEST_SKIP() << too_few_gpus(1);
  alone([] {
    const auto current = [] {
      CUcontext context = nullptr;
      check(driver().ctx_get_current(&context), "asking for the current CUDA context");
      return context;
    };
    require(current() == nullptr, "none at first");
    const int last = num_devices() - 1;
    const Event event(last, EventTiming::kOn);
    const DeviceBuffer<char> buffer(std::make_shared<DevicePool>(last), 1);
    require(current() == nullptr, "none afterwards");
    check(cudaSetDevice(last), "setting the device");
    const CUcontext mine = current();
    {
      const DeviceGuard guard(0);
    }
    require(current() == mine, "the caller's");
    check(driver().ctx_set_current(nullptr), "making no context the current one");
    {
      const CurrentContext of_device(mine);
      require(current() == mine, "the context that was asked for");
      const CurrentContext again(mine);
    }
    require(current() == nullptr, "none again");
  });
}

}  // namespace
}  // namespace tern::cuda
