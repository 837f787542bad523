// SPDX-License-Identifier: Apache-2.0
// All options mixed: cases drawn from seeds, as threads and as processes.
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

TEST(Sweep, SmallBatches) {
  for (const int32_t num_ranks : {1, 2, 4, 7})
    for (const Case& c : small_batch_cases(num_ranks)) expect_right_as_threads(c);
  for (const Case& c : small_batch_cases(3)) expect_right_as_processes(c);
}

}  // namespace
}  // namespace tern::conformance
