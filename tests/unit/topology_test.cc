// SPDX-License-Identifier: Apache-2.0
// Who the ranks are and how they first meet: threads, forked processes under each launcher's variables, and everything that goes
// wrong on the way.
#include "topology/topology.h"

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <thread>

#include "base/error.h"
#include "forked_ranks.h"
#include "topology/launch.h"
#include "topology/rendezvous.h"
#include "topology/socket.h"

namespace tern {
namespace {

using testing::Children;
using testing::expect_all_ok;
using testing::expect_text;
using testing::Gate;
using testing::require;
using testing::run_forked;

constexpr int64_t kAmpleMs = 60'000;
Deadline ample() { return Deadline::in_ms(kAmpleMs); }

// Several allgathers of different sizes, checked byte by byte.
void check_allgathers(Bootstrap& bootstrap) {
  const auto value = [](int rank, size_t i) { return static_cast<unsigned char>(rank * 31 + i * 7 + 1); };
  for (const size_t bytes : {1ul, 0ul, 7ul, 64ul, 300'000ul, 8ul}) {
    std::vector<unsigned char> mine(bytes), all(bytes * bootstrap.num_ranks());
    for (size_t i = 0; i < bytes; ++i) mine[i] = value(bootstrap.rank(), i);
    bootstrap.allgather(mine.data(), all.data(), bytes, ample());
    size_t num_wrong = 0;
    for (int r = 0; r < bootstrap.num_ranks(); ++r)
      for (size_t i = 0; i < bytes; ++i) num_wrong += all[r * bytes + i] != value(r, i);
    require(num_wrong == 0, "the bytes of every rank");
  }
}

// What `act` throws, as "STATUS: text"; "ok" if nothing.
template <typename Act>
std::string outcome(Act act) {
  try {
    act();
    return "ok";
  } catch (const Failure& failure) {
    return std::string(status_name(failure.status())) + ": " + failure.what();
  }
}

std::vector<std::string> run_threads(int num_ranks, const std::function<void(int)>& body) {
  std::vector<std::string> outcomes(num_ranks);
  std::vector<std::thread> threads;
  for (int r = 0; r < num_ranks; ++r) threads.emplace_back([&, r] { outcomes[r] = outcome([&] { body(r); }); });
  for (std::thread& thread : threads) thread.join();
  return outcomes;
}

void expect_parts(const std::string& text, std::initializer_list<const char*> parts) { expect_text({.text = text}, parts); }

// ----------------------------------------------------------------------------------------------------------- threads

class LocalBootstraps : public ::testing::TestWithParam<int> {};

TEST_P(LocalBootstraps, Allgather) {
  auto bootstraps = make_local_bootstraps(GetParam());
  const auto outcomes = run_threads(GetParam(), [&](int r) {
    require(bootstraps[r]->rank() == r && bootstraps[r]->num_ranks() == GetParam(), "rank and size");
    for (int i = 0; i < 3; ++i) check_allgathers(*bootstraps[r]);
  });
  for (const std::string& text : outcomes) EXPECT_EQ(text, "ok");
}

INSTANTIATE_TEST_SUITE_P(Ranks, LocalBootstraps, ::testing::Range(1, 17));

TEST(LocalBootstrap, NamesTheRankThatNeverComes) {
  auto bootstraps = make_local_bootstraps(4);
  const auto gather = [&](int r) {
    int all[4];
    bootstraps[r]->allgather(&r, all, sizeof(r), Deadline::in_ms(1000));
  };
  const auto outcomes = run_threads(4, [&](int r) {
    if (r != 2) gather(r);
  });
  for (const int r : {0, 1, 3}) expect_parts(outcomes[r], {"TERN_TIMEOUT", "rank 2 of 4"});
  expect_parts(outcome([&] { gather(2); }), {"TERN_TIMEOUT", "rank 2 of 4"});  // too late: the group has failed
}

TEST(LocalBootstrap, NamesTheRankThatHasGone) {
  auto bootstraps = make_local_bootstraps(3);
  const auto outcomes = run_threads(3, [&](int r) {
    int all[3];
    bootstraps[r]->allgather(&r, all, sizeof(r), ample());
    if (r == 1) return bootstraps[r].reset();
    bootstraps[r]->allgather(&r, all, sizeof(r), ample());
  });
  EXPECT_EQ(outcomes[1], "ok");
  for (const int r : {0, 2}) expect_parts(outcomes[r], {"TERN_ABORTED", "rank 1 of 3"});
}

TEST(LocalBootstrap, RefusesDifferentSizes) {
  auto bootstraps = make_local_bootstraps(3);
  const auto outcomes = run_threads(3, [&](int r) {
    char mine[8] = {}, all[24];
    bootstraps[r]->allgather(mine, all, r == 2 ? 4 : 8, ample());
  });
  for (const std::string& text : outcomes) expect_parts(text, {"TERN_MISMATCH", "rank 2 gathers 4 bytes", "8"});
}

TEST(CallbackBootstrap, PassesThroughAndReportsFailure) {
  const auto twice = [](void* context, const void* send, void* recv, size_t bytes) {
    std::memcpy(recv, send, bytes);
    std::memcpy(static_cast<char*>(recv) + bytes, send, bytes);
    return *static_cast<int*>(context);
  };
  int result = 0;
  const auto bootstrap = make_callback_bootstrap(1, 2, twice, &result);
  EXPECT_EQ(bootstrap->rank(), 1);
  EXPECT_EQ(bootstrap->num_ranks(), 2);
  const int mine = 42;
  int all[2] = {};
  bootstrap->allgather(&mine, all, sizeof(mine), ample());
  EXPECT_EQ(all[0], 42);
  EXPECT_EQ(all[1], 42);
  result = -7;
  expect_parts(outcome([&] { bootstrap->allgather(&mine, all, sizeof(mine), ample()); }), {"TERN_SYSTEM_ERROR", "rank 1", "-7"});
  expect_parts(outcome([&] { make_callback_bootstrap(2, 2, twice, &result); }), {"TERN_INVALID_ARGUMENT", "rank 2 of 2"});
  expect_parts(outcome([&] { make_callback_bootstrap(0, 1, nullptr, nullptr); }), {"TERN_INVALID_ARGUMENT", "NULL"});
}

TEST(NameRanks, ReadsLikeASentence) {
  EXPECT_EQ(name_ranks({}), "no rank");
  EXPECT_EQ(name_ranks({3}), "rank 3");
  EXPECT_EQ(name_ranks({3, 5}), "ranks 3 and 5");
  EXPECT_EQ(name_ranks({3, 5, 7}), "ranks 3, 5 and 7");
}

// ------------------------------------------------------------------------------------------------- launchers' variables

using Variables = std::map<std::string, std::string>;

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
  Variables mpi = {{"OMPI_COMM_WORLD_RANK", "1"}, {"OMPI_COMM_WORLD_SIZE", "4"}, {"OMPI_COMM_WORLD_LOCAL_SIZE", "4"},
                   {"PMIX_NAMESPACE", "123"}};
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

// -------------------------------------------------------------------------------------------------- forked processes

// A port that was free a moment ago, and so was the next one.
uint16_t free_port() {
  const Fd fd(::socket(AF_INET, SOCK_STREAM, 0));
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t bytes = sizeof(address);
  require(::bind(fd.get(), reinterpret_cast<sockaddr*>(&address), bytes) == 0, "bind");
  require(::getsockname(fd.get(), reinterpret_cast<sockaddr*>(&address), &bytes) == 0, "getsockname");
  return ntohs(address.sin_port);
}

// For children: a process of its own has an environment of its own.
void set_variables(const Variables& variables) {
  for (const auto& [name, value] : variables) ::setenv(name.c_str(), value.c_str(), 1);
}

Variables torchrun_variables(int rank, int num_ranks, uint16_t master_port) {
  return {{"RANK", std::to_string(rank)},
          {"WORLD_SIZE", std::to_string(num_ranks)},
          {"MASTER_ADDR", "127.0.0.1"},
          {"MASTER_PORT", std::to_string(master_port)}};
}

Variables mpi_variables(int rank, int num_ranks, const std::string& job) {
  const std::string size = std::to_string(num_ranks);
  return {{"OMPI_COMM_WORLD_RANK", std::to_string(rank)},
          {"OMPI_COMM_WORLD_SIZE", size},
          {"OMPI_COMM_WORLD_LOCAL_SIZE", size},
          {"PMIX_NAMESPACE", job}};
}

Variables slurm_variables(int rank, int num_ranks, const std::string& job) {
  return {{"SLURM_PROCID", std::to_string(rank)},
          {"SLURM_NTASKS", std::to_string(num_ranks)},
          {"SLURM_JOB_ID", job},
          {"SLURM_STEP_ID", "0"},
          {"SLURM_STEP_NUM_NODES", "1"}};
}

std::string own_job(const char* suffix) { return std::to_string(::getpid()) + suffix; }

std::unique_ptr<Bootstrap> make_group(const std::string& name, Deadline deadline = ample()) { return make_env_bootstrap(name, Log(), deadline); }

class EnvBootstraps : public ::testing::TestWithParam<std::tuple<int, const char*>> {};

TEST_P(EnvBootstraps, Allgather) {
  const auto [num_ranks, launcher] = GetParam();
  const uint16_t port = free_port();
  const std::string job = own_job(launcher) + std::to_string(num_ranks);
  expect_all_ok(run_forked(num_ranks, [&, size = num_ranks, kind = std::string(launcher)](int r) {
    set_variables(kind == "torchrun"   ? torchrun_variables(r, size, port)
                  : kind == "Open MPI" ? mpi_variables(r, size, job)
                                       : slurm_variables(r, size, job));
    const auto bootstrap = make_group("test");
    require(bootstrap->rank() == r && bootstrap->num_ranks() == size, "rank and size");
    check_allgathers(*bootstrap);
  }));
}

INSTANTIATE_TEST_SUITE_P(Launchers, EnvBootstraps,
                         ::testing::Combine(::testing::Values(2, 4, 8), ::testing::Values("torchrun", "Open MPI", "Slurm")));

TEST(EnvBootstrap, WithoutALauncherThereIsOneRank) {
  expect_all_ok(run_forked(1, [](int) {
    const auto bootstrap = make_group("test");
    require(bootstrap->num_ranks() == 1, "one rank");
    check_allgathers(*bootstrap);
  }));
}

TEST(EnvBootstrap, TwoGroupsAtOnceTakeTurns) {
  const uint16_t port = free_port();
  expect_all_ok(run_forked(3, [&](int r) {
    set_variables(torchrun_variables(r, 3, port));
    const auto outcomes = run_threads(2, [](int i) { check_allgathers(*make_group(i == 0 ? "experts" : "tensors")); });
    for (const std::string& text : outcomes) require(text == "ok", text);
  }));
}

TEST(EnvBootstrap, TwoJobsAtOneAddressTakeTurns) {
  const std::string rendezvous = "127.0.0.1:" + std::to_string(free_port());
  expect_all_ok(run_forked(4, [&](int child) {
    set_variables(mpi_variables(child % 2, 2, child < 2 ? "first" : "second"));
    set_variables({{"TERN_RENDEZVOUS", rendezvous}});
    check_allgathers(*make_group("test"));
  }));
}

TEST(EnvBootstrap, GroupsOfOneNameFollowEachOther) {
  const uint16_t port = free_port();
  expect_all_ok(run_forked(4, [&](int r) {
    set_variables(torchrun_variables(r, 4, port));
    const auto first = make_group("test");
    for (int i = 0; i < 5; ++i) check_allgathers(*make_group("test"));
    check_allgathers(*first);
  }));
}

TEST(EnvBootstrap, AnyRankMayBeLate) {
  for (const int late : {0, 2}) {
    const uint16_t port = free_port();
    expect_all_ok(run_forked(3, [&](int r) {
      set_variables(torchrun_variables(r, 3, port));
      if (r == late) std::this_thread::sleep_for(std::chrono::milliseconds(300));
      check_allgathers(*make_group("test"));
    }));
  }
}

TEST(EnvBootstrap, NamesTheRankThatNeverComes) {
  const uint16_t port = free_port();
  const auto results = run_forked(3, [&](int r) {
    set_variables(torchrun_variables(r, 4, port));
    make_group("test", Deadline::in_ms(r == 0 ? 3000 : kAmpleMs));
  });
  for (const auto& result : results) expect_text(result, {"TERN_TIMEOUT", "group \"test\"", "rank 3 of 4"});
}

TEST(EnvBootstrap, SaysWhereItLookedForRank0) {
  const uint16_t port = free_port();
  const auto results = run_forked(1, [&](int) {
    set_variables(torchrun_variables(1, 2, port));
    make_group("test", Deadline::in_ms(300));
  });
  expect_text(results[0], {"TERN_TIMEOUT", "rank 1 of 2", "rank 0 at 127.0.0.1:", "Connection refused"});
}

TEST(EnvBootstrap, PortHeldByAnotherProgram) {
  const uint16_t port = free_port();
  const Opened foreign = listen_at("127.0.0.1", port);
  ASSERT_TRUE(foreign.fd) << foreign.why_not;
  const auto results = run_forked(2, [&](int r) {
    set_variables(torchrun_variables(r, 2, static_cast<uint16_t>(port - 1)));
    make_group("test", Deadline::in_ms(500));
  });
  expect_text(results[0], {"TERN_TIMEOUT", "could not listen", "Address already in use", "TERN_RENDEZVOUS"});
  expect_text(results[1], {"TERN_TIMEOUT", "does not answer as rank 0 does"});
}

TEST(EnvBootstrap, StrangersAtThePortAreIgnored) {
  const uint16_t port = free_port();
  Gate stranger_was_there;
  Children children(3, [&](int child) {
    if (child == 2) {
      Opened link;
      while (!link.fd) {
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
        link = connect_to("127.0.0.1", static_cast<uint16_t>(port + 1), ample());
      }
      const std::string request = "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n";
      send_all(link.fd.get(), request.data(), request.size(), ample());
      char byte;
      require(receive_all(link.fd.get(), &byte, 1, ample()) == Io::kClosed, "turned away");
      return;
    }
    stranger_was_there.leave();
    set_variables(torchrun_variables(child, 2, port));
    if (child == 1) stranger_was_there.wait();
    check_allgathers(*make_group("test"));
  });
  stranger_was_there.leave();
  expect_all_ok(children.collect());
}

TEST(EnvBootstrap, TwoProcessesOfOneRank) {
  const uint16_t port = free_port();
  const auto results = run_forked(3, [&](int child) {
    set_variables(torchrun_variables(child == 0 ? 0 : 1, 3, port));
    make_group("test", Deadline::in_ms(4000));
  });
  expect_text(results[0], {"TERN_TIMEOUT", "rank 2 of 3", "two processes were started as the same rank"});
  const bool second_refused = results[2].text.starts_with("TERN_MISMATCH");
  expect_text(results[second_refused ? 2 : 1], {"TERN_MISMATCH", "two processes were started as the same rank"});
  expect_text(results[second_refused ? 1 : 2], {"TERN_TIMEOUT", "rank 2 of 3"});
}

TEST(EnvBootstrap, DifferentNumbersOfRanks) {
  const uint16_t port = free_port();
  const auto results = run_forked(2, [&](int r) {
    set_variables(torchrun_variables(r, r == 0 ? 2 : 3, port));
    make_group("test", Deadline::in_ms(r == 0 ? 3000 : kAmpleMs));
  });
  expect_text(results[0], {"TERN_TIMEOUT", "rank 1 of 2"});
  expect_text(results[1], {"TERN_MISMATCH", "rank 1 of 3", "one of 2"});
}

TEST(EnvBootstrap, NamesTheRankThatDied) {
  const uint16_t port = free_port();
  const auto results = run_forked(4, [&](int r) {
    set_variables(torchrun_variables(r, 4, port));
    const auto bootstrap = make_group("test");
    check_allgathers(*bootstrap);
    if (r == 2) ::kill(::getpid(), SIGKILL);
    check_allgathers(*bootstrap);
  });
  EXPECT_EQ(results[2].killed_by, SIGKILL);
  for (const int r : {0, 1, 3}) expect_text(results[r], {"TERN_ABORTED", "rank 2 of 4"});
}

TEST(EnvBootstrap, RankZeroDied) {
  const uint16_t port = free_port();
  const auto results = run_forked(3, [&](int r) {
    set_variables(torchrun_variables(r, 3, port));
    const auto bootstrap = make_group("test");
    if (r == 0) ::kill(::getpid(), SIGKILL);
    check_allgathers(*bootstrap);
  });
  for (const int r : {1, 2}) expect_text(results[r], {"TERN_ABORTED", "rank 0 has gone"});
}

TEST(EnvBootstrap, ARankThatHangsIsNamedByAll) {
  const uint16_t port = free_port();
  Gate others_gave_up;
  Children children(3, [&](int r) {
    set_variables(torchrun_variables(r, 3, port));
    const auto bootstrap = make_group("test");
    int all[3];
    if (r == 1) others_gave_up.wait();
    bootstrap->allgather(&r, all, sizeof(r), Deadline::in_ms(r == 0 ? 3000 : kAmpleMs));
  });
  others_gave_up.leave();
  for (const auto& result : children.collect()) expect_text(result, {"TERN_TIMEOUT", "rank 1 of 3"});
}

TEST(EnvBootstrap, RefusesDifferentSizes) {
  const uint16_t port = free_port();
  const auto results = run_forked(2, [&](int r) {
    set_variables(torchrun_variables(r, 2, port));
    const auto bootstrap = make_group("test");
    char mine[8] = {}, all[16];
    bootstrap->allgather(mine, all, r == 0 ? 8 : 4, ample());
  });
  for (const auto& result : results) expect_text(result, {"TERN_MISMATCH", "rank 1 gathers 4 bytes"});
}

TEST(EnvBootstrap, NameTooLong) {
  const auto results = run_forked(1, [&](int) {
    set_variables(torchrun_variables(0, 2, 29500));
    make_group(std::string(64, 'x'));
  });
  expect_text(results[0], {"TERN_INVALID_ARGUMENT", "64 bytes", "at most 63"});
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
    const auto bootstrap = make_group("test");
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

TEST(DescribeRank, ForErrorTexts) {
  const Topology topology = make_topology(0, {describe_self(""), rank_on("elsewhere", "")});
  EXPECT_EQ(describe_rank(topology, 0), " (process " + std::to_string(::getpid()) + " is running)");
  EXPECT_EQ(describe_rank(topology, 1), "");
}

}  // namespace
}  // namespace tern
