// SPDX-License-Identifier: Apache-2.0
// Copies of rows to where their owners sum them.
//
// `Rows` says what is copied; it is called by all threads of a warp:
//   bool next_copy(RowCopy& copy)       the next row; false: there is none. It may run ahead of row_done()
//   void row_done(const SumRow&)        after the row's stores, in the order of next_copy(); does nothing if its run is 0
#pragma once

#include "kernels/ring.cuh"
#include "kernels/rows.cuh"
#include "kernels/sums.cuh"

namespace tern::kernels {

// A row that an owner wants as it is, or none. The last one of a message has its `run`.
struct RowCopy {
  SumRow row;
  const std::byte* from;  // nullptr: the message has no row here
  std::byte* to;
};

// By ordinary loads and stores. Rows are reported when the next one's loads are under way, since reports wait for stores.
template <typename Rows>
__device__ void copy_by_threads(Rows& rows, int64_t row_bytes) {
  constexpr int kUnroll = 14;  // half a row of 7168 channels of 2 bytes: few warps copy, so each has much on its way
  RowCopy copy;
  SumRow done = {};
  const auto report = [&] {
    rows.row_done(done);
    done.run = 0;
  };
  while (rows.next_copy(copy)) {
    if (copy.from != nullptr) copy_row<kUnroll>(copy.from, row_bytes, [&](auto visit) { visit(copy.to); }, report);
    report();
    __syncwarp();
    done = copy.row;
  }
  report();
}

// Copies rows to their owners by bulk copies: a flow of ring.cuh. Thread i of the warp knows what is in stage i.
template <typename Rows>
class CopyFlow {
 public:
  static constexpr int kPendingStores = 1;

  __device__ CopyFlow(Rows& rows, int32_t row_bytes, const Ring& ring) : rows_(rows), row_bytes_(row_bytes), ring_(ring), at_(row_bytes) {}

  __device__ RingLoad load(std::byte* stage, uint64_t* arrivals, bool) {
    if (at_ >= row_bytes_) {
      if (!rows_.next_copy(copy_)) return RingLoad::kNoMore;
      at_ = 0;
    }
    const int32_t num_bytes = copy_.from == nullptr ? 0 : min(ring_.stage_bytes, row_bytes_ - at_);
    if (device::lane_idx() == 0) {
      device::expect_bytes(arrivals, static_cast<uint32_t>(num_bytes));
      if (num_bytes > 0) device::bulk_load(stage, copy_.from + at_, static_cast<uint32_t>(num_bytes), arrivals);
    }
    const bool is_last = num_bytes == 0 || at_ + num_bytes == row_bytes_;
    if (device::lane_idx() == static_cast<uint32_t>(load_idx_))
      staged_ = {copy_.to + at_, num_bytes, copy_.row.rank, copy_.row.token, is_last ? copy_.row.run : 0};
    at_ = is_last ? row_bytes_ : at_ + num_bytes;
    load_idx_ = load_idx_ + 1 < ring_.num_stages ? load_idx_ + 1 : 0;
    return RingLoad::kStarted;
  }

  __device__ void store(std::byte* stage) {
    report();
    const int i = store_idx_;
    store_idx_ = i + 1 < ring_.num_stages ? i + 1 : 0;
    auto* const to = reinterpret_cast<std::byte*>(__shfl_sync(~0u, reinterpret_cast<uint64_t>(staged_.to), i));
    const int32_t num_bytes = __shfl_sync(~0u, staged_.num_bytes, i);
    done_.rank = __shfl_sync(~0u, staged_.rank, i);
    done_.token = __shfl_sync(~0u, staged_.token, i);
    done_.run = __shfl_sync(~0u, staged_.run, i);
    if (device::lane_idx() == 0 && num_bytes > 0) device::bulk_store(to, stage, static_cast<uint32_t>(num_bytes));
  }

  // Of a run that is complete. Here and not with its last piece, so that other pieces arrive meanwhile.
  __device__ void report() {
    if (done_.run == 0) return;
    device::await_stored<0>();
    device::fence_async_proxy();
    rows_.row_done(done_);
    done_.run = 0;
  }

 private:
  struct Piece {
    std::byte* to;
    int32_t num_bytes, rank, token;
    uint32_t run;
  };

  Rows& rows_;
  const int32_t row_bytes_;
  const Ring& ring_;
  RowCopy copy_ = {};
  SumRow done_ = {};
  int32_t at_;  // in the row of copy_
  int load_idx_ = 0, store_idx_ = 0;
  Piece staged_ = {};
};

// Copies all rows through the slots of the warp's ring for sums.
template <typename Rows>
__device__ void copy_by_bulk(const SumRing& slots, Rows& rows, int32_t row_bytes) {
  const Ring ring{slots.memory, slots.arrivals(0), min(kWarpThreads, slots.shape.num_slots), slots.shape.piece_bytes};
  CopyFlow flow(rows, row_bytes, ring);
  run_ring(ring, flow);
  flow.report();
}

}  // namespace tern::kernels
