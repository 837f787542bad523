// SPDX-License-Identifier: Apache-2.0
// Memory for kernels comes and goes beside a kernel that waits for the host: whatever waits for the whole GPU meets the kernel's deadline.
#include "cuda/buffers.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>

#include "cuda/device_segment.h"
#include "gpu/gpus.h"
#include "gpu/spin.h"
#include "unit/test_ranks.h"

namespace tern::cuda {
namespace {

using namespace test;

constexpr int64_t kMostHoldMicros = 10'000'000;

// A kernel that runs until release().
class HeldKernel {
 public:
  HeldKernel() : stream_(0), end_(0), released_(0, 1) {}
  ~HeldKernel() { release(); }

  void start() {
    set(0);
    check(conformance::launch_hold(stream_.get(), released_.data(), kMostHoldMicros), "launching a kernel");
    check(cudaEventRecord(end_.get(), stream_.get()), "recording its end");
  }
  bool runs() const { return !end_.passed(); }
  void release() { set(1); }
  void wait() const { stream_.wait(ample(), "waiting for a kernel that was released"); }

 private:
  void set(uint32_t value) { std::atomic_ref<uint32_t>(*released_.data()).store(value); }

  Stream stream_;
  Event end_;
  PinnedBuffer<uint32_t> released_;
};

// Once by itself, since CUDA loads its own kernels at the first use, and then beside the kernel.
void expect_beside_a_kernel(const std::function<void(int turn)>& act) {
  expect_all_done(run_ranks(1, [&](RankSeat&) {
    const DeviceGuard guard(0);
    HeldKernel kernel;
    kernel.start();
    kernel.release();
    kernel.wait();
    act(0);
    kernel.start();
    for (int turn = 1; turn < 4; ++turn) {
      act(turn);
      require(kernel.runs(), "nothing has waited for the kernel");
    }
    kernel.release();
    kernel.wait();
    require(!kernel.runs(), "it has ended");
  }));
}

TEST(BesideAKernel, PoolsAndBuffers) {
  if (num_gpus() < 1) GTEST_SKIP() << too_few_gpus(1);
  expect_beside_a_kernel([](int turn) {
    const auto pool = std::make_shared<DevicePool>(0);
    for (int repeat = 0; repeat < 3; ++repeat) {
      const DeviceBuffer<std::byte> small(pool, 100), large(pool, static_cast<size_t>(turn + 1) << 24);
      require(small.data() != large.data(), "memory of their own");
    }
  });
}

TEST(BesideAKernel, PinnedBuffers) {
  if (num_gpus() < 1) GTEST_SKIP() << too_few_gpus(1);
  expect_beside_a_kernel([](int turn) {
    const PinnedBuffer<std::byte> fresh(0, size_t{1} << (12 + turn));  // a size that the cache does not have yet
    require(fresh[0] == std::byte{0}, "zeroed");
  });
}

TEST(BesideAKernel, StreamsAndEvents) {
  if (num_gpus() < 1) GTEST_SKIP() << too_few_gpus(1);
  expect_beside_a_kernel([](int) {
    const Stream stream(0, StreamPriority::kHighest);
    const Event event(0);
    check(cudaEventRecord(event.get(), stream.get()), "recording an event");
    stream.wait(ample(), "waiting for nothing");
    require(event.passed(), "an event of an empty stream");
  });
}

TEST(BesideAKernel, DeviceSegments) {
  if (num_gpus() < 1) GTEST_SKIP() << too_few_gpus(1);
  expect_beside_a_kernel([](int turn) {
    const SharedBy shared_by = turn % 2 == 0 ? SharedBy::kThreads : SharedBy::kProcesses;
    const auto segment = DeviceSegment::create(size_t{4} << 20, 0, shared_by);
    segment->grant(num_devices() - 1);
    segment->renew();
  });
}

// What was given back is zeroed again for the next one.
TEST(Buffers, AreZeroedAlsoAgain) {
  if (num_gpus() < 1) GTEST_SKIP() << too_few_gpus(1);
  expect_all_done(run_ranks(1, [](RankSeat&) {
    const auto pool = std::make_shared<DevicePool>(0);
    const void* before = nullptr;
    for (int turn = 0; turn < 3; ++turn) {
      const DeviceBuffer<uint32_t> device(pool, 1000);
      const PinnedBuffer<uint32_t> host(0, 1000);
      require(std::count(host.begin(), host.end(), 0u) == 1000, "zeros on the host");
      require(turn == 0 || host.data() == before, "the block that was given back");
      before = host.data();
      std::fill(host.begin(), host.end(), 7u);
      const auto copy = [&](void* to, const void* from) {
        check(cudaMemcpyAsync(to, from, 4000, cudaMemcpyDefault, pool->stream().get()), "copying");
        pool->stream().wait(ample(), "copying");
      };
      copy(host.data(), device.data());
      require(std::count(host.begin(), host.end(), 0u) == 1000, "zeros on the device");
      std::fill(host.begin(), host.end(), 7u);
      copy(device.data(), host.data());
    }
  }));
}

// Of the strictest kind, in which CUDA refuses to allocate for every thread of the process.
TEST(Buffers, ComeAndGoWhileAGraphIsCaptured) {
  if (num_gpus() < 1) GTEST_SKIP() << too_few_gpus(1);
  expect_all_done(run_ranks(1, [](RankSeat&) {
    const auto pool = std::make_shared<DevicePool>(0);
    const Stream captured(0);
    check(cudaStreamBeginCapture(captured.get(), cudaStreamCaptureModeGlobal), "beginning a capture");
    for (const size_t size : {size_t{100}, size_t{1} << 24}) {
      const DeviceBuffer<std::byte> device(pool, size);
      const PinnedBuffer<std::byte> host(0, 5000);
      const Stream stream(0);
      const Event event(0);
      check(cudaEventRecord(event.get(), stream.get()), "recording an event");
      stream.wait(ample(), "waiting for nothing");
      require(event.passed(), "an event of an empty stream");
    }
    cudaGraph_t graph = nullptr;
    check(cudaStreamEndCapture(captured.get(), &graph), "ending a capture that nothing has disturbed");
    size_t num_nodes = 1;
    check(cudaGraphGetNodes(graph, nullptr, &num_nodes), "counting nodes");
    cudaGraphDestroy(graph);
    require(num_nodes == 0, "nothing of it is in the graph");
  }));
}

}  // namespace
}  // namespace tern::cuda
