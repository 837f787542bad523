// SPDX-License-Identifier: Apache-2.0
// Numbers drawn from a position instead of a state: the same key gives the same number on every rank, thread and machine,
// so that a check can recompute any input without storing it.
//
//   const Draw draw(seed, kTokens, rank, token);
//   const uint64_t bits = draw.word(column);
#pragma once

#include <cstdint>

namespace tern::conformance {

// The finaliser of SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014).
inline uint64_t mix(uint64_t x) {
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

class Draw {
 public:
  template <typename... Parts>
  explicit Draw(uint64_t seed, Parts... parts) : key_(mix(seed)) {
    ((key_ = mix(key_ ^ static_cast<uint64_t>(parts))), ...);
  }

  uint64_t word(int64_t position) const { return mix(key_ + 0x632BE59BD9B4E019u * static_cast<uint64_t>(position)); }

  // 0 <= result < bound; the bias of the remainder does not matter here.
  int64_t below(int64_t position, int64_t bound) const { return static_cast<int64_t>(word(position) % static_cast<uint64_t>(bound)); }
  bool one_in(int64_t position, int64_t n) const { return below(position, n) == 0; }

 private:
  uint64_t key_;
};

}  // namespace tern::conformance
