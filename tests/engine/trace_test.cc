// SPDX-License-Identifier: Apache-2.0
// Timelines: what is recorded of an exchange's operations, and what is not.
#include <atomic>
#include <functional>
#include <numeric>
#include <tern/tern.hpp>
#include <thread>

#include "engine/support.h"

namespace tern::conformance {
namespace {

constexpr int32_t kRanks = 3;
constexpr int64_t kTokens = 6;
constexpr int64_t kHidden = 64;
constexpr int64_t kRowBytes = kHidden * int64_t{sizeof(uint16_t)};

// Every token goes to the first expert of each rank.
class Batch {
 public:
  explicit Batch(int32_t num_ranks)
      : num_ranks_(num_ranks), tokens_(kTokens * kHidden, 0x3f80), results_(kTokens * kHidden), weights_(kTokens * num_ranks, 1.0f) {
    for (int64_t i = 0; i < kTokens * num_ranks; ++i) experts_.push_back(static_cast<int32_t>(i % num_ranks));
  }

  tern_plan_options plan_options() const { return {.max_tokens = kTokens, .num_experts = num_ranks_, .num_topk = num_ranks_}; }

  void route(Plan& plan, tern_launch launch = {}) {
    const tern_plan_info info = plan.route({.topk_idx = experts_.data(), .topk_idx_type = TERN_INDEX_INT32, .num_tokens = kTokens}, launch);
    rows_.resize(static_cast<size_t>(info.num_rows * kHidden));
  }
  void dispatch(Plan& plan, tern_launch launch = {}) {
    plan.dispatch({.tokens = tokens_.data(), .hidden = kHidden, .out_tokens = rows_.data()}, launch);
  }
  void combine(Plan& plan, tern_launch launch = {}, tern_weighting weighting = TERN_WEIGHTS_NONE) {
    plan.combine({.rows = rows_.data(),
                  .hidden = kHidden,
                  .weighting = weighting,
                  .topk_weights = weighting == TERN_WEIGHTS_OWNER ? weights_.data() : nullptr,
                  .out_tokens = results_.data()},
                 launch);
  }
  void round_trip(Plan& plan, tern_launch launch = {}) {
    route(plan, launch);
    dispatch(plan, launch);
    combine(plan, launch);
  }

 private:
  int32_t num_ranks_;
  std::vector<int32_t> experts_;
  std::vector<uint16_t> tokens_, results_, rows_;
  std::vector<float> weights_;
};

// body(rank, exchange) on a thread for each rank.
void on_ranks(int32_t num_ranks, tern_exchange_options options, const std::function<void(int32_t, Exchange&)>& body) {
  options.device = TERN_DEVICE_CPU;
  options.max_tokens = kTokens;
  const std::vector<Group> groups = Group::local(num_ranks);
  std::vector<std::thread> threads;
  for (const Group& group : groups)
    threads.emplace_back([&] {
      Exchange exchange(group, options);
      body(group.rank(), exchange);
    });
  for (std::thread& thread : threads) thread.join();
}

std::vector<tern_span> spans_where(const std::vector<tern_span>& spans, const std::function<bool(const tern_span&)>& holds) {
  std::vector<tern_span> found;
  std::copy_if(spans.begin(), spans.end(), std::back_inserter(found), holds);
  return found;
}
std::vector<tern_span> of_kind(const std::vector<tern_span>& spans, tern_span_kind kind) {
  return spans_where(spans, [&](const tern_span& s) { return s.kind == kind; });
}
std::vector<tern_span> of_operation(const std::vector<tern_span>& spans, tern_operation operation) {
  return spans_where(spans, [&](const tern_span& s) { return s.operation == operation; });
}

int64_t sum_bytes(const std::vector<tern_span>& spans) {
  return std::accumulate(spans.begin(), spans.end(), int64_t{0}, [](int64_t sum, const tern_span& s) { return sum + s.bytes; });
}

bool encloses(const tern_span& outer, const tern_span& inner) { return outer.begin_ns <= inner.begin_ns && inner.end_ns <= outer.end_ns; }

// Spans of a lane come in the order of their ends; of two, one lies within the other or behind it.
void expect_well_nested(const std::vector<tern_span>& spans) {
  for (size_t late = 0; late < spans.size(); ++late) {
    EXPECT_LE(spans[late].begin_ns, spans[late].end_ns);
    for (size_t early = 0; early < late; ++early) {
      EXPECT_LE(spans[early].end_ns, spans[late].end_ns);
      EXPECT_TRUE(encloses(spans[late], spans[early]) || spans[early].end_ns <= spans[late].begin_ns) << early << " and " << late;
    }
  }
}

void expect_parts_lie_in_operations(const std::vector<tern_span>& spans) {
  const auto operations = of_kind(spans, TERN_SPAN_OPERATION);
  for (const tern_span& span : spans)
    EXPECT_TRUE(std::any_of(operations.begin(), operations.end(), [&](const tern_span& o) { return encloses(o, span); }))
        << "kind " << span.kind;
}

std::vector<int32_t> peers_of(const std::vector<tern_span>& spans) {
  std::vector<int32_t> peers;
  for (const tern_span& span : spans) peers.push_back(span.peer);
  std::sort(peers.begin(), peers.end());
  return peers;
}

// What a rank's recording of one round trip must hold, whoever was late.
void expect_round_trip(const std::vector<tern_span>& spans, const tern_metrics& metrics) {
  expect_well_nested(spans);
  expect_parts_lie_in_operations(spans);
  const auto operations = of_kind(spans, TERN_SPAN_OPERATION);
  ASSERT_EQ(operations.size(), 3u);
  EXPECT_EQ(operations[0].operation, TERN_OP_ROUTE);
  EXPECT_EQ(operations[1].operation, TERN_OP_DISPATCH);
  EXPECT_EQ(operations[2].operation, TERN_OP_COMBINE);
  for (const tern_span& span : spans) {
    EXPECT_EQ(span.status, TERN_OK);
    EXPECT_EQ(span.lane, 0);
    EXPECT_EQ(span.phase, TERN_PHASE_WHOLE);
    EXPECT_TRUE(encloses(operations[span.operation == TERN_OP_ROUTE ? 0 : span.operation == TERN_OP_DISPATCH ? 1 : 2], span));
  }

  const auto sends = of_kind(spans, TERN_SPAN_SEND);
  ASSERT_EQ(sends.size(), 3u);
  for (size_t i = 0; i < sends.size(); ++i) {
    EXPECT_EQ(sends[i].epoch, i + 1);
    EXPECT_EQ(sends[i].peer, -1);
  }
  EXPECT_EQ(static_cast<uint64_t>(sum_bytes(sends)), metrics.sent_bytes + metrics.sent_local_bytes);
  EXPECT_GE(sends[1].bytes, kRanks * kTokens * kRowBytes);

  EXPECT_EQ(of_kind(of_operation(spans, TERN_OP_ROUTE), TERN_SPAN_PLAN).size(), 2u);
  const auto receives = of_kind(spans, TERN_SPAN_RECEIVE);
  EXPECT_EQ(peers_of(of_operation(receives, TERN_OP_ROUTE)), (std::vector<int32_t>{0, 1, 2}));
  EXPECT_EQ(peers_of(of_operation(receives, TERN_OP_DISPATCH)), (std::vector<int32_t>{-1, 0, 1, 2}));

  const auto reductions = of_kind(spans, TERN_SPAN_REDUCE);
  ASSERT_EQ(reductions.size(), 1u);
  EXPECT_EQ(reductions[0].operation, TERN_OP_COMBINE);
  EXPECT_EQ(reductions[0].bytes, kRanks * kTokens * kRowBytes);

  const auto waits = of_kind(spans, TERN_SPAN_WAIT);
  EXPECT_EQ(waits.size(), metrics.waits);
  for (const tern_span& wait : waits) EXPECT_NE(wait.awaited, TERN_AWAITED_NOTHING);
}

TEST(Timeline, ShowsARoundTrip) {
  std::vector<std::vector<tern_span>> recorded(kRanks);
  on_ranks(kRanks, {}, [&](int32_t rank, Exchange& exchange) {
    Batch batch(kRanks);
    Plan plan(exchange, batch.plan_options());
    exchange.start_trace();
    batch.round_trip(plan);
    exchange.stop_trace();
    const Timeline timeline = exchange.timeline();
    EXPECT_EQ(timeline.num_dropped, 0);
    expect_round_trip(timeline.spans, exchange.metrics());
    recorded[static_cast<size_t>(rank)] = timeline.spans;
  });
  // One clock for all ranks: nobody receives before the other one has begun to send. What is received is what was sent.
  int64_t sent_bytes = 0, received_bytes = 0;
  for (const auto& spans : recorded) {
    received_bytes += sum_bytes(of_kind(spans, TERN_SPAN_RECEIVE));
    for (const tern_span& send : of_kind(spans, TERN_SPAN_SEND)) sent_bytes += send.operation == TERN_OP_COMBINE ? 0 : send.bytes;
    for (const tern_span& receive : of_kind(spans, TERN_SPAN_RECEIVE)) {
      if (receive.peer < 0) continue;
      const auto sends = of_kind(recorded[static_cast<size_t>(receive.peer)], TERN_SPAN_SEND);
      EXPECT_LE(sends.at(receive.epoch - 1).begin_ns, receive.begin_ns);
    }
  }
  EXPECT_EQ(received_bytes, sent_bytes);
}

TEST(Timeline, ShowsPhasesAndTheOwnersWeights) {
  on_ranks(2, {}, [](int32_t, Exchange& exchange) {
    Batch batch(2);
    tern_plan_options options = batch.plan_options();
    options.layout = TERN_LAYOUT_EXPERT_MAJOR;
    Plan plan(exchange, options);
    batch.route(plan);
    exchange.start_trace();
    batch.dispatch(plan, {.phase = TERN_PHASE_SEND});
    batch.dispatch(plan, {.phase = TERN_PHASE_RECEIVE});
    batch.combine(plan, {}, TERN_WEIGHTS_OWNER);
    exchange.stop_trace();
    const auto spans = exchange.timeline().spans;
    expect_well_nested(spans);
    expect_parts_lie_in_operations(spans);
    const auto operations = of_kind(spans, TERN_SPAN_OPERATION);
    ASSERT_EQ(operations.size(), 3u);
    EXPECT_EQ(operations[0].phase, TERN_PHASE_SEND);
    EXPECT_EQ(operations[1].phase, TERN_PHASE_RECEIVE);
    EXPECT_EQ(operations[2].phase, TERN_PHASE_WHOLE);
    const auto sends = of_kind(spans, TERN_SPAN_SEND);
    ASSERT_EQ(sends.size(), 3u);
    EXPECT_TRUE(encloses(operations[0], sends[0]));
    EXPECT_EQ(sends[1].operation, TERN_OP_WEIGHTS);
    EXPECT_TRUE(encloses(operations[2], sends[1]));
    EXPECT_EQ(peers_of(of_kind(of_operation(spans, TERN_OP_WEIGHTS), TERN_SPAN_RECEIVE)), (std::vector<int32_t>{0, 1}));
    for (const tern_span& receive : of_kind(of_operation(spans, TERN_OP_DISPATCH), TERN_SPAN_RECEIVE))
      EXPECT_TRUE(encloses(operations[1], receive));
  });
}

// A single rank never waits, so its spans are always the same ones.
TEST(Timeline, HoldsNothingUnlessItIsStarted) {
  on_ranks(1, {}, [](int32_t, Exchange& exchange) {
    Batch batch(1);
    Plan plan(exchange, batch.plan_options());
    batch.round_trip(plan);
    EXPECT_TRUE(exchange.timeline().spans.empty());
    exchange.stop_trace();
    exchange.start_trace();
    EXPECT_TRUE(exchange.timeline().spans.empty());
    batch.round_trip(plan);
    const size_t num_spans = exchange.timeline().spans.size();
    EXPECT_GT(num_spans, 3u);
    exchange.stop_trace();
    batch.round_trip(plan);
    EXPECT_EQ(exchange.timeline().spans.size(), num_spans);
    exchange.start_trace();
    batch.combine(plan);
    EXPECT_EQ(of_kind(exchange.timeline().spans, TERN_SPAN_OPERATION).size(), 1u) << "what was recorded before is still there";
  });
}

TEST(Timeline, CountsWhatFindsNoRoom) {
  on_ranks(1, {}, [](int32_t, Exchange& exchange) {
    constexpr int64_t kRoom = 2;
    Batch batch(1);
    Plan plan(exchange, batch.plan_options());
    exchange.start_trace();
    batch.round_trip(plan);
    const auto all = exchange.timeline().spans;
    exchange.start_trace(kRoom);
    batch.round_trip(plan);
    const Timeline timeline = exchange.timeline();
    ASSERT_EQ(timeline.spans.size(), static_cast<size_t>(kRoom));
    EXPECT_EQ(timeline.num_dropped, static_cast<int64_t>(all.size()) - kRoom);
    for (size_t i = 0; i < timeline.spans.size(); ++i) EXPECT_EQ(timeline.spans[i].kind, all[i].kind);
    exchange.start_trace(kRoom);
    EXPECT_EQ(exchange.timeline().num_dropped, 0);
  });
}

TEST(Timeline, IsReadInParts) {
  on_ranks(1, {}, [](int32_t, Exchange& exchange) {
    Batch batch(1);
    Plan plan(exchange, batch.plan_options());
    exchange.start_trace();
    batch.round_trip(plan);
    const auto all = exchange.timeline().spans;
    std::vector<tern_span> some(2);
    some[1].reserved = 7;
    int64_t num_spans = 0;
    ASSERT_EQ(tern_trace_read(exchange.get(), some.data(), 1, &num_spans, nullptr), TERN_OK);
    EXPECT_EQ(num_spans, static_cast<int64_t>(all.size()));
    EXPECT_EQ(some[0].begin_ns, all[0].begin_ns);
    EXPECT_EQ(some[1].reserved, 7) << "it wrote behind the array";
  });
}

TEST(Timeline, RefusesWhatCannotBe) {
  on_ranks(1, {}, [](int32_t, Exchange& exchange) {
    EXPECT_EQ(tern_trace_start(exchange.get(), -1), TERN_INVALID_ARGUMENT);
    EXPECT_EQ(tern_trace_start(exchange.get(), (int64_t{1} << 24) + 1), TERN_INVALID_ARGUMENT);
    EXPECT_EQ(tern_trace_start(nullptr, 0), TERN_INVALID_ARGUMENT);
    EXPECT_EQ(tern_trace_stop(nullptr), TERN_INVALID_ARGUMENT);
    int64_t num_spans = -5;
    EXPECT_EQ(tern_trace_read(exchange.get(), nullptr, 1, &num_spans, nullptr), TERN_INVALID_ARGUMENT);
    EXPECT_EQ(tern_trace_read(exchange.get(), nullptr, -1, &num_spans, nullptr), TERN_INVALID_ARGUMENT);
    EXPECT_EQ(tern_trace_read(exchange.get(), nullptr, 0, nullptr, nullptr), TERN_INVALID_ARGUMENT);
    EXPECT_EQ(num_spans, -5);
  });
}

// Rank 1 comes when rank 0 waits for it.
TEST(Timeline, ShowsWhoWasLate) {
  const std::vector<Group> groups = Group::local(2);
  std::vector<std::unique_ptr<Exchange>> exchanges(2);
  const auto on_both = [&](const std::function<void(size_t)>& body) {
    std::thread other([&] { body(1); });
    body(0);
    other.join();
  };
  on_both([&](size_t rank) {
    exchanges[rank] = std::make_unique<Exchange>(groups[rank], tern_exchange_options{.device = TERN_DEVICE_CPU, .max_tokens = kTokens});
  });
  on_both([&](size_t rank) {
    Batch batch(2);
    Plan plan(*exchanges[rank], batch.plan_options());
    exchanges[rank]->start_trace();
    // Ends at the latest with rank 0's deadline, after which this rank fails too.
    while (rank == 1 && exchanges[0]->metrics().waits == 0) std::this_thread::yield();
    batch.route(plan);
  });
  const auto waits = of_kind(exchanges[0]->timeline().spans, TERN_SPAN_WAIT);
  ASSERT_EQ(waits.size(), 1u);
  EXPECT_EQ(waits[0].peer, 1);
  EXPECT_EQ(waits[0].operation, TERN_OP_ROUTE);
  EXPECT_EQ(waits[0].awaited, TERN_AWAITED_MESSAGES);
  EXPECT_EQ(waits[0].epoch, 1u);
  EXPECT_EQ(waits[0].status, TERN_OK);
  const auto sends = of_kind(exchanges[1]->timeline().spans, TERN_SPAN_SEND);
  ASSERT_EQ(sends.size(), 1u);
  EXPECT_LE(waits[0].begin_ns, sends[0].begin_ns);
  EXPECT_LE(sends[0].begin_ns, waits[0].end_ns);
}

TEST(Timeline, ShowsWhoNeverCame) {
  on_ranks(2, {.timeout_ms = 100}, [](int32_t rank, Exchange& exchange) {
    if (rank == 1) return;
    Batch batch(2);
    Plan plan(exchange, batch.plan_options());
    exchange.start_trace();
    EXPECT_THROW(batch.route(plan), Error);
    const auto spans = exchange.timeline().spans;
    expect_well_nested(spans);
    const auto waits = of_kind(spans, TERN_SPAN_WAIT);
    ASSERT_EQ(waits.size(), 1u);
    EXPECT_EQ(waits[0].peer, 1);
    EXPECT_EQ(waits[0].status, TERN_TIMEOUT);
    const auto operations = of_kind(spans, TERN_SPAN_OPERATION);
    ASSERT_EQ(operations.size(), 1u);
    EXPECT_EQ(operations[0].status, TERN_TIMEOUT);
    EXPECT_TRUE(encloses(operations[0], waits[0]));
  });
}

TEST(Timeline, ShowsRecoveries) {
  on_ranks(2, {.timeout_ms = 100, .on_timeout = TERN_ON_TIMEOUT_MASK}, [](int32_t rank, Exchange& exchange) {
    if (rank == 1) return;
    Batch batch(2);
    Plan plan(exchange, batch.plan_options());
    exchange.start_trace();
    batch.route(plan);
    exchange.recover();
    const auto spans = exchange.timeline().spans;
    expect_well_nested(spans);
    const auto waits = of_kind(of_operation(spans, TERN_OP_ROUTE), TERN_SPAN_WAIT);
    ASSERT_EQ(waits.size(), 1u);
    EXPECT_EQ(waits[0].status, TERN_TIMEOUT);
    const auto operations = of_kind(spans, TERN_SPAN_OPERATION);
    ASSERT_EQ(operations.size(), 3u);
    EXPECT_EQ(operations[0].operation, TERN_OP_RECOVER) << "the one within the route ends first";
    EXPECT_EQ(operations[1].operation, TERN_OP_ROUTE);
    EXPECT_EQ(operations[1].status, TERN_OK);
    EXPECT_TRUE(encloses(operations[1], operations[0]));
    EXPECT_EQ(operations[2].operation, TERN_OP_RECOVER);
  });
}

// Lanes record on threads of their own, while another one reads.
TEST(Timeline, KeepsLanesApart) {
  constexpr int kTrips = 20;
  on_ranks(2, {.num_lanes = 2}, [](int32_t, Exchange& exchange) {
    Batch batches[] = {Batch(2), Batch(2)};
    Plan plans[] = {Plan(exchange, batches[0].plan_options()), Plan(exchange, batches[1].plan_options())};
    exchange.start_trace();
    std::atomic<int> num_running{2};
    std::vector<std::thread> threads;
    for (int32_t lane = 0; lane < 2; ++lane)
      threads.emplace_back([&, lane] {
        for (int i = 0; i < kTrips; ++i) batches[lane].round_trip(plans[lane], {.lane = lane});
        --num_running;
      });
    size_t num_read = 0;
    while (num_running > 0) {
      const size_t now = exchange.timeline().spans.size();
      EXPECT_GE(now, num_read);
      num_read = now;
    }
    for (std::thread& thread : threads) thread.join();
    exchange.stop_trace();
    const auto spans = exchange.timeline().spans;
    for (int32_t lane = 0; lane < 2; ++lane) {
      const auto of_lane = spans_where(spans, [&](const tern_span& s) { return s.lane == lane; });
      expect_well_nested(of_lane);
      expect_parts_lie_in_operations(of_lane);
      EXPECT_EQ(of_kind(of_lane, TERN_SPAN_OPERATION).size(), static_cast<size_t>(3 * kTrips));
    }
  });
}

}  // namespace
}  // namespace tern::conformance
