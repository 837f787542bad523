// SPDX-License-Identifier: Apache-2.0
// The first part of a combine whose weights only the owners know, where others need them: they travel ahead of it, in rounds of their own.
#pragma once

#include "cpu/plan.h"

namespace tern::cpu {

// Between nodes: from the owners to their rails, who find them in weights.at_rail. topk_weights: [num_tokens, num_topk].
void send_weights_to_rails(const PlanContext& context, const float* topk_weights);
int64_t num_rail_rounds_of_weights(const PlanContext& context);

// From the owners and rails to the ranks of the experts, who find them in weights.from_owner.
void send_weights_in_node(const PlanContext& context, const float* topk_weights);

}  // namespace tern::cpu
