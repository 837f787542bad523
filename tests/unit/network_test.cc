// SPDX-License-Identifier: Apache-2.0
// What crosses the network, by itself: two nodes of one rank each, as threads, over TCP on this machine's loopback. Banks hold header, counts and
// slots; or slots lie apart, as in the memory of GPUs.
#include "cpu/network.h"

#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <vector>

#include "memory/host_segment.h"
#include "plan/window_sizing.h"
#include "test_ranks.h"

// libfabric 1.17's provider "net" loses a few hundred bytes with each endpoint, also when it is closed.
extern "C" __attribute__((visibility("default"))) const char* __lsan_default_suppressions() { return "leak:libfabric.so.1"; }

namespace tern::cpu::test {
namespace {

using namespace tern::test;

constexpr int kNumNodes = 2;
constexpr int64_t kNumCounts = 5;
constexpr int64_t kMostSlots = 7;

tern_exchange_options test_options() {
  tern_exchange_options options = {};
  options.device = TERN_DEVICE_CPU;
  options.max_tokens = kMostSlots;
  options.max_row_bytes = 48;
  options.max_experts = 8;
  options.timeout_ms = kAmpleMs;
  return complete_options(options);
}

RailTrip test_trip() {
  return {.operation = TERN_OP_DISPATCH,
          .shape = {.row_bytes = 48},
          .bank = {.num_counts = kNumCounts, .slot = {.payload_bytes = 48}},
          .tokens_per_round = kMostSlots,
          .num_rounds = 1};
}

int64_t num_slots(uint64_t epoch, int rank) { return static_cast<int64_t>(epoch * 3 + static_cast<uint64_t>(rank)) % (kMostSlots + 1); }
int32_t count_of(uint64_t epoch, int rank, int64_t i) { return static_cast<int32_t>(epoch * 1000 + static_cast<uint64_t>(rank * 100 + i)); }
std::byte byte_of(uint64_t epoch, int rank, int64_t slot) {
  return static_cast<std::byte>(epoch * 31 + static_cast<uint64_t>(rank * 16 + slot) + 1);
}

enum class Slots { kInBanks, kApart, kApartOnOne, kRefused };

// One node: a rank with a lane, and the network's memory.
class Node {
 public:
  Node(Bootstrap& bootstrap, Slots slots) : rank_(bootstrap.rank()), options_(test_options()) {
    std::vector<RankInfo> infos;
    for (int r = 0; r < kNumNodes; ++r) infos.push_back(describe_self("node " + std::to_string(r)));
    domain_.num_ranks = 1;
    domain_.first_rank = rank_;
    domain_.layout = make_window_layout(options_, kNumNodes, kNumNodes);
    domain_.topology = make_topology(rank_, infos);
    domain_.masked.resize(1);
    domain_.windows = {HostSegment::create(static_cast<size_t>(domain_.layout.total_bytes()), SharedBy::kThreads)};
    domain_.heaps.resize(1);
    lane_ = std::make_unique<Lane>(domain_, 0, LaneOptions{.timeout_ms = kAmpleMs}, never_recorded_);
    network_ = std::make_unique<Network>(domain_, "", options_, Log{});
    const bool has_room = slots == Slots::kApart || (slots == Slots::kApartOnOne && rank_ == 0);
    RailMemory memory;
    memory.of_host = [this](size_t num_bytes) { return (host_ = HostSegment::create(num_bytes, SharedBy::kThreads))->data(); };
    if (has_room)
      memory.of_slots = [this](size_t num_bytes) { return (slots_ = HostSegment::create(num_bytes, SharedBy::kThreads))->data(); };
    if (slots == Slots::kRefused)
      memory.of_slots = [](size_t num_bytes) -> std::byte* { fail(TERN_OUT_OF_MEMORY, "{} bytes are not there", num_bytes); };
    network_->start(memory, bootstrap, {}, ample());
    rail_ = network_->make_rail(*lane_);
  }

  bool has_slots_apart() const { return network_->place().slots != nullptr; }
  bool has_host_slots() const { return rail_->head_bytes() == rail_->bank_bytes(); }
  Rail& rail() { return *rail_; }
  int rank() const { return rank_; }
  int other_node() const { return 1 - rank_; }

  // Fills what leaves in an epoch, and sends it.
  void send(uint64_t epoch) {
    const RailTrip trip = test_trip();
    rail_->start_round(trip, epoch);
    for (int64_t i = 0; i < kNumCounts; ++i) rail_->counts_for(trip, epoch, other_node())[i] = count_of(epoch, rank_, i);
    for (int64_t i = 0; i < num_slots(epoch, rank_); ++i)
      std::memset(slot(whole().out(0, epoch, other_node()), i), static_cast<int>(byte_of(epoch, rank_, i)), 48);
    rail_->set_num_slots(other_node(), static_cast<int32_t>(num_slots(epoch, rank_)));
    const int64_t num_bytes = rail_->send_round(trip, epoch);
    require(num_bytes == trip.bank.bytes(num_slots(epoch, rank_)), "as many bytes are sent as there are");
  }

  // Compares what has come in an epoch.
  void receive(uint64_t epoch) {
    const RailTrip trip = test_trip();
    const std::byte* bank = rail_->await_arrived(trip, epoch, other_node());
    const int sender = other_node();
    require(reinterpret_cast<const layout::RailHeader*>(bank)->num_slots == num_slots(epoch, sender), "the header says how many slots");
    const auto* counts = reinterpret_cast<const int32_t*>(bank + trip.bank.counts());
    for (int64_t i = 0; i < kNumCounts; ++i) require(counts[i] == count_of(epoch, sender, i), "counts are the sender's");
    for (int64_t i = 0; i < num_slots(epoch, sender); ++i)
      for (int64_t byte = 0; byte < 48; ++byte)
        require(slot(whole().in(0, epoch, sender), i)[byte] == byte_of(epoch, sender, i), "slots are the sender's");
    rail_->finish_round(epoch);
  }

 private:
  const layout::RailBanksLayout& whole() const { return network_->place().whole_banks; }
  std::byte* slot(int64_t bank_at, int64_t i) const {
    std::byte* const banks = slots_apart_ptr() != nullptr ? slots_apart_ptr() : host_->data() + network_->place().layout.banks_begin();
    return banks + bank_at + test_trip().bank.slot_at(i);
  }
  std::byte* slots_apart_ptr() const { return has_slots_apart() ? slots_->data() : nullptr; }

  int rank_;
  tern_exchange_options options_;
  SpanLog never_recorded_{0};
  Domain domain_;
  std::shared_ptr<Segment> host_, slots_;
  std::unique_ptr<Lane> lane_;
  std::unique_ptr<Network> network_;
  std::unique_ptr<Rail> rail_;
};

class RailOverNetwork : public ::testing::TestWithParam<Slots> {
 protected:
  void SetUp() override {
    const std::string found = outcome([] { make_endpoint(*make_local_bootstraps(1)[0], {}, ample()); });
    if (found != "ok") GTEST_SKIP() << "no network between ranks here: " << found;
  }
};

TEST_P(RailOverNetwork, BringsHeaderCountsAndSlots) {
  auto bootstraps = make_local_bootstraps(kNumNodes);
  const bool apart = GetParam() == Slots::kApart;
  const auto results = run_threads(kNumNodes, [&](int r) {
    Node node(*bootstraps[static_cast<size_t>(r)], GetParam());
    require(node.has_slots_apart() == apart, "slots lie apart if all ranks have room for that");
    require(node.has_host_slots() != apart, "the host's memory has room for slots only if they lie there");
    for (uint64_t epoch = node.rail().begin(TERN_OP_DISPATCH, 1); epoch <= 20; epoch = node.rail().begin(TERN_OP_DISPATCH, 1)) {
      node.send(epoch);
      node.receive(epoch);
    }
  });
  for (const std::string& text : results) EXPECT_EQ(text, "ok");
}

std::string name_of(const ::testing::TestParamInfo<Slots>& slots) {
  constexpr const char* kNames[] = {"InBanks", "Apart", "ApartOnOneRank", "WithoutRoom"};
  return kNames[static_cast<size_t>(slots.param)];
}

INSTANTIATE_TEST_SUITE_P(Slots, RailOverNetwork, ::testing::Values(Slots::kInBanks, Slots::kApart, Slots::kApartOnOne, Slots::kRefused),
                         name_of);

}  // namespace
}  // namespace tern::cpu::test
