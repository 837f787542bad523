// SPDX-License-Identifier: Apache-2.0
// Sums of rows in FP32, in the order in which their terms come: products and sums are rounded separately, a sum starts at +0, and the result is
// rounded once to the rows' type.
//
// `Rows` says what is summed; it is called by all threads of a warp:
//   bool next_row(SumRow& row)                  the next row, or part of one, to be made; false: there is none, or the exchange has failed
//   bool next_terms(const SumRow&, int batch, Terms& terms)   up to 32 terms, one per thread; false: no such batch
//   bool has_biases(); const std::byte* bias(const SumRow&, int which)   added first; nullptr: none
//   std::byte* out(const SumRow&)
//   void row_done(const SumRow&)                after the row's stores, which are ordered before by __syncwarp()
#pragma once

#include "kernels/ring.cuh"
#include "kernels/rows.cuh"

namespace tern::kernels {

struct SumRow {
  int32_t rank;   // to whom it belongs
  int32_t index;  // of the message, or of the token
  int32_t token;
  int32_t begin, end;  // bytes of it
};

struct Terms {
  const std::byte* address = nullptr;
  float weight = 1.0f;
  uint32_t valid = 0;  // bit t: thread t has a term
};

// Adds 16 bytes of a term. A weight of 1 leaves every bit as it is.
template <typename Wire>
__device__ __forceinline__ void add_term(float (&sum)[Wire::kElements], const Vec16& bytes, float weight) {
  float values[Wire::kElements];
  Wire::widen(bytes, values);
#pragma unroll
  for (int i = 0; i < Wire::kElements; ++i) sum[i] = __fadd_rn(sum[i], __fmul_rn(weight, values[i]));
}

template <typename Wire, typename Rows>
__device__ __forceinline__ void add_biases(Rows& rows, const SumRow& row, int64_t at, float (&sum)[Wire::kElements]) {
  for (int which = 0; which < 2; ++which)
    if (const std::byte* bias = rows.bias(row, which)) add_term<Wire>(sum, *reinterpret_cast<const Vec16*>(bias + at), 1.0f);
}

// Adds the terms of one batch at bytes `at`, and one step of the warp further on; several loads are under way at a time.
template <typename Wire, int kVecs>
__device__ __forceinline__ void add_batch(const Terms& terms, int at, int end, float (&sums)[kVecs][Wire::kElements]) {
  constexpr int kUnroll = 4;
  constexpr int kStep = 32 * sizeof(Vec16);
  for (uint32_t left = terms.valid; left != 0;) {
    Vec16 values[kUnroll][kVecs];
    float weights[kUnroll];
    const int num = min(kUnroll, __popc(left));
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (u >= num) break;
      const int t = __ffs(static_cast<int>(left)) - 1;
      left &= left - 1;
      const auto address = reinterpret_cast<const std::byte*>(__shfl_sync(~0u, reinterpret_cast<uint64_t>(terms.address), t));
      weights[u] = __shfl_sync(~0u, terms.weight, t);
#pragma unroll
      for (int v = 0; v < kVecs; ++v)
        if (at + v * kStep < end) values[u][v] = *reinterpret_cast<const Vec16*>(address + at + v * kStep);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (u >= num) break;
#pragma unroll
      for (int v = 0; v < kVecs; ++v)
        if (at + v * kStep < end) add_term<Wire>(sums[v], values[u][v], weights[u]);
    }
  }
}

// Ordinary loads and stores.
template <typename Wire, typename Rows>
__device__ void sum_by_threads(Rows& rows) {
  constexpr int kVecs = 1;
  constexpr int kStep = 32 * sizeof(Vec16);
  SumRow row;
  while (rows.next_row(row)) {
    Terms terms;
    const bool has_terms = rows.next_terms(row, 0, terms);
    for (int first = row.begin; first < row.end; first += kVecs * kStep) {
      const int at = first + static_cast<int>(device::lane_idx() * sizeof(Vec16));
      float sums[kVecs][Wire::kElements] = {};
#pragma unroll
      for (int v = 0; v < kVecs; ++v)
        if (rows.has_biases() && at + v * kStep < row.end) add_biases<Wire>(rows, row, at + v * kStep, sums[v]);
      if (has_terms) add_batch<Wire, kVecs>(terms, at, row.end, sums);
      Terms further;
      for (int batch = 1; has_terms && rows.next_terms(row, batch, further); ++batch) add_batch<Wire, kVecs>(further, at, row.end, sums);
#pragma unroll
      for (int v = 0; v < kVecs; ++v)
        if (at + v * kStep < row.end) *reinterpret_cast<Vec16*>(rows.out(row) + at + v * kStep) = Wire::narrow(sums[v]);
    }
    __syncwarp();
    rows.row_done(row);
  }
}

// Bulk loads: pieces of up to kMostGroup terms at a time come into a stage of a ring, side by side.
inline constexpr int kMostGroup = 4;

// What a stage holds, behind the pieces.
struct StageTag {
  SumRow row;
  int32_t at;  // where in the row the pieces begin
  int32_t num_terms;
  float weights[kMostGroup];
  bool is_last;  // of this piece of the row
};
inline constexpr int kStageTagBytes = 48;
static_assert(sizeof(StageTag) <= kStageTagBytes);

// Loads the terms of all rows, one stage after the other; all threads of a warp.
template <typename Wire, typename Rows>
class TermLoader {
 public:
  // A stage holds pieces of `piece_bytes` of up to `group` terms.
  __device__ TermLoader(Rows& rows, int piece_bytes, int group) : rows_(rows), piece_bytes_(piece_bytes), group_(group) {}

  __device__ StageTag& tag_of(std::byte* stage) const { return *reinterpret_cast<StageTag*>(stage + group_ * piece_bytes_); }

  // False: there is nothing left. Each thread with a term loads its own.
  __device__ bool load(std::byte* stage, uint64_t* arrivals) {
    while (terms_.valid == 0)
      if (!next_terms()) return false;
    const uint32_t own = 1u << device::lane_idx();
    const int nth = __popc(terms_.valid & (own - 1));
    const bool loads = (terms_.valid & own) != 0 && nth < group_;
    const uint32_t group = __ballot_sync(~0u, loads);
    terms_.valid &= ~group;
    StageTag& tag = tag_of(stage);
    const auto num_bytes = static_cast<uint32_t>(min(piece_bytes_, row_.end - at_));
    if (device::lane_idx() == 0) {
      tag.row = row_;
      tag.at = at_;
      tag.num_terms = __popc(group);
      tag.is_last = terms_.valid == 0 && !has_further_;
      device::expect_bytes(arrivals, num_bytes * __popc(group));
    }
    __syncwarp();
    if (loads) {
      tag.weights[nth] = terms_.weight;
      device::fence_async_proxy();  // the peer's flag was acquired before: its rows are read by the copy engine now
      device::bulk_load(stage + nth * piece_bytes_, terms_.address + at_, num_bytes, arrivals);
    }
    __syncwarp();  // publishes the tag
    return true;
  }

 private:
  // The next batch of terms: of this piece, of the row's next piece, or of the next row.
  __device__ bool next_terms() {
    if (has_further_) {
      ++batch_;
      has_further_ = has_terms_from(batch_ + 1);
      return rows_.next_terms(row_, batch_, terms_);
    }
    at_ += piece_bytes_;
    if (!in_row_ || at_ >= row_.end) {
      if (!rows_.next_row(row_)) return false;
      at_ = row_.begin;
      in_row_ = has_terms_from(0);
      if (!in_row_) {
        finish_empty_row();
        return true;
      }
      rows_.next_terms(row_, 0, first_terms_);
    }
    terms_ = first_terms_;
    batch_ = 0;
    has_further_ = has_terms_from(1);
    return true;
  }

  __device__ bool has_terms_from(int batch) {
    Terms further;
    for (; rows_.next_terms(row_, batch, further); ++batch)
      if (further.valid != 0) return true;
    return false;
  }

  // A row without terms: the biases, or zeros.
  __device__ void finish_empty_row() {
    for (int at = row_.begin + static_cast<int>(device::lane_idx() * sizeof(Vec16)); at < row_.end; at += 32 * sizeof(Vec16)) {
      float sum[Wire::kElements] = {};
      add_biases<Wire>(rows_, row_, at, sum);
      *reinterpret_cast<Vec16*>(rows_.out(row_) + at) = Wire::narrow(sum);
    }
    __syncwarp();
    rows_.row_done(row_);
  }

  Rows& rows_;
  const int piece_bytes_;
  const int group_;
  SumRow row_ = {};
  Terms terms_, first_terms_;
  int at_ = 0;
  int batch_ = 0;
  bool in_row_ = false, has_further_ = false;
};

// Sums all rows; the pieces of a row are added up in registers, while the next ones are loaded. kVecs: pieces of up to kVecs * 512 bytes.
template <typename Wire, int kVecs, typename Rows>
__device__ void sum_by_ring(const Ring& ring, Rows& rows, int piece_bytes, int group) {
  const auto offset = [](int v) { return static_cast<int>((v * 32 + device::lane_idx()) * sizeof(Vec16)); };
  TermLoader<Wire, Rows> loader(rows, piece_bytes, group);
  RingCursor loading{ring}, summing{ring};
  int num_ahead = 0;  // loaded and not yet summed
  bool more = true;
  const auto load_next = [&] {
    more = more && loader.load(loading.stage(), loading.arrivals());
    if (!more) return;
    loading.advance();
    ++num_ahead;
  };
  while (more && num_ahead < ring.num_stages) load_next();
  while (num_ahead > 0) {
    float sums[kVecs][Wire::kElements] = {};
    const SumRow row = loader.tag_of(summing.stage()).row;
    const int at = loader.tag_of(summing.stage()).at;
    const int size = min(piece_bytes, row.end - at);
    if (rows.has_biases()) {
#pragma unroll
      for (int v = 0; v < kVecs; ++v)
        if (offset(v) < size) add_biases<Wire>(rows, row, at + offset(v), sums[v]);
    }
    for (bool is_last = false; !is_last;) {
      const std::byte* stage = summing.stage();
      const StageTag& tag = loader.tag_of(summing.stage());
      summing.await();
      is_last = tag.is_last;
      const int num_terms = tag.num_terms;
#pragma unroll
      for (int u = 0; u < kMostGroup; ++u) {
        if (u >= num_terms) break;
        const float weight = tag.weights[u];
#pragma unroll
        for (int v = 0; v < kVecs; ++v)
          if (offset(v) < size) add_term<Wire>(sums[v], *reinterpret_cast<const Vec16*>(stage + u * piece_bytes + offset(v)), weight);
      }
      __syncwarp();
      summing.advance();
      --num_ahead;
      load_next();  // into the stage that has just become free
    }
    std::byte* out = rows.out(row) + at;
#pragma unroll
    for (int v = 0; v < kVecs; ++v)
      if (offset(v) < size) *reinterpret_cast<Vec16*>(out + offset(v)) = Wire::narrow(sums[v]);
    if (at + size < row.end) continue;
    __syncwarp();
    rows.row_done(row);
  }
}

}  // namespace tern::kernels
