// SPDX-License-Identifier: Apache-2.0
// The receiving half of a small dispatch: rows from the slots that their sources have written to where they lie in the outputs.
#pragma once

#include "kernels/latency_arrivals.cuh"

namespace tern::kernels {

// Spreads the messages that arrive; a group of warps takes a part of one at a time.
template <typename Call>
class MessageSpreader {
 public:
  __device__ MessageSpreader(const LatencyDispatchArgs& args, const Call& call, const Arrivals<Call>& arrivals)
      : args_(args),
        plan_(args.call.plan),
        call_(call),
        arrivals_(arrivals),
        group_(kGroups - 1 - static_cast<int>(threadIdx.x) / kThreads),
        thread_(static_cast<int>(threadIdx.x) % kThreads) {}

  // The workers of all blocks, but for the routing block. Groups take parts in turn, those of all sources side by side; first those of
  // a block that do not write outputs meanwhile.
  __device__ void run() {
    const bool is_alone = gridDim.x == 1;
    const auto num_blocks = static_cast<int32_t>(is_alone ? 1 : gridDim.x - 1), block = static_cast<int32_t>(is_alone ? 0 : blockIdx.x - 1);
    const int32_t num_groups = kGroups * num_blocks, first = group_ * num_blocks + block;
    const int32_t end = block < 0 ? first : call_.num_parts_of(arrivals_.num_candidates());
#pragma unroll 1
    for (int32_t i = first; i < end; i += num_groups) {
      ArrivingMessage message;
      if (!arrivals_.candidate(call_.row_of(i), message)) continue;
      const bool is_absent = call_.is_absent(message.source);
      if (!is_absent && !await(message, call_.part_of(i))) return;
      if (i + num_groups >= end) wait_no_more();
      if (is_absent)
        clear(message);
      else
        spread(message, call_.part_of(i));
    }
    wait_no_more();
  }

 private:
  static constexpr int kThreads = 96, kGroups = kWorkThreads / kThreads;
  static_assert(kGroups * kThreads == kWorkThreads);

  // The rows of a message: in each thread of a warp, one.
  struct Rows {
    int32_t row;
    uint32_t valid;

    template <typename Visit>
    __device__ void for_each(Visit visit) const {
#pragma unroll 1
      for (uint32_t left = valid; left != 0; left &= left - 1) visit(__shfl_sync(~0u, row, __ffs(static_cast<int>(left)) - 1));
    }
  };

  __device__ void wait_no_more() {
    if (waits_) call_.wait_no_more();
    waits_ = false;
  }

  // Each warp by itself: the part, and the first one, which says where the row is to go. False: the exchange has failed.
  __device__ bool await(const ArrivingMessage& message, int part) const {
    const auto lane = static_cast<int>(device::lane_idx());
    const bool ok = (lane != 0 && (lane != 1 || part == 0)) || call_.await_row(message.source, message.token, lane == 0 ? 0 : part);
    const bool all_ok = __all_sync(~0u, ok) != 0;
    __syncwarp();  // what one thread has acquired, all may read
    return all_ok;
  }

  __device__ void spread(ArrivingMessage& message, int part) const {
    const std::byte* slot = call_.slot(call_.rank(), call_.slot_idx(message.source, message.token));
    constexpr int kVecs = 10;
    constexpr int32_t kStep = kThreads * static_cast<int32_t>(sizeof(Vec16));
    const auto* entries = reinterpret_cast<const layout::LatencySlot::Entry*>(slot + args_.call.slot.entries());
    const int k = static_cast<int>(device::lane_idx());
    ArrivingEntry entry{-1, -1};
    Rows rows;
    const int32_t part_begin = part * args_.call.part_bytes, end = min(part_begin + args_.call.part_bytes, args_.row_bytes);
#pragma unroll 1
    for (int32_t first = part_begin; first == part_begin || first < end; first += kVecs * kStep) {
      Vec16 values[kVecs];
      const int32_t begin = first + thread_ * static_cast<int32_t>(sizeof(Vec16));
#pragma unroll
      for (int v = 0; v < kVecs; ++v)
        if (begin + v * kStep < end) values[v] = *reinterpret_cast<const Vec16*>(slot + begin + v * kStep);
      if (first == part_begin) {  // while the row is on its way
        arrivals_.place(message);
        if (k < plan_.num_topk) entry = arrivals_.entry(message, k, entries);
        rows = rows_of(message, entry);
      }
      rows.for_each([&](int32_t row) {
        std::byte* to = args_.out.tokens + int64_t{row} * args_.row_bytes;
#pragma unroll
        for (int v = 0; v < kVecs; ++v)
          if (begin + v * kStep < end) *reinterpret_cast<Vec16*>(to + begin + v * kStep) = values[v];
      });
    }
    if (part != 0) return;
    if (args_.out.scales != nullptr && args_.scale_bytes > 0) write_scales(rows, slot + args_.call.slot.scales());
    if (thread_ < kWarpThreads) keep(message, entry, slot);
  }

  // Each warp, with its entries.
  __device__ Rows rows_of(const ArrivingMessage& message, const ArrivingEntry& entry) const {
    Rows rows;
    rows.row = entry.row;
    if (!plan_.has_expert_rows()) rows.row = device::lane_idx() == 0 && message.index < args_.out.num_rows ? message.index : -1;
    rows.valid = __ballot_sync(~0u, rows.row >= 0);
    return rows;
  }

  // Zeros in place of what its source has not sent, of a call along a plan.
  __device__ __noinline__ void clear(ArrivingMessage& message) const {
    arrivals_.place(message);
    const int k = static_cast<int>(device::lane_idx());
    const ArrivingEntry entry = k < plan_.num_topk ? arrivals_.entry(message, k, nullptr) : ArrivingEntry{-1, -1};
    rows_of(message, entry).for_each([&](int32_t row) {
      for (int32_t at = thread_ * static_cast<int32_t>(sizeof(Vec16)); at < args_.row_bytes;
           at += kThreads * static_cast<int32_t>(sizeof(Vec16)))
        *reinterpret_cast<Vec16*>(args_.out.tokens + int64_t{row} * args_.row_bytes + at) = Vec16{};
      if (args_.out.scales == nullptr || args_.scale_bytes == 0) return;
      const auto num_elements = static_cast<int32_t>(args_.scale_bytes / args_.scale_element_bytes);
      for (int32_t i = thread_; i < num_elements; i += kThreads)
        for (int b = 0; b < args_.scale_element_bytes; ++b)
          args_.out.scale_address(plan_, {args_.scale_bytes, args_.scale_element_bytes}, row, i)[b] = std::byte{0};
    });
    if (thread_ < kWarpThreads) keep(message, entry, nullptr);
  }

  // One warp of the group: what there is once for a message and its entries, in the plan and in the outputs. No slot: nothing came.
  __device__ void keep(const ArrivingMessage& message, const ArrivingEntry& entry, const std::byte* slot) const {
    const auto* weights = reinterpret_cast<const float*>(slot + args_.call.slot.weights());
    const int k = static_cast<int>(device::lane_idx());
    if (k == 0) arrivals_.keep(message);
    if (k == 0 && !plan_.has_expert_rows() && message.index < args_.out.num_rows) write_source(message.index, message);
    if (k >= plan_.num_topk) return;
    arrivals_.keep(message, k, entry);
    const float weight = args_.carries_weights && slot != nullptr ? weights[k] : 0.0f;
    if (args_.carries_weights) args_.out.plan_weights[message.index * plan_.topk_stride + k] = weight;
    write_entry(message, k, entry, weight);
  }

  __device__ void write_entry(const ArrivingMessage& message, int k, const ArrivingEntry& entry, float weight) const {
    const DispatchOutputs& out = args_.out;
    if (!plan_.has_expert_rows()) {
      if (message.index >= out.num_rows) return;
      const int32_t at = message.index * plan_.num_topk + k;
      if (out.topk_idx != nullptr) out.topk_idx[at] = entry.expert;
      if (out.topk_weights != nullptr && args_.carries_weights) out.topk_weights[at] = entry.expert >= 0 ? weight : 0.0f;
      return;
    }
    if (entry.row < 0) return;
    write_source(entry.row, message);
    if (out.row_expert != nullptr) out.row_expert[entry.row] = entry.expert;
    if (out.topk_weights != nullptr && args_.carries_weights) out.topk_weights[entry.row] = weight;
  }

  __device__ void write_source(int64_t row, const ArrivingMessage& message) const {
    if (args_.out.source_token != nullptr) args_.out.source_token[row] = message.token;
    if (args_.out.source_rank != nullptr) args_.out.source_rank[row] = message.source;
  }

  // Each thread of the group, of every row; the same bytes for each.
  __device__ void write_scales(const Rows& rows, const std::byte* scales) const {
    const auto num_elements = static_cast<int32_t>(args_.scale_bytes / args_.scale_element_bytes);
    rows.for_each([&](int32_t row) {
#pragma unroll 1
      for (int32_t element = thread_; element < num_elements; element += kThreads) {
        std::byte* to = args_.out.scale_address(plan_, {args_.scale_bytes, args_.scale_element_bytes}, row, element);
        const std::byte* from = scales + element * args_.scale_element_bytes;
        if (args_.scale_element_bytes == 4 && (reinterpret_cast<uintptr_t>(to) & 3) == 0)
          *reinterpret_cast<uint32_t*>(to) = *reinterpret_cast<const uint32_t*>(from);
        else
#pragma unroll 1
          for (int b = 0; b < args_.scale_element_bytes; ++b) to[b] = from[b];
      }
    });
  }

  const LatencyDispatchArgs& args_;
  const PlanView& plan_;
  const Call& call_;
  const Arrivals<Call>& arrivals_;
  const int group_, thread_;
  bool waits_ = true;
};

}  // namespace tern::kernels
