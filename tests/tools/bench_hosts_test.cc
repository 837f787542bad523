// SPDX-License-Identifier: Apache-2.0
// `tern bench` on ranks of several hosts, as a launcher starts them: network namespaces, joined by virtual Ethernet.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "engine/namespaces.h"

namespace tern::conformance {
namespace {

constexpr int kNumNodes = 3;
// Replaces the calling process; only returns if that fails.
void run_bench(const Namespaces& nodes, int rank, const std::string& json) {
  nodes.enter(rank);
  setenv("RANK", std::to_string(rank).c_str(), 1);
  setenv("WORLD_SIZE", std::to_string(kNumNodes).c_str(), 1);
  setenv("TERN_RENDEZVOUS", "10.123.45.1:29555", 1);
  const std::vector<std::string> words{TERN_COMMAND, "bench",  "--device", "cpu",  "--experts", "12",     "--topk",   "4",
                                       "--hidden",   "512",    "--tokens", "64",   "--model",   "custom", "--layout", "expert_major",
                                       "--buffers",  "caller", "--wire",   "fp32", "--iters",   "5",      "--ops",    "dispatch,combine",
                                       "--timeout",  "30000",  "--json",   json};
  std::vector<char*> arguments;
  for (const std::string& word : words) arguments.push_back(const_cast<char*>(word.c_str()));
  arguments.push_back(nullptr);
  execv(TERN_COMMAND, arguments.data());
}

TEST(BenchOnSeveralHosts, ReportsTheNetworkBesideAPlainStream) {
  const Namespaces nodes(kNumNodes);
  if (!nodes.problem().empty()) GTEST_SKIP() << nodes.problem();
  const std::string json = (std::filesystem::temp_directory_path() / fmt::format("bench_hosts_test-{}.json", getpid())).string();
  std::array<pid_t, kNumNodes> pids{};
  for (int rank = 0; rank < kNumNodes; ++rank) {
    pids[static_cast<size_t>(rank)] = fork();
    if (pids[static_cast<size_t>(rank)] != 0) continue;
    run_bench(nodes, rank, json);
    _exit(1);
  }
  for (const pid_t pid : pids) {
    int status = 0;
    ASSERT_EQ(waitpid(pid, &status, 0), pid);
    EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
  }
  std::ifstream file(json);
  const auto found = nlohmann::json::parse(file, nullptr, false);
  std::filesystem::remove(json);
  ASSERT_TRUE(found.is_object() && found["records"].size() == 2u);
  for (const auto& record : found["records"]) {
    EXPECT_TRUE(record["verified"].get<bool>()) << record["wrong"];
    EXPECT_EQ(record["ranks_per_node"], 1);
    // Everything but a rank's own rows crosses the network, with a header for each node.
    EXPECT_GT(record["network_bytes"].get<int64_t>(), record["wire_bytes"].get<int64_t>() / 2);
    EXPECT_GT(record["network_gbps"].get<double>(), 0);
    EXPECT_GT(record["network_ceiling_gbps"].get<double>(), 0);
    EXPECT_EQ(record["ceiling_us"], 0);  // nothing is shared between hosts
  }
}

}  // namespace
}  // namespace tern::conformance
