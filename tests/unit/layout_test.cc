// SPDX-License-Identifier: Apache-2.0
// Where bytes lie, checked by the compiler: no two regions overlap, everything is aligned, flags hold what was put into them.
#include <gtest/gtest.h>

#include "layout/device_window.h"
#include "layout/flags.h"
#include "layout/message.h"
#include "layout/window.h"

namespace tern::layout {
namespace {

constexpr int kMostTestedRanks = 16;
constexpr int kMostTestedLanes = 4;

// Walks over regions that are given in ascending order.
class Walk {
 public:
  constexpr void region(int64_t begin, int64_t bytes, int64_t alignment) {
    is_good_ = is_good_ && begin >= end_ && begin % alignment == 0 && bytes > 0;
    end_ = begin + bytes;
  }
  constexpr bool ends_within(int64_t total) const { return is_good_ && end_ <= total; }

 private:
  int64_t end_ = 0;
  bool is_good_ = true;
};

constexpr bool regions_are_apart(const WindowLayout& window) {
  constexpr auto kLine = static_cast<int64_t>(kCacheLine);
  Walk walk;
  walk.region(window.failure(), sizeof(FailureCell), kLine);
  walk.region(window.given_up(), sizeof(GivenUpCell), kLine);
  walk.region(window.begun(), sizeof(BegunCell), kLine);
  for (int lane = 0; lane < window.num_lanes; ++lane) {
    walk.region(window.doorbell(lane), sizeof(Doorbell), kLine);
    for (int source = 0; source < window.num_ranks; ++source) walk.region(window.cell(lane, source), sizeof(FlagCell), kLine);
  }
  if (!walk.ends_within(window.control_bytes())) return false;
  for (int lane = 0; lane < window.num_lanes; ++lane)
    for (uint64_t epoch = 0; epoch < kNumBanks; ++epoch)
      for (int source = 0; source < window.num_ranks; ++source) walk.region(window.bank(lane, epoch, source), window.bank_bytes, kLine);
  return walk.ends_within(window.total_bytes()) && window.total_bytes() == window.control_bytes() + window.staging_bytes();
}

constexpr bool all_windows_are_apart() {
  for (int ranks = 1; ranks <= kMostTestedRanks; ++ranks)
    for (int lanes = 1; lanes <= kMostTestedLanes; ++lanes)
      for (const int64_t bank_bytes : {64, 192, 4096})
        if (!regions_are_apart({.num_ranks = ranks, .num_lanes = lanes, .bank_bytes = bank_bytes})) return false;
  return true;
}
static_assert(all_windows_are_apart());
static_assert(regions_are_apart({.num_ranks = kMaxRanks, .num_lanes = 1, .bank_bytes = 64}));
static_assert(regions_are_apart({.num_ranks = 1, .num_lanes = kMaxLanes, .bank_bytes = int64_t{1} << 40}));

// Two epochs in a row never share a bank; the one after the next does.
constexpr bool banks_alternate() {
  const WindowLayout window{.num_ranks = 3, .num_lanes = 2, .bank_bytes = 128};
  for (uint64_t epoch = 1; epoch < 10; ++epoch)
    if (window.bank(1, epoch, 2) == window.bank(1, epoch + 1, 2) || window.bank(1, epoch, 2) != window.bank(1, epoch + 2, 2)) return false;
  return true;
}
static_assert(banks_alternate());

constexpr bool slot_is_apart(const SlotLayout& slot) {
  const int64_t end_of_experts = slot.experts() + 4 * slot.num_experts;
  return slot.payload() == 0 && slot.scales() >= slot.payload_bytes && slot.scales() % 16 == 0 &&
         slot.source_token() >= slot.scales() + slot.scale_bytes && slot.source_token() % 4 == 0 &&
         slot.experts() == slot.source_token() + 4 && slot.weights() >= end_of_experts && slot.weights() % 4 == 0 &&
         slot.stride() >= slot.weights() + 4 * slot.num_weights && slot.stride() % static_cast<int64_t>(kCacheLine) == 0;
}

constexpr bool all_slots_are_apart() {
  for (const int64_t payload : {0, 16, 48, 14336})
    for (const int64_t scales : {0, 1, 4, 17, 448})
      for (const int topk : {0, 1, 8, 64})
        for (const int weights : {0, 1, topk})
          if (!slot_is_apart({.payload_bytes = payload, .scale_bytes = scales, .num_experts = topk, .num_weights = weights})) return false;
  return true;
}
static_assert(all_slots_are_apart());

// As many slots fit as bytes() says, and not one more.
constexpr bool slots_fit() {
  for (const int64_t counts : {0, 5, 264})
    for (const int64_t payload : {0, 16, 7168}) {
      const BankLayout bank{.num_counts = counts, .slot = {.payload_bytes = payload, .num_experts = 8}};
      if (bank.counts() < static_cast<int64_t>(sizeof(MessageHeader)) || bank.slots() < bank.counts() + 4 * counts) return false;
      for (int64_t n = 0; n < 20; ++n)
        if (bank.slots_in(bank.bytes(n)) != n || (n > 0 && bank.slots_in(bank.bytes(n) - 1) != n - 1) ||
            bank.slot_at(n) % static_cast<int64_t>(kCacheLine) != 0)
          return false;
      if (bank.slots_in(bank.slots() - 1) != 0 || bank.slots_in(0) != 0) return false;
    }
  return true;
}
static_assert(slots_fit());

constexpr bool flags_hold(uint64_t epoch) {
  for (int lane = 0; lane < kMaxLanes; ++lane)
    for (int operation = 0; operation < 16; ++operation) {
      const uint64_t flag = make_flag(epoch, lane, operation);
      if (flag_epoch(flag) != epoch || flag_lane(flag) != lane || flag_operation(flag) != operation) return false;
      // Flags grow with their epoch, whatever the operations are.
      if (make_flag(epoch + 1, 0, 0) <= flag) return false;
    }
  return true;
}
static_assert(flags_hold(0) && flags_hold(1) && flags_hold(0xfffffffe) && flags_hold((uint64_t{1} << 56) - 2));

static_assert(align_up(0, 64) == 0 && align_up(1, 64) == 64 && align_up(64, 64) == 64 && align_up(65, 3) == 66);

// The checks above are made when this file is compiled; this says that it was.
TEST(Layout, IsCheckedByTheCompiler) { EXPECT_TRUE(all_windows_are_apart() && all_slots_are_apart() && slots_fit() && banks_alternate()); }

// ---- the window of a GPU rank

constexpr bool regions_are_apart(const DeviceWindowLayout& window) {
  constexpr auto kWord = static_cast<int64_t>(sizeof(uint64_t));
  Walk walk;
  walk.region(window.abort(), kWord, kWord);
  for (int rank = 0; rank < window.num_ranks; ++rank) walk.region(window.record(rank), sizeof(FailureRecord), kCacheLine);
  for (int lane = 0; lane < window.num_lanes; ++lane) {
    for (int source = 0; source < window.num_ranks; ++source) walk.region(window.progress(lane, source), sizeof(ProgressCell), kCacheLine);
    for (uint64_t epoch = 0; epoch < kNumBanks; ++epoch)
      for (int source = 0; source < window.num_ranks; ++source) walk.region(window.call(lane, epoch, source), sizeof(CallCell), kCacheLine);
    for (int source = 0; source < window.num_ranks; ++source) walk.region(window.staged(lane, source), kMaxChunks * kWord, kWord);
  }
  if (!walk.ends_within(window.control_bytes())) return false;
  for (int lane = 0; lane < window.num_lanes; ++lane)
    for (uint64_t epoch = 0; epoch < kNumBanks; ++epoch)
      for (int source = 0; source < window.num_ranks; ++source)
        walk.region(window.routing(lane, epoch, source), window.routing_bytes, kCacheLine);
  for (int lane = 0; lane < window.num_lanes && window.latency_words > 0; ++lane)
    for (uint64_t epoch = 0; epoch < kNumBanks; ++epoch)
      for (int source = 0; source < window.num_ranks; ++source)
        walk.region(window.words(lane, epoch, source), window.latency_words * kWord, kWord);
  for (int lane = 0; lane < window.num_lanes && window.latency_tokens > 0; ++lane)
    for (int source = 0; source < window.num_ranks; ++source)
      walk.region(window.row_flags(lane, source), window.num_row_flags() * kWord, kWord);
  for (int lane = 0; lane < window.num_lanes && window.slot_bytes > 0; ++lane)
    for (uint64_t epoch = 0; epoch < kNumBanks; ++epoch) walk.region(window.slots(lane, epoch), window.slot_bytes, kBulkLine);
  for (int lane = 0; lane < window.num_lanes; ++lane)
    for (uint64_t epoch = 0; epoch < kNumBanks; ++epoch) walk.region(window.staging(lane, epoch), window.staging_bytes, kBulkLine);
  return walk.ends_within(window.total_bytes());
}

constexpr bool device_windows_are_good() {
  for (int num_ranks = 1; num_ranks <= kMostTestedRanks; num_ranks += 1 + num_ranks / 2)
    for (int num_lanes = 1; num_lanes <= kMostTestedLanes; ++num_lanes)
      for (const int64_t tokens : {0, 1, 128, 1024}) {
        const LatencyWords words{.num_counts = 10 + num_ranks, .max_tokens = tokens, .num_topk = 3};
        const DeviceWindowLayout window{.num_ranks = num_ranks,
                                        .num_lanes = num_lanes,
                                        .routing_bytes = 192,
                                        .staging_bytes = 1280,
                                        .slot_bytes = tokens * 128,
                                        .latency_words = tokens > 0 ? align_up(words.num_words(), 16) : 0,
                                        .latency_tokens = tokens};
        if (!regions_are_apart(window)) return false;
      }
  return true;
}
static_assert(device_windows_are_good());

// Words of a dispatch and of a combine lie within their block, parts of a slot within the slot.
constexpr bool latency_parts_are_good() {
  for (const int64_t tokens : {1, 31, 32, 33, 1024}) {
    const LatencyWords words{.num_counts = 292, .max_tokens = tokens, .num_topk = 8, .num_batches = tokens % 2 == 0 ? 1 : 3};
    Walk dispatch, combine;
    dispatch.region(words.call(), 1, 1);
    dispatch.region(words.num_tokens(), words.num_batches, 1);
    dispatch.region(words.counts(), words.num_batches * words.num_counts, 1);
    dispatch.region(words.presence(), words.num_batches * words.num_presence(), 1);
    dispatch.region(words.entries(), words.num_entries(), 1);
    dispatch.region(words.weights(), words.num_entries(), 1);
    combine.region(words.num_tokens(), words.num_batches, 1);
    combine.region(words.returned(), words.num_entries(), 1);
    combine.region(words.weights(), words.num_entries(), 1);
    if (!dispatch.ends_within(words.num_words()) || !combine.ends_within(words.num_words())) return false;
    const LatencySlot slot{.row_bytes = 7168, .scale_bytes = 4 * tokens};
    Walk parts;
    parts.region(slot.row(), slot.row_bytes, kBulkLine);
    parts.region(slot.scales(), slot.scale_bytes, 16);
    if (!parts.ends_within(slot.end()) || slot.end() > slot.stride() || slot.stride() % kBulkLine != 0) return false;
  }
  return true;
}
static_assert(latency_parts_are_good());

TEST(DeviceWindow, IsCheckedByTheCompiler) { EXPECT_TRUE(device_windows_are_good() && latency_parts_are_good()); }

}  // namespace
}  // namespace tern::layout
