// SPDX-License-Identifier: Apache-2.0
// What a launcher's environment says, and who the ranks are.
#include "topology/topology.h"

#include <gtest/gtest.h>
#include <sched.h>

#include <cstring>
#include <thread>

#include "base/error.h"
#include "test_ranks.h"
#include "topology/launch.h"
#include "topology/rendezvous.h"

namespace tern {
namespace {

using namespace test;

// ------------------------------------------------------------------------------------------------- launchers' variables

Launch launch_of(const Variables& variables, std::optional<std::string> rendezvous = std::nullopt) {
  return find_launch(
      [&](const char* name) {
        const auto found = variables.find(name);
        return found == variables.end() ? nullptr : found->second.c_str();
      },
      rendezvous);
}

TEST(Launch, WithoutALauncherThereIsOneRank) {
  const Launch launch = launch_of({});
  EXPECT_EQ(launch.rank, 0);
  EXPECT_EQ(launch.num_ranks, 1);
  EXPECT_EQ(launch_of({{"RANK", "0"}, {"WORLD_SIZE", "1"}}).num_ranks, 1);
}

TEST(Launch, TorchrunMeetsBesideItsStore) {
  const Variables torchrun = {{"RANK", "3"}, {"WORLD_SIZE", "8"}, {"MASTER_ADDR", "node7"}, {"MASTER_PORT", "29500"}};
  const Launch launch = launch_of(torchrun);
  EXPECT_EQ(launch.rank, 3);
  EXPECT_EQ(launch.num_ranks, 8);
  EXPECT_EQ(launch.host, "node7");
  EXPECT_EQ(launch.port, 29501);
  Variables last_port = torchrun;
  last_port["MASTER_PORT"] = "65535";
  EXPECT_EQ(launch_of(last_port).port, 65534);
}

TEST(Launch, OpenMpiOnOneHostMeetsAtADerivedPort) {
  Variables mpi = {
      {"OMPI_COMM_WORLD_RANK", "1"}, {"OMPI_COMM_WORLD_SIZE", "4"}, {"OMPI_COMM_WORLD_LOCAL_SIZE", "4"}, {"PMIX_NAMESPACE", "123"}};
  const Launch launch = launch_of(mpi);
  EXPECT_EQ(launch.rank, 1);
  EXPECT_EQ(launch.host, "127.0.0.1");
  EXPECT_EQ(launch.port, 20000 + stable_hash("Open MPI 123") % 12768);
  mpi["OMPI_COMM_WORLD_LOCAL_SIZE"] = "2";
  expect_parts(outcome([&] { launch_of(mpi); }), {"TERN_INVALID_ARGUMENT", "Open MPI", "TERN_RENDEZVOUS"});
  EXPECT_EQ(launch_of(mpi, "[fe80::1]:77").host, "fe80::1");
  EXPECT_EQ(launch_of(mpi, "[fe80::1]:77").port, 77);
}

TEST(Launch, SlurmOnlyInsideAStep) {
  Variables slurm = {{"SLURM_PROCID", "2"}, {"SLURM_NTASKS", "4"}, {"SLURM_JOB_ID", "55"}};
  EXPECT_EQ(launch_of(slurm).num_ranks, 1);  // a batch script
  slurm["SLURM_STEP_ID"] = "4294967290";
  EXPECT_EQ(launch_of(slurm).num_ranks, 1);  // an interactive shell
  slurm["SLURM_STEP_ID"] = "0";
  slurm["SLURM_STEP_NUM_NODES"] = "2";
  slurm["SLURM_STEP_NODELIST"] = "gpu[07-12,20],login";
  EXPECT_EQ(launch_of(slurm).host, "gpu07");
  EXPECT_EQ(launch_of(slurm).port, 20000 + stable_hash("Slurm 55.0") % 12768);
  slurm["SLURM_STEP_NUM_NODES"] = "1";
  EXPECT_EQ(launch_of(slurm).host, "127.0.0.1");
}

TEST(Launch, FirstCompletePairWins) {
  const Variables both = {{"RANK", "5"}, {"OMPI_COMM_WORLD_RANK", "1"}, {"OMPI_COMM_WORLD_SIZE", "4"}, {"OMPI_COMM_WORLD_LOCAL_SIZE", "4"}};
  EXPECT_EQ(launch_of(both).launcher, "Open MPI");
  EXPECT_EQ(launch_of(both).rank, 1);
}

TEST(Launch, RefusesWhatCannotBe) {
  const auto refused = [](const Variables& variables, std::optional<std::string> rendezvous = std::nullopt) {
    return outcome([&] { launch_of(variables, rendezvous); });
  };
  expect_parts(refused({{"RANK", "4"}, {"WORLD_SIZE", "4"}}), {"TERN_INVALID_ARGUMENT", "RANK=4", "WORLD_SIZE=4"});
  expect_parts(refused({{"RANK", "x"}, {"WORLD_SIZE", "4"}}), {"TERN_INVALID_ARGUMENT", "RANK=\"x\""});
  const Variables two = {{"RANK", "0"}, {"WORLD_SIZE", "2"}};
  expect_parts(refused(two), {"TERN_INVALID_ARGUMENT", "TERN_RENDEZVOUS"});
  for (const char* wrong : {"host", "host:", ":1", "host:x", "host:0", "host:65536"})
    expect_parts(refused(two, wrong), {"TERN_INVALID_ARGUMENT", "TERN_RENDEZVOUS"});
}

TEST(Launch, FirstHostOfASlurmList) {
  EXPECT_EQ(first_host("solo"), "solo");
  EXPECT_EQ(first_host("a,b"), "a");
  EXPECT_EQ(first_host("n[3,5]"), "n3");
  EXPECT_EQ(first_host("rack[1-2]n[08-09].site"), "rack1n08.site");
}

// ---------------------------------------------------------------------------------------------------------- topology

RankInfo rank_on(const char* host, const char* node) {
  RankInfo info = describe_self(node);
  info.boot_id.fill('\0');
  std::strcpy(info.boot_id.data(), host);
  return info;
}

TEST(Topology, HostsAreNodesUnlessNodesAreDeclared) {
  const Topology hosts = make_topology(1, {rank_on("b", ""), rank_on("a", ""), rank_on("b", ""), rank_on("a", ""), rank_on("a", "")});
  EXPECT_EQ(hosts.num_nodes, 2);
  EXPECT_EQ(hosts.node, (std::vector<int>{0, 1, 0, 1, 1}));
  EXPECT_EQ(hosts.rank_in_node, (std::vector<int>{0, 0, 1, 1, 2}));
  EXPECT_EQ(hosts.ranks_in_node, (std::vector<int>{2, 3}));
  EXPECT_FALSE(hosts.same_host(0));
  EXPECT_TRUE(hosts.same_host(3));

  const Topology declared = make_topology(0, {rank_on("a", "x"), rank_on("a", "y"), rank_on("b", "x"), rank_on("a", "")});
  EXPECT_EQ(declared.node, (std::vector<int>{0, 1, 0, 2}));
  EXPECT_EQ(declared.rank_in_node, (std::vector<int>{0, 0, 1, 0}));
  EXPECT_TRUE(declared.same_host(1));
  EXPECT_FALSE(declared.same_host(2));
}

TEST(Topology, RefusesAnotherVersion) {
  RankInfo other = describe_self("");
  ++other.format;
  expect_parts(outcome([&] { make_topology(0, {describe_self(""), other}); }), {"TERN_MISMATCH", "rank 1"});
}

TEST(Topology, NodeNameTooLong) {
  expect_parts(outcome([] { describe_self(std::string(128, 'n')); }), {"TERN_INVALID_ARGUMENT", "128 bytes"});
}

TEST(Topology, ThreadsShareAProcess) {
  auto bootstraps = make_local_bootstraps(3);
  const auto outcomes = run_threads(3, [&](int r) {
    const Topology topology = discover(*bootstraps[r], r == 2 ? "elsewhere" : "", ample());
    require(topology.rank == r && topology.num_ranks == 3 && topology.num_nodes == 2, "ranks and nodes");
    for (int peer = 0; peer < 3; ++peer) require(topology.same_process(peer) && topology.same_host(peer), "same process");
  });
  for (const std::string& text : outcomes) EXPECT_EQ(text, "ok");
}

TEST(Topology, ForkedProcessesShareAHost) {
  const uint16_t port = free_port();
  expect_all_ok(run_forked(3, [&](int r) {
    set_variables(torchrun_variables(r, 3, port));
    const auto bootstrap = make_env_bootstrap("test", Log(), ample());
    const Topology topology = discover(*bootstrap, "", ample());
    require(topology.num_nodes == 1 && topology.rank_in_node[r] == r && topology.ranks_in_node[0] == 3, "one node");
    for (int peer = 0; peer < 3; ++peer)
      require(topology.same_host(peer) && topology.same_process(peer) == (peer == r), "same host, own process");
    require(!describe_process(topology.ranks[(r + 1) % 3]).empty(), "a process on this host can be described");
  }));
}

// Waits, bounded, until the kernel has carried a signal out.
std::string described_as(const RankInfo& info, const std::string& expected) {
  const Deadline deadline = ample();
  std::string text;
  do {
    text = describe_process(info);
    if (text.ends_with(expected)) break;
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  } while (!deadline.passed());
  return text;
}

TEST(DescribeProcess, RunningStoppedExited) {
  int ends[2];
  ASSERT_EQ(::pipe(ends), 0);
  Children children(1, [&](int) {
    const RankInfo self = describe_self("");
    require(::write(ends[1], &self, sizeof(self)) == sizeof(self), "report");
    while (true) ::pause();
  });
  RankInfo info;
  ASSERT_EQ(::read(ends[0], &info, sizeof(info)), static_cast<ssize_t>(sizeof(info)));
  ::close(ends[0]);
  ::close(ends[1]);
  const std::string process = "process " + std::to_string(children.pid(0));
  EXPECT_EQ(info.pid, children.pid(0));
  EXPECT_EQ(described_as(info, "running"), process + " is running");
  ::kill(children.pid(0), SIGSTOP);
  EXPECT_EQ(described_as(info, "stopped"), process + " is stopped");
  ::kill(children.pid(0), SIGCONT);
  EXPECT_EQ(described_as(info, "running"), process + " is running");

  RankInfo earlier = info;  // a process that had the same pid before
  --earlier.start_time;
  EXPECT_EQ(describe_process(earlier), process + " has exited");
  RankInfo elsewhere = info;
  elsewhere.boot_id[0] = '!';
  EXPECT_EQ(describe_process(elsewhere), "");
  RankInfo contained = info;
  ++contained.pid_namespace;
  EXPECT_EQ(describe_process(contained), "");

  ::kill(children.pid(0), SIGKILL);
  EXPECT_EQ(described_as(info, "exited"), process + " has exited");  // not yet reaped
  children.collect();
  EXPECT_EQ(describe_process(info), process + " has exited");
}

TEST(SeatOnHost, IsAmongTheRanksOfTheHost) {
  std::vector<RankInfo> ranks;
  for (const char* host : {"a", "b", "a", "b", "b"}) ranks.push_back(rank_on(host, ""));
  const int expected[] = {0, 0, 1, 1, 2};
  for (int r = 0; r < 5; ++r) {
    const HostSeat seat = seat_on_host(make_topology(r, ranks));
    EXPECT_EQ(seat.idx, expected[r]);
    EXPECT_EQ(seat.num_ranks, ranks[static_cast<size_t>(r)].boot_id[0] == 'a' ? 2 : 3);
  }
}

RankInfo rank_with_cores(const char* host, std::initializer_list<int> cores) {
  RankInfo info = rank_on(host, "");
  info.cores.fill(0);
  for (const int core : cores) info.cores[static_cast<size_t>(core / 64)] |= uint64_t{1} << (core % 64);
  return info;
}

TEST(RanksShareCores, WhereAHostHasFewerThanRanks) {
  const auto share = [](const std::vector<RankInfo>& ranks) { return ranks_share_cores(make_topology(0, ranks)); };
  EXPECT_FALSE(share({rank_with_cores("a", {3})}));
  EXPECT_FALSE(share({rank_with_cores("a", {3}), rank_with_cores("a", {700})}));
  EXPECT_FALSE(share({rank_with_cores("a", {3, 4}), rank_with_cores("a", {3, 4}), rank_with_cores("b", {3})}));
  EXPECT_TRUE(share({rank_with_cores("a", {3}), rank_with_cores("a", {3})}));
  EXPECT_TRUE(share({rank_with_cores("a", {1, 2}), rank_with_cores("b", {5}), rank_with_cores("b", {5})}));
}

TEST(RanksShareCores, NamespacesOfAHostHaveTheSameCores) {
  RankInfo other = rank_with_cores("a", {3});
  ++other.network_namespace;
  EXPECT_TRUE(ranks_share_cores(make_topology(0, {rank_with_cores("a", {3}), other})));
}

TEST(DescribeSelf, NamesTheCoresOfTheThread) {
  cpu_set_t before, one;
  ASSERT_EQ(::sched_getaffinity(0, sizeof(before), &before), 0);
  int core = 0;
  while (!CPU_ISSET(core, &before)) ++core;
  CPU_ZERO(&one);
  CPU_SET(core, &one);
  ASSERT_EQ(::sched_setaffinity(0, sizeof(one), &one), 0);
  const RankInfo self = describe_self("");
  ASSERT_EQ(::sched_setaffinity(0, sizeof(before), &before), 0);
  EXPECT_EQ(self.cores, rank_with_cores("", {core}).cores);
}

TEST(DescribeRank, ForErrorTexts) {
  const Topology topology = make_topology(0, {describe_self(""), rank_on("elsewhere", "")});
  EXPECT_EQ(describe_rank(topology, 0), " (process " + std::to_string(::getpid()) + " is running)");
  EXPECT_EQ(describe_rank(topology, 1), "");
}

}  // namespace
}  // namespace tern
