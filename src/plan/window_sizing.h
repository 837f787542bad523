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

// The internal window for completed options. TERN_INVALID_ARGUMENT if staging_bytes cannot hold one slot for each pair of ranks.
layout::WindowLayout make_window_layout(const tern_exchange_options& options, int32_t num_ranks);

}  // namespace tern
