// SPDX-License-Identifier: Apache-2.0
// The sending half of a small combine: what the experts' ranks push to the owners of tokens. And how a warp makes a part of a row's sum, which
// both halves do.
#pragma once

#include "kernels/latency.cuh"
#include "kernels/log_rows.cuh"
#include "kernels/sums.cuh"

namespace tern::kernels {

// What of a combine is left out of the kernels for usual calls, or of those for rows without flags.
template <typename Call>
__device__ __forceinline__ bool is_per_entry(const LatencyCombineArgs& args) {
  return Call::has_row_flags() && args.per_entry;
}
template <typename Call>
__device__ __forceinline__ bool sums_owner_weights(const LatencyCombineArgs& args) {
  return !Call::is_usual() && args.sums_owner_weights;
}
template <typename Call>
__device__ __forceinline__ bool returns_weights(const LatencyCombineArgs& args) {
  return !Call::is_usual() && args.returns_weights;
}

// Where the row of (rank, token) is, or with per_entry the rows of the token's entries.
template <typename Call>
__device__ __forceinline__ int32_t slot_idx_of(const LatencyCombineArgs& args, const Call& call, int rank, int32_t token) {
  return is_per_entry<Call>(args) && args.shares_slots ? token : call.slot_idx(rank, token);
}

// Adds the terms at bytes `at` of a row of Wire, and one step of the warp further on.
template <typename Wire, int kVecs>
__device__ __forceinline__ void add_terms(Terms terms, int at, int end, float (&sums)[kVecs][Wire::kElements]) {
  while (terms.valid != 0) add_batch<Wire, kVecs>(take_batch(terms), at, end, sums);
}
// The same of rows in the 10-bit encoding.
template <typename Wire, int kVecs>
__device__ __forceinline__ void add_log_terms(Terms terms, int at, int end, float (&sums)[kVecs][Wire::kElements]) {
  constexpr int kStep = 32 * sizeof(Vec16);
  while (terms.valid != 0) {
    const Term term = take_term(terms);
#pragma unroll
    for (int v = 0; v < kVecs; ++v)
      if (const int here = at + v * kStep; here < end)
        LogRow<Wire>::add(sums[v], LogRow<Wire>::load(term.address, here / static_cast<int>(sizeof(Vec16)) * Wire::kElements), term.weight);
  }
}

// What a warp sums at once: of each thread two times 16 bytes.
inline constexpr int kSumVecs = kPieceBytes / 512;
template <typename Wire>
using PieceSums = float[kSumVecs][Wire::kElements];

// Sums over bytes [begin, end) of a row of Wire, as one warp makes them: make(at, sums) adds to zeros what there is for the thread at bytes `at`, and
// one step of the warp further on. All threads call store(at, sum), also beyond the end.
template <typename Wire, typename Make, typename Store>
__device__ __forceinline__ void sum_bytes(int begin, int end, Make make, Store store) {
  constexpr int kStep = 32 * sizeof(Vec16);
#pragma unroll 1
  for (int first = begin; first < end; first += kPieceBytes) {
    const int at = first + static_cast<int>(device::lane_idx() * sizeof(Vec16));
    PieceSums<Wire> sums = {};
    make(at, sums);
#pragma unroll
    for (int v = 0; v < kSumVecs; ++v)
      if (first + v * kStep < end) store(at + v * kStep, sums[v]);
  }
}

// Pushes what this rank has for the owners of the messages that it received. kLog: in the 10-bit encoding.
template <typename Wire, bool kLog, typename Call>
class ShareSender {
 public:
  // Sums the block's first message, if it can: meanwhile the raising warp looks whether anything may be sent at all.
  __device__ ShareSender(const LatencyCombineArgs& args, const Call& call)
      : args_(args), plan_(args.call.plan), call_(call), num_messages_(plan_.received_begin[call.num_sources()]), begins_(args, call) {
    if (goes_round()) first_message_ = plan_.received_begin[call.rank() + 1 == call.num_ranks() ? 0 : call.rank() + 1];
    if (is_raising() || !call.sends()) return;
    ahead_ = fetch(message_at(first()));
    sum_first();
    target_ = target_of(message_at(first()), ahead_);
  }

  // All threads of all blocks. The workers of a block take a part of a message at a time, each warp a piece of it; the raising warp follows them.
  __device__ void run() {
    if (is_raising()) {
      raise();
      return;
    }
    for (int32_t nth = 0, i = first(); i < num_parts(); ++nth, i += step()) {
      if (nth >= kAhead) device::sync_some_warps(kFreeBarrier + nth % kAhead, kLatencyThreads);
      const Share share = ahead_;
      ahead_ = fetch(message_at(i + step()));
      push(share, i, nth == 0 && has_sums_);
      if (is_unclear_) call_.note_unclear(nth % kAhead);
      is_unclear_ = false;
      device::arrive_at_barrier(kDoneBarrier + nth % kAhead, kLatencyThreads);
      target_ = target_of(message_at(i + step()), ahead_);
    }
  }

 private:
  static constexpr int kRankBatches = layout::kMostLatencyRanks / kWarpThreads;
  // The workers are ahead of the raising warp by up to so many messages, with a pair of barriers for each.
  static constexpr int kAhead = 4, kDoneBarrier = 1, kFreeBarrier = kDoneBarrier + kAhead;

  // Of all messages; a block takes every step()-th. Behind them may lie any number.
  __device__ int32_t num_parts() const { return call_.num_parts_of(num_messages_); }

  // A message, as the plan has it, with entry lane_idx().
  struct Share {
    int32_t token;
    int32_t row;
    float weight;
  };

  // Where it goes.
  struct Target {
    int owner;
    int32_t token;  // of those that the owner sends
    std::byte* slot;
  };

  // Where each source's messages begin, in the threads of a warp.
  struct Begins {
    __device__ Begins(const LatencyCombineArgs& args, const Call& call) {
      for (int b = 0; b < kRankBatches; ++b) {
        const int source = b * kWarpThreads + static_cast<int>(device::lane_idx());
        end[b] = source < call.num_sources() ? args.call.plan.received_begin[source + 1] : 0x7fffffff;
      }
    }
    // All threads of a warp.
    __device__ int source_of(int32_t message) const {
      int source = 0;
      for (int b = 0; b < kRankBatches; ++b) source += __popc(__ballot_sync(~0u, end[b] <= message));
      return source;
    }
    int32_t end[kRankBatches];
  };

  __device__ static int32_t first() { return static_cast<int32_t>(blockIdx.x); }
  __device__ static int32_t step() { return static_cast<int32_t>(gridDim.x); }

  // Where blocks have several messages, a rank begins with those of the next rank: not all of them send to the same one at a time.
  __device__ bool goes_round() const { return most_messages() > step(); }
  __device__ int32_t most_messages() const { return args_.call.sent_tokens * call_.num_ranks(); }
  // The message that the i-th part to be pushed is of.
  __device__ int32_t message_at(int32_t i) const {
    int32_t message = call_.row_of(i);
    if (!goes_round()) return message;
    message += first_message_;
    return message < num_messages_ ? message : message - num_messages_;
  }

  // Bytes of a row that a warp takes of part `i`.
  struct Piece {
    int begin, end;
  };
  __device__ Piece piece_of(int32_t i) const {
    const int warp = static_cast<int>(threadIdx.x) / kWarpThreads, part_begin = call_.part_of(i) * args_.call.part_bytes;
    const int part_end = min(part_begin + args_.call.part_bytes, args_.row_bytes);
    const int begin = min(part_begin + warp * args_.piece_bytes, part_end);
    return {begin, min(begin + args_.piece_bytes, part_end)};
  }

  __device__ Terms terms_of(const Share& share) const {
    Terms terms;
    terms.valid = __ballot_sync(~0u, share.row >= 0);
    terms.address = args_.rows + int64_t{share.row} * args_.row_bytes;
    terms.weight = share.weight;
    return terms;
  }

  // Of the first part, the first bytes of the warp's piece. The plan of a failed exchange may say anything, so that no row is read by it.
  __device__ void sum_first() {
    const bool can = !kLog && call_.has_expert_rows() && !is_per_entry<Call>(args_) && !sums_owner_weights<Call>(args_);
    has_sums_ = __all_sync(~0u, can && first() < num_parts() && call_.was_healthy()) != 0;
    if (!has_sums_) return;
    const Piece mine = piece_of(first());
    PieceSums<Wire> sums = {};
    add_terms<Wire, kSumVecs>(terms_of(ahead_), mine.begin + static_cast<int>(device::lane_idx() * sizeof(Vec16)), mine.end, sums);
#pragma unroll
    for (int v = 0; v < kSumVecs; ++v) summed_[v] = Wire::narrow(sums[v]);
  }
  // Pushes them; returns what is left of the piece.
  __device__ Piece push_first(std::byte* slot, const Piece& mine) {
    const int at = mine.begin + static_cast<int>(device::lane_idx() * sizeof(Vec16));
#pragma unroll
    for (int v = 0; v < kSumVecs; ++v)
      if (at + v * kPieceBytes / kSumVecs < mine.end) store(slot + at + v * kPieceBytes / kSumVecs, summed_[v]);
    return {min(mine.begin + kPieceBytes, mine.end), mine.end};
  }

  // May be asked for beyond the last message, and in a failed exchange, where the plan may say anything, for any.
  __device__ Share fetch(int32_t message) const {
    Share share = {};
    if (static_cast<uint32_t>(message) >= static_cast<uint32_t>(most_messages())) return share;
    share.token = plan_.source_token[message];
    const int k = static_cast<int>(device::lane_idx());
    const int32_t entry = message * plan_.topk_stride + k;
    share.row = call_.has_expert_rows() && k < plan_.num_topk ? plan_.received_rows[entry] : -1;
    share.weight = args_.entry_weights != nullptr && k < plan_.num_topk ? args_.entry_weights[entry] : 1.0f;
    return share;
  }

  // All threads of a warp. In a failed exchange some rank and any address.
  __device__ Target target_of(int32_t message, const Share& share) const {
    const auto owner = call_.sender_of(min(begins_.source_of(message), call_.num_sources() - 1), share.token);
    return {owner.rank, owner.token, call_.slot(owner.rank, slot_idx_of(args_, call_, call_.rank(), owner.token))};
  }

  // One warp: raises the flag of each part that the workers have pushed, if it needs one.
  __device__ void raise() const {
    for (int32_t nth = 0, i = first(); i < num_parts(); ++nth, i += step()) {
      const int32_t message = message_at(i);
      const auto [owner, token] = call_.sender_of(begins_.source_of(message), plan_.source_token[message]);
      device::sync_some_warps(kDoneBarrier + nth % kAhead, kLatencyThreads);
      if (call_.needs_flag(nth % kAhead)) {
        // Without the owner's weights, because the exchange has failed, the row is not right.
        const bool is_right = !sums_owner_weights<Call>(args_) || !call_.operation().is_aborted();
        if (device::lane_idx() == 0 && is_right && (call_.cut_off() >> owner & 1) == 0) call_.raise_row(owner, token, call_.part_of(i));
        __syncwarp();
      }
      // Without waiting for the workers, who come here some messages later.
      if (i + kAhead * step() < num_parts()) device::arrive_at_barrier(kFreeBarrier + nth % kAhead, kLatencyThreads);
    }
  }

  // Part `i`. has_sums: its beginning is summed.
  __device__ void push(const Share& share, int32_t i, bool has_sums) {
    const int32_t message = message_at(i);
    const auto [owner, token, slot] = target_;
    if (is_cut_off(owner)) return;
    if (returns_weights<Call>(args_) && call_.part_of(i) == 0) return_weights(message, owner, token);
    Piece mine = piece_of(i);
    if (has_sums) mine = push_first(slot, mine);
    if (mine.begin == mine.end) return;
    if (!call_.has_expert_rows()) {
      if (message < plan_.row_capacity) copy(args_.rows + int64_t{message} * args_.row_bytes, slot, mine);
      return;
    }
    Terms terms = terms_of(share);
    if (sums_owner_weights<Call>(args_) && !__all_sync(~0u, share.row < 0 || await_owner_weight(owner, token, terms.weight))) return;
    if (is_per_entry<Call>(args_))
      copy_entries(terms, slot, mine);
    else
      sum_into(terms, slot, mine);
  }

  // All threads of a warp alike, though other warps may add to the set meanwhile.
  __device__ bool is_cut_off(int owner) const {
    return call_.may_go_on_without() && __shfl_sync(~0u, static_cast<int>(call_.cut_off() >> owner & 1), 0) != 0;
  }

  __device__ void sum_into(const Terms& terms, std::byte* row, const Piece& mine) {
    sum_bytes<Wire>(
        mine.begin, mine.end, [&](int at, PieceSums<Wire>& sums) { add_terms<Wire, kSumVecs>(terms, at, mine.end, sums); },
        [&](int at, const auto& sum) {
          if constexpr (kLog)
            LogRow<Wire>::store(sum, at < mine.end, at / static_cast<int>(sizeof(Vec16)) * Wire::kElements, row);
          else if (at < mine.end)
            store(row + at, Wire::narrow(sum));
        });
  }
  __device__ void store(std::byte* to, const Vec16& value) {
    is_unclear_ = is_unclear_ || looks_unwritten(value);
    *reinterpret_cast<Vec16*>(to) = value;
  }

  __device__ bool await_owner_weight(int source, int32_t token, float& weight) const {
    const int k = static_cast<int>(device::lane_idx());
    uint32_t bits = 0;
    const bool is_there = call_.await_word(source, args_.call.words.weights() + token * plan_.num_topk + k, bits);
    if (!is_there && call_.may_go_on_without()) call_.cut_off(source);
    weight = __uint_as_float(bits);
    return is_there;
  }

  __device__ void copy_entries(const Terms& terms, std::byte* slot, const Piece& mine) {
    if constexpr (kLog) {
      for (uint32_t left = terms.valid; left != 0; left &= left - 1) {
        const int k = __ffs(static_cast<int>(left)) - 1;
        copy(address_of(terms, k), slot + k * args_.wire_bytes, mine);
      }
    } else {
      for (uint32_t left = terms.valid; left != 0;) left = copy_some(terms, left, slot, mine);
    }
  }
  __device__ static const std::byte* address_of(const Terms& terms, int k) {
    return reinterpret_cast<const std::byte*>(__shfl_sync(~0u, reinterpret_cast<uint64_t>(terms.address), k));
  }

  // The first few entries of those that are left, with all their loads under way together; returns the others.
  __device__ uint32_t copy_some(const Terms& terms, uint32_t left, std::byte* slot, const Piece& mine) {
    constexpr int kAtOnce = 4, kStep = 32 * sizeof(Vec16);
    const std::byte* from[kAtOnce];
    std::byte* to[kAtOnce];
    const int num = min(kAtOnce, __popc(left));
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      if (u >= num) break;
      const int k = __ffs(static_cast<int>(left)) - 1;
      left &= left - 1;
      from[u] = address_of(terms, k);
      to[u] = slot + k * args_.wire_bytes;
    }
#pragma unroll 1
    for (int at = mine.begin + static_cast<int>(device::lane_idx() * sizeof(Vec16)); at < mine.end; at += kPieceBytes) {
      Vec16 values[kAtOnce][kSumVecs];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u)
#pragma unroll
        for (int v = 0; v < kSumVecs; ++v)
          if (u < num && at + v * kStep < mine.end) values[u][v] = device::load_vec16(from[u] + at + v * kStep);
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u)
#pragma unroll
        for (int v = 0; v < kSumVecs; ++v)
          if (u < num && at + v * kStep < mine.end) store(to[u] + at + v * kStep, values[u][v]);
    }
    return left;
  }

  // The warp's piece of a row.
  __device__ void copy(const std::byte* from, std::byte* to, const Piece& mine) {
    Terms one;
    one.valid = 1;
    one.address = from;
    if constexpr (kLog)
      sum_into(one, to, mine);
    else
      copy_some(one, one.valid, to, mine);
  }

  // Weights as they came for each entry; per_entry, those of other ranks' entries are left alone.
  __device__ void return_weights(int32_t message, int owner, int32_t token) const {
    for (int k = static_cast<int>(threadIdx.x); k < plan_.num_topk; k += kWorkThreads) {
      const int64_t entry = int64_t{message} * plan_.topk_stride + k;
      if (args_.per_entry && plan_.received_experts[entry] < 0) continue;
      float weight = 0.0f;
      if (call_.has_expert_rows()) {
        if (plan_.received_rows[entry] >= 0) weight = args_.returned_weights[plan_.received_rows[entry]];
      } else if (message < plan_.row_capacity) {
        weight = args_.returned_weights[int64_t{message} * plan_.num_topk + k];
      }
      call_.put_word(owner, args_.call.words.returned() + token * plan_.num_topk + k, __float_as_uint(weight));
    }
  }

  const LatencyCombineArgs& args_;
  const PlanView& plan_;
  const Call& call_;
  const int32_t num_messages_;
  const Begins begins_;
  int32_t first_message_ = 0;
  Share ahead_ = {};         // the next message
  Target target_ = {};       // where it goes
  bool has_sums_ = false;    // of the block's first part
  bool is_unclear_ = false;  // what this thread has pushed of a part
  Vec16 summed_[kSumVecs] = {};
};

}  // namespace tern::kernels
