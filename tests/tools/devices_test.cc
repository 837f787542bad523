// SPDX-License-Identifier: Apache-2.0
// Memory and stream of a rank, on every kind of device that is here.
#include <gtest/gtest.h>

#include <cstring>
#include <numeric>
#include <vector>

#include "base/error.h"
#include "devices/rank_device.h"

namespace tern::tools {
namespace {

class Devices : public testing::TestWithParam<tern_device_type> {
 protected:
  void SetUp() override {
    if (GetParam() == TERN_DEVICE_CUDA && num_cuda_devices() == 0) GTEST_SKIP() << "needs a GPU, here is none";
    device_ = make_rank_device(GetParam(), 0);
  }
  std::vector<uint8_t> contents(const DeviceMemory& memory) {
    std::vector<uint8_t> bytes(static_cast<size_t>(memory.num_bytes()));
    device_->copy_out(bytes.data(), memory.data(), memory.num_bytes());
    return bytes;
  }
  std::unique_ptr<RankDevice> device_;
};

INSTANTIATE_TEST_SUITE_P(Kinds, Devices, testing::Values(TERN_DEVICE_CPU, TERN_DEVICE_CUDA),
                         [](const auto& kind) { return kind.param == TERN_DEVICE_CPU ? "Cpu" : "Cuda"; });

TEST_P(Devices, SayWhatTheyAre) {
  EXPECT_EQ(device_->type(), GetParam());
  EXPECT_EQ(device_->index(), 0);
  EXPECT_EQ(device_->stream() != nullptr, GetParam() == TERN_DEVICE_CUDA);
}

TEST_P(Devices, MemoryIsAlignedAndItsOwn) {
  std::vector<DeviceMemory> all;
  for (const int64_t num_bytes : {0, 1, 255, 256, 4097, 0}) {
    all.emplace_back(*device_, num_bytes);
    EXPECT_NE(all.back().data(), nullptr);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(all.back().data()) % RankDevice::kAlignment, 0u);
    EXPECT_EQ(all.back().num_bytes(), num_bytes);
    for (size_t i = 0; i + 1 < all.size(); ++i) EXPECT_NE(all[i].data(), all.back().data());
    device_->fill(all.back().data(), static_cast<uint8_t>(all.size()), num_bytes);
  }
  for (size_t i = 0; i < all.size(); ++i)
    for (const uint8_t byte : contents(all[i])) ASSERT_EQ(byte, i + 1);
}

TEST_P(Devices, CopiesAndFillsActInOrder) {
  const DeviceMemory memory(*device_, 100'000);
  std::vector<uint8_t> sent(50'000);
  std::iota(sent.begin(), sent.end(), uint8_t{0});
  for (int turn = 0; turn < 100; ++turn) {
    device_->fill(memory.data(), 0xEE, memory.num_bytes());
    device_->copy_in(memory.as<uint8_t>() + 3, sent.data(), 50'000);
    device_->fill(memory.as<uint8_t>() + 10, 0x11, 5);
    std::vector<uint8_t> expected(100'000, 0xEE);
    std::memcpy(expected.data() + 3, sent.data(), sent.size());
    std::memset(expected.data() + 10, 0x11, 5);
    ASSERT_EQ(contents(memory), expected);
  }
}

TEST_P(Devices, CapturedWorkRunsAtEveryReplay) {
  const DeviceMemory memory(*device_, 1000);
  uint8_t* const bytes = memory.as<uint8_t>();
  device_->fill(bytes, 1, 1000);
  const auto graph = device_->capture([&] { device_->fill(bytes, 2, 500); });
  EXPECT_EQ(contents(memory).front(), 1);
  for (int turn = 0; turn < 3; ++turn) {
    device_->fill(bytes, 3, 1000);
    graph->replay();
    EXPECT_EQ(contents(memory).front(), 2);
    EXPECT_EQ(contents(memory).back(), 3);
  }
}

TEST_P(Devices, WorkThatFailsIsNotCaptured) {
  EXPECT_THROW(device_->capture([] { fail(TERN_INTERNAL_ERROR, "on purpose"); })->replay(), Failure);
  const DeviceMemory memory(*device_, 16);
  device_->fill(memory.data(), 9, 16);
  EXPECT_EQ(contents(memory).front(), 9);
}

TEST(DeviceIndex, OnesThatAreNotThereAreRefused) {
  const int32_t count = num_cuda_devices();
  for (const int32_t index : {-1, count, count + 7}) {
    try {
      make_rank_device(TERN_DEVICE_CUDA, index);
      ADD_FAILURE() << "device " << index << " was made";
    } catch (const Failure& failure) {
      EXPECT_EQ(failure.status(), TERN_UNSUPPORTED);
    }
  }
  EXPECT_EQ(make_rank_device(TERN_DEVICE_AUTO, 0)->type(), count > 0 ? TERN_DEVICE_CUDA : TERN_DEVICE_CPU);
}

}  // namespace
}  // namespace tern::tools
