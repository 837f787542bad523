// SPDX-License-Identifier: Apache-2.0
// A rank's tokens on their way out: rows, cast if that is asked for, scales and weights, from the caller's arrays; or, between nodes, of a
// batch that lies in slots as it arrives. One warp.
//
//   const TokenSource::Scales scales = source.load_scales(token);     // what is loaded beforehand is under way with the row
//   source.put_row(token, row, to_scales, begun);
//   source.put_scales(token, to_scales, scales);
#pragma once

#include "kernels/dispatch.h"
#include "kernels/operation.cuh"
#include "kernels/rows.cuh"

namespace tern::kernels {

class TokenSource {
 public:
  __device__ explicit TokenSource(const DispatchArgs& args) : args_(args), in_(args.in) {}

  // What a thread has of the first scales of a token, and of the first weights of several; the others are loaded when they are put.
  struct Scales {
    static constexpr int kBatch = 2;
    uint32_t words[kBatch];
  };
  struct Weights {
    static constexpr int kBatch = 4;
    float values[kBatch];
  };

  // A cast makes the scales too. `begun` is called when the row's first loads are under way, if any are that this can tell.
  template <int kUnroll = 8, typename Begun>
  __device__ void put_row(int64_t token, std::byte* row, std::byte* scales, Begun begun) const {
    if (in_.encoding == TERN_ENCODING_AS_GIVEN) {
      const std::byte* from = row_of(token);
      if (from != nullptr) copy_row<kUnroll>(from, args_.row_bytes, [&](auto visit) { visit(row); }, begun);
      return;
    }
    device::with_wire_type(in_.dtype, [&](auto wire) { cast_row<decltype(wire)>(row_of(token), in_.hidden, in_.encoding, row, scales); });
  }
  __device__ void put_row(int64_t token, std::byte* row, std::byte* scales) const {
    put_row(token, row, scales, [] {});
  }

  // A part of a row that is not cast.
  struct Part {
    int64_t begin, num_bytes;
  };
  __device__ void put_part(int64_t token, std::byte* row, Part part) const {
    if (const std::byte* from = row_of(token); from != nullptr && part.begin < args_.row_bytes)
      copy_row(from + part.begin, min(part.num_bytes, args_.row_bytes - part.begin), [&](auto visit) { visit(row + part.begin); });
  }

  // Those that were given.
  __device__ Scales load_scales(int64_t token) const { return has_scale_words() ? load_words(scales_of(token), 0) : Scales{}; }
  __device__ void put_scales(int64_t token, std::byte* to, Scales first_words) const {
    if (in_.encoding != TERN_ENCODING_AS_GIVEN) return;
    const std::byte* from = scales_of(token);
    if (from == nullptr) return;
    if (has_scale_words()) {
      put_words(from, to, first_words);
      return;
    }
    const int64_t element_stride = is_dense() ? args_.scale_element_bytes : in_.scale_element_stride_bytes;
    for (int64_t at = device::lane_idx(); at < args_.scale_bytes; at += kWarpThreads)
      to[at] = from[at / args_.scale_element_bytes * element_stride + at % args_.scale_element_bytes];
  }
  __device__ void put_scales(int64_t token, std::byte* to) const { put_scales(token, to, load_scales(token)); }

  // Of tokens that follow each other: to place_of(token), and into the plan those of this rank's.
  __device__ Weights load_weights(int64_t begin, int64_t end) const {
    if (in_.is_packed()) return {};
    return load_values(in_.weights + begin * args_.plan.num_topk, 0, num_weights(begin, end));
  }
  template <typename PlaceOf>
  __device__ void put_weights(int64_t begin, int64_t end, PlaceOf place_of, Weights values) const {
    if (in_.is_packed()) {
      for (int64_t token = begin; token < end; ++token) put_packed_weights(token, place_of(token));
      return;
    }
    const auto topk = static_cast<uint32_t>(args_.plan.num_topk);
    const uint32_t num = num_weights(begin, end);
    for (uint32_t first = 0; first < num; first += Weights::kBatch * kWarpThreads) {
      if (first > 0) values = load_values(in_.weights + begin * topk, first, num);
#pragma unroll
      for (int u = 0; u < Weights::kBatch; ++u) {
        const uint32_t i = first + thread_of(u);
        if (i >= num) break;
        if (float* place = place_of(begin + i / topk)) place[i % topk] = values.values[u];
        if (args_.plan.weights_sent != nullptr) args_.plan.weights_sent[begin * topk + i] = values.values[u];
      }
    }
  }
  template <typename PlaceOf>
  __device__ void put_weights(int64_t begin, int64_t end, PlaceOf place_of) const {
    put_weights(begin, end, place_of, load_weights(begin, end));
  }

 private:
  __device__ static uint32_t thread_of(int u) { return device::lane_idx() + static_cast<uint32_t>(u) * kWarpThreads; }
  __device__ bool is_dense() const { return in_.is_packed() || in_.scale_element_stride_bytes == args_.scale_element_bytes; }
  __device__ bool has_scale_words() const {
    return in_.encoding == TERN_ENCODING_AS_GIVEN && args_.scale_bytes > 0 && args_.scale_word_bytes == 4 && is_dense();
  }

  // From word `first` on; nullptr: there are none.
  __device__ Scales load_words(const std::byte* from, uint32_t first) const {
    Scales scales = {};
#pragma unroll
    for (int u = 0; u < Scales::kBatch; ++u)
      if (from != nullptr && first + thread_of(u) < num_scale_words())
        scales.words[u] = reinterpret_cast<const uint32_t*>(from)[first + thread_of(u)];
    return scales;
  }
  __device__ void put_words(const std::byte* from, std::byte* to, Scales scales) const {
    for (uint32_t first = 0; first < num_scale_words(); first += Scales::kBatch * kWarpThreads) {
      if (first > 0) scales = load_words(from, first);
#pragma unroll
      for (int u = 0; u < Scales::kBatch; ++u)
        if (first + thread_of(u) < num_scale_words()) reinterpret_cast<uint32_t*>(to)[first + thread_of(u)] = scales.words[u];
    }
  }
  __device__ uint32_t num_scale_words() const { return static_cast<uint32_t>(args_.scale_bytes) / 4; }

  __device__ uint32_t num_weights(int64_t begin, int64_t end) const {
    return static_cast<uint32_t>(end - begin) * static_cast<uint32_t>(args_.plan.num_topk);
  }
  // Of `num`, from `first` on.
  __device__ static Weights load_values(const float* from, uint32_t first, uint32_t num) {
    Weights weights = {};
#pragma unroll
    for (int u = 0; u < Weights::kBatch; ++u)
      if (first + thread_of(u) < num) weights.values[u] = from[first + thread_of(u)];
    return weights;
  }

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
    const auto* from = reinterpret_cast<const float*>(slot + in_.slots.layout.weights());
    for (int k = static_cast<int>(device::lane_idx()); k < args_.plan.num_topk; k += kWarpThreads) to[k] = from[k];
  }

  const DispatchArgs& args_;
  const DispatchInputs& in_;
};

}  // namespace tern::kernels
