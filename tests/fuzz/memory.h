// SPDX-License-Identifier: Apache-2.0
// The caller's side of a call: memory that is exactly as large as the contract says, so that a sanitizer sees every access
// beyond it, and structs that are exactly as large as their struct_size says.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <vector>

#include "input.h"

namespace tern::fuzz {

// Calls that may touch more memory than this are not made.
inline constexpr int64_t kMostBytes = int64_t{4} << 20;

// A size that has left what can be touched.
inline constexpr int64_t kTooMuch = int64_t{1} << 61;

// The product of sizes that may be anything: 0 if one is not positive, kTooMuch where it leaves the integers.
inline int64_t product(std::initializer_list<int64_t> factors) {
  int64_t result = 1;
  for (const int64_t factor : factors) {
    if (factor <= 0) return 0;
    result = factor > kTooMuch / result ? kTooMuch : result * factor;
  }
  return result;
}
inline int64_t sum(int64_t a, int64_t b) { return std::min(kTooMuch, std::min(kTooMuch, a) + std::min(kTooMuch, b)); }

// The arrays of one call.
class Arrays {
 public:
  explicit Arrays(Input& input) : input_(input), fill_(input.byte()) {}

  // Memory of this size, or of one byte if it is too large; then only a call that refuses its arguments may be made.
  template <typename Element>
  Element* make(int64_t bytes) {
    has_all_ = has_all_ && bytes <= kMostBytes;
    return reinterpret_cast<Element*>(add(bytes));
  }
  // An argument that the caller may leave out.
  template <typename Element>
  Element* maybe(int64_t bytes) {
    return input_.one_in(3) ? nullptr : make<Element>(bytes);
  }
  // Memory that lies elsewhere: a window's.
  std::byte* borrow(std::byte* data, int64_t bytes) {
    arrays_.push_back({nullptr, data, bytes});
    std::memset(data, fill_, static_cast<size_t>(bytes));
    return data;
  }

  bool has_all() const { return has_all_; }
  // Did nobody write into any of them? To be asked of a call whose arrays have not been filled with anything else.
  bool are_unchanged() const {
    return std::all_of(arrays_.begin(), arrays_.end(), [&](const Array& array) {
      return std::all_of(array.data, array.data + array.size_bytes, [&](std::byte b) { return b == std::byte{fill_}; });
    });
  }

 private:
  struct Array {
    std::unique_ptr<std::byte[]> owned;
    std::byte* data;
    int64_t size_bytes;
  };

  std::byte* add(int64_t bytes) {
    const int64_t size = bytes > kMostBytes || bytes <= 0 ? 1 : bytes;
    auto owned = std::make_unique<std::byte[]>(static_cast<size_t>(size));
    std::memset(owned.get(), fill_, static_cast<size_t>(size));
    std::byte* data = owned.get();
    arrays_.push_back({std::move(owned), data, size});
    return data;
  }

  Input& input_;
  uint8_t fill_;
  std::vector<Array> arrays_;
  bool has_all_ = true;
};

// A struct as a caller of some version hands it over. In wild calls its size may be any, and unknown fields may be set.
template <typename Struct>
class Given {
 public:
  explicit Given(Input& input) {
    if (!input.odd_one_in(6)) return;
    switch (input.byte() % 4) {
      case 0: size_ = input.byte() % (sizeof(Struct) + 16); break;  // an older or a broken caller
      case 1: size_ = static_cast<size_t>(input.word()); break;
      case 2: size_ = sizeof(Struct) + 8 * (1 + size_t{input.byte()}); break;  // a newer caller
      default: is_null_ = true;
    }
    if (is_null_ || size_ <= sizeof(Struct) || size_ > kLongest) return;
    if (input.one_in(2)) unknown_ = input.byte();
  }

  // What the library may read of these fields: nothing beyond struct_size.
  Struct seen(const Struct& fields) const {
    Struct result;
    std::memset(static_cast<void*>(&result), 0, sizeof(result));
    if (!is_null_ && size_ >= sizeof(size_t)) std::memcpy(static_cast<void*>(&result), &fields, std::min(size_, sizeof(Struct)));
    result.struct_size = size_;
    return result;
  }

  // The pointer to pass. May be called again with other fields.
  Struct* pointer(const Struct& fields) {
    if (is_null_) return nullptr;
    const size_t bytes = size_ > kLongest ? sizeof(Struct) : std::max(size_, sizeof(size_t));
    // Of words, for the alignment; the library must not look at the rest of the last one.
    memory_ = std::make_unique<std::byte[]>(bytes);
    std::memset(memory_.get(), unknown_, bytes);
    std::memcpy(memory_.get(), &fields, std::min(bytes, sizeof(Struct)));
    std::memcpy(memory_.get(), &size_, sizeof(size_));
    before_.assign(memory_.get(), memory_.get() + bytes);
    return reinterpret_cast<Struct*>(memory_.get());
  }
  Struct* optional_pointer(Input& input, const Struct& fields) { return input.one_in(3) ? nullptr : pointer(fields); }

  bool is_unchanged() const { return std::equal(before_.begin(), before_.end(), memory_.get()); }

 private:
  // The longest struct that the library reads.
  static constexpr size_t kLongest = 1 << 20;

  bool is_null_ = false;
  size_t size_ = sizeof(Struct);
  uint8_t unknown_ = 0;
  std::unique_ptr<std::byte[]> memory_;
  std::vector<std::byte> before_;
};

}  // namespace tern::fuzz
