// SPDX-License-Identifier: Apache-2.0
// Memory that operations work on, where the rank's device has it, and how the host fills it and looks at it.
//
//   const Buffer tokens = Buffer::own(device, num_tokens * row_bytes);
//   HostRows host(device, num_workers);
//   host.write({tokens.data(), row_bytes, num_tokens}, [](int64_t i, std::span<std::byte> row) { ... });
//   const HostBytes copy(device, tokens);     // all of it, to be read
//
// Lifetime: the device and the exchange outlive the buffers. Threads: one at a time, as the device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <tern/tern.hpp>

#include "devices/rank_device.h"

namespace tern::tools {

// Cache-line aligned memory of a rank's device, either in the window or the rank's own.
class Buffer {
 public:
  Buffer() = default;
  static Buffer in_window(const Exchange& exchange, int64_t num_bytes);
  static Buffer own(RankDevice& device, int64_t num_bytes);

  std::byte* data() const { return data_; }
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }
  int64_t num_bytes() const { return num_bytes_; }

 private:
  DeviceMemory own_;
  std::optional<WindowBuffer> window_;
  std::byte* data_ = nullptr;
  int64_t num_bytes_ = 0;
};

// What is in a buffer, as the host reads it: in place on a CPU rank, a copy of it on a GPU.
class HostBytes {
 public:
  HostBytes(RankDevice& device, const Buffer& buffer);

  std::span<const std::byte> bytes() const { return bytes_; }
  template <typename T>
  const T* as() const {
    return reinterpret_cast<const T*>(bytes_.data());
  }

 private:
  std::unique_ptr<std::byte[]> copy_;
  std::span<const std::byte> bytes_;
};

// Rows of a buffer that may be larger than what the host wants to hold at once: block by block, several threads to a block.
class HostRows {
 public:
  HostRows(RankDevice& device, int num_workers) : device_(device), num_workers_(num_workers) {}

  // Row i lies at position(i), which grows with i; without `position`, at i.
  struct Rows {
    const Buffer& buffer;
    int64_t row_bytes = 0;
    int64_t count = 0;
    std::function<int64_t(int64_t)> position = nullptr;
  };

  // What lies between the rows may change.
  void write(const Rows& rows, const std::function<void(int64_t, std::span<std::byte>)>& make);

  // The first thing that `check` finds wrong, in the order of rows.
  using Check = std::function<std::optional<std::string>(int64_t, std::span<const std::byte>)>;
  std::optional<std::string> check(const Rows& rows, const Check& check);

  // Calls work(first, end) for parts of 0 .. count - 1, on several threads where that pays.
  void split(int64_t count, const std::function<void(int64_t, int64_t)>& work) const;

 private:
  // Rows that are on the host at once.
  struct Block {
    int64_t first = 0, end = 0;               // of the rows
    int64_t offset_bytes = 0, num_bytes = 0;  // in the buffer
    std::byte* host = nullptr;
  };
  Block block_at(const Rows& rows, int64_t first);

  RankDevice& device_;
  int num_workers_;
  std::unique_ptr<std::byte[]> staging_;
  int64_t staging_bytes_ = 0;
};

}  // namespace tern::tools
