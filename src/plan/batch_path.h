// SPDX-License-Identifier: Apache-2.0
// Which of two ways an operation of GPU ranks takes: one kernel that pushes rows (latency), or kernels that route first and whose rows are pulled
// or delivered (throughput). Both are forecast, and the shorter one is taken.
//
//   const BatchFacts facts{.operation = TERN_OP_DISPATCH, .num_ranks = 4, .num_tokens = 128, .messages_per_token = 4, .row_bytes = 7392, .num_sms = 132};
//   if (is_pushed(facts)) ...
//
// The forecasts:
//   rows        = num_tokens x messages_per_token, of which 1 / num_ranks stay on the rank
//   latency     = start + rows of a block, at least 1, x time of a row + bytes over the link / its rate
//   throughput  = start (+ a route) + the longer of bytes over the link / its rate, and bytes of all rows / (SMs x rate of an SM)
// The constants are in batch_path.cc, with what they were measured on. They are of one kind of GPU, and need not be exact: where both ways take
// about as long it does not matter which is taken. The library and `tern plan` both ask here.
#pragma once

#include <tern/tern.h>

#include <cstdint>

namespace tern {

// What all ranks know alike of an operation, so that all choose alike.
struct BatchFacts {
  tern_operation operation = TERN_OP_DISPATCH;  // or TERN_OP_COMBINE
  bool routes = false;                          // the dispatch makes its plan
  int32_t num_ranks = 1;
  int64_t num_tokens = 0;  // the most of any rank
  int32_t messages_per_token = 1;
  int64_t row_bytes = 0;       // of a message, as it travels, with its scales
  int32_t num_sms = 1;         // that there are for the operation
  bool are_sms_asked = false;  // as many were asked for; else the throughput path takes those that its bytes need
};

double latency_us(const BatchFacts& facts);
double throughput_us(const BatchFacts& facts);
inline bool is_pushed(const BatchFacts& facts) { return latency_us(facts) <= throughput_us(facts); }

// Elsewhere it goes by bytes: batches up to this many KiB of rows per rank are small. CPU ranks; and dispatches between nodes, which are then
// routed on their way, in one trip over the network and not two. TERN_LATENCY_MAX_KB stands for any of them.
inline constexpr int64_t kSmallKb = 32, kRoutedOnTheWayKbCpu = 512, kRoutedOnTheWayKbGpu = 2048;

// One SM moves at least this much while the others use up the link's rate: batches up to here need one SM for each.
inline constexpr int64_t kBytesPerSm = 512 << 10;
inline constexpr int kSaturatingSms = 24;
// SMs that the throughput path takes for `bytes` of traffic, of at most so many.
int sms_for_bytes(int most, int64_t bytes);

}  // namespace tern
