// SPDX-License-Identifier: Apache-2.0
// Random allocations against a model that knows every granule, and the ends of the numbers.
#include "memory/offset_allocator.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>
#include <map>
#include <random>
#include <vector>

#include "base/error.h"

namespace tern::test {
namespace {

using testing::HasSubstr;

constexpr int64_t kGranule = OffsetAllocator::kAlignment;

std::string text_of_refusal(OffsetAllocator& allocator, int64_t bytes) {
  try {
    const int64_t offset = allocator.allocate(bytes);
    return fmt::format("gave {} bytes at {}", bytes, offset);
  } catch (const Failure& failure) {
    EXPECT_EQ(failure.status(), TERN_OUT_OF_MEMORY);
    return failure.what();
  }
}

// One flag per granule.
class Model {
 public:
  explicit Model(int64_t bytes) : used_(static_cast<size_t>(bytes / kGranule)) {}

  int64_t first_fit(int64_t bytes) const {
    size_t run = 0;
    for (size_t i = 0; i < used_.size(); ++i) {
      run = used_[i] ? 0 : run + 1;
      if (run == granules(bytes)) return static_cast<int64_t>(i + 1 - run) * kGranule;
    }
    return -1;
  }
  void mark(int64_t offset, int64_t bytes, bool used) { std::fill_n(used_.begin() + offset / kGranule, granules(bytes), used); }
  static size_t granules(int64_t bytes) { return static_cast<size_t>((bytes + kGranule - 1) / kGranule); }

 private:
  std::vector<bool> used_;
};

TEST(OffsetAllocator, DoesWhatTheModelDoes) {
  for (unsigned seed = 0; seed < 20; ++seed) {
    std::mt19937 random(seed);
    const int64_t bytes = static_cast<int64_t>(random() % 64) * kGranule + static_cast<int64_t>(random() % kGranule);
    OffsetAllocator allocator(bytes);
    Model model(bytes);
    std::map<int64_t, int64_t> live;
    for (int step = 0; step < 500; ++step) {
      if (random() % 2 != 0 || live.empty()) {
        const int64_t size = 1 + static_cast<int64_t>(random() % (6 * kGranule));
        const int64_t expected = model.first_fit(size);
        if (expected < 0) {
          ASSERT_THAT(text_of_refusal(allocator, size), HasSubstr("bytes asked for"));
          continue;
        }
        ASSERT_EQ(allocator.allocate(size), expected) << "seed " << seed << ", step " << step;
        model.mark(expected, size, true);
        live[expected] = size;
      } else {
        const auto freed = std::next(live.begin(), static_cast<std::ptrdiff_t>(random() % live.size()));
        ASSERT_FALSE(allocator.release(freed->first + 1));
        ASSERT_TRUE(allocator.release(freed->first)) << "seed " << seed << ", step " << step;
        ASSERT_FALSE(allocator.release(freed->first));
        model.mark(freed->first, freed->second, false);
        live.erase(freed);
      }
    }
  }
}

TEST(OffsetAllocator, MergesNeighboursInAnyOrder) {
  std::vector<int> order = {0, 1, 2, 3};
  do {
    OffsetAllocator allocator(4 * kGranule);
    for (int i = 0; i < 4; ++i) ASSERT_EQ(allocator.allocate(kGranule), i * kGranule);
    for (const int i : order) ASSERT_TRUE(allocator.release(i * kGranule));
    EXPECT_EQ(allocator.allocate(4 * kGranule), 0);
  } while (std::next_permutation(order.begin(), order.end()));
}

TEST(OffsetAllocator, SaysWhatIsLeft) {
  OffsetAllocator allocator(5 * kGranule + 255);
  ASSERT_EQ(allocator.allocate(kGranule), 0);
  ASSERT_EQ(allocator.allocate(2 * kGranule), kGranule);
  ASSERT_TRUE(allocator.release(0));
  EXPECT_EQ(text_of_refusal(allocator, 600),
            "window: 600 bytes asked for, 768 are free, at most 512 in one piece; create the exchange with a larger window_bytes");
}

TEST(OffsetAllocator, RefusesWhatNoWindowCanHold) {
  for (const int64_t bytes : {int64_t{0}, int64_t{255}, 4 * kGranule}) {
    OffsetAllocator allocator(bytes);
    for (const int64_t asked : {std::numeric_limits<int64_t>::max(), std::numeric_limits<int64_t>::max() - kGranule, int64_t{1} << 62})
      EXPECT_THAT(text_of_refusal(allocator, asked), HasSubstr("bytes asked for"));
    if (bytes >= kGranule) {
      EXPECT_EQ(allocator.allocate(bytes), 0);
    }
  }
}

}  // namespace
}  // namespace tern::test
