// SPDX-License-Identifier: Apache-2.0
// What a routing says by itself, counted on the host: tern_count_routing of CPU ranks.
#pragma once

#include "plan/plan_shape.h"

namespace tern {

// TERN_INVALID_ARGUMENT if the routing does not fit the shape; then nothing is written.
void count_routing(const PlanShape& shape, const tern_routing& routing, const tern_routing_counts& counts);

}  // namespace tern
