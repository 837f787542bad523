// SPDX-License-Identifier: Apache-2.0
// Which of the kernels of the latency path an operation takes.
#pragma once

#include "kernels/latency.h"

namespace tern::kernels {

// What kernels are compiled for, so that nothing else takes time, registers or code in them.
enum class CallKind {
  kMasking,  // under TERN_ON_TIMEOUT_MASK; rows have flags
  kFlagged,  // so they have here
  kAny,
  kUsual,    // see is_usual_call()
  kBatches,  // between nodes: see LatencyBatches
  kMaskingBatches,
};

// Rows have flags or not on all ranks alike; what is usual each rank may find for itself.
inline CallKind kind_of(const LatencyArgs& args, bool is_usual) {
  const bool masks = args.exchange.attendance != nullptr;
  if (args.batches.slots.banks != nullptr) return masks ? CallKind::kMaskingBatches : CallKind::kBatches;
  if (masks) return CallKind::kMasking;
  if (args.has_row_flags) return CallKind::kFlagged;
  return is_usual ? CallKind::kUsual : CallKind::kAny;
}

// What decoding does as a rule: both phases at once, in groups of equal size, and no waits are counted.
inline bool is_usual_call(const LatencyArgs& args) {
  return args.sends && args.receives && args.wait_ns == nullptr && args.plan.layout == TERN_LAYOUT_EXPERT_PADDED;
}

}  // namespace tern::kernels
