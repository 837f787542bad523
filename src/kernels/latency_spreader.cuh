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
      if (is_absent)
        clear(message);
      else if (!await_flag(message, call_.part_of(i)) || !spread(message, call_.part_of(i), i + num_groups >= end))
        return;
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

  // Each warp by itself, where rows have flags. False: the exchange has failed.
  __device__ bool await_flag(const ArrivingMessage& message, int part) const {
    if (!call_.has_row_flags()) return true;
    const bool ok = device::lane_idx() != 0 || call_.await_row(message.source, message.token, part);
    const bool all_ok = __all_sync(~0u, ok) != 0;
    __syncwarp();  // what one thread has acquired, all may read
    return all_ok;
  }

  // What a source tells of a message beside its row, entry k in thread k of a warp: its looks are under way with those at the row.
  struct Words {
    uint64_t entry, weight;
  };
  __device__ Words look_at_words(const ArrivingMessage& message, bool with_weights) const {
    Words seen = {};
    const int k = static_cast<int>(device::lane_idx());
    if (k >= plan_.num_topk) return seen;
    if (call_.routes()) seen.entry = call_.look_at_word(message.source, entry_word(message, k));
    if (with_weights) seen.weight = call_.look_at_word(message.source, weight_word(message, k));
    return seen;
  }
  __device__ bool await_words(const ArrivingMessage& message, bool with_weights, const Words& seen, ArrivingEntry& entry,
                              float& weight) const {
    const int k = static_cast<int>(device::lane_idx());
    if (k >= plan_.num_topk) return true;
    uint32_t sent = 0, bits = 0;
    bool ok = !call_.routes() || call_.await_word_after(seen.entry, message.source, entry_word(message, k), sent);
    if (with_weights) ok = ok && call_.await_word_after(seen.weight, message.source, weight_word(message, k), bits);
    entry = arrivals_.entry(message, k, sent);
    weight = __uint_as_float(bits);
    return ok;
  }
  __device__ int32_t entry_word(const ArrivingMessage& message, int k) const {
    return static_cast<int32_t>(args_.call.words.entries()) + message.token * plan_.num_topk + k;
  }
  __device__ int32_t weight_word(const ArrivingMessage& message, int k) const {
    return static_cast<int32_t>(args_.call.words.weights()) + message.token * plan_.num_topk + k;
  }

  // Each warp by itself: a part of a message; is_last: it takes no other one. False: the exchange has failed.
  __device__ bool spread(ArrivingMessage& message, int part, bool is_last) {
    constexpr int kVecs = 10;
    constexpr int32_t kStep = kThreads * static_cast<int32_t>(sizeof(Vec16));
    std::byte* const slot = call_.slot(call_.rank(), call_.slot_idx(message.source, message.token));
    const bool with_weights = args_.carries_weights && part == 0 && thread_ < kWarpThreads;
    const bool with_scales = args_.scale_bytes > 0 && part == 0;
    auto* const scales = reinterpret_cast<uint32_t*>(slot + args_.call.slot.scales());
    ArrivingEntry entry{-1, -1};
    float weight = 0.0f;
    Rows rows;
    const int32_t part_begin = part * args_.call.part_bytes, end = min(part_begin + args_.call.part_bytes, args_.row_bytes);
#pragma unroll 1
    for (int32_t first = part_begin; first == part_begin || first < end; first += kVecs * kStep) {
      Vec16 values[kVecs];
      const int32_t begin = first + thread_ * static_cast<int32_t>(sizeof(Vec16));
      const RowVecs<kStep> vecs{slot + begin, end - begin, {message.source, message.token, part}};
      Words seen = {};
      uint32_t scale_word = 0;
      bool ok = call_.take_vecs(vecs, values, [&] {
        if (first != part_begin) return;
        seen = look_at_words(message, with_weights);
        if (with_scales && thread_ < num_scale_words()) scale_word = look_at(scales + thread_);
        arrivals_.place(message);
      });
      if (first == part_begin) {
        ok = ok && await_words(message, with_weights, seen, entry, weight);
        if (!__all_sync(~0u, ok)) return false;
        rows = rows_of(message, entry);
        if (with_scales) ok = spread_scales(message, rows, scales, scale_word);
      }
      if (!__all_sync(~0u, ok)) return false;
      if (is_last && first + kVecs * kStep >= end) wait_no_more();
      rows.for_each([&](int32_t row) {
        std::byte* to = args_.out.tokens + int64_t{row} * args_.row_bytes;
#pragma unroll
        for (int v = 0; v < kVecs; ++v)
          if (begin + v * kStep < end) *reinterpret_cast<Vec16*>(to + begin + v * kStep) = values[v];
      });
    }
    if (part == 0 && thread_ < kWarpThreads) keep(message, entry, weight);
    return true;
  }

  // Each warp, with its entries.
  __device__ Rows rows_of(const ArrivingMessage& message, const ArrivingEntry& entry) const {
    Rows rows;
    rows.row = entry.row;
    if (!call_.has_expert_rows()) rows.row = device::lane_idx() == 0 && message.index < args_.out.num_rows ? message.index : -1;
    rows.valid = __ballot_sync(~0u, rows.row >= 0);
    return rows;
  }

  // Zeros in place of what its source has not sent, of a call along a plan.
  __device__ __noinline__ void clear(ArrivingMessage& message) const {
    arrivals_.place(message);
    const int k = static_cast<int>(device::lane_idx());
    const ArrivingEntry entry = k < plan_.num_topk ? arrivals_.entry(message, k, 0) : ArrivingEntry{-1, -1};
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
    if (thread_ < kWarpThreads) keep(message, entry, 0.0f);
  }

  // One warp of the group: what there is once for a message and its entries, in the plan and in the outputs.
  __device__ void keep(const ArrivingMessage& message, const ArrivingEntry& entry, float weight) const {
    const int k = static_cast<int>(device::lane_idx());
    if (k == 0) arrivals_.keep(message);
    if (k == 0 && !call_.has_expert_rows() && message.index < args_.out.num_rows) write_source(message.index, message);
    if (k >= plan_.num_topk) return;
    arrivals_.keep(message, k, entry);
    if (args_.carries_weights) args_.out.plan_weights[message.index * plan_.topk_stride + k] = weight;
    write_entry(message, k, entry, weight);
  }

  __device__ void write_entry(const ArrivingMessage& message, int k, const ArrivingEntry& entry, float weight) const {
    const DispatchOutputs& out = args_.out;
    if (!call_.has_expert_rows()) {
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

  __device__ int32_t num_scale_words() const {
    return static_cast<int32_t>((args_.call.slot.end() - args_.call.slot.scales()) / sizeof(uint32_t));
  }
  // Each thread of the group takes some words of the scales and writes them to every row; of the first one it has looked at it has seen `word`.
  // False: the exchange has failed.
  __device__ bool spread_scales(const ArrivingMessage& message, const Rows& rows, uint32_t* scales, uint32_t word) const {
    bool ok = true;
#pragma unroll 1
    for (int32_t first = 0; first < num_scale_words() && ok; first += kThreads) {
      const int32_t i = first + thread_;
      const bool has = i < num_scale_words();
      if (has && first > 0) word = look_at(scales + i);
      ok = __all_sync(~0u, !has || call_.take_word(scales + i, {message.source, message.token, 0}, word)) != 0;
      if (args_.out.scales != nullptr && ok)
        rows.for_each([&](int32_t row) { write_scales(row, i * static_cast<int32_t>(sizeof(word)), word); });
    }
    return ok;
  }
  // The scales of a row at bytes `at`: a word of them, which may be several or a part of one.
  __device__ void write_scales(int32_t row, int32_t at, uint32_t word) const {
    const int32_t element_bytes = args_.scale_element_bytes;
    const auto address = [&](int32_t byte) {
      const int32_t element = byte / element_bytes;
      return args_.out.scale_address(plan_, {args_.scale_bytes, element_bytes}, row, element) + (byte - element * element_bytes);
    };
    if (element_bytes == 4 && at < args_.scale_bytes && (reinterpret_cast<uintptr_t>(args_.out.scales) & 3) == 0) {
      *reinterpret_cast<uint32_t*>(address(at)) = word;
      return;
    }
#pragma unroll 1
    for (int32_t byte = at; byte < min(at + 4, args_.scale_bytes); ++byte, word >>= 8) *address(byte) = static_cast<std::byte>(word);
  }

  const LatencyDispatchArgs& args_;
  const PlanView& plan_;
  const Call& call_;
  const Arrivals<Call>& arrivals_;
  const int group_, thread_;
  bool waits_ = true;
};

}  // namespace tern::kernels
