// SPDX-License-Identifier: Apache-2.0
// How much memory an exchange takes, from its options.
#pragma once

#include <tern/tern.h>

#include "layout/window.h"

namespace tern {

// Validates (TERN_INVALID_ARGUMENT), fills in every default, and returns what the exchange will use.
tern_exchange_options complete_options(const tern_exchange_options& options);

// The most staging that is computed from shapes, all lanes and banks together.
int64_t staging_bound(const tern_exchange_options& options);

// The internal window for completed options, shared by the num_ranks / num_nodes ranks of a node. TERN_INVALID_ARGUMENT if staging_bytes
// cannot hold one slot for each pair of them.
layout::WindowLayout make_window_layout(const tern_exchange_options& options, int32_t num_ranks, int32_t num_nodes = 1);

// Of a bank of what crosses the network; there are two for each lane and node, for each direction. With one node: 0.
int64_t rail_bank_bytes(const tern_exchange_options& options, int32_t num_ranks, int32_t num_nodes);
// Of it, header and counts, which stay in memory of the host where slots lie in the GPU's.
int64_t rail_head_bytes(const tern_exchange_options& options, int32_t num_ranks, int32_t num_nodes);
inline int64_t num_rail_banks(const tern_exchange_options& options, int32_t num_nodes) {
  return num_nodes == 1 ? 0 : int64_t{options.num_lanes} * layout::kNumBanks * num_nodes * 2;
}

}  // namespace tern
