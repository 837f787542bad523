// SPDX-License-Identifier: Apache-2.0
// The thread that owns an endpoint: epochs in flow, words that grow, and leaving, between ranks as threads over TCP on loopback.
#include "transport/proxy.h"

#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <cstring>
#include <thread>

#include "test_ranks.h"

// libfabric 1.17's provider "net" loses a few hundred bytes with each endpoint, also when it is closed.
extern "C" __attribute__((visibility("default"))) const char* __lsan_default_suppressions() { return "leak:libfabric.so.1"; }

namespace tern {
namespace {

using namespace test;

constexpr int kChannels = 2;
constexpr size_t kBankBytes = 4096;

EndpointOptions loopback_options() {
  EndpointOptions options;
  options.provider = "tcp";
  options.domains = {"lo"};
  options.num_channels = Proxy::channels_for(kChannels);
  return options;
}

uint64_t load(const uint64_t& word) { return std::atomic_ref<uint64_t>(const_cast<uint64_t&>(word)).load(std::memory_order_acquire); }

// A rank with a proxy. Its memory: [channel][bank][in, out][rank].
class ProxyRank {
 public:
  explicit ProxyRank(Bootstrap& bootstrap)
      : rank_(bootstrap.rank()), num_ranks_(bootstrap.num_ranks()), memory_(offset(kChannels, 0, 0, 0)) {
    auto endpoint = make_endpoint(bootstrap, loopback_options(), ample());
    region_ = std::make_unique<Region>(endpoint->register_memory(memory_.data(), memory_.size()));
    remotes_.resize(static_cast<size_t>(num_ranks_));
    bootstrap.allgather(&region_->remote(), remotes_.data(), sizeof(RemoteRegion), ample());
    ProxyOptions options;
    options.num_channels = kChannels;
    options.region = region_.get();
    for (int r = 0; r < num_ranks_; ++r)
      if (r != rank_) options.peers.push_back({r, remotes_[static_cast<size_t>(r)]});
    options.changed = [this](int) { ++num_changes; };
    options.failed = [this](int peer, const std::string&) { failed_peer = peer; };
    options.turned = [] {};
    proxy_ = std::make_unique<Proxy>(std::move(endpoint), options);
    proxy_->start();
  }

  // Puts a pattern to every peer, as far as they have room.
  void send(int channel, uint64_t epoch) {
    for_each_peer([&](int peer) {
      if (epoch > 2) await(proxy_->taken(peer, channel), epoch - 2, "credit");
      std::memset(memory_.data() + offset(channel, epoch, 1, peer), pattern(rank_, peer, epoch), kBankBytes);
      proxy_->put({.peer = peer,
                   .from = region_.get(),
                   .from_offset = offset(channel, epoch, 1, peer),
                   .to = remotes_[static_cast<size_t>(peer)],
                   .to_offset = offset(channel, epoch, 0, rank_),
                   .num_bytes = kBankBytes,
                   .channel = channel,
                   .epoch = static_cast<int64_t>(epoch),
                   .last = true});
    });
  }
  void receive(int channel, uint64_t epoch) {
    for_each_peer([&](int peer) {
      await(proxy_->arrived(peer, channel), epoch, "data");
      const std::byte* bank = memory_.data() + offset(channel, epoch, 0, peer);
      for (size_t i = 0; i < kBankBytes; i += 97)
        require(bank[i] == std::byte{pattern(peer, rank_, epoch)}, "bytes of epoch " + std::to_string(epoch));
    });
    proxy_->finish(channel, epoch);
  }

  Proxy& proxy() { return *proxy_; }
  bool helps = false;  // moves bytes while it waits
  std::atomic<int> num_changes = 0;
  std::atomic<int> failed_peer = -2;

 private:
  void await(const uint64_t& word, uint64_t value, const char* what) {
    const Deadline deadline = ample();
    for (int turn = 0; load(word) < value; ++turn) {
      require(!deadline.passed(), what);
      constexpr int kTurnsUntilHandOver = 100;
      if (helps && turn < kTurnsUntilHandOver)
        proxy_->help();
      else if (helps && turn == kTurnsUntilHandOver)
        proxy_->hand_over();
      std::this_thread::yield();
    }
  }

  size_t offset(int channel, uint64_t epoch, size_t direction, int rank) const {
    return (((static_cast<size_t>(channel) * 2 + epoch % 2) * 2 + direction) * static_cast<size_t>(num_ranks_) +
            static_cast<size_t>(rank)) *
           kBankBytes;
  }
  static uint8_t pattern(int from, int to, uint64_t epoch) { return static_cast<uint8_t>(from * 31 + to * 7 + static_cast<int>(epoch)); }
  template <typename Visitor>
  void for_each_peer(Visitor visit) const {
    for (int r = 0; r < num_ranks_; ++r)
      if (r != rank_) visit(r);
  }

  int rank_, num_ranks_;
  std::vector<std::byte> memory_;
  std::unique_ptr<Region> region_;
  std::vector<RemoteRegion> remotes_;
  std::unique_ptr<Proxy> proxy_;
};

class Proxies : public ::testing::Test {
 protected:
  void SetUp() override {
    const std::string found = outcome([] { make_endpoint(*make_local_bootstraps(1)[0], loopback_options(), ample()); });
    if (found != "ok") GTEST_SKIP() << "no TCP between ranks here: " << found;
  }
  static void run_ok(int num_ranks, const std::function<void(int, ProxyRank&)>& body) {
    auto bootstraps = make_local_bootstraps(num_ranks);
    for (const std::string& text : run_threads(num_ranks, [&](int r) {
           ProxyRank rank(*bootstraps[static_cast<size_t>(r)]);
           body(r, rank);
         }))
      EXPECT_EQ(text, "ok");
  }
};

TEST_F(Proxies, ManyEpochsOfTwoChannels) {
  run_ok(3, [](int, ProxyRank& rank) {
    constexpr uint64_t kNumEpochs = 200;
    for (int channel = 0; channel < kChannels; ++channel) rank.send(channel, 1);
    for (uint64_t epoch = 1; epoch <= kNumEpochs; ++epoch)
      for (int channel = 0; channel < kChannels; ++channel) {
        if (epoch < kNumEpochs) rank.send(channel, epoch + 1);
        rank.receive(channel, epoch);
      }
    require(rank.proxy().close(ample()), "all take leave");
    require(rank.num_changes > 0 && rank.failed_peer == -2, "words grow, and nobody is lost");
  });
}

// Takes a put of some bytes at the fifth attempt only, one without at once.
class ReluctantEndpoint final : public Endpoint {
 public:
  explicit ReluctantEndpoint(std::vector<Put>& taken) : taken_(taken) {}

  const EndpointFacts& facts() const override { return facts_; }
  Region register_memory(void* address, size_t num_bytes, int) override { return Region(static_cast<std::byte*>(address), num_bytes); }
  bool try_put(Put& put) override {
    if (put.num_bytes > 0 && ++num_attempts_ % 5 != 0) return false;
    taken_.push_back(put);
    return true;
  }
  bool progress() override { return false; }
  void flush(Deadline) override {}
  int num_outstanding() const override { return 0; }
  int num_outstanding_to(int) const override { return 0; }
  bool lost(int) const override { return false; }
  void try_again(int) override {}
  bool complete(int, int, int64_t) const override { return false; }
  void retire(int, int, int64_t) override {}

 private:
  std::vector<Put>& taken_;
  EndpointFacts facts_;
  int num_attempts_ = 0;
};

// The last put of an epoch does not overtake one that has to wait; those of other epochs do.
TEST(ProxyOverAReluctantEndpoint, PutsOfAnEpochStayInOrder) {
  std::vector<Put> taken;
  std::array<std::byte, 64> memory = {};
  const Region region(memory.data(), memory.size());
  ProxyOptions options;
  options.num_channels = kChannels;
  options.region = &region;
  options.peers = {{1, region.remote()}};
  options.changed = [](int) {};
  options.failed = [](int, const std::string&) {};
  options.turned = [] {};
  Proxy proxy(std::make_unique<ReluctantEndpoint>(taken), options);
  const Put first{.peer = 1, .from = &region, .to = region.remote(), .num_bytes = 32, .channel = 0, .epoch = 1};
  Put last = first, of_other_channel = first;
  last.num_bytes = of_other_channel.num_bytes = 0;
  last.last = of_other_channel.last = true;
  of_other_channel.channel = 1;
  for (const Put& put : {first, last, of_other_channel}) proxy.put(put);
  while (taken.size() < 3) proxy.help();
  EXPECT_NE(taken[0].channel, taken[1].channel);
  EXPECT_EQ(taken[1].num_bytes, first.num_bytes);
  EXPECT_TRUE(taken[2].last);
}

// Two threads of each rank, with a channel each, move bytes while they wait, and so does the proxy's own.
TEST_F(Proxies, ThreadsThatWaitMoveTheBytes) {
  run_ok(2, [](int, ProxyRank& rank) {
    constexpr uint64_t kNumEpochs = 300;
    rank.helps = true;
    const std::vector<std::string> texts = run_threads(kChannels, [&](int channel) {
      for (uint64_t epoch = 1; epoch <= kNumEpochs; ++epoch) {
        rank.send(channel, epoch);
        rank.receive(channel, epoch);
      }
    });
    for (const std::string& text : texts) require(text == "ok", text);
    require(rank.proxy().close(ample()), "all take leave");
    require(rank.failed_peer == -2, "nobody is lost");
  });
}

// Who has nothing left to do goes, while a peer has not even looked at what it was sent.
TEST_F(Proxies, WhoLeavesEarlyLosesNothing) {
  std::atomic<bool> has_left = false;
  run_ok(2, [&](int r, ProxyRank& rank) {
    rank.send(0, 1);
    if (r == 0) {
      rank.receive(0, 1);
      require(rank.proxy().close(ample()), "the peer's proxy lets it go");
      has_left = true;
      return;
    }
    const Deadline deadline = ample();
    while (!has_left) {
      require(!deadline.passed(), "rank 0 leaves");
      std::this_thread::yield();
    }
    rank.receive(0, 1);
    require(rank.proxy().close(ample()) && rank.failed_peer == -2, "nobody is lost");
    rank.send(0, 2);
    while (rank.failed_peer != 0) {
      require(!deadline.passed(), "what is put to a rank that has left is its fault");
      std::this_thread::yield();
    }
  });
}

TEST_F(Proxies, CloseWithoutAWord) {
  run_ok(4, [](int, ProxyRank& rank) { require(rank.proxy().close(ample()), "all take leave"); });
}

}  // namespace
}  // namespace tern
