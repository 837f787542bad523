// SPDX-License-Identifier: Apache-2.0
// Puts between ranks as threads, each with an endpoint of its own, over TCP on this machine's loopback.
#include "transport/endpoint.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <optional>
#include <random>
#include <tuple>

#include "test_ranks.h"

// libfabric 1.17's provider "net" loses a few hundred bytes with each endpoint, also when it is closed.
extern "C" __attribute__((visibility("default"))) const char* __lsan_default_suppressions() { return "leak:libfabric.so.1"; }

namespace tern {
namespace {

using namespace test;

EndpointOptions over_loopback(int num_devices = 1) {
  EndpointOptions options;
  options.provider = "tcp";
  options.domains.assign(static_cast<size_t>(num_devices), "lo");
  options.traffic_class = "";
  return options;
}

// One rank of a test.
struct Rank {
  Bootstrap& bootstrap;
  Endpoint& endpoint;
  std::atomic<int>& num_finished;
  int rank() const { return bootstrap.rank(); }
  int num_ranks() const { return bootstrap.num_ranks(); }

  std::vector<RemoteRegion> exchange(const Region& region) const {
    std::vector<RemoteRegion> all(num_ranks());
    bootstrap.allgather(&region.remote(), all.data(), sizeof(RemoteRegion), ample());
    return all;
  }
  void await(int peer, int channel, int64_t epoch) const {
    const Deadline deadline = ample();
    while (!endpoint.complete(peer, channel, epoch))
      require(endpoint.wait(deadline), "epoch " + std::to_string(epoch) + " comes from rank " + std::to_string(peer));
  }
  // Every rank has a connection with every other, over which epoch 1 of channel 0 has gone without bytes. (libfabric 1.17 loses memory
  // where an endpoint closes while it connects.)
  void connect(const Region& here, const std::vector<RemoteRegion>& remotes) const {
    for (int peer = 0; peer < num_ranks(); ++peer)
      if (peer != rank()) endpoint.put({.peer = peer, .from = &here, .to = remotes[peer], .epoch = 1, .last = true}, ample());
    for (int peer = 0; peer < num_ranks(); ++peer)
      if (peer != rank()) await(peer, 0, 1);
    finish();
  }
  // All that this rank put has left, and it helps the others until they are as far.
  void finish() const {
    endpoint.flush(ample());
    ++num_finished;
    const Deadline deadline = ample();
    while (num_finished < num_ranks()) {
      require(!deadline.passed(), "all ranks finish");
      endpoint.wait(Deadline::in_ms(1));
    }
  }
};

class Endpoints : public ::testing::Test {
 protected:
  void SetUp() override {
    const std::string found = outcome([] { make_endpoint(*make_local_bootstraps(1)[0], over_loopback(), ample()); });
    if (found != "ok") GTEST_SKIP() << "no TCP between ranks here: " << found;
  }

  static std::vector<std::string> run(int num_ranks, const EndpointOptions& options, const std::function<void(const Rank&)>& body) {
    auto bootstraps = make_local_bootstraps(num_ranks);
    std::atomic<int> num_finished = 0;
    return run_threads(num_ranks, [&](int r) {
      const auto bootstrap = std::move(bootstraps[r]);  // who fails leaves, so that the others learn of it
      const auto endpoint = make_endpoint(*bootstrap, options, ample());
      body({*bootstrap, *endpoint, num_finished});
    });
  }
  static void run_ok(int num_ranks, const EndpointOptions& options, const std::function<void(const Rank&)>& body) {
    for (const std::string& text : run(num_ranks, options, body)) EXPECT_EQ(text, "ok");
  }
};

std::vector<std::byte> make_source(int sender) {
  std::vector<std::byte> source(9 << 20);
  std::mt19937 random(static_cast<unsigned>(sender));
  std::vector<uint32_t> words(source.size() / sizeof(uint32_t));
  std::ranges::generate(words, random);
  std::memcpy(source.data(), words.data(), source.size());
  return source;
}

// What one rank puts to another: pieces of random size in a random order, with gaps that stay as they were.
struct Piece {
  size_t from, to, num_bytes;
};
std::vector<Piece> make_pieces(int sender, int receiver, const std::vector<size_t>& sizes) {
  std::mt19937 random(static_cast<unsigned>(sender * 100 + receiver));
  std::vector<Piece> pieces;
  size_t to = 0;
  for (const size_t num_bytes : sizes) {
    to += random() % 300;
    pieces.push_back({random() % 1000, to, num_bytes});
    to += num_bytes;
  }
  std::ranges::shuffle(pieces, random);
  return pieces;
}

class AllToAll : public Endpoints, public ::testing::WithParamInterface<std::tuple<int, size_t, int>> {};

TEST_P(AllToAll, LandsByteForByte) {
  const auto [num_ranks, most_message_bytes, num_devices] = GetParam();
  const std::vector<size_t> sizes = {0, 1, 2, 7, 63, 64, 65, 255, 4095, 4096, 65537, 1000003, 8 << 20};
  constexpr size_t kPerSender = (10 << 20);
  EndpointOptions options = over_loopback(num_devices);
  options.most_message_bytes = most_message_bytes;
  options.most_outstanding = 16;  // fewer than the largest put has messages
  std::vector<std::vector<std::byte>> sources;
  for (int r = 0; r < num_ranks; ++r) sources.push_back(make_source(r));
  run_ok(num_ranks, options, [&](const Rank& me) {
    std::vector<std::byte>& source = sources[me.rank()];
    std::vector<std::byte> window(kPerSender * me.num_ranks());
    const Region from = me.endpoint.register_memory(source.data(), source.size());
    const Region here = me.endpoint.register_memory(window.data(), window.size());
    const std::vector<RemoteRegion> remotes = me.exchange(here);
    for (int peer = 0; peer < me.num_ranks(); ++peer) {
      if (peer == me.rank()) continue;
      const std::vector<Piece> pieces = make_pieces(me.rank(), peer, sizes);
      for (size_t i = 0; i < pieces.size(); ++i)
        me.endpoint.put({.peer = peer,
                         .from = &from,
                         .from_offset = pieces[i].from,
                         .to = remotes[peer],
                         .to_offset = me.rank() * kPerSender + pieces[i].to,
                         .num_bytes = pieces[i].num_bytes,
                         .epoch = 1,
                         .last = i + 1 == pieces.size()},
                        ample());
    }
    std::vector<std::byte> expected(window.size());
    for (int peer = 0; peer < me.num_ranks(); ++peer) {
      if (peer == me.rank()) continue;
      me.await(peer, 0, 1);
      for (const Piece& piece : make_pieces(peer, me.rank(), sizes))
        std::copy_n(sources[peer].begin() + piece.from, piece.num_bytes, expected.begin() + peer * kPerSender + piece.to);
    }
    require(std::memcmp(window.data(), expected.data(), window.size()) == 0, "every byte is where it belongs, and no other has changed");
    me.finish();
  });
}

INSTANTIATE_TEST_SUITE_P(RanksMessageSizesAndDevices, AllToAll,
                         ::testing::Values(std::tuple(2, 0, 1), std::tuple(4, 0, 1), std::tuple(3, 65521, 1), std::tuple(2, 0, 2),
                                           std::tuple(3, 0, 3), std::tuple(3, 65521, 2)));

// What depends on how many devices there are.
class OverDevices : public Endpoints, public ::testing::WithParamInterface<int> {};
INSTANTIATE_TEST_SUITE_P(Devices, OverDevices, ::testing::Values(1, 2, 3));

// Two epochs under way: their puts are sent in turns, into banks that are used again when the peer has given credit on channel 1.
TEST_P(OverDevices, TwoEpochsUnderWay) {
  static constexpr int kRanks = 3, kEpochs = 40, kSlots = 24;
  EndpointOptions options = over_loopback(GetParam());
  options.num_channels = 2;
  run_ok(kRanks, options, [&](const Rank& me) {
    using Bank = std::array<uint64_t, kSlots>;
    const auto number = [](int sender, int receiver, int64_t epoch) { return int((sender * 7 + receiver * 3 + epoch * 5) % (kSlots + 1)); };
    const auto value = [](int sender, int64_t epoch, int slot) { return uint64_t(epoch) << 32 | uint64_t(sender) << 16 | uint64_t(slot); };
    std::vector<std::array<Bank, 2>> source(kRanks), window(kRanks);
    const Region from = me.endpoint.register_memory(source.data(), source.size() * sizeof(source[0]));
    const Region here = me.endpoint.register_memory(window.data(), window.size() * sizeof(window[0]));
    const std::vector<RemoteRegion> remotes = me.exchange(here);
    const auto offset = [&](int rank, int64_t epoch, int slot) {
      return ((rank * 2 + (epoch & 1)) * kSlots + static_cast<size_t>(slot)) * sizeof(uint64_t);
    };
    for (int64_t epoch = 1; epoch < kEpochs; epoch += 2) {
      for (int peer = 0; peer < kRanks; ++peer) {
        if (peer == me.rank()) continue;
        for (const int64_t credit : {epoch - 2, epoch - 1})
          if (credit > 0) {
            me.await(peer, 1, credit);
            me.endpoint.retire(peer, 1, credit);
          }
        me.endpoint.flush(ample());  // the source's banks are used again too
        for (int slot = 0; slot <= kSlots; ++slot)
          for (const int64_t e : {epoch, epoch + 1}) {
            const int end = number(me.rank(), peer, e);
            if (slot > end) continue;
            if (slot < end) source[peer][e & 1][slot] = value(me.rank(), e, slot);
            me.endpoint.put({.peer = peer,
                             .from = &from,
                             .from_offset = slot < end ? offset(peer, e, slot) : 0,
                             .to = remotes[peer],
                             .to_offset = slot < end ? offset(me.rank(), e, slot) : 0,
                             .num_bytes = slot < end ? sizeof(uint64_t) : 0,
                             .epoch = e,
                             .last = slot == end},
                            ample());
          }
      }
      for (const int64_t e : {epoch, epoch + 1})
        for (int peer = 0; peer < kRanks; ++peer) {
          if (peer == me.rank()) continue;
          me.await(peer, 0, e);
          for (int slot = 0; slot < number(peer, me.rank(), e); ++slot)
            require(window[peer][e & 1][slot] == value(peer, e, slot), "the value of the epoch that is complete");
          me.endpoint.retire(peer, 0, e);
          me.endpoint.put({.peer = peer, .from = &from, .to = remotes[peer], .channel = 1, .epoch = e, .last = true}, ample());
        }
    }
    me.finish();
  });
}

TEST_P(OverDevices, ManySmallPutsWithFewOutstanding) {
  constexpr int kPuts = 5000, kMost = 16;
  EndpointOptions options = over_loopback(GetParam());
  options.most_outstanding = kMost;
  run_ok(2, options, [&](const Rank& me) {
    const int peer = 1 - me.rank();
    std::vector<uint64_t> source(kPuts), window(kPuts);
    for (int i = 0; i < kPuts; ++i) source[i] = uint64_t(i) * 3 + me.rank();
    const Region from = me.endpoint.register_memory(source.data(), kPuts * sizeof(uint64_t));
    const Region here = me.endpoint.register_memory(window.data(), kPuts * sizeof(uint64_t));
    const std::vector<RemoteRegion> remotes = me.exchange(here);
    require(me.endpoint.facts().most_outstanding <= kMost, "the limit is kept");
    for (int i = 0; i < kPuts; ++i) {
      const size_t offset = i * sizeof(uint64_t);
      me.endpoint.put({peer, &from, offset, remotes[peer], offset, sizeof(uint64_t), 0, 1, i + 1 == kPuts}, ample());
      require(me.endpoint.num_outstanding() <= GetParam() * kMost, "no more are under way");
    }
    me.await(peer, 0, 1);
    for (int i = 0; i < kPuts; ++i) require(window[i] == uint64_t(i) * 3 + peer, "every word came");
    me.finish();
    require(me.endpoint.num_outstanding() == 0, "all have left");
  });
}

// Rank 1 leaves in the middle. Rank 0 learns of it by putting, rank 2 by its own deadline; these two go on.
TEST_P(OverDevices, APeerThatLeavesIsNamed) {
  auto bootstraps = make_local_bootstraps(3);
  std::atomic<int> num_finished = 0;
  const auto outcomes = run_threads(3, [&](int r) {
    std::vector<std::byte> memory(1 << 20);
    auto endpoint = make_endpoint(*bootstraps[r], over_loopback(GetParam()), ample());
    const Rank me = {*bootstraps[r], *endpoint, num_finished};
    std::optional<Region> here = endpoint->register_memory(memory.data(), memory.size());
    const std::vector<RemoteRegion> remotes = me.exchange(*here);
    me.connect(*here, remotes);
    if (r == 1) {
      here.reset();
      endpoint.reset();
    }
    char mine = 0, all[3];
    bootstraps[r]->allgather(&mine, all, 1, ample());
    if (r == 0) {
      const auto put = [&] {
        const Deadline deadline = Deadline::in_ms(5000);
        while (true) endpoint->put({1, &*here, 0, remotes[1], 0, memory.size(), 0, 2, false}, deadline);
      };
      const std::string text = outcome(put);
      expect_parts(text, {"transport", "rank 1"});
      // The provider may also wait for the peer to come back.
      require(endpoint->lost(1) == text.starts_with("TERN_SYSTEM_ERROR"), text);
      endpoint->put({2, &*here, 0, remotes[2], 0, 64, 0, 2, true}, ample());
    }
    if (r == 2) {
      me.await(0, 0, 2);
      const Deadline soon = Deadline::in_ms(50);
      while (endpoint->wait(soon)) {
      }
      require(!endpoint->complete(1, 0, 2), "nothing comes from who has left");
    }
    bootstraps[r]->allgather(&mine, all, 1, ample());
  });
  for (const std::string& text : outcomes) EXPECT_EQ(text, "ok");
}

// As if the address of a rank that has ended had become rank 1's: what rank 0 knows of that one's memory does not open rank 1's. Its connection may
// end with that, and nobody else's.
TEST_F(Endpoints, MemoryOfAnEarlierEndpointIsNotReached) {
  constexpr std::byte kUntouched{0xa5};
  auto bootstraps = make_local_bootstraps(3);
  std::atomic<int> num_finished = 0;
  const auto outcomes = run_threads(3, [&](int r) {
    std::vector<std::byte> memory(256, kUntouched), zeros(64), expected(memory);
    std::vector<RemoteRegion> earlier;
    {
      const auto ended = make_endpoint(*bootstraps[r], over_loopback(), ample());
      const Region region = ended->register_memory(memory.data(), memory.size());
      earlier = Rank{*bootstraps[r], *ended, num_finished}.exchange(region);
    }
    const auto endpoint = make_endpoint(*bootstraps[r], over_loopback(), ample());
    const Region here = endpoint->register_memory(memory.data(), memory.size()),
                 from = endpoint->register_memory(zeros.data(), zeros.size());
    const Rank me = {*bootstraps[r], *endpoint, num_finished};
    const std::vector<RemoteRegion> remotes = me.exchange(here);
    Put put{.peer = 1, .from = &from, .to = r == 0 ? earlier[1] : remotes[1], .num_bytes = zeros.size(), .epoch = 1, .last = true};
    if (r == 0)
      for (const bool counted : {false, true}) {
        put.counted = counted;
        outcome([&] { endpoint->put(put, Deadline::in_ms(500)); });
      }
    if (r == 2) {
      put.to_offset = 128;
      endpoint->put(put, ample());
    }
    if (r == 1) me.await(2, 0, 1);
    const Deadline soon = Deadline::in_ms(1000);
    while (!soon.passed()) outcome([&] { endpoint->wait(soon); });  // what rank 0 has put fails in some way, or waits
    if (r == 1) std::copy_n(zeros.begin(), zeros.size(), expected.begin() + 128);
    require(memory == expected, "rank 2 has written where it may, and nobody else anywhere");
    require(!endpoint->complete(0, 0, 1), "nothing is counted from rank 0");
    char mine = 0, all[3];
    bootstraps[r]->allgather(&mine, all, 1, ample());
  });
  for (const std::string& text : outcomes) EXPECT_EQ(text, "ok");
}

// Small puts are one message, large ones one for each device at least.
TEST_P(OverDevices, LargePutsAreStripes) {
  constexpr size_t kMost = 4 << 20;
  run_ok(2, over_loopback(GetParam()), [&](const Rank& me) {
    std::vector<std::byte> memory(kMost);
    const Region here = me.endpoint.register_memory(memory.data(), memory.size());
    const std::vector<RemoteRegion> remotes = me.exchange(here);
    me.connect(here, remotes);
    const int peer = 1 - me.rank();
    const auto num_messages = [&](size_t num_bytes, bool last) {
      Put put{.peer = peer, .from = &here, .to = remotes[peer], .num_bytes = num_bytes, .epoch = 2, .last = last};
      require(me.endpoint.try_put(put), "there is room for it");
      const int number = me.endpoint.num_outstanding();
      require(me.endpoint.num_outstanding_to(peer) == number, "there is only one peer");
      me.endpoint.flush(ample());
      return number;
    };
    for (const size_t small : {size_t{0}, size_t{1}, 2 * kLeastStripeBytes - 1})
      require(num_messages(small, false) == 1, "a small put is not split");
    require(num_messages(2 * kLeastStripeBytes, false) == std::min(GetParam(), 2), "stripes have a least size");
    const int number = num_messages(kMost, true);
    require(GetParam() == 1 ? number == 1 : number > GetParam() && number < 8 * GetParam(), "a few for each device");
    me.await(peer, 0, 2);
    me.finish();
  });
}

TEST_F(Endpoints, WhoDoesNotTakeIsNamed) {
  run_ok(2, over_loopback(2), [](const Rank& me) {
    std::vector<std::byte> memory(64 << 20);
    const Region here = me.endpoint.register_memory(memory.data(), memory.size());
    const std::vector<RemoteRegion> remotes = me.exchange(here);
    me.connect(here, remotes);
    if (me.rank() == 0) {  // the peer stays away: more than what sockets hold cannot leave
      const auto act = [&] {
        const Deadline soon = Deadline::in_ms(100);
        me.endpoint.put({1, &here, 0, remotes[1], 0, memory.size(), 0, 2, true}, soon);
        me.endpoint.flush(soon);
      };
      expect_parts(outcome(act), {"TERN_TIMEOUT", "rank 1"});
    }
    char mine = 0, all[2];
    me.bootstrap.allgather(&mine, all, 1, ample());
  });
}

TEST_F(Endpoints, CloseInAnyOrder) {
  for (const bool regions_first : {false, true}) {
    std::atomic<int> num_finished = 0;
    auto bootstraps = make_local_bootstraps(3);
    std::vector<std::vector<std::byte>> memory(3, std::vector<std::byte>(4 << 20));
    const auto outcomes = run_threads(3, [&](int r) {
      auto endpoint = make_endpoint(*bootstraps[r], over_loopback(2), ample());
      std::optional<Region> here = endpoint->register_memory(memory[r].data(), memory[r].size());
      const Rank me = {*bootstraps[r], *endpoint, num_finished};
      const std::vector<RemoteRegion> remotes = me.exchange(*here);
      me.connect(*here, remotes);
      // Nobody closes while others still connect.
      char mine = 0, all[3];
      me.bootstrap.allgather(&mine, all, 1, ample());
      // Under way when everything closes.
      Put put = {(r + 1) % 3, &*here, 0, remotes[(r + 1) % 3], 0, 4 << 20, 0, 2, true};
      // Unless the other is faster.
      const std::string text = outcome([&] {
        endpoint->try_put(put);
        endpoint->progress();
      });
      require(text == "ok" || text.starts_with("TERN_SYSTEM_ERROR: transport: "), text);
      if (regions_first) here.reset();
      endpoint.reset();
    });
    for (const std::string& text : outcomes) EXPECT_EQ(text, "ok");
  }
}

TEST_F(Endpoints, RefusesWhatCannotBe) {
  run_ok(2, over_loopback(), [](const Rank& me) {
    std::vector<std::byte> memory(100);
    const Region here = me.endpoint.register_memory(memory.data(), memory.size());
    const std::vector<RemoteRegion> remotes = me.exchange(here);
    const int peer = 1 - me.rank();
    const auto put = [&](Put what) { return outcome([&] { me.endpoint.put(what, ample()); }); };
    expect_parts(put({peer, &here, 1, remotes[peer], 0, 100, 0, 1, true}), {"TERN_INVALID_ARGUMENT", "offset 1 of 100"});
    expect_parts(put({peer, &here, 0, remotes[peer], 101, 0, 0, 1, true}), {"TERN_INVALID_ARGUMENT", "offset 101 of 100"});
    expect_parts(put({me.rank(), &here, 0, remotes[peer], 0, 1, 0, 1, true}), {"TERN_INVALID_ARGUMENT", "itself"});
    expect_parts(put({2, &here, 0, remotes[peer], 0, 1, 0, 1, true}), {"TERN_INVALID_ARGUMENT", "rank 2", "2 ranks"});
    expect_parts(put({peer, nullptr, 0, remotes[peer], 0, 1, 0, 1, true}), {"TERN_INVALID_ARGUMENT", "without a region"});
    expect_parts(put({peer, &here, 0, remotes[peer], 0, 1, 0, 5, true}), {"TERN_INVALID_STATE", "epoch 5"});
    expect_parts(outcome([&] { me.endpoint.register_memory(memory.data(), 0); }), {"TERN_INVALID_ARGUMENT", "0 bytes"});
    me.finish();
  });
}

TEST_F(Endpoints, SaysWhatIsMissing) {
  const auto run_with = [](const EndpointOptions& options) { return run(2, options, [](const Rank&) {}); };
  EndpointOptions options = over_loopback();
  options.provider = "pigeon";
  for (const auto& text : run_with(options)) expect_parts(text, {"TERN_UNSUPPORTED", "rank 0", "provider pigeon", "there are", "on lo"});
  options = over_loopback();
  options.domains = {"pigeon0"};
  for (const auto& text : run_with(options)) expect_parts(text, {"TERN_UNSUPPORTED", "rank 0", "device pigeon0", "TERN_FABRIC_DOMAIN"});
  options = over_loopback();
  options.traffic_class = "dscp:64";
  for (const auto& text : run_with(options)) expect_parts(text, {"TERN_INVALID_ARGUMENT", "dscp:64", "TERN_FABRIC_TCLASS"});
  options.traffic_class = "";
  options.most_outstanding = 0;
  for (const auto& text : run_with(options)) expect_parts(text, {"TERN_INVALID_ARGUMENT", "0 outstanding"});
}

TEST_F(Endpoints, AllHaveAsManyDevices) {
  const auto run_with = [](const EndpointOptions& first, const EndpointOptions& second) {
    auto bootstraps = make_local_bootstraps(2);
    return run_threads(2, [&](int r) { make_endpoint(*bootstraps[r], r == 0 ? first : second, ample()); });
  };
  for (const auto& text : run_with(over_loopback(1), over_loopback(2)))
    expect_parts(text, {"TERN_MISMATCH", "rank 1 has 2 network devices, rank 0 has 1", "TERN_FABRIC_DOMAIN", "TERN_FABRIC_RAILS"});
  for (const auto& text : run_with(over_loopback(1), over_loopback(kMostDevices + 1)))
    expect_parts(text, {"TERN_UNSUPPORTED", "rank 1", "9 network devices", "1 to 8"});
  EndpointOptions unnamed = over_loopback(0);
  unnamed.num_rails = 0;
  for (const auto& text : run_with(over_loopback(1), unnamed)) expect_parts(text, {"TERN_UNSUPPORTED", "rank 1", "0 network devices"});
}

// Of TCP's devices only the first is known to lead to the others.
TEST_F(Endpoints, TheFirstDeviceServesSeveralTimes) {
  EndpointOptions options = over_loopback(0);
  options.num_rails = 3;
  options.seat = {.idx = 1, .num_ranks = 2};
  run_ok(2, options, [](const Rank& me) {
    const std::vector<std::string>& domains = me.endpoint.facts().domains;
    EXPECT_EQ(domains, std::vector<std::string>(3, domains.at(0)));
  });
}

TEST_F(Endpoints, TrafficClassesAreAccepted) {
  for (const char* name : {"low_latency", "bulk_data", "dscp:46"}) {
    EndpointOptions options = over_loopback();
    options.traffic_class = name;
    run_ok(2, options, [](const Rank& me) { EXPECT_EQ(me.endpoint.facts().domains, std::vector<std::string>{"lo"}); });
  }
}

// Ranks that take no part in an endpoint need no address.
TEST_F(Endpoints, SomeAreAbsent) {
  EndpointOptions options = over_loopback();
  options.absent = {0, 1, 0};
  const auto texts = run(3, options, [](const Rank& rank) {
    std::vector<std::byte> memory(64);
    const Region here = rank.endpoint.register_memory(memory.data(), memory.size());
    const std::vector<RemoteRegion> remotes = rank.exchange(here);
    if (rank.rank() == 1) return rank.finish();
    const int peer = 2 - rank.rank();
    rank.endpoint.put({.peer = peer, .from = &here, .to = remotes[static_cast<size_t>(peer)], .num_bytes = 8, .epoch = 1, .last = true},
                      ample());
    rank.await(peer, 0, 1);
    rank.finish();
  });
  for (const std::string& text : texts) EXPECT_EQ(text, "ok");
}

}  // namespace
}  // namespace tern
