// SPDX-License-Identifier: Apache-2.0
#include "tools/device_buffer.h"

#include <algorithm>
#include <thread>
#include <vector>

namespace tern::tools {
namespace {

int64_t position_of(const HostRows::Rows& rows, int64_t i) { return rows.position ? rows.position(i) : i; }

}  // namespace

Buffer Buffer::in_window(const Exchange& exchange, int64_t num_bytes) {
  Buffer buffer;
  buffer.window_.emplace(exchange, std::max<int64_t>(1, num_bytes));
  buffer.data_ = buffer.window_->as<std::byte>();
  buffer.num_bytes_ = num_bytes;
  return buffer;
}

Buffer Buffer::own(RankDevice& device, int64_t num_bytes) {
  Buffer buffer;
  buffer.own_ = DeviceMemory(device, std::max<int64_t>(1, num_bytes));
  buffer.data_ = buffer.own_.as<std::byte>();
  buffer.num_bytes_ = num_bytes;
  device.fill(buffer.data_, 0, num_bytes);  // all pages are there before anything is timed
  return buffer;
}

HostBytes::HostBytes(RankDevice& device, const Buffer& buffer) {
  const auto num_bytes = static_cast<size_t>(buffer.num_bytes());
  if (device.type() == TERN_DEVICE_CPU) {
    bytes_ = {buffer.data(), num_bytes};
    return;
  }
  copy_ = std::make_unique_for_overwrite<std::byte[]>(num_bytes);
  device.copy_out(copy_.get(), buffer.data(), buffer.num_bytes());
  bytes_ = {copy_.get(), num_bytes};
}

HostRows::Block HostRows::block_at(const Rows& rows, int64_t first) {
  constexpr int64_t kMostBytes = 64 << 20;
  const bool in_place = device_.type() == TERN_DEVICE_CPU;
  const int64_t most_rows = in_place ? INT64_MAX : std::max<int64_t>(1, kMostBytes / std::max<int64_t>(1, rows.row_bytes));
  const int64_t first_position = position_of(rows, first);
  Block block{.first = first, .end = first + 1};
  while (block.end < rows.count && position_of(rows, block.end) - first_position < most_rows) ++block.end;
  block.offset_bytes = first_position * rows.row_bytes;
  block.num_bytes = (position_of(rows, block.end - 1) + 1 - first_position) * rows.row_bytes;
  if (in_place) {
    block.host = rows.buffer.data() + block.offset_bytes;
    return block;
  }
  if (staging_bytes_ < block.num_bytes) {
    staging_ = std::make_unique_for_overwrite<std::byte[]>(static_cast<size_t>(block.num_bytes));
    staging_bytes_ = block.num_bytes;
  }
  block.host = staging_.get();
  return block;
}

void HostRows::write(const Rows& rows, const std::function<void(int64_t, std::span<std::byte>)>& make) {
  if (rows.row_bytes == 0) return;
  for (int64_t next = 0; next < rows.count;) {
    const Block block = block_at(rows, next);
    split(block.end - block.first, [&](int64_t first, int64_t end) {
      for (int64_t i = block.first + first; i < block.first + end; ++i) {
        std::byte* row = block.host + position_of(rows, i) * rows.row_bytes - block.offset_bytes;
        make(i, {row, static_cast<size_t>(rows.row_bytes)});
      }
    });
    std::byte* device_memory = rows.buffer.data() + block.offset_bytes;
    if (block.host != device_memory) device_.copy_in(device_memory, block.host, block.num_bytes);
    next = block.end;
  }
}

std::optional<std::string> HostRows::check(const Rows& rows, const Check& check) {
  for (int64_t next = 0; next < rows.count;) {
    const Block block = block_at(rows, next);
    const std::byte* device_memory = rows.buffer.data() + block.offset_bytes;
    if (block.host != device_memory) device_.copy_out(block.host, device_memory, block.num_bytes);
    const int64_t count = block.end - block.first;
    std::vector<std::optional<std::string>> wrong(static_cast<size_t>(count));
    split(count, [&](int64_t first, int64_t end) {
      for (int64_t i = first; i < end; ++i) {
        const std::byte* row = block.host + position_of(rows, block.first + i) * rows.row_bytes - block.offset_bytes;
        auto& found = wrong[static_cast<size_t>(i)];
        found = check(block.first + i, {row, static_cast<size_t>(rows.row_bytes)});
        if (found) return;
      }
    });
    for (auto& found : wrong) {
      if (found) return std::move(found);
    }
    next = block.end;
  }
  return std::nullopt;
}

void HostRows::split(int64_t count, const std::function<void(int64_t, int64_t)>& work) const {
  constexpr int64_t kLeastPerThread = 64;
  const int64_t num_parts = std::clamp<int64_t>(count / kLeastPerThread, 1, num_workers_);
  std::vector<std::jthread> threads;
  for (int64_t part = 1; part < num_parts; ++part)
    threads.emplace_back([&, part] { work(count * part / num_parts, count * (part + 1) / num_parts); });
  work(0, count / num_parts);
}

}  // namespace tern::tools
