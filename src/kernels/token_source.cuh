// SPDX-License-Identifier: Apache-2.0
// A rank's tokens on their way out: rows, cast if that is asked for, scales and weights, from the caller's arrays; or, between nodes, of a
// batch that lies in slots as it arrives. One warp.
#pragma once

#include "kernels/dispatch.h"
#include "kernels/operation.cuh"
#include "kernels/rows.cuh"

namespace tern::kernels {

class TokenSource {
 public:
  __device__ explicit TokenSource(const DispatchArgs& args) : args_(args), in_(args.in) {}

  // A cast makes the scales too.
  __device__ void put_row(int64_t token, std::byte* row, std::byte* scales) const {
    if (in_.encoding == TERN_ENCODING_AS_GIVEN) {
      const std::byte* from = row_of(token);
      if (from != nullptr) copy_row(from, args_.row_bytes, [&](auto visit) { visit(row); });
      return;
    }
    device::with_wire_type(in_.dtype, [&](auto wire) { cast_row<decltype(wire)>(row_of(token), in_.hidden, in_.encoding, row, scales); });
  }

  // Those that were given.
  __device__ void put_scales(int64_t token, std::byte* to) const {
    if (in_.encoding != TERN_ENCODING_AS_GIVEN) return;
    const std::byte* from = scales_of(token);
    if (from == nullptr) return;
    const bool is_dense = in_.is_packed() || in_.scale_element_stride_bytes == args_.scale_element_bytes;
    const int lane = static_cast<int>(device::lane_idx());
    if (args_.scale_word_bytes == 4 && is_dense) {
      for (int64_t at = lane * 4; at < args_.scale_bytes; at += kWarpThreads * 4)
        *reinterpret_cast<uint32_t*>(to + at) = *reinterpret_cast<const uint32_t*>(from + at);
      return;
    }
    const int64_t element_stride = is_dense ? args_.scale_element_bytes : in_.scale_element_stride_bytes;
    for (int64_t at = lane; at < args_.scale_bytes; at += kWarpThreads)
      to[at] = from[at / args_.scale_element_bytes * element_stride + at % args_.scale_element_bytes];
  }

  // Of tokens that follow each other: to place_of(token), and into the plan those of this rank's.
  template <typename PlaceOf>
  __device__ void put_weights(int64_t begin, int64_t end, PlaceOf place_of) const {
    if (in_.is_packed()) {
      for (int64_t token = begin; token < end; ++token) put_packed_weights(token, place_of(token));
      return;
    }
    constexpr int kBatch = 4;  // loads that are under way at a time
    const auto topk = static_cast<uint32_t>(args_.plan.num_topk), num = static_cast<uint32_t>(end - begin) * topk;
    const float* const weights = in_.weights + begin * topk;
    for (uint32_t first = device::lane_idx(); first < num; first += kBatch * kWarpThreads) {
      float values[kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u)
        if (first + u * kWarpThreads < num) values[u] = weights[first + u * kWarpThreads];
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const uint32_t i = first + u * kWarpThreads;
        if (i >= num) break;
        if (float* place = place_of(begin + i / topk)) place[i % topk] = values[u];
        if (args_.plan.weights_sent != nullptr) args_.plan.weights_sent[begin * topk + i] = values[u];
      }
    }
  }

 private:
  // nullptr: the token does not come to this node.
  __device__ const std::byte* row_of(int64_t token) const {
    if (!in_.is_packed()) return in_.tokens + token * in_.token_stride_bytes;
    const std::byte* slot = in_.slots.of(in_.node, token);
    return slot == nullptr ? nullptr : slot + in_.slots.layout.payload();
  }
  __device__ const std::byte* scales_of(int64_t token) const {
    if (!in_.is_packed()) return in_.scales + token * in_.scale_token_stride_bytes;
    const std::byte* slot = in_.slots.of(in_.node, token);
    return slot == nullptr ? nullptr : slot + in_.slots.layout.scales();
  }
  __device__ void put_packed_weights(int64_t token, float* to) const {
    const std::byte* slot = in_.slots.of(in_.node, token);
    if (slot == nullptr) return;
    const auto* from = reinterpret_cast<const float*>(slot + in_.slots.layout.words());
    for (int k = static_cast<int>(device::lane_idx()); k < args_.plan.num_topk; k += kWarpThreads) to[k] = from[k];
  }

  const DispatchArgs& args_;
  const DispatchInputs& in_;
};

}  // namespace tern::kernels
