// SPDX-License-Identifier: Apache-2.0
#include "conformance/buffer.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace tern::conformance {
namespace {

constexpr uint8_t kGuard = 0x5C;
constexpr size_t kAlignment = 64;

}  // namespace

void GuardedBuffer::Free::operator()(uint8_t* memory) const noexcept {
  if (window == nullptr)
    std::free(memory);
  else
    tern_window_free(window, memory);
}

GuardedBuffer::GuardedBuffer(int64_t num_bytes, tern_exchange* window) : num_bytes_(num_bytes) {
  const auto total = static_cast<size_t>(num_bytes + 2 * kGuardBytes);
  void* memory = nullptr;
  if (window == nullptr)
    memory = std::aligned_alloc(kAlignment, (total + kAlignment - 1) / kAlignment * kAlignment);
  else if (tern_window_alloc(window, static_cast<int64_t>(total), &memory) != TERN_OK)
    throw std::runtime_error(std::string("tern_window_alloc: ") + tern_last_error());
  if (memory == nullptr) throw std::bad_alloc();
  memory_ = {static_cast<uint8_t*>(memory), Free{window}};
  std::fill_n(memory_.get(), total, kGuard);
  poison();
}

void GuardedBuffer::poison() { std::fill_n(data(), num_bytes_, kPoison); }

bool GuardedBuffer::guards_intact() const {
  if (memory_ == nullptr) return true;
  const auto intact = [](const uint8_t* at) { return std::all_of(at, at + kGuardBytes, [](uint8_t byte) { return byte == kGuard; }); };
  return intact(memory_.get()) && intact(data() + num_bytes_);
}

}  // namespace tern::conformance
