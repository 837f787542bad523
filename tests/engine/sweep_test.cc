// SPDX-License-Identifier: Apache-2.0
// All options mixed: cases drawn from seeds, as threads and as processes.
#include <cstddef>
#include <iterator>
#include <vector>

#include "engine/support.h"

namespace tern::conformance {
namespace {

TEST(Sweep, RandomCasesAsThreads) {
  for (int64_t seed = 1; seed <= scaled(1500); ++seed) expect_right_as_threads(random_case(static_cast<uint64_t>(seed)));
}

TEST(Sweep, RandomCasesAsProcesses) {
  for (int64_t seed = 10001; seed <= 10000 + scaled(300); ++seed) expect_right_as_processes(random_case(static_cast<uint64_t>(seed)));
}

TEST(Sweep, EveryLayoutExtentEncodingAndOrderOfScales) {
  for (const Case& c : layout_cases()) expect_right_as_threads(c);
}

// Of a sweep that is cut short (sanitizers) every case is run too, but not by every number of ranks: each by one of them as threads, and a
// quarter as processes. The sum of a number's digits spreads the cases so that each number of ranks gets every value of every option.
TEST(Sweep, SmallBatches) {
  constexpr int32_t kRanks[] = {1, 2, 4, 7};
  const auto drawn = [](size_t i, size_t which) { return full_scale() || (i + i / 4 + i / 16 + i / 64) % 4 == which; };
  for (size_t which = 0; which < std::size(kRanks); ++which) {
    const std::vector<Case> cases = small_batch_cases(kRanks[which]);
    for (size_t i = 0; i < cases.size(); ++i)
      if (drawn(i, which)) expect_right_as_threads(cases[i]);
  }
  const std::vector<Case> cases = small_batch_cases(3);
  for (size_t i = 0; i < cases.size(); ++i)
    if (drawn(i, 0)) expect_right_as_processes(cases[i]);
}

}  // namespace
}  // namespace tern::conformance
