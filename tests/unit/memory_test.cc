// SPDX-License-Identifier: Apache-2.0
// Segments and how they reach other ranks: as threads, as forked processes, mixed, and with ranks that are dead, stopped, missing or
// somebody else's.
#include <dirent.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <atomic>
#include <cstring>
#include <fstream>
#include <iterator>
#include <set>
#include <thread>

#include "base/error.h"
#include "memory/host_segment.h"
#include "memory/sharing.h"
#include "test_ranks.h"
#include "topology/launch.h"
#include "topology/rendezvous.h"

namespace tern {
namespace {

using namespace test;

Fd duplicate(int fd) { return Fd(::fcntl(fd, F_DUPFD_CLOEXEC, 0)); }

std::shared_ptr<Segment> create_for(const SegmentSharer& sharer, size_t bytes) { return HostSegment::create(bytes, sharer.shared_by()); }

std::atomic<uint64_t>& word(const Segment& segment, size_t i) { return reinterpret_cast<std::atomic<uint64_t>*>(segment.data())[i]; }

// ----------------------------------------------------------------------------------------------------------- segments

class Segments : public ::testing::TestWithParam<SharedBy> {};

TEST_P(Segments, AreWholePagesOfZeros) {
  for (const size_t bytes : {1ul, 4096ul, 4097ul, 5ul << 20}) {
    const auto segment = HostSegment::create(bytes, GetParam());
    EXPECT_GE(segment->size(), bytes);
    EXPECT_EQ(segment->size() % 4096, 0u);
    EXPECT_EQ(segment->fd() >= 0, GetParam() == SharedBy::kProcesses);
    size_t num_nonzero = 0;
    for (size_t i = 0; i < segment->size(); ++i) num_nonzero += segment->data()[i] != std::byte(0);
    EXPECT_EQ(num_nonzero, 0u);
    std::memset(segment->data(), 0x5a, segment->size());
    EXPECT_EQ(segment->data()[segment->size() - 1], std::byte(0x5a));
  }
}

// Every page must be there at once, so that nothing can run out of memory later.
TEST_P(Segments, ArePopulated) {
  const auto segment = HostSegment::create(1 << 20, GetParam());
  std::vector<unsigned char> resident(segment->size() / 4096);
  ASSERT_EQ(::mincore(segment->data(), segment->size(), resident.data()), 0);
  for (const unsigned char page : resident) EXPECT_EQ(page & 1, 1);
}

TEST_P(Segments, OutOfMemoryIsAnError) {
  expect_parts(outcome([] { HostSegment::create(1ul << 45, GetParam()); }), {"TERN_OUT_OF_MEMORY", "35184372088832 bytes"});
  expect_parts(outcome([] { HostSegment::create(0, GetParam()); }), {"TERN_INVALID_ARGUMENT"});
  expect_parts(outcome([] { HostSegment::create(SIZE_MAX, GetParam()); }), {"TERN_INVALID_ARGUMENT"});
}

TEST_P(Segments, RenewKeepsAddressAndContents) {
  const auto segment = HostSegment::create(1 << 20, GetParam());
  std::byte* const data = segment->data();
  for (size_t i = 0; i < segment->size() / 8; ++i) word(*segment, i) = i * i;
  segment->renew();
  EXPECT_EQ(segment->data(), data);
  size_t num_wrong = 0;
  for (size_t i = 0; i < segment->size() / 8; ++i) num_wrong += word(*segment, i) != i * i;
  EXPECT_EQ(num_wrong, 0u);
  word(*segment, 0) = 7;
  EXPECT_EQ(word(*segment, 0), 7u);
}

INSTANTIATE_TEST_SUITE_P(Both, Segments, ::testing::Values(SharedBy::kThreads, SharedBy::kProcesses));

TEST(Segment, AMappedDescriptorIsTheSameMemory) {
  const auto mine = HostSegment::create(8192, SharedBy::kProcesses);
  const auto again = HostSegment::map(duplicate(mine->fd()));
  EXPECT_NE(mine->data(), again->data());
  EXPECT_EQ(mine->size(), again->size());
  word(*mine, 1000) = 42;
  EXPECT_EQ(word(*again, 1000), 42u);
}

TEST(Segment, ItsSizeIsSealed) {
  const auto mine = HostSegment::create(8192, SharedBy::kProcesses);
  EXPECT_NE(::ftruncate(mine->fd(), 0), 0);
  EXPECT_NE(::ftruncate(mine->fd(), 1 << 20), 0);
}

TEST(Segment, RefusesForeignDescriptors) {
  expect_parts(outcome([] { HostSegment::map(Fd(::open("/dev/null", O_RDWR))); }), {"TERN_SYSTEM_ERROR", "no sealed memory"});
  expect_parts(outcome([] {
                 Fd unsealed(::memfd_create("test", MFD_CLOEXEC));
                 require(::ftruncate(unsealed.get(), 4096) == 0, "ftruncate");
                 HostSegment::map(std::move(unsealed));
               }),
               {"TERN_SYSTEM_ERROR", "no sealed memory"});
  expect_parts(outcome([] { HostSegment::map(Fd()); }), {"TERN_SYSTEM_ERROR", "fstat"});
}

TEST(Segment, RenewShutsOutAProcessThatMapsTheOldBacking) {
  const auto segment = HostSegment::create(1 << 16, SharedBy::kProcesses);
  word(*segment, 0) = 1;
  Children child(1, [&](int) {
    const Deadline deadline = ample();
    while (word(*segment, 0) != 2) {
      require(!deadline.passed(), "the parent renewed");
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    word(*segment, 1) = 666;  // into the old backing
    require(word(*segment, 2) == 0, "writes to the new backing stay unseen");
  });
  const auto old = HostSegment::map(duplicate(segment->fd()));
  segment->renew();
  word(*segment, 2) = 3;
  word(*old, 0) = 2;
  expect_all_ok(child.collect());
  EXPECT_EQ(word(*old, 1), 666u);
  EXPECT_EQ(word(*segment, 0), 1u);
  EXPECT_EQ(word(*segment, 1), 0u);
}

// ------------------------------------------------------------------------------------------------------------ threads

TEST(SharingByThreads, OneMappingForAll) {
  for (const int n : {1, 2, 5, 16}) {
    auto bootstraps = make_local_bootstraps(n);
    std::vector<std::shared_ptr<Segment>> owners(n);
    const std::vector<uint8_t> everyone(n, 1);
    const auto outcomes = run_threads(n, [&](int r) {
      const Topology topology = discover(*bootstraps[r], "", ample());
      const auto sharer = make_segment_sharer(topology, *bootstraps[r], ample());
      require(sharer->shares_address_space(), "one address space");
      owners[r] = create_for(*sharer, 4096);
      require(owners[r]->fd() < 0, "no descriptor");
      for (int round = 0; round < 3; ++round) {
        const auto all = sharer->share(owners[r], "round-" + std::to_string(round), everyone, ample());
        require(all[r] == owners[r], "own entry");
        for (int peer = 0; peer < n; ++peer) word(*all[peer], r).fetch_add(1 + r);
      }
    });
    for (const std::string& text : outcomes) EXPECT_EQ(text, "ok");
    for (int owner = 0; owner < n; ++owner)
      for (int r = 0; r < n; ++r) EXPECT_EQ(word(*owners[owner], r), 3u * (1 + r));
  }
}

TEST(SharingByThreads, SurvivorsShareWithoutTheOthers) {
  auto bootstraps = make_local_bootstraps(4);
  const std::vector<uint8_t> survivors = {1, 0, 1, 1};
  const auto outcomes = run_threads(4, [&](int r) {
    const auto sharer = make_segment_sharer(discover(*bootstraps[r], "", ample()), *bootstraps[r], ample());
    bootstraps[r].reset();
    if (r == 1) return;
    const auto all = sharer->share(create_for(*sharer, 4096), "survivors", survivors, ample());
    for (int peer = 0; peer < 4; ++peer) require((all[peer] != nullptr) == (survivors[peer] != 0), "members only");
  });
  for (const std::string& text : outcomes) EXPECT_EQ(text, "ok");
}

TEST(SharingByThreads, NamesTheMissingMember) {
  auto bootstraps = make_local_bootstraps(3);
  const std::vector<uint8_t> everyone(3, 1);
  const auto outcomes = run_threads(3, [&](int r) {
    const auto sharer = make_segment_sharer(discover(*bootstraps[r], "", ample()), *bootstraps[r], ample());
    if (r != 1) sharer->share(create_for(*sharer, 4096), "all", everyone, Deadline::in_ms(r == 0 ? 2000 : 3000));
  });
  EXPECT_EQ(outcomes[1], "ok");
  for (const int r : {0, 2}) expect_parts(outcomes[r], {"TERN_TIMEOUT", "waited for rank", "1", "\"all\""});
}

TEST(Sharing, RefusesWrongArguments) {
  auto bootstraps = make_local_bootstraps(1);
  const auto sharer = make_segment_sharer(discover(*bootstraps[0], "", ample()), *bootstraps[0], ample());
  const std::vector<uint8_t> me = {1}, nobody = {0}, two = {1, 1};
  const auto refused = [&](const std::string& tag, const std::vector<uint8_t>& members) {
    return outcome([&] { sharer->share(create_for(*sharer, 4096), tag, members, ample()); });
  };
  EXPECT_EQ(refused("tag", me), "ok");
  for (const auto& text : {refused("tag", nobody), refused("tag", two), refused("", me), refused(std::string(49, 't'), me)})
    expect_parts(text, {"TERN_INTERNAL_ERROR"});
}

TEST(Sharing, DifferentHostsAreNotThereYet) {
  auto bootstraps = make_local_bootstraps(2);
  std::vector<RankInfo> ranks(2, describe_self(""));
  std::strcpy(ranks[1].boot_id.data(), "another kernel");
  std::strcpy(ranks[1].host_name.data(), "faraway");
  const auto outcomes = run_threads(2, [&](int r) { make_segment_sharer(make_topology(r, ranks), *bootstraps[r], ample()); });
  for (const std::string& text : outcomes) expect_parts(text, {"TERN_UNSUPPORTED", "rank 1 on faraway", "one host"});
}

// ---------------------------------------------------------------------------------------------------------- processes

// The ranks of one test meet at an address that no other test uses.
Launch launch_at_own_port(int num_ranks) {
  static int num_launches = 0;
  Launch launch = {
      .launcher = "test", .job = fmt::format("{} {}", ::getpid(), num_launches++), .num_ranks = num_ranks, .host = "127.0.0.1"};
  launch.port = static_cast<uint16_t>(20000 + stable_hash(launch.job) % 12768);
  return launch;
}

struct Rank {
  Rank(Launch launch, int r) {
    launch.rank = r;
    bootstrap = meet(launch, "test", ample());
    topology = discover(*bootstrap, "", ample());
    sharer = make_segment_sharer(topology, *bootstrap, ample());
  }
  void barrier() { bootstrap->allgather(nullptr, nullptr, 0, ample()); }
  std::unique_ptr<Bootstrap> bootstrap;
  Topology topology;
  std::unique_ptr<SegmentSharer> sharer;
};

// Every rank writes into every window and finds what the others wrote into its own.
void check_windows(Rank& rank, const std::string& tag) {
  const int n = rank.topology.num_ranks, me = rank.topology.rank;
  const auto mine = create_for(*rank.sharer, 1 << 16);
  const auto all = rank.sharer->share(mine, tag, std::vector<uint8_t>(n, 1), ample());
  require(all[me] == mine, "own entry");
  for (int peer = 0; peer < n; ++peer) word(*all[peer], me) = 1000 * peer + me + 1;
  rank.barrier();
  for (int peer = 0; peer < n; ++peer) require(word(*mine, peer) == uint64_t(1000 * me + peer + 1), "what a peer wrote");
  rank.barrier();
}

class SharingByProcesses : public ::testing::TestWithParam<int> {};

TEST_P(SharingByProcesses, WriteHereReadThere) {
  const Launch launch = launch_at_own_port(GetParam());
  expect_all_ok(run_forked(GetParam(), [&](int r) {
    Rank rank(launch, r);
    require(!rank.sharer->shares_address_space(), "own address spaces");
    for (int round = 0; round < 3; ++round) check_windows(rank, "round-" + std::to_string(round));
  }));
}

INSTANTIATE_TEST_SUITE_P(Ranks, SharingByProcesses, ::testing::Values(2, 3, 4, 8));

TEST(SharingByProcesses, SomeRanksAreThreadsOfOneProcess) {
  const Launch launch = launch_at_own_port(5);
  expect_all_ok(run_forked(2, [&](int process) {
    const auto outcomes = run_threads(process == 0 ? 3 : 2, [&](int thread) {
      Rank rank(launch, process == 0 ? thread : 3 + thread);
      require(!rank.sharer->shares_address_space(), "not all in one process");
      check_windows(rank, "mixed");
    });
    for (const std::string& text : outcomes) require(text == "ok", text);
  }));
}

TEST(SharingByProcesses, SurvivorsShareRenewedSegments) {
  const Launch launch = launch_at_own_port(4);
  const std::vector<uint8_t> survivors = {1, 1, 0, 1};
  const auto results = run_forked(4, [&](int r) {
    Rank rank(launch, r);
    check_windows(rank, "before");
    const auto mine = create_for(*rank.sharer, 4096);
    const auto before = rank.sharer->share(mine, "windows-0", std::vector<uint8_t>(4, 1), ample());
    word(*mine, 0) = 100 + r;
    rank.barrier();
    if (r == 2) ::kill(::getpid(), SIGKILL);
    mine->renew();
    const auto after = rank.sharer->share(mine, "windows-1", survivors, ample());
    for (int peer = 0; peer < 4; ++peer) {
      require((after[peer] != nullptr) == (survivors[peer] != 0), "members only");
      if (after[peer]) require(word(*after[peer], 0) == uint64_t(100 + peer), "contents are kept");
      if (peer != r) word(*before[peer], 0) = 0;  // late writes into what was before
    }
    const auto again = rank.sharer->share(mine, "windows-2", survivors, ample());  // all have written
    for (const int peer : {0, 1, 3}) require(word(*again[peer], 0) == uint64_t(100 + peer), "late writes do not matter");
  });
  EXPECT_EQ(results[2].killed_by, SIGKILL);
  for (const int r : {0, 1, 3}) EXPECT_EQ(results[r].text, "ok");
}

TEST(SharingByProcesses, NamesTheMissingMemberAndWhatItDoes) {
  const Launch launch = launch_at_own_port(3);
  Gate others_gave_up;
  Children children(3, [&](int r) {
    if (r == 1) others_gave_up.leave();
    Rank rank(launch, r);
    rank.barrier();
    if (r == 1) ::raise(SIGSTOP);
    rank.sharer->share(create_for(*rank.sharer, 4096), "all", std::vector<uint8_t>(3, 1), Deadline::in_ms(3000));
  });
  const pid_t stopped = children.pid(1);
  others_gave_up.wait();
  ::kill(stopped, SIGKILL);
  const auto results = children.collect();
  for (const int r : {0, 2})
    expect_text(results[r], {"TERN_TIMEOUT", "waited for rank 1", fmt::format("rank 1: process {} is stopped", stopped).c_str()});
}

std::set<std::string> entries_of(const char* folder) {
  std::set<std::string> result;
  DIR* dir = ::opendir(folder);
  if (dir == nullptr) return result;
  while (const dirent* entry = ::readdir(dir)) result.insert(entry->d_name);
  ::closedir(dir);
  return result;
}

std::string read_text(const char* path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), {}};
}

// Names that this library could leave behind; other programs of the machine come and go meanwhile. So tests name their own files otherwise.
std::vector<std::string> leftovers() {
  std::vector<std::string> result;
  for (const char* folder : {"/dev/shm", "/tmp", "/dev/mqueue"})
    for (const std::string& name : entries_of(folder))
      if (name.find("tern-") == 0) result.push_back(std::string(folder) + "/" + name);
  return result;
}

TEST(SharingByProcesses, NothingIsLeftAfterKill) {
  const auto before = leftovers();
  const Launch launch = launch_at_own_port(3);
  const auto results = run_forked(3, [&](int r) {
    Rank rank(launch, r);
    check_windows(rank, "windows");
    const auto mine = create_for(*rank.sharer, 1 << 20);
    rank.barrier();
    // In the middle of sharing: rank 2 dies before it comes, the others while they wait for it.
    if (r == 2) ::kill(::getpid(), SIGKILL);
    ::alarm(1);
    rank.sharer->share(mine, fmt::format("end-of-{}", launch.port), std::vector<uint8_t>(3, 1), ample());
  });
  for (const auto& result : results) EXPECT_NE(result.killed_by, 0);
  EXPECT_EQ(leftovers(), before);
  for (const std::string& name : entries_of("/dev/shm")) EXPECT_EQ(name.find("tern"), std::string::npos) << name;
  EXPECT_EQ(read_text("/proc/net/unix").find(fmt::format("end-of-{}-", launch.port)), std::string::npos);
}

TEST(SharingByProcesses, RefusesAnotherUser) {
  if (::geteuid() != 0) GTEST_SKIP() << "only root can become somebody else";
  const Launch launch = launch_at_own_port(2);
  const auto results = run_forked(2, [&](int r) {
    Rank rank(launch, r);
    if (r == 1) require(::setresuid(65534, 65534, 65534) == 0, "setresuid");
    rank.sharer->share(create_for(*rank.sharer, 4096), "users", std::vector<uint8_t>(2, 1), Deadline::in_ms(3000));
  });
  // Who connects first says so at once; the other one has perhaps only turned somebody away.
  int num_clear = 0;
  for (const auto& result : results) {
    EXPECT_FALSE(result.ok());
    num_clear += result.text.find("same user") != std::string::npos;
    expect_text(result, {"user"});
  }
  EXPECT_GE(num_clear, 1);
}

}  // namespace
}  // namespace tern
