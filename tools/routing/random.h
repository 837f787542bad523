// SPDX-License-Identifier: Apache-2.0
// Random numbers that are the same on every rank, machine and compiler: SplitMix64, integers only.
//
//   Random random(key_of(seed, rank, token));
//   const uint64_t die = random.below(6);
#pragma once

#include <cstdint>

namespace tern::tools {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15u;

// The finaliser of SplitMix64: a bijection that spreads every input bit over the whole word.
constexpr uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

// One key from several numbers; the order of the numbers matters.
template <typename... Numbers>
constexpr uint64_t key_of(uint64_t seed, Numbers... numbers) {
  uint64_t key = mix(seed + kGolden);
  ((key = mix(key + kGolden + static_cast<uint64_t>(numbers))), ...);
  return key;
}

class Random {
 public:
  explicit constexpr Random(uint64_t key) : state_(key) {}

  constexpr uint64_t next() { return mix(state_ += kGolden); }
  // 0 .. bound - 1, for bounds up to 2^48; biased by less than bound / 2^64.
  constexpr uint64_t below(uint64_t bound) { return static_cast<uint64_t>((static_cast<unsigned __int128>(next()) * bound) >> 64); }

 private:
  uint64_t state_;
};

}  // namespace tern::tools
