// SPDX-License-Identifier: Apache-2.0
// What an operator sees: counters, log lines, memory figures, states.
#include <mutex>
#include <tern/tern.hpp>
#include <thread>

#include "engine/support.h"

namespace tern::conformance {
namespace {

constexpr int32_t kRanks = 3;
constexpr int64_t kTokens = 6;
constexpr int64_t kHidden = 64;
constexpr int32_t kExperts = 6;

// Collects lines; the hook may be called from several threads.
struct LogLines {
  std::mutex mutex;
  std::vector<std::pair<tern_log_level, std::string>> lines;

  static void write(void* self, tern_log_level level, const char* text) {
    auto* log = static_cast<LogLines*>(self);
    const std::lock_guard lock(log->mutex);
    log->lines.emplace_back(level, text);
  }
  bool has(tern_log_level level, const std::string& part) {
    const std::lock_guard lock(mutex);
    return std::any_of(lines.begin(), lines.end(),
                       [&](const auto& line) { return line.first == level && line.second.find(part) != std::string::npos; });
  }
};

// Every token of rank r goes to one expert on each rank: kRanks messages a token.
struct Batch {
  std::vector<int32_t> experts;
  std::vector<uint16_t> tokens = std::vector<uint16_t>(kTokens * kHidden, 0x3f80);
  std::vector<uint16_t> results = std::vector<uint16_t>(kTokens * kHidden);
  std::vector<uint16_t> rows;

  Batch() {
    for (int64_t t = 0; t < kTokens; ++t)
      for (int32_t r = 0; r < kRanks; ++r) experts.push_back(r * kExperts / kRanks + static_cast<int32_t>(t % 2));
  }
  void exchange(Plan& plan) {
    const tern_plan_info info = plan.route({.topk_idx = experts.data(), .topk_idx_type = TERN_INDEX_INT32, .num_tokens = kTokens});
    rows.resize(static_cast<size_t>(info.num_rows * kHidden));
    plan.dispatch({.tokens = tokens.data(), .hidden = kHidden, .out_tokens = rows.data()});
    plan.combine({.rows = rows.data(), .hidden = kHidden, .out_tokens = results.data()});
  }
};

template <typename Body>
void on_all_ranks(const std::vector<Group>& groups, Body body) {
  std::vector<std::thread> threads;
  for (const Group& group : groups) threads.emplace_back([&body, &group] { body(group); });
  for (std::thread& thread : threads) thread.join();
}

TEST(Metrics, CountWhatWasDone) {
  const std::vector<Group> groups = Group::local(kRanks);
  on_all_ranks(groups, [](const Group& group) {
    const Exchange exchange(group, {.device = TERN_DEVICE_CPU, .max_tokens = kTokens});
    EXPECT_EQ(exchange.metrics().num_routes, 0u);
    Plan plan(exchange, {.max_tokens = kTokens, .num_experts = kExperts, .num_topk = kRanks});
    Batch batch;
    batch.exchange(plan);
    batch.exchange(plan);
    const tern_metrics metrics = exchange.metrics();
    EXPECT_EQ(metrics.num_routes, 2u);
    EXPECT_EQ(metrics.num_dispatches, 2u);
    EXPECT_EQ(metrics.num_combines, 2u);
    EXPECT_EQ(metrics.rounds, 6u);
    EXPECT_EQ(metrics.received_rows, 2u * kRanks * kTokens);
    EXPECT_EQ(metrics.timeouts, 0u);
    // Dispatch and combine each write a row a message; the rest is slots, counts and headers.
    const uint64_t payload_bytes = 2 * 2 * kTokens * kHidden * sizeof(uint16_t);
    EXPECT_GE(metrics.sent_local_bytes, payload_bytes);
    EXPECT_LT(metrics.sent_local_bytes, 3 * payload_bytes);
    EXPECT_EQ(metrics.sent_bytes, (kRanks - 1) * metrics.sent_local_bytes);
    EXPECT_GE(metrics.waits, metrics.sleeps > 0 ? 1u : 0u);
  });
}

TEST(Metrics, CountTimeouts) {
  const std::vector<Group> groups = Group::local(2);
  on_all_ranks(groups, [](const Group& group) {
    const Exchange exchange(group, {.device = TERN_DEVICE_CPU, .max_tokens = kTokens, .timeout_ms = 100});
    Plan plan(exchange, {.max_tokens = kTokens, .num_experts = 2, .num_topk = 1});
    if (group.rank() != 0) return;  // never comes
    const std::vector<int64_t> experts(kTokens, 1);
    EXPECT_THROW(plan.route({.topk_idx = experts.data(), .num_tokens = kTokens}), Error);
    EXPECT_EQ(exchange.metrics().timeouts, 1u);
    EXPECT_EQ(exchange.metrics().num_routes, 0u);
    EXPECT_EQ(exchange.state().health, TERN_HEALTH_FAILED);
  });
}

TEST(Log, LinesGoToTheHookByLevel) {
  LogLines all;
  LogLines warnings;
  const std::vector<Group> talkative = Group::local(1, {.log = LogLines::write, .log_context = &all, .log_level = TERN_LOG_INFO});
  const std::vector<Group> quiet = Group::local(1, {.log = LogLines::write, .log_context = &warnings, .log_level = TERN_LOG_WARNING});
  Exchange first(talkative[0], {.device = TERN_DEVICE_CPU});
  Exchange second(quiet[0], {.device = TERN_DEVICE_CPU});
  EXPECT_TRUE(all.has(TERN_LOG_INFO, "CPU exchange"));
  EXPECT_TRUE(warnings.lines.empty());
  second.recover();
  EXPECT_TRUE(warnings.has(TERN_LOG_WARNING, "generation 1"));
  EXPECT_EQ(second.state().generation, 1u);
  EXPECT_EQ(second.state().health, TERN_HEALTH_OK);
}

TEST(Memory, QuerySaysWhatCreationTakes) {
  const std::vector<Group> groups = Group::local(4);
  const tern_exchange_options options = {
      .device = TERN_DEVICE_CPU, .window_bytes = 4096, .max_tokens = 32, .max_row_bytes = 1024, .num_lanes = 2};
  const tern_memory_info memory = Exchange::query_memory(groups[0], options);
  EXPECT_EQ(memory.window_bytes, 4096);
  EXPECT_EQ(memory.total_bytes, memory.control_bytes + memory.staging_bytes + memory.window_bytes);
  // Two lanes with two banks for each of four sources, each with room for 32 tokens.
  EXPECT_GE(memory.staging_bytes, 2 * 2 * 4 * 32 * 1024);
  EXPECT_LT(memory.staging_bytes, 2 * 2 * 4 * 48 * 1024);

  tern_exchange_options given = options;
  given.staging_bytes = 1 << 20;
  EXPECT_LE(Exchange::query_memory(groups[0], given).staging_bytes, 1 << 20);
}

// Small batches: buffers that callers ask for are counted apart.
TEST(Memory, OfADecodingBatchIsSmall) {
  const std::vector<Group> groups = Group::local(4);
  const tern_exchange_options options = {.device = TERN_DEVICE_CPU,
                                         .window_bytes = int64_t{1} << 30,
                                         .max_tokens = 128,
                                         .max_row_bytes = 7168 * 2,
                                         .max_topk = 8,
                                         .max_experts = 288};
  const tern_memory_info memory = Exchange::query_memory(groups[0], options);
  EXPECT_EQ(memory.window_bytes, options.window_bytes);
  EXPECT_LE(memory.control_bytes + memory.staging_bytes, 64'000'000);
}

TEST(Version, AgreesWithTheHeader) {
  EXPECT_EQ(tern_version(), TERN_VERSION_MAJOR * 10000 + TERN_VERSION_MINOR * 100 + TERN_VERSION_PATCH);
  EXPECT_STREQ(tern_status_name(TERN_TIMEOUT), "TERN_TIMEOUT");
  EXPECT_STREQ(tern_status_name(static_cast<tern_status>(99)), "TERN_UNKNOWN");
}

}  // namespace
}  // namespace tern::conformance
