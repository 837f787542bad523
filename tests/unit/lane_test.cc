// SPDX-License-Identifier: Apache-2.0
// The protocol of a lane by itself: ranks as threads over windows of their own, messages of numbers instead of tokens.
#include "cpu/lane.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "base/error.h"
#include "domain/given_up.h"
#include "memory/host_segment.h"

namespace tern::cpu::test {
namespace {

using testing::HasSubstr;

constexpr int64_t kLongTimeoutMs = 60000;
constexpr int64_t kSlotsPerBank = 4;

layout::BankLayout test_bank() { return {.num_counts = 0, .slot = {.payload_bytes = sizeof(uint64_t)}}; }

RoundTrip test_trip(int64_t num_rounds, tern_operation operation = TERN_OP_DISPATCH) {
  return {.operation = operation,
          .shape = {.row_bytes = 16},
          .bank = test_bank(),
          .num_tokens = 0,
          .tokens_per_round = kSlotsPerBank,
          .num_rounds = num_rounds};
}

// The windows of some ranks, and a view of them for each.
class Ranks {
 public:
  Ranks(int num_ranks, int num_lanes) {
    const layout::WindowLayout layout{.num_ranks = num_ranks, .num_lanes = num_lanes, .bank_bytes = test_bank().bytes(kSlotsPerBank)};
    std::vector<std::shared_ptr<Segment>> windows;
    for (int r = 0; r < num_ranks; ++r)
      windows.push_back(HostSegment::create(static_cast<size_t>(layout.total_bytes()), SharedBy::kThreads));
    const std::vector<RankInfo> infos(static_cast<size_t>(num_ranks), describe_self(""));
    for (int r = 0; r < num_ranks; ++r) {
      domains_.push_back(std::make_unique<Domain>());
      Domain& domain = *domains_.back();
      domain.rank = r;
      domain.num_ranks = num_ranks;
      domain.layout = layout;
      domain.topology = make_topology(r, infos);
      domain.masked.resize(static_cast<size_t>(num_ranks));
      domain.windows = windows;
      domain.heaps.resize(static_cast<size_t>(num_ranks));
    }
  }

  int size() const { return static_cast<int>(domains_.size()); }
  Domain& domain(int rank) { return *domains_[static_cast<size_t>(rank)]; }
  Lane lane(int rank, int index, LaneOptions options = {.timeout_ms = kLongTimeoutMs}) {
    return Lane(domain(rank), index, options, never_recorded_);
  }

  // body(rank) on a thread for each.
  template <typename Body>
  void run(Body body) {
    std::vector<std::thread> threads;
    for (int r = 0; r < size(); ++r) threads.emplace_back([&, r] { body(r); });
    for (std::thread& thread : threads) thread.join();
  }

 private:
  std::vector<std::unique_ptr<Domain>> domains_;
  SpanLog never_recorded_{0};
};

// What `source` tells `destination` in a slot.
uint64_t message(uint64_t epoch, int source, int destination, int64_t slot) {
  return epoch << 32 | static_cast<uint64_t>(source) << 24 | static_cast<uint64_t>(destination) << 16 | static_cast<uint64_t>(slot);
}

int64_t num_messages(uint64_t epoch, int source, int destination) {
  return static_cast<int64_t>(epoch * 7 + static_cast<uint64_t>(source * 3 + destination)) % (kSlotsPerBank + 1);
}

void fill(Lane& lane, const RoundTrip& trip, uint64_t epoch) {
  const Domain& domain = lane.domain();
  domain.for_each_member([&](int to) {
    for (int64_t i = 0; i < num_messages(epoch, domain.rank, to); ++i) {
      const uint64_t value = message(epoch, domain.rank, to, i);
      std::memcpy(lane.next_slot(trip, epoch, to), &value, sizeof(value));
    }
  });
}

void drain(Lane& lane, const RoundTrip& trip, uint64_t epoch) {
  const Domain& domain = lane.domain();
  domain.for_each_member([&](int from) {
    const std::byte* bank = lane.await_arrived(trip, epoch, from);
    ASSERT_NE(bank, nullptr);
    const int64_t arrived = reinterpret_cast<const layout::MessageHeader*>(bank)->num_messages;
    ASSERT_EQ(arrived, num_messages(epoch, from, domain.rank)) << "epoch " << epoch;
    for (int64_t i = 0; i < arrived; ++i) {
      uint64_t value = 0;
      std::memcpy(&value, bank + trip.bank.slot_at(i), sizeof(value));
      ASSERT_EQ(value, message(epoch, from, domain.rank, i));
    }
  });
}

void run_trip(Lane& lane, const RoundTrip& trip) {
  lane.run(trip, [&](int64_t, uint64_t epoch) { fill(lane, trip, epoch); }, [&](int64_t, uint64_t epoch) { drain(lane, trip, epoch); });
}

// In how many rounds nothing came from each rank.
std::vector<int> silent_rounds(Lane& lane, const RoundTrip& trip) {
  std::vector<int> silent(static_cast<size_t>(lane.domain().num_ranks));
  lane.run(
      trip, [&](int64_t, uint64_t epoch) { fill(lane, trip, epoch); },
      [&](int64_t, uint64_t epoch) {
        lane.domain().for_each_member(
            [&](int from) { silent[static_cast<size_t>(from)] += lane.await_arrived(trip, epoch, from) == nullptr; });
      });
  return silent;
}

uint64_t send(Lane& lane, const RoundTrip& trip) {
  const uint64_t epoch = lane.begin(trip.operation, 1);
  lane.send_round(trip, epoch, [&](uint64_t e) { fill(lane, trip, e); });
  return epoch;
}

void receive(Lane& lane, const RoundTrip& trip, uint64_t epoch) {
  lane.receive_round(epoch, [&](uint64_t e) { drain(lane, trip, e); });
}

Failure failure_of(const auto& action) {
  try {
    action();
  } catch (const Failure& failure) {
    return failure;
  }
  return Failure(TERN_OK, "no failure");
}

// Operations of one to five rounds, thousands of epochs in all.
void run_many_trips(Ranks& ranks, int rank, int lane_idx, std::chrono::nanoseconds spin) {
  Lane lane = ranks.lane(rank, lane_idx, {.timeout_ms = kLongTimeoutMs, .spin = spin});
  std::mt19937 random(static_cast<unsigned>(lane_idx));  // alike on all ranks
  while (lane.next_epoch() < 2500) run_trip(lane, test_trip(1 + random() % 5));
  EXPECT_GE(lane.counters().rounds, 2499u);
  EXPECT_EQ(lane.counters().timeouts, 0u);
}

TEST(Lane, CarriesThousandsOfEpochs) {
  for (const int num_ranks : {1, 2, 5}) {
    Ranks ranks(num_ranks, 1);
    ranks.run([&](int rank) { run_many_trips(ranks, rank, 0, std::chrono::nanoseconds(0)); });
  }
}

TEST(Lane, SpinsBeforeItSleeps) {
  Ranks ranks(2, 1);
  ranks.run([&](int rank) { run_many_trips(ranks, rank, 0, std::chrono::microseconds(50)); });
}

TEST(Lane, TwoLanesRunOnTwoThreads) {
  Ranks ranks(3, 2);
  ranks.run([&](int rank) {
    std::thread other([&] { run_many_trips(ranks, rank, 1, std::chrono::nanoseconds(0)); });
    run_many_trips(ranks, rank, 0, std::chrono::nanoseconds(0));
    other.join();
  });
}

TEST(Lane, TwoSendsMayBeUnderWayAndBeReceivedInAnyOrder) {
  Ranks ranks(3, 1);
  ranks.run([&](int rank) {
    Lane lane = ranks.lane(rank, 0);
    const RoundTrip trip = test_trip(1);
    std::mt19937 random(1);
    for (int i = 0; i < 300; ++i) {
      const uint64_t first = send(lane, trip);
      const uint64_t second = send(lane, trip);
      EXPECT_EQ(second, first + 1);
      const Failure third = failure_of([&] { lane.begin(TERN_OP_DISPATCH, 1); });
      EXPECT_EQ(third.status(), TERN_INVALID_STATE);
      EXPECT_THAT(third.what(), HasSubstr("at most 2 sends"));
      EXPECT_EQ(lane.next_epoch(), second + 1) << "what was refused took an epoch";
      const bool in_order = random() % 2 != 0;
      receive(lane, trip, in_order ? first : second);
      if (in_order) receive(lane, trip, send(lane, trip));  // the bank of the first is free again
      receive(lane, trip, in_order ? second : first);
      run_trip(lane, test_trip(1 + random() % 3));
    }
  });
}

// While a send is under way, one more round fits and two do not.
TEST(Lane, RefusesRoundsThatNeedTheBankOfASend) {
  Ranks ranks(1, 1);
  Lane lane = ranks.lane(0, 0);
  const RoundTrip trip = test_trip(1);
  const uint64_t sent = send(lane, trip);
  EXPECT_EQ(failure_of([&] { lane.begin(TERN_OP_ROUTE, 2); }).status(), TERN_INVALID_STATE);
  run_trip(lane, trip);
  EXPECT_EQ(failure_of([&] { lane.begin(TERN_OP_ROUTE, 1); }).status(), TERN_INVALID_STATE);
  receive(lane, trip, sent);
  run_trip(lane, test_trip(4));
}

TEST(Lane, RecordsWhoDidNotCome) {
  Ranks ranks(3, 2);
  Lane lane = ranks.lane(0, 1, {.timeout_ms = 20});
  const Failure failure = failure_of([&] { run_trip(lane, test_trip(1, TERN_OP_COMBINE)); });
  EXPECT_EQ(failure.status(), TERN_TIMEOUT);
  EXPECT_THAT(failure.what(), HasSubstr("rank 0 waited until its deadline for rank 1"));
  EXPECT_THAT(failure.what(), HasSubstr("combine, lane 1, epoch 1, saw 0"));
  for (int r = 0; r < 3; ++r) {
    const auto record = recorded_failure(ranks.domain(r));
    ASSERT_TRUE(record.has_value()) << "rank " << r;
    EXPECT_EQ(record->status, TERN_TIMEOUT);
    EXPECT_EQ(record->waiter, 0);
    EXPECT_EQ(record->awaited, 1);
    EXPECT_EQ(record->lane, 1);
    EXPECT_EQ(record->operation, TERN_OP_COMBINE);
    EXPECT_EQ(record->expected_epoch, 1u);
    EXPECT_EQ(record->seen_epoch, 0u);
    EXPECT_EQ(failure_of([&] { throw_recorded(ranks.domain(r), *record); }).status(), r == 0 ? TERN_TIMEOUT : TERN_ABORTED);
  }
}

// The others do not wait for their own deadline, on any lane.
TEST(Lane, WakesWhoWaitsWhenSomebodyFails) {
  Ranks ranks(3, 2);
  ranks.run([&](int rank) {
    if (rank == 2) return;
    const bool gives_up = rank == 0;
    Lane lane = ranks.lane(rank, rank, {.timeout_ms = gives_up ? 20 : kLongTimeoutMs});
    const Failure failure = failure_of([&] { run_trip(lane, test_trip(1)); });
    EXPECT_EQ(failure.status(), gives_up ? TERN_TIMEOUT : TERN_ABORTED) << failure.what();
  });
}

TEST(Lane, NoticesOtherOperations) {
  Ranks ranks(2, 1);
  ranks.run([&](int rank) {
    Lane lane = ranks.lane(rank, 0);
    const Failure failure = failure_of([&] { run_trip(lane, test_trip(1, rank == 0 ? TERN_OP_DISPATCH : TERN_OP_COMBINE)); });
    // Whoever looks first finds it; the other one finds it too, or hears of it.
    EXPECT_TRUE(failure.status() == TERN_MISMATCH || failure.status() == TERN_ABORTED) << failure.what();
  });
  EXPECT_EQ(recorded_failure(ranks.domain(0))->status, TERN_MISMATCH);
  EXPECT_EQ(recorded_failure(ranks.domain(1))->status, TERN_MISMATCH);
}

TEST(Lane, NoticesOtherShapes) {
  Ranks ranks(2, 1);
  ranks.run([&](int rank) {
    Lane lane = ranks.lane(rank, 0);
    RoundTrip trip = test_trip(1);
    trip.shape.row_bytes = rank == 0 ? 16 : 32;
    const Failure failure = failure_of([&] { run_trip(lane, trip); });
    EXPECT_TRUE(failure.status() == TERN_MISMATCH || failure.status() == TERN_ABORTED) << failure.what();
    if (failure.status() == TERN_MISMATCH) {
      EXPECT_THAT(failure.what(), HasSubstr("row 16 bytes"));
      EXPECT_THAT(failure.what(), HasSubstr("row 32 bytes"));
    }
  });
}

TEST(Lane, GoesOnWithoutWhoWasGivenUp) {
  Ranks ranks(2, 1);
  Lane lane = ranks.lane(0, 0, {.timeout_ms = 20, .on_timeout = TERN_ON_TIMEOUT_MASK});
  EXPECT_THAT(silent_rounds(lane, test_trip(3)), testing::ElementsAre(0, 3));
  EXPECT_TRUE(lane.gave_up_any());
  EXPECT_TRUE(lane.gave_up(1));
  EXPECT_EQ(lane.counters().timeouts, 1u) << "it waited again for who was given up";
  EXPECT_FALSE(recorded_failure(lane.domain()).has_value());
}

// One of those who wait has a deadline that passes. The other one hears of it, and what was given up learns that it was.
TEST(Lane, OneDeadlineIsEnoughForAll) {
  Ranks ranks(3, 1);
  const RoundTrip trip = test_trip(2);
  ranks.run([&](int rank) {
    if (rank == 2) return;
    Lane lane = ranks.lane(rank, 0, {.timeout_ms = rank == 0 ? 20 : kLongTimeoutMs, .on_timeout = TERN_ON_TIMEOUT_MASK});
    EXPECT_THAT(silent_rounds(lane, trip), testing::ElementsAre(0, 0, 2));
    EXPECT_EQ(lane.num_given_up(), 1);
    EXPECT_TRUE(lane.gave_up(2));
    EXPECT_EQ(lane.counters().timeouts, rank == 0 ? 1u : 0u);
  });
  for (int r = 0; r < 3; ++r) EXPECT_TRUE(is_given_up(ranks.domain(r), 2)) << "rank " << r;
  Lane late = ranks.lane(2, 0, {.timeout_ms = kLongTimeoutMs, .on_timeout = TERN_ON_TIMEOUT_MASK});
  EXPECT_EQ(failure_of([&] { run_trip(late, test_trip(4)); }).status(), TERN_MASKED_OUT);
}

// A rank that looks for a word of rank 1's, and shows what rank 1 does while it looks, so that it does not matter how slow its thread is:
// show(elapsed ms) returns the rank for which rank 1 waits, -1 for none, and the word comes after `come_ms`. True: it was not given up.
constexpr int64_t kDeadlineMs = 5, kGraceMs = 100;
template <typename Show>
bool is_awaited(int64_t come_ms, Show show) {
  Ranks ranks(4, 1);
  Lane lane = ranks.lane(0, 0, {.timeout_ms = kDeadlineMs, .on_timeout = TERN_ON_TIMEOUT_MASK, .grace_ms = kGraceMs});
  const auto start = std::chrono::steady_clock::now();
  const uint64_t word = 0;
  const Awaited awaited{.rank = 1, .operation = TERN_OP_COMBINE, .epoch = 1, .word = word, .what = TERN_AWAITED_MESSAGES};
  return lane.await_word_of(awaited, [&] {
    const auto elapsed = std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::steady_clock::now() - start).count();
    store_release(ranks.domain(0).doorbell(1, 0).awaits, static_cast<uint64_t>(show(elapsed) + 1));
    return elapsed > come_ms;
  });
}

TEST(Lane, GivesTimeToWhoWaitsForAnother) {
  EXPECT_TRUE(is_awaited(kDeadlineMs + 2 * kGraceMs + kGraceMs / 2, [](int64_t) { return 2; }));
  EXPECT_FALSE(is_awaited(kLongTimeoutMs, [](int64_t) { return 2; })) << "they may wait for each other in a circle";
  EXPECT_FALSE(is_awaited(kLongTimeoutMs, [](int64_t) { return 0; })) << "it waits for this one";
}
// At the deadline it waits for somebody, at the next look it is on its way.
TEST(Lane, GivesTimeToWhoHasWaitedForAnother) {
  EXPECT_TRUE(is_awaited(kDeadlineMs + kGraceMs + kGraceMs / 2, [](int64_t elapsed) { return elapsed > kGraceMs / 2 ? -1 : 2; }));
}
TEST(Lane, GivesMoreTimeToWhoWaitsForOneAfterTheOther) {
  EXPECT_TRUE(
      is_awaited(kDeadlineMs + 4 * kGraceMs + kGraceMs / 2, [](int64_t elapsed) { return elapsed > kGraceMs + kGraceMs / 2 ? 3 : 2; }));
}

// By the number of sleeps, of 100 ms at most.
TEST(Lane, MissesSeveralRanksAtOneDeadline) {
  Ranks ranks(4, 1);
  Lane lane = ranks.lane(0, 0, {.timeout_ms = 600, .on_timeout = TERN_ON_TIMEOUT_MASK, .grace_ms = kGraceMs});
  EXPECT_THAT(silent_rounds(lane, test_trip(1)), testing::ElementsAre(0, 1, 1, 1));
  EXPECT_LT(lane.counters().sleeps, 15u);
}

TEST(Lane, TellsWhereRowsLie) {
  Ranks ranks(2, 1);
  std::vector<std::shared_ptr<Segment>> heaps = {HostSegment::create(4096, SharedBy::kThreads),
                                                 HostSegment::create(4096, SharedBy::kThreads)};
  for (int r = 0; r < 2; ++r) ranks.domain(r).heaps = heaps;
  ranks.run([&](int rank) {
    Lane lane = ranks.lane(rank, 0);
    const RoundTrip trip = test_trip(1);
    for (int i = 0; i < 300; ++i) {
      const int64_t offset = 8 * ((i + rank) % 100);
      lane.run(
          trip,
          [&](int64_t, uint64_t epoch) {
            lane.post_ready(epoch, trip.operation, offset);
            const int peer = 1 - rank;
            EXPECT_EQ(lane.await_ready(epoch, trip.operation, peer), lane.domain().heap(peer) + 8 * ((i + peer) % 100));
            fill(lane, trip, epoch);
          },
          [&](int64_t, uint64_t epoch) { drain(lane, trip, epoch); });
      lane.await_consumed(lane.next_epoch() - 1, trip.operation, 1 - rank);
    }
  });
}

}  // namespace
}  // namespace tern::cpu::test
