// SPDX-License-Identifier: Apache-2.0
// The receiving half of a small dispatch: rows from the slots that their sources have written to where they lie in the outputs.
#pragma once

#include "kernels/latency_arrivals.cuh"

namespace tern::kernels {

// Spreads the messages that arrive; a group of warps takes a part of one at a time, each of its warps by itself.
template <typename Call>
class MessageSpreader {
 public:
  // is_open: arrivals.open() lies behind this warp. One for which it does not takes its first part meanwhile.
  __device__ MessageSpreader(const LatencyDispatchArgs& args, const Call& call, const Arrivals<Call>& arrivals, bool is_open)
      : args_(args),
        plan_(args.call.plan),
        call_(call),
        arrivals_(arrivals),
        group_(kGroups - 1 - static_cast<int>(threadIdx.x) / kThreads),
        thread_(static_cast<int>(threadIdx.x) % kThreads),
        is_open_(is_open) {}

  // The workers of all blocks, but for the routing block. Groups take parts in turn, those of all sources side by side; first those of
  // a block that do not write outputs meanwhile.
  __device__ void run() {
    if (args_.call.part_bytes <= kFewVecs * kStep)
      run_with<kFewVecs>();
    else
      run_with<kMostVecs>();
  }

 private:
  static constexpr int kThreads = 96, kGroups = kWorkThreads / kThreads;
  static_assert(kGroups * kThreads == kWorkThreads);
  static constexpr int32_t kStep = kThreads * static_cast<int32_t>(sizeof(Vec16));
  // What a thread has of a row at a time: what there is not of a short one costs instructions too.
  static constexpr int kFewVecs = 5, kMostVecs = 10;

  template <int kVecs>
  __device__ void run_with() {
    const bool is_alone = gridDim.x == 1;
    const auto num_blocks = static_cast<int32_t>(is_alone ? 1 : gridDim.x - 1), block = static_cast<int32_t>(is_alone ? 0 : blockIdx.x - 1);
    const int32_t num_groups = kGroups * num_blocks, first = group_ * num_blocks + block;
    if (is_open_) set_end();
#pragma unroll 1
    for (int32_t i = first; block >= 0 && (!is_open_ || i < end_); i += num_groups) {
      ArrivingMessage message;
      const bool is_there = is_open_ ? arrivals_.candidate(call_.row_of(i), message) : arrivals_.await_candidate(call_.row_of(i), message);
      if (is_open_ && !is_there) continue;
      if (call_.may_go_on_without() && call_.is_absent(sender_of(message).rank))
        clear(message);
      else if (!spread<kVecs>(message, is_there, call_.part_of(i), i + num_groups))
        return;
    }
    wait_no_more();
  }

  // All that the sources tell is known. False: the exchange has failed.
  __device__ bool open() {
    is_open_ = true;
    const bool ok = arrivals_.await_open();
    if (ok) set_end();
    return ok;
  }
  __device__ void set_end() { end_ = call_.num_parts_of(arrivals_.num_candidates()); }

  using Sender = typename Call::Sender;
  __device__ Sender sender_of(const ArrivingMessage& message) const { return call_.sender_of(message.source, message.token); }

  // The rows of a message: in each thread of a warp, one.
  struct Rows {
    int32_t row;
    std::byte* address;
    uint32_t valid;

    template <typename Visit>
    __device__ void for_each(Visit visit) const {
#pragma unroll 1
      for (uint32_t left = valid; left != 0; left &= left - 1) visit(__shfl_sync(~0u, row, __ffs(static_cast<int>(left)) - 1));
    }
    template <typename Visit>
    __device__ void for_each_address(Visit visit) const {
#pragma unroll 1
      for (uint32_t left = valid; left != 0; left &= left - 1)
        visit(reinterpret_cast<std::byte*>(__shfl_sync(~0u, reinterpret_cast<uint64_t>(address), __ffs(static_cast<int>(left)) - 1)));
    }
  };

  __device__ void wait_no_more() {
    if (waits_) call_.wait_no_more();
    waits_ = false;
  }

  // Each warp by itself, where rows have flags. False: the exchange has failed.
  __device__ bool await_flag(const ArrivingMessage& message, int part) const {
    if (!call_.has_row_flags()) return true;
    const Sender from = sender_of(message);
    const bool ok = device::lane_idx() != 0 || call_.await_row(from.rank, from.token, part);
    const bool all_ok = __all_sync(~0u, ok) != 0;
    __syncwarp();  // what one thread has acquired, all may read
    return all_ok;
  }

  // What a source tells of a message beside its row, entry k in thread k of a warp: its looks are under way with those at the row.
  struct Words {
    uint64_t entry, weight;
  };
  __device__ Words look_at_words(const Sender& from, bool with_weights) const {
    Words seen = {};
    const int k = static_cast<int>(device::lane_idx());
    if (k >= plan_.num_topk) return seen;
    if (call_.routes()) seen.entry = call_.look_at_word(from.rank, entry_word(from, k));
    if (with_weights) seen.weight = call_.look_at_word(from.rank, weight_word(from, k));
    return seen;
  }
  __device__ bool await_words(const ArrivingMessage& message, bool with_weights, const Words& seen, ArrivingEntry& entry,
                              float& weight) const {
    const int k = static_cast<int>(device::lane_idx());
    if (k >= plan_.num_topk) return true;
    uint32_t sent = 0, bits = 0;
    const Sender from = sender_of(message);
    bool ok = !call_.routes() || call_.await_word_after(seen.entry, from.rank, entry_word(from, k), sent);
    if (with_weights) ok = ok && call_.await_word_after(seen.weight, from.rank, weight_word(from, k), bits);
    entry = arrivals_.entry(message, k, sent);
    weight = __uint_as_float(bits);
    return ok;
  }
  __device__ int32_t entry_word(const Sender& from, int k) const { return args_.call.words.entries() + from.token * plan_.num_topk + k; }
  __device__ int32_t weight_word(const Sender& from, int k) const { return args_.call.words.weights() + from.token * plan_.num_topk + k; }

  // Each warp by itself: a part of a message, if it is there; and opens, if need be. The next one that it takes is `next`, if there is one. False:
  // the exchange has failed.
  template <int kVecs>
  __device__ bool spread(ArrivingMessage& message, bool is_there, int part, int32_t next) {
    const Sender from = sender_of(message);
    std::byte* const slot = call_.slot(call_.rank(), call_.slot_idx(from.rank, from.token));
    const bool with_weights = args_.carries_weights && part == 0 && thread_ < kWarpThreads;
    const bool with_scales = args_.scale_bytes > 0 && part == 0;
    auto* const scales = reinterpret_cast<uint32_t*>(slot + args_.call.slot.scales());
    ArrivingEntry entry{-1, -1};
    float weight = 0.0f;
    Rows rows;
    const int32_t part_begin = part * args_.call.part_bytes, end = min(part_begin + args_.call.part_bytes, args_.row_bytes);
    bool ok = !is_there || await_flag(message, part);
    bool is_placed = is_open_;
#pragma unroll 1
    for (int32_t first = part_begin; first == part_begin || first < end; first += kVecs * kStep) {
      Vec16 values[kVecs];
      const int32_t begin = first + thread_ * static_cast<int32_t>(sizeof(Vec16));
      const RowVecs<kStep> vecs{slot + begin, end - begin, {from.rank, from.token, part}};
      Words seen = {};
      uint32_t scale_word = 0;
      ok = ok && (!is_there || call_.take_vecs(vecs, values, [&] {
             if (first != part_begin) return;
             seen = look_at_words(from, with_weights);
             if (with_scales && thread_ < num_scale_words()) scale_word = look_at(scales + thread_);
             if (is_open_) arrivals_.place(message);
           }));
      if (first == part_begin) {
        if (!is_open_) ok = open() && ok;  // here alone: all warps of the block are to meet at one place of the code
        if (!is_there) return ok;
        if (!is_placed && !call_.has_expert_rows() && ok) {
          arrivals_.place(message);
          is_placed = true;
        }
        ok = ok && await_words(message, with_weights, seen, entry, weight);
        if (!__all_sync(~0u, ok)) return false;
        rows = rows_of(message, entry);
        if (with_scales) ok = spread_scales(from, rows, scales, scale_word);
      }
      if (!__all_sync(~0u, ok)) return false;
      if (next >= end_ && first + kVecs * kStep >= end) wait_no_more();
      rows.for_each_address([&](std::byte* row) {
#pragma unroll
        for (int v = 0; v < kVecs; ++v)
          if (begin + v * kStep < end) *reinterpret_cast<Vec16*>(row + begin + v * kStep) = values[v];
      });
    }
    if (part != 0 || thread_ >= kWarpThreads) return true;
    if (!is_placed) arrivals_.place(message);
    keep(message, entry, weight);
    return true;
  }

  // Each warp, with its entries.
  __device__ Rows rows_of(const ArrivingMessage& message, const ArrivingEntry& entry) const {
    Rows rows;
    rows.row = entry.row;
    if (!call_.has_expert_rows()) rows.row = device::lane_idx() == 0 && message.index < args_.out.num_rows ? message.index : -1;
    rows.address = args_.out.tokens + int64_t{rows.row} * args_.row_bytes;
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
  __device__ bool spread_scales(const Sender& from, const Rows& rows, uint32_t* scales, uint32_t word) const {
    bool ok = true;
#pragma unroll 1
    for (int32_t first = 0; first < num_scale_words() && ok; first += kThreads) {
      const int32_t i = first + thread_;
      const bool has = i < num_scale_words();
      if (has && first > 0) word = look_at(scales + i);
      ok = __all_sync(~0u, !has || call_.take_word(scales + i, {from.rank, from.token, 0}, word)) != 0;
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
  bool is_open_;
  int32_t end_ = 0;  // of the parts that there may be
  bool waits_ = true;
};

}  // namespace tern::kernels
