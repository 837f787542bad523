// SPDX-License-Identifier: Apache-2.0
// Ranks that die, stop or do not come, with real processes and real signals: all others get an error that names the rank, in bounded
// time; they go on without it, and it harms nobody when it wakes up. Each scene is the body of a test, for ranks of any device, two or
// more of them: of two ranks one goes on alone.
#pragma once

#include <cstdint>

#include "conformance/runner.h"

namespace tern::conformance {

struct SceneSettings {
  int32_t num_ranks = 4;
  RunOptions run;  // with the timeout of the operations, which most scenes wait for
  tern_extent extent = TERN_EXTENT_EXACT;
  bool fused = false;                   // dispatches route; the extent is worst
  bool in_windows = false;              // large batches in rank_major, whose rows go from window to window
  int64_t process_timeout_ms = 40'000;  // of the whole scene

  // The rank that dies, stops or does not come. Never rank 0, which others wait for.
  int32_t victim() const { return num_ranks / 2; }
};

void killed_rank_is_named_and_masked(const SceneSettings& settings);
void stopped_rank_wakes_up_and_harms_nobody(const SceneSettings& settings);
void stopped_rank_comes_back(const SceneSettings& settings);
// The victim gets the signal (SIGSTOP or SIGKILL) wherever it happens to be, in the middle of copying too.
void struck_anywhere(const SceneSettings& settings, int signal);
// One rank leaves out a call; nobody is dead, and all go on together.
void recovery_of_all_ranks(const SceneSettings& settings);
// One rank calls another operation than the others.
void recovery_from_a_mismatch(const SceneSettings& settings);
void recovery_without_a_mask_needs_every_rank(const SceneSettings& settings);
// All agree, and then one gets no memory for its windows: the exchange has failed for all, and the next recovery is right.
void recovery_without_memory(const SceneSettings& settings);
// A healthy rank that the others leave out on purpose learns of it.
void chosen_mask(const SceneSettings& settings);
// With the policy MASK the operation itself goes on, and the following ones run without the rank.
void policy_mask(const SceneSettings& settings);
// The same for a small batch in a single call, which routes, casts and dispatches: it costs one timeout.
void policy_mask_of_a_single_call(const SceneSettings& settings);
// A rank that dies between dispatch and combine has a share of zero, and is reported.
struct MissedCombine {
  tern_combine_mode mode = TERN_COMBINE_HIERARCHICAL;
  tern_weighting weighting = TERN_WEIGHTS_DISPATCH;
};
void policy_mask_of_a_combine(const SceneSettings& settings, const MissedCombine& missed);
// A rank that was stopped, and missed in single calls, wakes up, learns of it, and is let in again.
void policy_mask_of_a_stopped_rank(const SceneSettings& settings);
// The victim gets the signal wherever it happens to be, in single calls one after the other. GPU ranks, which start no generation by themselves.
void policy_mask_anywhere(const SceneSettings& settings, int signal);
// A rank that was left out, and misses all others, learns of it instead of going on alone.
void policy_mask_of_who_was_left_out(const SceneSettings& settings);
// A rank that was stopped and left out wakes up, learns of it, and comes back with its exchange.
void masked_rank_is_let_in_again(const SceneSettings& settings);
// GPU ranks go on without a rank on the latency path only, and say so elsewhere.
void policy_mask_needs_the_latency_path(const SceneSettings& settings);

}  // namespace tern::conformance
