// SPDX-License-Identifier: Apache-2.0
// The receiving end of dispatch: writes what has arrived into the caller's arrays, in the plan's layout.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "plan/device.h"
#include "plan/routing_table.h"
#include "rows/rows.h"

namespace tern::cpu {

struct ArrivedMessage {
  int32_t source = 0;
  int32_t source_token = 0;
  std::span<const int32_t> experts;    // local, [num_topk], -1: not here
  std::span<const float> weights;      // [num_topk], or empty
  const std::byte* payload = nullptr;  // nullptr: the row is in its place already
  const std::byte* scales = nullptr;
};

class DispatchOutputs {
 public:
  DispatchOutputs(const RoutingTable& table, const DispatchCall& call);

  // One message, which place_message() has given the index.
  void write(int64_t message_idx, const ArrivedMessage& message, Store store);
  // Zero rows for all that a rank was to send, of which not everything has come.
  void clear_missing(int32_t source);
  // After the last message: offsets and counts, and whatever lies between the rows.
  void finish();

 private:
  void write_rank_major(int64_t message_idx, const ArrivedMessage& message, Store store);
  void write_entry(int32_t row, int32_t k, const ArrivedMessage& message, Store store);
  void write_payload(int32_t row, const ArrivedMessage& message, Store store);
  void write_source(int32_t row, int32_t source_token, int32_t source_rank);
  // Marks rows [begin, end) as holding no token; `zero` clears payload and scales too.
  void clear_rows(int64_t begin, int64_t end, bool zero);
  void write_counts();
  std::byte* scale_address(int64_t row, int64_t element_idx) const;

  const RoutingTable& table_;
  const PlanShape& shape_;
  const DispatchCall& call_;
  const tern_dispatch_args& args_;
  int64_t num_scale_elements_;
};

}  // namespace tern::cpu
