// SPDX-License-Identifier: Apache-2.0
// How ranks first meet: as threads, as forked processes under each launcher's variables, and everything that goes wrong on the way.
#include "topology/bootstrap.h"

#include <gtest/gtest.h>

#include <cstring>
#include <thread>

#include "base/error.h"
#include "test_ranks.h"
#include "topology/socket.h"

namespace tern {
namespace {

using namespace test;

// Several allgathers of different sizes, checked byte by byte.
void check_allgathers(Bootstrap& bootstrap, size_t largest_bytes = 300'000) {
  const auto value = [](int rank, size_t i) { return static_cast<unsigned char>(rank * 31 + i * 7 + 1); };
  for (const size_t bytes : {size_t(1), size_t(0), size_t(7), size_t(64), largest_bytes, size_t(8)}) {
    std::vector<unsigned char> mine(bytes), all(bytes * bootstrap.num_ranks());
    for (size_t i = 0; i < bytes; ++i) mine[i] = value(bootstrap.rank(), i);
    bootstrap.allgather(mine.data(), all.data(), bytes, ample());
    size_t num_wrong = 0;
    for (int r = 0; r < bootstrap.num_ranks(); ++r)
      for (size_t i = 0; i < bytes; ++i) num_wrong += all[r * bytes + i] != value(r, i);
    require(num_wrong == 0, "the bytes of every rank");
  }
}

// ----------------------------------------------------------------------------------------------------------- threads

class LocalBootstraps : public ::testing::TestWithParam<int> {};

TEST_P(LocalBootstraps, Allgather) {
  auto bootstraps = make_local_bootstraps(GetParam());
  const auto outcomes = run_threads(GetParam(), [&](int r) {
    require(bootstraps[r]->rank() == r && bootstraps[r]->num_ranks() == GetParam(), "rank and size");
    for (int i = 0; i < 3; ++i) check_allgathers(*bootstraps[r], 10'000);
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

// -------------------------------------------------------------------------------------------------- forked processes

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

std::unique_ptr<Bootstrap> make_group(const std::string& name, Deadline deadline = ample()) {
  return make_env_bootstrap(name, Log(), deadline);
}

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

}  // namespace
}  // namespace tern
