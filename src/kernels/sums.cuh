// SPDX-License-Identifier: Apache-2.0
// Sums of rows in FP32, in the order in which their terms come: products and sums are rounded separately, a sum starts at +0, and the result is
// rounded once to the rows' type.
//
// `Rows` says what is summed; it is called by all threads of a warp:
//   bool next_row(SumRow& row)                  the next row, or part of one, to be made; false: there is none, or the exchange has failed.
//                                               Its terms may then be read, by bulk copies too. It may run ahead of row_done()
//   int num_batches()                           of up to 32 terms, one per thread, each row has so many; in some there may be none
//   void get_terms(const SumRow&, int batch, Terms& terms)
//   bool has_biases(); const std::byte* bias(const SumRow&, int which)   added first; nullptr: none
//   std::byte* out(const SumRow&)
//   void row_done(const SumRow&)                after the row's stores, which are ordered before by __syncwarp()
#pragma once

#include <type_traits>

#include "device/bulk.cuh"
#include "kernels/operation.cuh"
#include "kernels/rows.cuh"
#include "kernels/sum_ring.h"

namespace tern::kernels {

struct SumRow {
  int32_t rank;   // to whom it belongs
  int32_t index;  // of the message, or of the token
  int32_t token;
  int32_t begin, end;  // bytes of it
  uint32_t run;        // when it is done, so many rows are reported, which came in a row; 0: with a later one
};

struct Terms {
  const std::byte* address = nullptr;
  float weight = 1.0f;
  uint32_t valid = 0;  // bit t: thread t has a term
};

// Adds 16 bytes of a term. A weight of 1 leaves every bit as it is, so terms without weights need no product.
template <typename Wire, bool kWeighted = true>
__device__ __forceinline__ void add_term(float (&sum)[Wire::kElements], const Vec16& bytes, float weight) {
  float values[Wire::kElements];
  Wire::widen(bytes, values);
#pragma unroll
  for (int i = 0; i < Wire::kElements; ++i) sum[i] = __fadd_rn(sum[i], kWeighted ? __fmul_rn(weight, values[i]) : values[i]);
}

template <typename Wire, typename Rows>
__device__ __forceinline__ void add_biases(const Rows& rows, const SumRow& row, int64_t at, float (&sum)[Wire::kElements]) {
  for (int which = 0; which < 2; ++which)
    if (const std::byte* bias = rows.bias(row, which)) add_term<Wire>(sum, device::load_vec16(bias + at), 1.0f);
}

// A term in every thread of a warp.
struct Term {
  const std::byte* address;
  float weight;
};

// All threads of a warp: takes the first of the terms that are left.
__device__ __forceinline__ Term take_term(Terms& left) {
  const int t = __ffs(static_cast<int>(left.valid)) - 1;
  left.valid &= left.valid - 1;
  return {reinterpret_cast<const std::byte*>(__shfl_sync(~0u, reinterpret_cast<uint64_t>(left.address), t)),
          __shfl_sync(~0u, left.weight, t)};
}

// Terms that are loaded together, in every thread of a warp.
struct TermBatch {
  static constexpr int kMost = 4;
  Term terms[kMost];
  int num;
};

// All threads of a warp: takes the first terms of those that are left.
__device__ __forceinline__ TermBatch take_batch(Terms& left) {
  TermBatch batch;
  batch.num = min(TermBatch::kMost, __popc(left.valid));
#pragma unroll
  for (int u = 0; u < TermBatch::kMost; ++u) {
    if (u >= batch.num) break;
    batch.terms[u] = take_term(left);
  }
  return batch;
}

// Adds the terms at bytes `at`, and one step of the warp further on.
template <typename Wire, int kVecs>
__device__ __forceinline__ void add_batch(const TermBatch& batch, int at, int end, float (&sums)[kVecs][Wire::kElements]) {
  constexpr int kStep = 32 * sizeof(Vec16);
  Vec16 values[TermBatch::kMost][kVecs];
#pragma unroll
  for (int u = 0; u < TermBatch::kMost; ++u) {
    if (u >= batch.num) break;
#pragma unroll
    for (int v = 0; v < kVecs; ++v)
      if (at + v * kStep < end) values[u][v] = device::load_vec16(batch.terms[u].address + at + v * kStep);
  }
#pragma unroll
  for (int u = 0; u < TermBatch::kMost; ++u) {
    if (u >= batch.num) break;
#pragma unroll
    for (int v = 0; v < kVecs; ++v)
      if (at + v * kStep < end) add_term<Wire>(sums[v], values[u][v], batch.terms[u].weight);
  }
}

// Ordinary loads and stores. What bounds them is how much is on its way: a warp keeps 6 KiB of a row's terms under way, few or many terms. Where
// those at one vector have been added, the ones so much further on are loaded.

constexpr int kMostTermsUnderWay = 8;
constexpr int kVecsUnderWay = 12;  // of a thread

// Sums the terms of a row, at most kMost, which is 1, 2, 4 or 8.
template <typename Wire, int kMost, bool kWeighted>
__device__ __forceinline__ void sum_terms(const Terms& terms, int begin, int end, std::byte* out) {
  constexpr int kVecs = kVecsUnderWay / kMost, kStep = 32 * sizeof(Vec16);
  constexpr int kLeast = kMost / 2 + 1;  // fewer are not summed by this
  const int num_terms = __popc(terms.valid);
  int at = begin + static_cast<int>(device::lane_idx() * sizeof(Vec16));
  const std::byte* addresses[kMost];
  float weights[kMost];
  uint32_t left = terms.valid;
#pragma unroll
  for (int u = 0; u < kMost; ++u) {
    const int t = u < kLeast || left != 0 ? __ffs(static_cast<int>(left)) - 1 : 0;
    left &= left - 1;
    addresses[u] = reinterpret_cast<const std::byte*>(__shfl_sync(~0u, reinterpret_cast<uint64_t>(terms.address), t)) + at;
    weights[u] = __shfl_sync(~0u, terms.weight, t);
  }
  Vec16 values[kVecs][kMost] = {};  // or registers that are set under a condition would be kept for them from row to row
  const auto load = [&](int v, int offset) {
    if (at + offset >= end) return;
#pragma unroll
    for (int u = 0; u < kMost; ++u)
      if (u < kLeast || u < num_terms) values[v][u] = device::load_vec16_once(addresses[u] + offset);
  };
#pragma unroll
  for (int v = 0; v < kVecs; ++v) load(v, v * kStep);
#pragma unroll 1
  for (; at - static_cast<int>(device::lane_idx() * sizeof(Vec16)) < end; at += kVecs * kStep) {
#pragma unroll
    for (int v = 0; v < kVecs; ++v) {
      if (at + v * kStep < end) {
        float sum[Wire::kElements] = {};
#pragma unroll
        for (int u = 0; u < kMost; ++u)
          if (u < kLeast || u < num_terms) add_term<Wire, kWeighted>(sum, values[v][u], weights[u]);
        *reinterpret_cast<Vec16*>(out + at + v * kStep) = Wire::narrow(sum);
      }
      load(v, (v + kVecs) * kStep);
    }
#pragma unroll
    for (int u = 0; u < kMost; ++u) addresses[u] += kVecs * kStep;
  }
}

// Calls function(constant) for the constant 1, 2, 4 or 8 that is not below `num_terms`.
template <typename Function>
__device__ __forceinline__ void with_most_terms(int num_terms, Function function) {
  if (num_terms == 1)
    function(std::integral_constant<int, 1>());
  else if (num_terms == 2)
    function(std::integral_constant<int, 2>());
  else if (num_terms <= 4)
    function(std::integral_constant<int, 4>());
  else
    function(std::integral_constant<int, 8>());
}

// Any number of terms, and biases.
template <typename Wire, typename Rows>
__device__ __forceinline__ void sum_many_terms(const Rows& rows, const SumRow& row) {
  constexpr int kVecs = 4, kStep = 32 * sizeof(Vec16);
#pragma unroll 1
  for (int place = row.begin; place < row.end; place += kVecs * kStep) {
    const int first = place + static_cast<int>(device::lane_idx() * sizeof(Vec16));
    int offsets[kVecs];
    float sums[kVecs][Wire::kElements] = {};
#pragma unroll
    for (int v = 0; v < kVecs; ++v) {
      offsets[v] = min(first + v * kStep, row.end - static_cast<int>(sizeof(Vec16)));  // behind the end: for sums that nobody uses
      if (rows.has_biases()) add_biases<Wire>(rows, row, offsets[v], sums[v]);
    }
#pragma unroll 1
    for (int batch = 0; batch < rows.num_batches(); ++batch) {
      Terms terms;
      rows.get_terms(row, batch, terms);
#pragma unroll 1
      while (terms.valid != 0) {
        const Term term = take_term(terms);
        Vec16 values[kVecs];
#pragma unroll
        for (int v = 0; v < kVecs; ++v) values[v] = device::load_vec16_once(term.address + offsets[v]);
#pragma unroll
        for (int v = 0; v < kVecs; ++v) add_term<Wire>(sums[v], values[v], term.weight);
      }
    }
#pragma unroll
    for (int v = 0; v < kVecs; ++v)
      if (first + v * kStep < row.end) *reinterpret_cast<Vec16*>(rows.out(row) + offsets[v]) = Wire::narrow(sums[v]);
  }
}

template <typename Wire, typename Rows>
__device__ void sum_by_threads(Rows& rows) {
  SumRow row;
  while (rows.next_row(row)) {
    Terms terms;
    rows.get_terms(row, 0, terms);
    const int num_terms = __popc(terms.valid);
    const bool is_weighted = __any_sync(~0u, (terms.valid >> device::lane_idx() & 1) != 0 && terms.weight != 1.0f) != 0;
    if (rows.has_biases() || rows.num_batches() > 1 || num_terms == 0 || num_terms > kMostTermsUnderWay)
      sum_many_terms<Wire>(rows, row);
    else
      with_most_terms(num_terms, [&](auto most) {
        if (is_weighted)
          sum_terms<Wire, decltype(most)::value, true>(terms, row.begin, row.end, rows.out(row));
        else
          sum_terms<Wire, decltype(most)::value, false>(terms, row.begin, row.end, rows.out(row));
      });
    __syncwarp();
    rows.row_done(row);
  }
}

// Bulk loads: the pieces of a row's terms come into the slots of a ring, those of up to kMostSumGroup terms together. A group takes as many slots
// as it has terms, so however many a row has, most of the ring is on its way.

// What a group is.
struct SumTag {
  SumRow row;
  int32_t at;  // where in the row the pieces begin
  int32_t num_terms;
  bool is_last;      // of this piece of the row
  bool is_weighted;  // there are weights other than 1
  float weights[kMostSumGroup];
};
static_assert(sizeof(SumTag) <= kSumTagBytes);

// A warp's ring. Groups and slots go round separately.
struct SumRing {
  std::byte* memory;
  SumRingShape shape;

  __device__ std::byte* slot(int idx) const { return memory + idx * shape.piece_bytes; }
  __device__ SumTag& tag(int group) const { return *reinterpret_cast<SumTag*>(memory + shape.tags() + group * kSumTagBytes); }
  __device__ uint64_t* arrivals(int group) const { return reinterpret_cast<uint64_t*>(memory + shape.arrivals()) + group; }

  // All threads of the warp, before the first use.
  __device__ void init() const {
    if (device::lane_idx() == 0) {
      for (int group = 0; group < shape.num_slots; ++group) device::init_arrivals(arrivals(group));
      device::fence_arrivals_init();
    }
    __syncwarp();
  }
  // After the last use, before the memory is used otherwise.
  __device__ void end() const {
    if (device::lane_idx() == 0)
      for (int group = 0; group < shape.num_slots; ++group) device::end_arrivals(arrivals(group));
    __syncwarp();
  }
};

// Goes round and round a ring.
struct SumCursor {
  int num_slots;
  int group = 0;
  int slot = 0;
  uint32_t phase = 0;  // of the group's arrivals: changes with every round

  __device__ int slot_of(int nth) const { return slot + nth < num_slots ? slot + nth : slot + nth - num_slots; }
  __device__ void advance(int num_terms) {
    slot = slot_of(num_terms);
    if (++group < num_slots) return;
    group = 0;
    phase ^= 1;
  }
};

// Loads the terms of all rows, group after group; all threads of a warp. A piece without terms is a group without slots.
template <typename Rows>
class TermLoader {
 public:
  __device__ TermLoader(const SumRing& ring, Rows& rows)
      : ring_(ring), rows_(rows), cursor_{ring.shape.num_slots}, num_free_(ring.shape.num_slots), batch_(rows.num_batches()) {}

  // Starts loading whatever fits. False: nothing is on its way, and there is nothing left.
  __device__ bool fill() {
    while (more_) {
      if (!has_terms_) more_ = has_terms_ = next_batch();
      const int num_terms = min(min(__popc(terms_.valid), kMostSumGroup), ring_.shape.num_slots);
      if (!more_ || num_terms > num_free_ || num_groups_ == ring_.shape.num_slots) break;
      load(num_terms);
      has_terms_ = terms_.valid != 0;
    }
    return num_groups_ > 0;
  }
  // The oldest group has been used.
  __device__ void release(int num_terms) {
    --num_groups_;
    num_free_ += num_terms;
  }

 private:
  // The next batch of terms: of this piece, of the row's next piece, or of the next row.
  __device__ bool next_batch() {
    if (++batch_ < rows_.num_batches()) {
      rows_.get_terms(row_, batch_, terms_);
      return true;
    }
    batch_ = 0;
    at_ += ring_.shape.piece_bytes;
    if (at_ >= row_.end) {
      if (!rows_.next_row(row_)) return false;
      at_ = row_.begin;
      rows_.get_terms(row_, 0, first_terms_);
    }
    terms_ = first_terms_;
    return true;
  }

  // Each thread with a term loads its own.
  __device__ void load(int num_terms) {
    const int nth = __popc(terms_.valid & device::lanes_below());
    const bool loads = (terms_.valid >> device::lane_idx() & 1) != 0 && nth < num_terms;
    terms_.valid &= ~__ballot_sync(~0u, loads);
    const bool is_weighted = __any_sync(~0u, loads && terms_.weight != 1.0f) != 0;
    SumTag& tag = ring_.tag(cursor_.group);
    uint64_t* const arrivals = ring_.arrivals(cursor_.group);
    const auto num_bytes = static_cast<uint32_t>(min(ring_.shape.piece_bytes, row_.end - at_));
    if (device::lane_idx() == 0) {
      tag.row = row_;
      tag.at = at_;
      tag.num_terms = num_terms;
      tag.is_last = terms_.valid == 0 && batch_ + 1 == rows_.num_batches();
      tag.is_weighted = is_weighted;
      device::expect_bytes(arrivals, num_bytes * num_terms);
    }
    __syncwarp();
    if (loads) {
      tag.weights[nth] = terms_.weight;
      device::bulk_load(ring_.slot(cursor_.slot_of(nth)), terms_.address + at_, num_bytes, arrivals);
    }
    __syncwarp();  // publishes the tag
    cursor_.advance(num_terms);
    ++num_groups_;
    num_free_ -= num_terms;
  }

  const SumRing& ring_;
  Rows& rows_;
  SumCursor cursor_;
  int num_groups_ = 0;  // on their way
  int num_free_;        // slots
  SumRow row_ = {};
  int at_ = 0;
  int batch_;
  Terms terms_, first_terms_;
  bool more_ = true, has_terms_ = false;
};

// Where the bytes begin that a thread adds in sums[v].
__device__ __forceinline__ int vec_offset(int v) {
  return (v * kWarpThreads + static_cast<int>(device::lane_idx())) * static_cast<int>(sizeof(Vec16));
}

// Adds the pieces of a group that has arrived, whole steps at a time: what stands behind a piece in its slot is added to sums that nobody uses.
template <typename Wire, bool kWeighted, int kVecs>
__device__ __forceinline__ void add_group(const SumRing& ring, const SumCursor& cursor, int num_terms, int size,
                                          float (&sums)[kVecs][Wire::kElements]) {
  constexpr int kStepVecs = kSumStepBytes / (kWarpThreads * static_cast<int>(sizeof(Vec16)));
  const SumTag& tag = ring.tag(cursor.group);
#pragma unroll 1
  for (int u = 0; u < num_terms; ++u) {
    const float weight = kWeighted ? tag.weights[u] : 1.0f;
    const std::byte* const piece = ring.slot(cursor.slot_of(u));
#pragma unroll
    for (int step = 0; step < kVecs; step += kStepVecs) {
      if (step > 0 && vec_offset(step) >= size) break;
      Vec16 values[kStepVecs];
#pragma unroll
      for (int v = 0; v < kStepVecs; ++v)
        if (step + v < kVecs) values[v] = device::load_vec16(piece + vec_offset(step + v));
#pragma unroll
      for (int v = 0; v < kStepVecs; ++v)
        if (step + v < kVecs) add_term<Wire, kWeighted>(sums[step + v], values[v], weight);
    }
  }
}

template <typename Wire, int kVecs, typename Rows>
__device__ __forceinline__ void add_biases(Rows& rows, const SumTag& tag, int size, float (&sums)[kVecs][Wire::kElements]) {
#pragma unroll
  for (int v = 0; v < kVecs; ++v)
    if (vec_offset(v) < size) add_biases<Wire>(rows, tag.row, tag.at + vec_offset(v), sums[v]);
}

// Stores the piece of a row, and begins the next one.
template <typename Wire, int kVecs>
__device__ __forceinline__ void store_sums(std::byte* to, int size, float (&sums)[kVecs][Wire::kElements]) {
#pragma unroll
  for (int v = 0; v < kVecs; ++v) {
    if (vec_offset(v) < size) *reinterpret_cast<Vec16*>(to + vec_offset(v)) = Wire::narrow(sums[v]);
#pragma unroll
    for (int i = 0; i < Wire::kElements; ++i) sums[v][i] = 0.0f;
  }
}

// Sums all rows; the pieces of a row, of up to kPieceBytes, are added up in registers, while the next ones are loaded.
template <typename Wire, int kPieceBytes, typename Rows>
__device__ void sum_by_ring(const SumRing& ring, Rows& rows) {
  constexpr int kVecs = kPieceBytes / (kWarpThreads * static_cast<int>(sizeof(Vec16)));
  TermLoader<Rows> loader(ring, rows);
  SumCursor summing{ring.shape.num_slots};
  float sums[kVecs][Wire::kElements] = {};
  SumRow done;  // is complete, but not reported
  bool is_done = false, begins = true;
  while (true) {
    const bool more = loader.fill();  // first, since reports wait for stores
    if (is_done) rows.row_done(done);
    if (!more) break;
    const SumTag& tag = ring.tag(summing.group);
    const int num_terms = tag.num_terms;
    const int size = min(ring.shape.piece_bytes, tag.row.end - tag.at);
    if (begins && rows.has_biases()) add_biases<Wire>(rows, tag, size, sums);
    device::await_bytes(ring.arrivals(summing.group), summing.phase);
    if (tag.is_weighted)
      add_group<Wire, true>(ring, summing, num_terms, size, sums);
    else
      add_group<Wire, false>(ring, summing, num_terms, size, sums);
    begins = tag.is_last;
    is_done = begins && tag.at + size == tag.row.end;
    if (begins) store_sums<Wire>(rows.out(tag.row) + tag.at, size, sums);
    if (is_done) done = tag.row;
    __syncwarp();  // all threads have read the group and its tag, and stored
    summing.advance(num_terms);
    loader.release(num_terms);
  }
}

}  // namespace tern::kernels
