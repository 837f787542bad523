// SPDX-License-Identifier: Apache-2.0
// What the host writes to a rank's memory and reads there, on every kind of device that is here.
#include <gtest/gtest.h>

#include <algorithm>

#include "tools/device_buffer.h"

namespace tern::tools {
namespace {

constexpr int64_t kRowBytes = 48;
constexpr int64_t kNumRows = 500;  // enough for several threads

class DeviceBuffer : public testing::TestWithParam<tern_device_type> {
 protected:
  void SetUp() override {
    if (GetParam() == TERN_DEVICE_CUDA && num_cuda_devices() == 0) GTEST_SKIP() << "needs a GPU, here is none";
    device_ = make_rank_device(GetParam(), 0);
  }

  static std::byte byte_of(int64_t row, size_t i) { return static_cast<std::byte>(row * 7 + static_cast<int64_t>(i)); }

  // Row i at 3 i, as with rows that have gaps between them.
  HostRows::Rows sparse_rows(const Buffer& buffer) const {
    return {buffer, kRowBytes, kNumRows, [](int64_t i) { return 3 * i; }};
  }

  Buffer written_buffer(HostRows& host) {
    Buffer buffer = Buffer::own(*device_, 3 * kNumRows * kRowBytes);
    host.write(sparse_rows(buffer), [](int64_t i, std::span<std::byte> row) {
      for (size_t at = 0; at < row.size(); ++at) row[at] = byte_of(i, at);
    });
    return buffer;
  }

  static std::optional<std::string> differs(int64_t i, std::span<const std::byte> row) {
    for (size_t at = 0; at < row.size(); ++at) {
      if (row[at] != byte_of(i, at)) return "row " + std::to_string(i);
    }
    return std::nullopt;
  }

  std::unique_ptr<RankDevice> device_;
};

INSTANTIATE_TEST_SUITE_P(Kinds, DeviceBuffer, testing::Values(TERN_DEVICE_CPU, TERN_DEVICE_CUDA),
                         [](const auto& kind) { return kind.param == TERN_DEVICE_CPU ? "Cpu" : "Cuda"; });

TEST_P(DeviceBuffer, RowsAreFoundAsTheyWereWritten) {
  HostRows host(*device_, 3);
  const Buffer buffer = written_buffer(host);
  EXPECT_EQ(host.check(sparse_rows(buffer), differs), std::nullopt);
}

TEST_P(DeviceBuffer, TheFirstWrongRowIsNamed) {
  HostRows host(*device_, 3);
  const Buffer buffer = written_buffer(host);
  for (const int64_t row : {int64_t{499}, int64_t{123}}) {
    const std::byte wrong = ~byte_of(row, 5);
    device_->copy_in(buffer.data() + 3 * row * kRowBytes + 5, &wrong, 1);
  }
  EXPECT_EQ(host.check(sparse_rows(buffer), differs), "row 123");
}

TEST_P(DeviceBuffer, HostBytesAreThoseOfTheDevice) {
  HostRows host(*device_, 1);
  const Buffer buffer = written_buffer(host);
  const HostBytes bytes(*device_, buffer);
  ASSERT_EQ(bytes.bytes().size(), static_cast<size_t>(3 * kNumRows * kRowBytes));
  EXPECT_EQ(bytes.bytes()[3 * 10 * kRowBytes + 4], byte_of(10, 4));
}

TEST_P(DeviceBuffer, NoRowsAreNoWork) {
  HostRows host(*device_, 4);
  const Buffer buffer = Buffer::own(*device_, 0);
  int calls = 0;
  host.write({buffer, kRowBytes, 0}, [&](int64_t, std::span<std::byte>) { ++calls; });
  EXPECT_EQ(host.check({buffer, kRowBytes, 0}, differs), std::nullopt);
  EXPECT_EQ(calls, 0);
}

}  // namespace
}  // namespace tern::tools
