// SPDX-License-Identifier: Apache-2.0
// The kernels of the latency path: one launch for a whole dispatch, routing included, and one for a combine. Rows are pushed.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/dispatch.h"
#include "kernels/exchange_view.h"
#include "kernels/rail.h"

namespace tern::kernels {

// Between nodes a kernel takes all batches of this rank at once, its own tokens and what its rails have sent here: token t of the batch of node n
// is number n * max_tokens + t of those that it sends within the node.
struct LatencyBatches {
  RailSlots slots;              // dispatch: where tokens are, as they have come; combine: where sums go. No banks: one node
  HostSteps steps;              // around the kernel
  bool has_own_packed = false;  // dispatch: slots have this rank's own tokens too
};

// What is where in layout::LatencyWords, which kernels, since they run their code once, need not work out.
class LatencyPlaces {
 public:
  int32_t num_batches = 1;
  int32_t num_counts = 0;  // of a batch, as the next

  LatencyPlaces() = default;
  explicit constexpr LatencyPlaces(const layout::LatencyWords& words)
      : num_batches(words.num_batches),
        num_counts(static_cast<int32_t>(words.num_counts)),
        num_presence_(static_cast<int32_t>(words.num_presence())),
        counts_(static_cast<int32_t>(words.counts())),
        presence_(static_cast<int32_t>(words.presence())),
        entries_(static_cast<int32_t>(words.entries())),
        weights_(static_cast<int32_t>(words.weights())) {}

  static constexpr int32_t call() { return static_cast<int32_t>(layout::LatencyWords{}.call()); }
  static constexpr int32_t num_tokens() { return static_cast<int32_t>(layout::LatencyWords{}.num_tokens()); }
  constexpr int32_t num_presence() const { return num_presence_; }
  constexpr int32_t counts() const { return counts_; }
  constexpr int32_t presence() const { return presence_; }
  constexpr int32_t num_routing_words() const { return entries_; }
  constexpr int32_t entries() const { return entries_; }
  constexpr int32_t returned() const { return entries_; }
  constexpr int32_t weights() const { return weights_; }

 private:
  int32_t num_presence_ = 0, counts_ = 0, presence_ = 0, entries_ = 0, weights_ = 0;
};

// What both kernels need.
struct LatencyArgs {
  ExchangeView exchange;
  PlanView plan;
  layout::CallShape shape;
  uint32_t call_hash = 0;        // of operation and shape: compared by the receivers
  int32_t operation = 0;         // tern_operation
  bool sends = false;            // pushes this rank's rows
  bool receives = false;         // takes what has been pushed here
  bool routes = false;           // dispatch: the plan is made here
  bool has_row_flags = false;    // see LatencyCall
  bool follows_closely = false;  // the kernel may begin while the one in front ends
  uint64_t* ticket = nullptr;    // keeps the epoch from a send to its receive
  int64_t* wait_ns = nullptr;    // [num_ranks] what this rank waits for the calls of the others is added; nullptr: not counted
  LatencyPlaces words;
  layout::LatencySlot slot;
  LatencyBatches batches;
  int32_t sent_tokens = 0;  // that a rank sends at most, of all batches
  // Each row goes in so many parts, of so many bytes but for the last, each by a block of its own: an SM alone fills a tenth of the link.
  int32_t parts_log2 = 0;
  int32_t part_bytes = 0;

  // Where things are in every window, so that kernels, which run their code once, need not work it out.
  int64_t words_at[layout::kNumBanks] = {};  // of source 0
  int64_t slots_at[layout::kNumBanks] = {};
  int64_t row_flags_at = 0;  // of source 0
  int64_t progress_at = 0;   // of source 0
  int32_t words_stride = 0;  // from source to source, in words; so are flags
  int32_t flags_stride = 0;
  int32_t slot_stride = 0;
  uint32_t experts_reciprocal = 0;  // of local_experts: rank_of()
  uint32_t topk_reciprocal = 0;
  uint32_t ranks_reciprocal = 0;
  uint32_t sources_reciprocal = 0;

  // For quotient(): of numbers up to this and divisors up to this, so that the product is exact. num_experts is at most this.
  static constexpr int32_t kMostExperts = 65535;
  static constexpr uint32_t reciprocal(int32_t of) {
    const auto divisor = static_cast<uint64_t>(of);
    return divisor == 1 ? 0 : static_cast<uint32_t>(((uint64_t{1} << 32) + divisor - 1) / divisor);
  }
};
static_assert(std::is_trivially_copyable_v<LatencyArgs>);
static_assert(layout::kMostLatencyTokens * layout::kMostLatencyTopk <= LatencyArgs::kMostExperts);
static_assert(layout::kMostLatencyTokens * layout::kMostLatencyRanks - 1 <= LatencyArgs::kMostExperts);

// Where things are in the shared memory of a block of dispatch (DispatchMemory), and how much that is. First come a token's scales.
struct LatencyDispatchMemory {
  int32_t has_failed = 0;
  int32_t entries_sent = 0;
  int32_t words = 0;
  int32_t first_row = 0;
  int32_t num_entries = 0;
  int64_t num_bytes = 0;

  LatencyDispatchMemory() = default;
  constexpr LatencyDispatchMemory(const PlanView& plan, int64_t num_ranks, const layout::LatencyWords& latency_words,
                                  const layout::LatencySlot& slot) {
    num_bytes = slot.end() - slot.scales();
    has_failed = place_words(1);
    entries_sent = place_words(latency_words.num_batches * (plan.num_experts + num_ranks * latency_words.num_presence()));
    words = place_words(num_ranks * latency_words.num_routing_words());
    first_row = place_words(plan.num_experts);
    num_entries = place_words(plan.local_experts + 1);
  }

 private:
  constexpr int32_t place_words(int64_t num) {
    const int64_t offset = layout::align_up(num_bytes, 16);
    num_bytes = offset + num * static_cast<int64_t>(sizeof(int32_t));
    return static_cast<int32_t>(offset);
  }
};

struct LatencyDispatchArgs {
  LatencyArgs call;
  LatencyDispatchMemory memory;
  const void* topk_idx = nullptr;  // [num_tokens, num_topk], int64 or int32
  bool is_int32 = false;
  int32_t num_tokens = 0;
  const int32_t* device_num_tokens = nullptr;  // the number of tokens, if not NULL

  DispatchInputs in;
  DispatchOutputs out;
  int32_t row_bytes = 0;    // as it arrives
  int32_t scale_bytes = 0;  // as they arrive
  int32_t scale_element_bytes = 1;
  bool carries_weights = false;
};

struct LatencyCombineArgs {
  LatencyArgs call;
  int32_t dtype = 0;
  int32_t row_bytes = 0;
  int32_t wire_bytes = 0;   // of a row on its way
  int32_t piece_bytes = 0;  // that a warp pushes of a part
  bool is_log = false;      // on their way rows are in the 10-bit encoding (base/log_rows.h)
  bool per_entry = false;   // every entry's row goes to the owner
  // Rows of a token's entries lie in one slot, whichever ranks they come from. Not where a rank that was given up may still write.
  bool shares_slots = false;
  bool returns_weights = false;

  // At the ranks of the experts.
  const std::byte* rows = nullptr;          // in the plan's layout
  const float* entry_weights = nullptr;     // [max_messages, topk_stride] of the entries summed here; nullptr: 1, or the owner's
  const float* returned_weights = nullptr;  // [rows, num_topk] or [rows], handed back

  // At the owners.
  const float* owner_weights = nullptr;  // [sent tokens, num_topk] pushed to the experts' ranks; nullptr: none
  bool sums_owner_weights = false;       // the experts' ranks wait for them
  const float* token_weights = nullptr;  // [num_tokens, num_topk] of the entries summed there; nullptr: 1
  const std::byte* bias[2] = {nullptr, nullptr};
  std::byte* out_tokens = nullptr;
  float* out_topk_weights = nullptr;
};

// Of a row, that a warp of its owner sums at once: parts are multiples of that.
inline constexpr int kPieceBytes = 1024;
// Threads of a block; the last warp does not push.
inline constexpr int kLatencyThreads = 512, kPushingWarps = kLatencyThreads / 32 - 1;
// The most shared memory that a block may have: every GPU has it.
inline constexpr int64_t kMostLatencyShared = 96 << 10;

// Loads the kernels' code on the current device.
cudaError_t prepare_latency_dispatch();
cudaError_t prepare_latency_combine();
// `num_blocks` blocks; all of them, and those of the peers on the same device, must be able to run at the same time.
cudaError_t launch_latency_dispatch(const LatencyDispatchArgs& args, int num_blocks, cudaStream_t stream);
cudaError_t launch_latency_combine(const LatencyCombineArgs& args, int num_blocks, cudaStream_t stream);

}  // namespace tern::kernels
