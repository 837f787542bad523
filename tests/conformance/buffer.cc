// SPDX-License-Identifier: Apache-2.0
#include "conformance/buffer.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace tern::conformance {
namespace {

constexpr uint8_t kGuard = 0x5C;

}  // namespace

void GuardedBuffer::Free::operator()(uint8_t* memory) const noexcept {
  if (window == nullptr)
    device->free(memory);
  else
    tern_window_free(window, memory);
}

GuardedBuffer::GuardedBuffer(int64_t num_bytes, tern_exchange* window, RankDevice& device) : num_bytes_(num_bytes) {
  const int64_t total = num_bytes + 2 * kGuardBytes;
  void* memory = nullptr;
  if (window == nullptr)
    memory = device.allocate(total);
  else if (tern_window_alloc(window, total, &memory) != TERN_OK)
    throw std::runtime_error(std::string("tern_window_alloc: ") + tern_last_error());
  memory_ = {static_cast<uint8_t*>(memory), Free{window, &device}};
  device.fill(memory_.get(), kGuard, total);
  poison();
}

void GuardedBuffer::poison() { memory_.get_deleter().device->fill(data(), kPoison, num_bytes_); }

void GuardedBuffer::write(const Bytes& bytes) {
  if (static_cast<int64_t>(bytes.size()) > num_bytes_) throw std::runtime_error("a buffer is too small for what is written to it");
  memory_.get_deleter().device->copy_in(data(), bytes.data(), static_cast<int64_t>(bytes.size()));
}

GuardedBuffer::Image GuardedBuffer::read() const {
  Image image;
  if (memory_ == nullptr) return image;
  image.memory_.resize(static_cast<size_t>(num_bytes_ + 2 * kGuardBytes));
  memory_.get_deleter().device->copy_out(image.memory_.data(), memory_.get(), static_cast<int64_t>(image.memory_.size()));
  return image;
}

std::span<const uint8_t> GuardedBuffer::Image::bytes() const {
  if (memory_.empty()) return {};
  return std::span(memory_).subspan(kGuardBytes, memory_.size() - 2 * kGuardBytes);
}

bool GuardedBuffer::Image::guards_intact() const {
  if (memory_.empty()) return true;
  const auto is_guard = [](uint8_t byte) { return byte == kGuard; };
  return std::all_of(memory_.begin(), memory_.begin() + kGuardBytes, is_guard) &&
         std::all_of(memory_.end() - kGuardBytes, memory_.end(), is_guard);
}

void InputArray::make_room(RankDevice& device, int64_t num_bytes, tern_exchange* window) {
  if (num_bytes == 0) return;
  if (window != nullptr && in_window_.num_bytes() < num_bytes) in_window_ = GuardedBuffer(num_bytes, window, device);
  if (window == nullptr && memory_.num_bytes() < num_bytes) memory_ = DeviceMemory(device, num_bytes);
}

const void* InputArray::load_bytes(RankDevice& device, std::span<const std::byte> bytes) {
  uint8_t* const data = in_window_.data() != nullptr ? in_window_.data() : memory_.as<uint8_t>();
  const auto num_bytes = static_cast<int64_t>(bytes.size()), room = std::max(in_window_.num_bytes(), memory_.num_bytes());
  if (num_bytes > room) throw std::runtime_error("an input does not fit the room that was given to it");
  if (data == nullptr) return nullptr;
  device.fill(data + num_bytes, kPoison, room - num_bytes);
  device.copy_in(data, bytes.data(), num_bytes);
  return data;
}

}  // namespace tern::conformance
