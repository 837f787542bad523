// SPDX-License-Identifier: Apache-2.0
// Ranks as processes on nodes that are declared on this host; ranks that die or stop.
#include "engine/node_scenes.h"
#include "engine/nodes.h"
#include "engine/support.h"

namespace tern::conformance {
namespace {

RunOptions options() {
  RunOptions options;
  options.timeout_ms = full_scale() ? 2'000 : 10'000;
  return options;
}

class NodeProcesses : public ::testing::Test {
 protected:
  void SetUp() override {
    const std::string problem = missing_network(run_as_processes(smallest_case_on_nodes()));
    if (!problem.empty()) GTEST_SKIP() << problem;
  }
};

TEST_F(NodeProcesses, RandomCases) {
  for (int64_t seed = 2001; seed <= 2000 + scaled(16); ++seed) expect_right_as_processes(random_case_on_nodes(static_cast<uint64_t>(seed)));
}

TEST_F(NodeProcesses, KilledRankIsNamedOnBothNodes) { strike(SIGKILL, 2, options()); }
TEST_F(NodeProcesses, StoppedRankIsNamedOnBothNodes) { strike(SIGSTOP, 1, options()); }

}  // namespace
}  // namespace tern::conformance
