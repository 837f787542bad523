// SPDX-License-Identifier: Apache-2.0
// Windows in GPU memory: between processes, between threads, renewed, and refused.
#include "cuda/device_segment.h"

#include <fcntl.h>
#include <gtest/gtest.h>

#include <algorithm>

#include "cuda/buffers.h"
#include "gpu/gpus.h"
#include "memory/host_segment.h"
#include "memory/sharing.h"
#include "topology/topology.h"
#include "unit/test_ranks.h"

namespace tern::cuda {
namespace {

using namespace test;
using Words = std::vector<uint32_t>;

constexpr size_t kNumWords = 100'000;
constexpr size_t kSliceBytes = 1 << 20;  // what a window holds for each writer
constexpr size_t kPageBytes = 2 << 20;

Words pattern(int writer, int owner, int round = 0) {
  Words words(kNumWords);
  for (size_t i = 0; i < words.size(); ++i) words[i] = static_cast<uint32_t>(i * 2654435761u + writer * 65537 + owner * 257 + round + 1);
  return words;
}

// Through memory of `device`, so that it is this GPU that reaches the window.
void copy_words(int device, void* to, const void* from) {
  const DeviceGuard guard(device);
  const Stream stream(device);
  const DeviceBuffer<uint32_t> between(std::make_shared<DevicePool>(device), kNumWords);
  const size_t bytes = kNumWords * sizeof(uint32_t);
  check(cudaMemcpyAsync(between.data(), from, bytes, cudaMemcpyDefault, stream.get()), "copying");
  check(cudaMemcpyAsync(to, between.data(), bytes, cudaMemcpyDefault, stream.get()), "copying");
  stream.wait(ample(), "copying");
}

void write(int device, const Segment& window, int slice, const Words& words) {
  const PinnedBuffer<uint32_t> host(device, kNumWords);
  std::copy(words.begin(), words.end(), host.begin());
  copy_words(device, window.data() + slice * kSliceBytes, host.data());
}

Words read(int device, const Segment& window, int slice) {
  const PinnedBuffer<uint32_t> host(device, kNumWords);
  copy_words(device, host.data(), window.data() + slice * kSliceBytes);
  return Words(host.begin(), host.end());
}

struct Rank {
  Rank(std::unique_ptr<Bootstrap> with, int num_gpus)
      : bootstrap(std::move(with)),
        me(bootstrap->rank()),
        num_ranks(bootstrap->num_ranks()),
        device(me % num_gpus),
        sharer(make_segment_sharer(discover(*bootstrap, "", ample()), *bootstrap, ample())) {}

  void barrier() { bootstrap->allgather(nullptr, nullptr, 0, ample()); }
  std::shared_ptr<DeviceSegment> create() const {
    return DeviceSegment::create(static_cast<size_t>(num_ranks) * kSliceBytes, device, sharer->shared_by());
  }
  std::vector<std::shared_ptr<Segment>> share(std::shared_ptr<Segment> mine, const std::string& tag) {
    return sharer->share(std::move(mine), tag, std::vector<uint8_t>(static_cast<size_t>(num_ranks), 1), ample());
  }

  std::unique_ptr<Bootstrap> bootstrap;
  int me, num_ranks, device;
  std::unique_ptr<SegmentSharer> sharer;
};

std::unique_ptr<Bootstrap> bootstrap_of(RankSeat& seat) {
  return make_callback_bootstrap(seat.rank(), seat.num_ranks(), &RankSeat::allgather, &seat);
}

// Every rank writes into every window; every rank finds in its own, and in the others', what was written.
void check_windows(Rank& rank, const std::vector<std::shared_ptr<Segment>>& windows, int round) {
  for (int owner = 0; owner < rank.num_ranks; ++owner) write(rank.device, *windows[owner], rank.me, pattern(rank.me, owner, round));
  rank.barrier();
  for (int owner = 0; owner < rank.num_ranks; ++owner)
    for (int writer = 0; writer < rank.num_ranks; ++writer)
      require(read(rank.device, *windows[owner], writer) == pattern(writer, owner, round), "what a rank wrote");
  rank.barrier();
}

void alone(const std::function<void()>& body) {
  expect_all_done(run_ranks(1, [&](RankSeat&) { body(); }));
}

// ---------------------------------------------------------------------------------------------------------- one process

TEST(DeviceSegment, IsWholePagesOfZeros) {
  if (num_gpus() < 1) GTEST_SKIP() << too_few_gpus(1);
  alone([] {
    for (const SharedBy shared_by : {SharedBy::kThreads, SharedBy::kProcesses}) {
      const auto segment = DeviceSegment::create(kPageBytes + 1, 0, shared_by);
      require(segment->size() % kPageBytes == 0 && segment->size() > kPageBytes, "rounded up");
      require((segment->fd() >= 0) == (shared_by == SharedBy::kProcesses), "a descriptor for processes");
      require(segment->fd() < 0 || (::fcntl(segment->fd(), F_GETFD) & FD_CLOEXEC) != 0, "closed on exec");
      for (int slice = 0; slice < 3; ++slice) require(read(0, *segment, slice) == Words(kNumWords), "zeros");
    }
  });
}

TEST(DeviceSegment, RefusesWhatCannotBe) {
  if (num_gpus() < 1) GTEST_SKIP() << too_few_gpus(1);
  alone([] {
    const auto refused = [](size_t bytes, int device) {
      return outcome([&] { DeviceSegment::create(bytes, device, SharedBy::kProcesses); });
    };
    const std::string too_large = refused(size_t{1} << 45, 0);
    require(too_large.starts_with("TERN_OUT_OF_MEMORY: window of 35184372088832 bytes: GPU 0 (") &&
                too_large.find(" bytes free; ") != std::string::npos,
            too_large);
    for (const std::string& text : {refused(0, 0), refused(SIZE_MAX, 0), refused(4096, num_devices()), refused(4096, -1)})
      require(text.starts_with("TERN_INVALID_ARGUMENT: "), text);
    const auto mine = DeviceSegment::create(4096, 0, SharedBy::kProcesses);
    const auto foreign = HostSegment::create(mine->size(), SharedBy::kProcesses);
    const std::string text = outcome([&] { mine->map_peer(Fd(::fcntl(foreign->fd(), F_DUPFD_CLOEXEC, 0))); });
    require(text.starts_with("TERN_SYSTEM_ERROR: CUDA: taking over a peer's window"), text);
  });
}

TEST(DeviceSegment, RenewKeepsAddressContentsAndAccess) {
  if (num_gpus() < 1) GTEST_SKIP() << too_few_gpus(1);
  alone([] {
    const int other = num_devices() - 1;
    const auto segment = DeviceSegment::create(kSliceBytes, 0, SharedBy::kProcesses);
    segment->grant(other);
    write(0, *segment, 0, pattern(0, 0));
    const std::byte* address = segment->data();
    for (int round = 1; round < 4; ++round) {
      const auto old = segment->map_peer(Fd(::fcntl(segment->fd(), F_DUPFD_CLOEXEC, 0)));
      segment->renew();
      write(0, *old, 0, Words(kNumWords, 666));
      require(segment->data() == address, "the same address");
      require(read(other, *segment, 0) == pattern(0, 0, round - 1), "the same contents, for whoever has access");
      write(other, *segment, 0, pattern(0, 0, round));
      require(read(0, *old, 0) == Words(kNumWords, 666), "what is old stays apart");
    }
  });
}

// -------------------------------------------------------------------------------------------------------------- threads

class DeviceWindowsOfThreads : public ::testing::TestWithParam<int> {};

TEST_P(DeviceWindowsOfThreads, WriteHereReadThere) {
  const int num_ranks = GetParam();
  if (num_gpus() < 1) GTEST_SKIP() << too_few_gpus(1);
  alone([&] {
    auto bootstraps = make_local_bootstraps(num_ranks);
    const auto outcomes = run_threads(num_ranks, [&](int r) {
      Rank rank(std::move(bootstraps[r]), num_devices());
      const auto mine = rank.create();
      const auto windows = rank.share(mine, "windows");
      for (const auto& window : windows) {
        static_cast<DeviceSegment&>(*window).grant(rank.device);
        static_cast<DeviceSegment&>(*window).grant(rank.device);
      }
      require(windows[r] == mine && mine->fd() < 0, "one mapping for all");
      for (int round = 0; round < 2; ++round) check_windows(rank, windows, round);
      mine->renew();
      rank.barrier();
      check_windows(rank, windows, 2);
    });
    for (const std::string& text : outcomes) require(text == "ok", text);
  });
}

INSTANTIATE_TEST_SUITE_P(Ranks, DeviceWindowsOfThreads, ::testing::Values(1, 2, 4, 8));

// ------------------------------------------------------------------------------------------------------------ processes

class DeviceWindowsOfProcesses : public ::testing::TestWithParam<int> {};

TEST_P(DeviceWindowsOfProcesses, WriteHereReadThere) {
  const int num_ranks = GetParam();
  const int gpus = num_gpus();
  if (gpus < 1) GTEST_SKIP() << too_few_gpus(1);
  expect_all_done(run_ranks(num_ranks, [&](RankSeat& seat) {
    Rank rank(bootstrap_of(seat), gpus);
    for (int round = 0; round < 3; ++round) {
      const auto mine = rank.create();
      const auto windows = rank.share(mine, fmt::format("windows-{}", round));
      require(windows[rank.me] == mine, "own entry");
      check_windows(rank, windows, round);
    }
  }));
}

TEST_P(DeviceWindowsOfProcesses, WhoMapsTheOldMemoryIsShutOut) {
  const int num_ranks = GetParam();
  const int gpus = num_gpus();
  if (gpus < 1) GTEST_SKIP() << too_few_gpus(1);
  expect_all_done(run_ranks(num_ranks, [&](RankSeat& seat) {
    Rank rank(bootstrap_of(seat), gpus);
    const auto mine = rank.create();
    const auto before = rank.share(mine, "before");
    check_windows(rank, before, 0);
    mine->renew();
    rank.barrier();
    // As a rank would that slept through the renewal.
    for (int owner = 0; owner < num_ranks; ++owner)
      if (owner != rank.me) write(rank.device, *before[owner], rank.me, Words(kNumWords, 666));
    rank.barrier();
    for (int writer = 0; writer < num_ranks; ++writer)
      require(read(rank.device, *mine, writer) == pattern(writer, rank.me, 0), "contents are kept, late writes do not matter");
    check_windows(rank, rank.share(mine, "after"), 1);
  }));
}

INSTANTIATE_TEST_SUITE_P(Gpus, DeviceWindowsOfProcesses, ::testing::Values(2, 4, 8));

}  // namespace
}  // namespace tern::cuda
