// SPDX-License-Identifier: Apache-2.0
// The protocol of the latency path, as the kernels of dispatch and combine see it.
//
//   sending    announce();  write slots;  raise_row(...) behind those that need it
//   receiving  await_calls(): the sources run the same call, or the exchange fails;  take a row: look at its words until all are written, and put
//              back what says that they are not (ArrivingRow)
//   both       begin(), or lead() and follow(): what was pushed two epochs ago is used up;  finish()
//
// So a row has no flag as a rule, and no fence: it is there when none of its words is kUnwritten. One that holds this very word has a flag raised,
// which who waits for long looks at too. All rows have flags (has_row_flags()) where they show nothing by themselves: under TERN_ON_TIMEOUT_MASK,
// since a rank that was given up may write on, and in the 10-bit encoding, whose words are written by several threads; and where that is quicker,
// in exact combines.
//
// Under TERN_ON_TIMEOUT_MASK a rank is in an operation with all that it sends, or not at all: each block first waits for everything that comes,
// and the first one that has all of a rank, or misses something at the deadline, decides for all blocks (settle_attendance()).
//
// Nothing that is small has a flag: it travels in words that hold their epoch (layout::LatencyWords). Nothing waits for all blocks: that this
// rank has consumed an epoch is said by the next kernel, and the epoch is advanced by the block that began last.
#pragma once

#include "kernels/latency_kinds.h"
#include "kernels/latency_looks.cuh"
#include "kernels/operation.cuh"

namespace tern::kernels {

// The last warp of a block waits until rows have arrived at their owners, and raises their flags. Meanwhile the others, the workers, go on.
inline constexpr int kRaisingWarp = kPushingWarps;
inline constexpr int kWorkThreads = kRaisingWarp * kWarpThreads;
__device__ __forceinline__ bool is_raising() { return threadIdx.x >= kWorkThreads; }
// The first kThreads of a block.
template <int kThreads>
__device__ __forceinline__ void sync_first() {
  device::sync_some_warps(15, kThreads);
}

// A number divided by what the reciprocal is of.
__device__ __forceinline__ int32_t quotient(int32_t number, uint32_t reciprocal) {
  return reciprocal == 0 ? number : static_cast<int32_t>(__umulhi(static_cast<uint32_t>(number), reciprocal));
}

// The rank of an expert.
__device__ __forceinline__ int rank_of(const LatencyArgs& args, int32_t expert) { return quotient(expert, args.experts_reciprocal); }

template <CallKind kKind>
class LatencyCall {
 public:
  // Asks for what begin() looks at before all else, since it comes from memory.
  __device__ explicit LatencyCall(const LatencyArgs& args)
      : args_(args),
        last_epoch_(args.exchange.state->epoch),
        op_{args.exchange, args.operation, sends() ? last_epoch_ + 1 : *args.ticket},
        aborted_(load_relaxed_sys(abort_word())) {
    const int peer = static_cast<int>(device::lane_idx());
    if (is_raising() && peer < num_ranks() && !is_masked(peer)) consumed_ = load_relaxed_sys(&progress(rank(), peer)->consumed);
  }

  __device__ const Operation& operation() const { return op_; }
  __device__ int rank() const { return args_.exchange.rank; }
  __device__ int num_ranks() const { return args_.exchange.num_ranks; }

  __device__ static constexpr bool is_usual() { return kKind == CallKind::kUsual; }
  __device__ bool sends() const { return is_usual() || args_.sends; }
  __device__ bool receives() const { return is_usual() || args_.receives; }
  __device__ bool routes() const { return is_usual() || args_.routes; }  // a usual dispatch does
  __device__ int32_t layout() const { return is_usual() ? TERN_LAYOUT_EXPERT_PADDED : args_.plan.layout; }
  __device__ bool has_expert_rows() const { return layout() != TERN_LAYOUT_RANK_MAJOR; }

  // There are never more ranks than these.
  __device__ std::byte* window(int rank) const { return args_.exchange.inline_windows[rank]; }
  __device__ bool is_masked(int rank) const { return window(rank) == nullptr; }
  // When the kernel began. What the plan says may be used: it is not that of a failed exchange, which may be anything.
  __device__ bool was_healthy() const { return aborted_ == 0; }

  // Under TERN_ON_TIMEOUT_MASK: ranks, a bit each, that nothing is sent to, known behind begin(); and that have no part in what this operation
  // receives, known behind settle_attendance().
  __device__ static constexpr bool may_go_on_without() { return kMasks; }
  __device__ uint64_t cut_off() const { return may_go_on_without() ? *shared_ranks(kCutOff) : 0; }
  __device__ bool is_absent(int rank) const { return may_go_on_without() && (*shared_ranks(kAbsent) >> rank & 1) != 0; }
  __device__ bool takes(int rank) const { return !is_masked(rank) && (cut_off() >> rank & 1) == 0; }
  // Something of `source` has not come until the deadline.
  __device__ void miss(int source) const { add_rank(kMissing, source); }
  // Nothing more is sent to `owner`: what it would get is not right.
  __device__ void cut_off(int owner) const { add_rank(kCutOff, owner); }

  // Sources of messages, as the plan has them: ranks, or between nodes those of all nodes.
  __device__ static constexpr bool has_batches() { return kKind == CallKind::kBatches || kKind == CallKind::kMaskingBatches; }
  __device__ int num_batches() const { return has_batches() ? args_.words.num_batches : 1; }
  __device__ int num_sources() const { return has_batches() ? args_.plan.num_sources : num_ranks(); }
  // The rank of this node that brings the tokens of such a source, and the batch of that rank that they are.
  struct Batch {
    int rank;
    int node;
  };
  __device__ Batch batch_of(int source) const {
    if (!has_batches()) return {source, 0};
    const int node = quotient(source, args_.ranks_reciprocal);
    return {source - node * num_ranks(), node};
  }
  __device__ int source_of(const Batch& batch) const { return has_batches() ? batch.node * num_ranks() + batch.rank : batch.rank; }
  // The same with a token, and its number among those that the rank sends.
  struct Sender {
    int rank;
    int32_t token;
  };
  __device__ Sender sender_of(int source, int32_t token) const {
    const Batch batch = batch_of(source);
    return {batch.rank, has_batches() ? batch.node * static_cast<int32_t>(args_.plan.max_tokens) + token : token};
  }
  // The other way round, of what this rank sends.
  struct BatchToken {
    int node;
    int32_t token;
  };
  __device__ BatchToken batch_token(int32_t token) const {
    if (!has_batches()) return {0, token};
    const int node = token / static_cast<int32_t>(args_.plan.max_tokens);
    return {node, token - node * static_cast<int32_t>(args_.plan.max_tokens)};
  }
  __device__ bool is_there(const BatchToken& at) const { return at.token < args_.plan.num_tokens[at.node * num_ranks() + rank()]; }

  // What `source` writes to `owner`.
  __device__ layout::ProgressCell* progress(int owner, int source) const {
    return reinterpret_cast<layout::ProgressCell*>(window(owner) + args_.progress_at) + source;
  }
  __device__ std::byte* slot(int owner, int32_t slot_idx) const {
    return window(owner) + args_.slots_at[op_.epoch % layout::kNumBanks] + int64_t{slot_idx} * args_.slot_stride;
  }
  __device__ int32_t slot_idx(int source, int32_t token) const { return source * args_.sent_tokens + token; }
  __device__ uint64_t* words(int owner, int source) const {
    return reinterpret_cast<uint64_t*>(window(owner) + args_.words_at[op_.epoch % layout::kNumBanks]) + source * args_.words_stride;
  }
  __device__ void put_word(int owner, int32_t word, uint32_t value) const { op_.put_word(words(owner, rank()) + word, value); }
  __device__ bool await_word(int source, int32_t word, uint32_t& value, int64_t* wait_ns = nullptr) const {
    return reported(op_.await_word<kMasks>(words(rank(), source) + word, source, value, wait_ns));
  }
  // The same behind a look that has shown `seen`, perhaps some time ago.
  __device__ bool await_word_after(uint64_t seen, int source, int32_t word, uint32_t& value) const {
#pragma unroll 1
    for (int look = 0; look < num_first_looks() && !op_.is_of_epoch(seen); ++look) seen = look_at_word(source, word);
    value = static_cast<uint32_t>(seen);
    return op_.is_of_epoch(seen) || await_word(source, word, value);
  }
  __device__ uint64_t look_at_word(int source, int32_t word) const { return load_relaxed_sys(words(rank(), source) + word); }

  // All threads of the block. False: the exchange has failed, and nothing is to be done. The raising warp finds out, while the others ask for
  // something, or sum it.
  __device__ bool begin() {
    bool ok = !is_raising() || may_begin();
    // All have the epoch now: when all blocks have come here it may be advanced.
    ok = __syncthreads_and(ok && op_.epoch != 0 ? 1 : 0) != 0;
    if (threadIdx.x == kWorkThreads) count_begun();  // the others have more to do
    return ok;
  }

  // The same where the block's warps do not all wait for each other: the raising warp leads, and says what it has found at the barriers where
  // the others follow. Its threads are counted there too.
  struct Start {
    int barrier;
    int num_threads;
  };
  template <typename... Starts>
  __device__ bool lead(Starts... starts) const {
    const bool ok = may_begin();
    if (device::lane_idx() == 0) has_begun() = ok;
    __syncwarp();
    (device::arrive_at_barrier(starts.barrier, starts.num_threads), ...);
    return ok;
  }
  __device__ bool follow(Start start) const {
    const bool has_epoch = __all_sync(~0u, op_.epoch != 0) != 0;  // it has come from memory
    device::arrive_at_barrier(kBegunBarrier, kLatencyThreads);
    device::sync_some_warps(start.barrier, start.num_threads);
    return has_epoch && has_begun();
  }
  // Behind lead(), when all warps have the epoch.
  __device__ void count_followers() {
    device::sync_some_warps(kBegunBarrier, kLatencyThreads);
    if (device::lane_idx() == 0) count_begun();
  }

  // One warp: says to everybody what this rank calls, and how many tokens it has: num_tokens(batch).
  template <typename NumTokens>
  __device__ void announce(NumTokens num_tokens) const {
#pragma unroll 1
    for (int peer = static_cast<int>(device::lane_idx()); peer < num_ranks(); peer += kWarpThreads) {
      if (!takes(peer)) continue;
      put_word(peer, args_.words.call(), args_.call_hash);
#pragma unroll 1
      for (int batch = 0; batch < num_batches(); ++batch)
        put_word(peer, args_.words.num_tokens() + batch, static_cast<uint32_t>(num_tokens(batch)));
    }
  }
  // One warp: the same for ranks that run an operation of the throughput path, by mistake.
  __device__ void announce_to_throughput() const {
#pragma unroll 1
    for (int peer = static_cast<int>(device::lane_idx()); peer < num_ranks(); peer += kWarpThreads) {
      if (!takes(peer)) continue;
      layout::CallCell* cell = op_.call(peer, rank());
      cell->shape = args_.shape;
      cell->epoch = op_.epoch;
      cell->operation = op_.operation;
      store_release_sys(&progress(peer, rank())->ready, op_.epoch);
    }
  }

  // One warp: do the sources run the same call? If not, the exchange fails, and so do all waits.
  __device__ void await_calls() const {
    uint32_t hash = 0;
#pragma unroll 1
    for (int source = static_cast<int>(device::lane_idx()); source < num_ranks(); source += kWarpThreads)
      if (!is_masked(source) && await_word(source, static_cast<int32_t>(args_.words.call()), hash, wait_of(source)))
        check_call(source, hash);
  }

  __device__ bool check_call(int source, uint32_t hash) const {
    if (hash == args_.call_hash) return true;
    op_.give_up(TERN_MISMATCH, source, op_.epoch, op_.epoch);
    return false;
  }

  // Have all rows flags?
  __device__ static constexpr bool has_row_flags() { return kMasks || kKind == CallKind::kFlagged; }
  // Threads that have written the row have met at a barrier before: one of them tells the owner of the slot.
  __device__ void raise_row(int owner, int32_t token, int part) const {
    store_release_sys(row_flag(owner, rank(), token, part), op_.epoch);
  }
  // Without flags: a thread has found kUnwritten in a row that it pushes, number `nth` of a few; before the barrier at which the raising warp learns
  // that the row is pushed. That one asks behind it, before anybody pushes another row of that number.
  __device__ void note_unclear(int nth) const {
    if (!has_row_flags()) is_unclear(nth) = true;
  }
  __device__ bool needs_flag(int nth) const {
    if (has_row_flags()) return true;
    const bool needs = is_unclear(nth);
    __syncwarp();
    if (needs && device::lane_idx() == 0) is_unclear(nth) = false;
    __syncwarp();
    return needs;
  }

  // All threads of a warp: each takes 16 bytes at each place of a row, or of several, that `vecs` has: has(v), at(v), and row_of(an address) say
  // what they are of. They are looked at together, and meanwhile() is called while the first looks are under way. If all that has not come after
  // a few of these looks, one thread looks at the last of it alone: the looks of all would be in the way of what is to come. False: the exchange
  // has failed.
  template <int kNum, typename Vecs, typename Meanwhile>
  __device__ bool take_vecs(const Vecs& vecs, Vec16 (&values)[kNum], Meanwhile meanwhile) const {
    uint32_t as_sent = 0;  // a bit each: what looks unwritten has been sent so
#pragma unroll 1
    for (int look = 1;; ++look) {
#pragma unroll
      for (int v = 0; v < kNum; ++v) values[v] = device::load_vec16_relaxed_sys_if(vecs.has(v), vecs.at(v));
      __syncwarp();  // or the compiler would look at some before it asks for the next
      if (look == 1) meanwhile();
      if (has_row_flags()) return true;
      bool is_unwritten = false;
#pragma unroll
      for (int v = 0; v < kNum; ++v) is_unwritten = is_unwritten | looks_unwritten(values[v]);
      if (__any_sync(~0u, is_unwritten) == 0) break;
      if (look < kLooksAtAll) continue;
      const std::byte* missing_at = nullptr;
      uint32_t missing = 0;  // its bit
#pragma unroll
      for (int v = 0; v < kNum; ++v)
        if (looks_unwritten(values[v]) && (as_sent >> v & 1) == 0) {
          missing = 1u << v;
          missing_at = vecs.at(v);
        }
      const uint32_t missing_in = __ballot_sync(~0u, missing != 0);
      if (missing_in == 0) break;
      Arrival arrival = Arrival::kShown;
      if (missing_in >> device::lane_idx() == 1) {
        arrival = await_arrival(reinterpret_cast<const Vec16*>(missing_at), vecs.row_of(missing_at));
        if (arrival == Arrival::kFlagged) as_sent |= missing;
      }
      if (__any_sync(~0u, arrival == Arrival::kFailed)) return false;
    }
#pragma unroll
    for (int v = 0; v < kNum; ++v)
      if (vecs.has(v)) *reinterpret_cast<Vec16*>(vecs.at(v)) = kUnwrittenVec;
    return true;
  }
  // One thread: the same of one word, behind a look that has shown `value`.
  __device__ bool take_word(uint32_t* at, const ArrivingRow& row, uint32_t& value) const {
    if (has_row_flags()) return true;
    if (looks_unwritten(value)) {
      if (await_arrival(at, row) == Arrival::kFailed) return false;
      value = look_at(at);
    }
    *at = layout::kUnwritten;
    return true;
  }

  // One thread, without flags: until what is at `at` has been written, as looks show, or else the row's flag says that all is as it was sent.
  enum class Arrival { kFailed, kShown, kFlagged };
  template <typename T>
  __device__ Arrival await_arrival(const T* at, const ArrivingRow& row) const {
#pragma unroll 1
    for (int look = 0; look < num_first_looks(); ++look)
      if (!looks_unwritten(look_at(at))) return Arrival::kShown;
    return await_shown_or_flagged(op_, at, row_flag(rank(), row.source, row.token, row.part), row.source);
  }

  // One thread.
  __device__ bool await_row(int source, int32_t token, int part) const {
    const uint64_t* flag = row_flag(rank(), source, token, part);
    // Most waits are short, and those that are not keep what they are called with in memory.
#pragma unroll 1
    for (int look = 0; look < num_first_looks(); ++look)
      if (load_acquire_sys(flag) >= op_.epoch) return true;
    return reported(op_.await<kMasks>(flag, op_.epoch, source));
  }

  // At what is waited for, before what is seldom needed is. A rank that was given up is not waited for at all.
  __device__ static constexpr int num_first_looks() { return may_go_on_without() ? 0 : Operation::kSpinsPerLook; }

  // Rows in parts, one behind the other: number `i` belongs to row i / num_parts.
  __device__ int32_t row_of(int32_t i) const { return i >> args_.parts_log2; }
  __device__ int part_of(int32_t i) const { return i & ((1 << args_.parts_log2) - 1); }
  __device__ int32_t num_parts_of(int32_t num_rows) const { return num_rows << args_.parts_log2; }

  // The first kThreads of a block, under TERN_ON_TIMEOUT_MASK: finds out who has a part in the operation. await_all() waits for all that this block
  // will use of others, and calls miss() for what does not come.
  template <int kThreads, typename AwaitAll>
  __device__ void settle_attendance(AwaitAll await_all) const {
    do {
      sync_first<kThreads>();
      if (threadIdx.x < kNumShared && threadIdx.x != kCutOff) *shared_ranks(static_cast<int>(threadIdx.x)) = 0;
      sync_first<kThreads>();
      await_all();
      sync_first<kThreads>();
#pragma unroll 1
      for (int source = static_cast<int>(threadIdx.x); source < num_ranks(); source += kThreads) {
        if (is_masked(source)) continue;
        const bool misses = (*shared_ranks(kMissing) >> source & 1) != 0, takes_part = decide(source, !misses);
        if (!takes_part) add_rank(kAbsent, source);
        if (takes_part && misses) add_rank(kAgain, source);  // another block has seen all of it in time
      }
      sync_first<kThreads>();
    } while (*shared_ranks(kAgain) != 0 && !op_.is_aborted());
  }

  // Each warp, at most once: it waits for no other rank any more. When all warps of all blocks have said so (or ended), the next kernel may
  // take its place on the GPU: this one ends by itself.
  __device__ void wait_no_more() const {
    if (device::lane_idx() == 0 && atomicAdd(&warps_done_waiting(), 1u) == kLatencyThreads / kWarpThreads - 1) device::allow_next_kernel();
  }

  // All threads of all blocks, at the end.
  __device__ void finish() const {
    if (!began_last_) return;
    LaneState* state = args_.exchange.state;
    state->blocks_begun = 0;
    if (!sends()) return;
    state->epoch = op_.epoch;
    if (!receives()) *args_.ticket = op_.epoch;
  }

 private:
  static constexpr bool kMasks = kKind == CallKind::kMasking || kKind == CallKind::kMaskingBatches;
  // By window(), from the arguments: for more ranks the compiler would look in memory where the window is.
  __device__ const uint64_t* abort_word() const {
    return reinterpret_cast<const uint64_t*>(window(rank()) + args_.exchange.layout.abort());
  }
  static constexpr int kBegunBarrier = 12, kMostUnclear = 4;
  static constexpr int kLooksAtAll = 24;  // then a thread looks at what is missing alone

  // Not inlined, like all that is seldom done.
  template <typename T>
  static __device__ __noinline__ Arrival await_shown_or_flagged(Operation op, const T* at, const uint64_t* flag, int source) {
    uint64_t seen = 0;
    bool is_shown = false;
    const bool ok = op.template await_until<kMasks>(op.epoch, source, seen, [&] {
      is_shown = !looks_unwritten(look_at(at));
      return is_shown || (seen = load_acquire_sys(flag)) >= op.epoch;
    });
    if (!ok) op.report_abort();
    return !ok ? Arrival::kFailed : is_shown ? Arrival::kShown : Arrival::kFlagged;
  }

  __device__ static uint32_t& warps_done_waiting() {
    __shared__ uint32_t num_warps;
    return num_warps;
  }
  // Of up to kMostUnclear rows of the block that are on their way to the raising warp.
  __device__ static volatile bool& is_unclear(int nth) {
    __shared__ bool unclear[kMostUnclear];
    return *const_cast<volatile bool*>(&unclear[nth]);
  }
  // What the leading warp has found.
  __device__ static bool& has_begun() {
    __shared__ bool ok;
    return ok;
  }

  // Flags are of a token: of the sender's in dispatch, of the receiver's in combine.
  __device__ uint64_t* row_flag(int owner, int source, int32_t token, int part) const {
    return reinterpret_cast<uint64_t*>(window(owner) + args_.row_flags_at) + source * args_.flags_stride + num_parts_of(token) + part;
  }

  __device__ int64_t* wait_of(int source) const { return is_usual() || args_.wait_ns == nullptr ? nullptr : args_.wait_ns + source; }

  // Passes on why a wait has failed.
  __device__ bool reported(bool ok) const {
    if (!ok) op_.report_abort();
    return ok;
  }

  // Sets of ranks that the threads of a block share.
  enum SharedRanks { kCutOff, kMissing, kAbsent, kAgain, kNumShared };
  __device__ static volatile uint64_t* shared_ranks(int which) {
    __shared__ uint64_t ranks[kNumShared];
    return ranks + which;
  }
  // One warp.
  __device__ static void clear_shared_ranks() {
    if (device::lane_idx() < kNumShared) *shared_ranks(static_cast<int>(device::lane_idx())) = 0;
    __syncwarp();
  }
  __device__ static void add_rank(int which, int rank) {
    atomicOr(reinterpret_cast<unsigned long long*>(const_cast<uint64_t*>(shared_ranks(which))), 1ull << rank);
  }

  // Nothing is sent to a rank that was given up, nor to one that still needs what it was sent two epochs ago.
  __device__ __noinline__ void await_bank_or_cut_off(int peer) const {
    if (op_.given_up_in(peer) != 0 || (sends() && !op_.await_bank<kMasks>(peer))) add_rank(kCutOff, peer);
  }

  // One thread: has `source` a part in what this operation receives? The first block that knows decides.
  __device__ bool decide(int source, bool has_come) const {
    using Word = unsigned long long;
    const auto word = reinterpret_cast<Word*>(&args_.exchange.attendance->decided[source]);
    const Word wanted = 2 * op_.epoch + (has_come ? 0 : 1);
    Word seen = *const_cast<volatile Word*>(word);
    while (seen / 2 != op_.epoch) {
      const Word before = atomicCAS(word, seen, wanted);
      if (before == seen) return has_come;
      seen = before;
    }
    return seen % 2 == 0;
  }

  // One warp: is there anything to be done, and has everybody used up what was pushed two epochs ago?
  __device__ bool may_begin() const {
    if (device::lane_idx() == 0) warps_done_waiting() = 0;
    if (!has_row_flags() && device::lane_idx() < kMostUnclear) is_unclear(static_cast<int>(device::lane_idx())) = false;
    if (may_go_on_without()) clear_shared_ranks();
    bool ok = was_healthy() && op_.epoch != 0;
#pragma unroll 1
    for (int peer = static_cast<int>(device::lane_idx()); peer < num_ranks(); peer += kWarpThreads)
      if (!is_masked(peer)) ok = begin(peer) && ok;
    ok = __all_sync(~0u, ok) != 0;
    if (!ok && device::lane_idx() == 0) op_.report_abort();
    return ok;
  }
  // One thread: when those of all blocks have come here the epoch may be advanced.
  __device__ void count_begun() { began_last_ = atomicAdd(&args_.exchange.state->blocks_begun, 1u) == gridDim.x - 1; }

  // One thread: has the peer used up what was pushed two epochs ago?
  __device__ bool begin(int peer) const {
    if (blockIdx.x == 0) post_consumed_before(peer);
    if (may_go_on_without()) await_bank_or_cut_off(peer);
    return may_go_on_without() || !sends() || has_consumed(peer) || op_.await_bank<kMasks>(peer);
  }

  // By what was seen at the start; of further ranks than a warp has threads nothing was. Nothing of the peer's is read behind this, only written,
  // and stores are not done ahead of a branch: so there is nothing to acquire.
  __device__ bool has_consumed(int peer) const { return peer < kWarpThreads && consumed_ + layout::kNumBanks >= op_.epoch; }

  // What earlier kernels took is read: they have ended.
  __device__ void post_consumed_before(int peer) const {
    device::store_relaxed_sys(&progress(peer, rank())->consumed, last_epoch_ - static_cast<uint64_t>(args_.exchange.consumed_lag_before));
  }

  const LatencyArgs& args_;
  const uint64_t last_epoch_;  // that the lane has begun before
  const Operation op_;
  const uint64_t aborted_;
  uint64_t consumed_ = 0;    // of rank lane_idx(), in the raising warp
  bool began_last_ = false;  // one thread of the block that came last knows it
};

}  // namespace tern::kernels
