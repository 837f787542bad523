// SPDX-License-Identifier: Apache-2.0
#include "plan/window_sizing.h"

#include <algorithm>

#include "base/deadline.h"
#include "base/error.h"
#include "base/knobs.h"
#include "layout/message.h"
#include "layout/rail.h"

namespace tern {
namespace {

constexpr auto kGranule = static_cast<int64_t>(layout::kCacheLine);
constexpr int64_t kCpuStagingMb = 256;
constexpr int64_t kGpuStagingMb = 1024;

void check_options(const tern_exchange_options& o) {
  constexpr auto kBad = TERN_INVALID_ARGUMENT;
  const auto not_negative = [](const char* name, int64_t value) {
    if (value < 0) fail(kBad, "exchange: {} is {}, must not be negative", name, value);
  };
  if (o.device < TERN_DEVICE_AUTO || o.device > TERN_DEVICE_CUDA)
    fail(kBad, "exchange: device is {}, which is no tern_device_type", static_cast<int>(o.device));
  not_negative("staging_bytes", o.staging_bytes);
  not_negative("window_bytes", o.window_bytes);
  not_negative("max_tokens", o.max_tokens);
  not_negative("max_row_bytes", o.max_row_bytes);
  not_negative("max_topk", o.max_topk);
  not_negative("max_experts", o.max_experts);
  not_negative("num_sms", o.num_sms);
  not_negative("timeout_ms", o.timeout_ms);
  constexpr int64_t kMostBytes = int64_t{1} << 46;  // 64 TiB: keeps the arithmetic below from overflowing
  if (o.staging_bytes > kMostBytes || o.window_bytes > kMostBytes || o.max_row_bytes > kMostBytes >> 16 || o.max_tokens > int64_t{1} << 31)
    fail(kBad, "exchange: staging_bytes {}, window_bytes {}, max_tokens {} or max_row_bytes {} is out of any reasonable range",
         o.staging_bytes, o.window_bytes, o.max_tokens, o.max_row_bytes);
  if (o.max_topk > 64) fail(kBad, "exchange: max_topk is {}, must be at most 64", o.max_topk);
  if (o.num_lanes < 0 || o.num_lanes > layout::kMaxLanes)
    fail(kBad, "exchange: num_lanes is {}, must be 0 (one) to {}", o.num_lanes, layout::kMaxLanes);
  if (o.on_timeout != TERN_ON_TIMEOUT_ABORT && o.on_timeout != TERN_ON_TIMEOUT_MASK)
    fail(kBad, "exchange: on_timeout is {}, which is no tern_timeout_policy", static_cast<int>(o.on_timeout));
  if (o.on_timeout == TERN_ON_TIMEOUT_MASK && o.num_lanes > 1)
    fail(kBad, "exchange: TERN_ON_TIMEOUT_MASK works with one lane, not {}; use tern_exchange_recover, or an exchange for each lane",
         o.num_lanes);
  if (o.mode < TERN_MODE_AUTO || o.mode > TERN_MODE_LATENCY)
    fail(kBad, "exchange: mode is {}, which is no tern_mode", static_cast<int>(o.mode));
}

// Counts of the messages and entries of one source, and how many tokens it has.
int64_t num_counts(const tern_exchange_options& o, int32_t num_ranks, int32_t num_nodes) {
  return o.max_experts / num_nodes + int64_t{num_ranks} + 1;
}

layout::BankLayout expected_bank(const tern_exchange_options& o, int32_t num_ranks, int32_t num_nodes) {
  return {.num_counts = num_nodes * num_counts(o, num_ranks, num_nodes),
          .slot = {.payload_bytes = o.max_row_bytes, .scale_bytes = 0, .num_experts = o.max_topk, .num_weights = o.max_topk}};
}

}  // namespace

tern_exchange_options complete_options(const tern_exchange_options& options) {
  check_options(options);
  tern_exchange_options o = options;
  if (o.max_tokens == 0) o.max_tokens = 128;
  if (o.max_row_bytes == 0) o.max_row_bytes = 16384;
  if (o.max_topk == 0) o.max_topk = 8;
  if (o.max_experts == 0) o.max_experts = 256;
  if (o.num_lanes == 0) o.num_lanes = 1;
  o.timeout_ms = bounded_timeout_ms(o.timeout_ms == 0 ? knobs().timeout_ms : o.timeout_ms);
  return o;
}

int64_t staging_bound(const tern_exchange_options& o) {
  return knobs().staging_max_mb.value_or(o.device == TERN_DEVICE_CUDA ? kGpuStagingMb : kCpuStagingMb) << 20;
}

layout::WindowLayout make_window_layout(const tern_exchange_options& o, int32_t num_ranks, int32_t num_nodes) {
  const int32_t domain_ranks = num_ranks / num_nodes;
  layout::WindowLayout window{.num_ranks = domain_ranks, .num_lanes = o.num_lanes};
  const int64_t num_banks = int64_t{o.num_lanes} * layout::kNumBanks * domain_ranks;
  const layout::BankLayout bank = expected_bank(o, num_ranks, num_nodes);  // of what a rank and its rails send
  const int64_t least = bank.bytes(int64_t{o.max_topk} * num_nodes);       // one token's entries, each by itself in an exact combine
  int64_t bank_bytes = 0;
  if (o.staging_bytes > 0) {
    bank_bytes = o.staging_bytes / num_banks / kGranule * kGranule;
    const int64_t smallest = static_cast<int64_t>(sizeof(layout::MessageHeader) + layout::kCacheLine);
    if (bank_bytes < smallest)
      fail(TERN_INVALID_ARGUMENT,
           "exchange: staging_bytes is {}, which leaves {} bytes for each of {} banks ({} lanes x {} x {} ranks); at least {} are needed",
           o.staging_bytes, bank_bytes, num_banks, o.num_lanes, layout::kNumBanks, domain_ranks, smallest * num_banks);
  } else {
    const int64_t most = staging_bound(o);
    bank_bytes = std::max(least, std::min(bank.bytes(o.max_tokens * num_nodes), most / num_banks / kGranule * kGranule));
  }
  window.bank_bytes = layout::align_up(bank_bytes, kGranule);
  return window;
}

int64_t rail_head_bytes(const tern_exchange_options& o, int32_t num_ranks, int32_t num_nodes) {
  const layout::RailBankLayout bank{.num_counts = num_counts(o, num_ranks, num_nodes), .slot = {}};
  return layout::align_up(bank.slots(), kGranule);
}

int64_t rail_bank_bytes(const tern_exchange_options& o, int32_t num_ranks, int32_t num_nodes) {
  if (num_nodes == 1) return 0;
  // Scales begin at a multiple of 16 bytes. A row that is routed on its way brings its token, experts and weights.
  const layout::RailBankLayout bank{.num_counts = num_counts(o, num_ranks, num_nodes),
                                    .slot = {.payload_bytes = o.max_row_bytes, .scale_bytes = 16, .num_words = 1 + 2 * o.max_topk}};
  const int64_t most =
      o.staging_bytes > 0 ? o.staging_bytes : std::max(staging_bound(o), num_rail_banks(o, num_nodes) * bank.bytes(o.max_topk));
  return std::min(layout::align_up(bank.bytes(o.max_tokens), kGranule), most / num_rail_banks(o, num_nodes) / kGranule * kGranule);
}

}  // namespace tern
