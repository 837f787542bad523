// SPDX-License-Identifier: Apache-2.0
// What arrives with a message of a dispatch besides its row: scales and weights, and where they go.
//
//   const MessageSides sides(args);
//   const MessageSides::Share share = sides.load(scales, weights);   // a thread's part; loads of the row can be under way with these
//   sides.store(message, rows, experts, scales, share);
//
// Threads: all of a warp.
#pragma once

#include "kernels/dispatch.h"
#include "kernels/transfer.cuh"

namespace tern::kernels {

class MessageSides {
 public:
  // A thread's share: of the first scales (if there are more, the rest is copied by store()), and of the weights.
  struct Share {
    static constexpr int kScales = 2, kWeights = 2;  // top-k is at most 64
    uint32_t scales[kScales];
    float weights[kWeights];
  };

  __device__ explicit MessageSides(const DispatchArgs& args) : args_(args), plan_(args.plan) {}

  __device__ Share load(const std::byte* scales, const float* weights) const {
    Share share = {};
    load_scales(scales, 0, share);
    if (!args_.carries_weights) return share;
#pragma unroll
    for (int i = 0; i < Share::kWeights; ++i)
      if (entry(i) < plan_.num_topk) share.weights[i] = weights[entry(i)];
    return share;
  }

  // rows, experts: of the message's entries; not looked at if the layout or the call has none. scales: as they were loaded.
  __device__ void store(int32_t message, const int32_t* rows, const int32_t* experts, const std::byte* scales, Share share) const {
    if (args_.out.scales != nullptr) {
      for (int32_t first = 0; first < args_.scale_bytes; first += kScaleBytes * args_.scale_word_bytes) {
        if (first > 0) load_scales(scales, first, share);
        for_each_row(message, rows, [&](int64_t row) { store_scales(row, first, share); });
      }
    }
    if (!args_.carries_weights) return;
#pragma unroll
    for (int i = 0; i < Share::kWeights; ++i) {
      const int k = entry(i);
      if (k >= plan_.num_topk) break;
      args_.out.plan_weights[int64_t{message} * plan_.topk_stride + k] = share.weights[i];
      if (args_.out.topk_weights == nullptr) continue;
      if (plan_.has_expert_rows()) {
        if (rows[k] >= 0) args_.out.topk_weights[rows[k]] = share.weights[i];
      } else if (message < args_.out.num_rows) {
        args_.out.topk_weights[int64_t{message} * plan_.num_topk + k] = experts[k] >= 0 ? share.weights[i] : 0.0f;
      }
    }
  }

 private:
  static constexpr int32_t kScaleBytes = Share::kScales * kWarpThreads;  // of a warp's shares, if words were bytes

  __device__ static int entry(int i) { return static_cast<int>(device::lane_idx()) + i * kWarpThreads; }

  template <typename Visitor>
  __device__ void for_each_row(int32_t message, const int32_t* rows, Visitor visit) const {
    if (!plan_.has_expert_rows()) {
      if (message < args_.out.num_rows) visit(message);
      return;
    }
    for (int k = 0; k < plan_.num_topk; ++k)
      if (rows[k] >= 0) visit(rows[k]);
  }

  // The thread's words of the scales from byte `first` on.
  __device__ void load_scales(const std::byte* scales, int32_t first, Share& share) const {
#pragma unroll
    for (int i = 0; i < Share::kScales; ++i) {
      const int32_t at = first + entry(i) * args_.scale_word_bytes;
      if (at >= args_.scale_bytes) break;
      share.scales[i] = args_.scale_word_bytes == 4 ? *reinterpret_cast<const uint32_t*>(scales + at) : static_cast<uint32_t>(scales[at]);
    }
  }

  __device__ void store_scales(int64_t row, int32_t first, const Share& share) const {
#pragma unroll
    for (int i = 0; i < Share::kScales; ++i) {
      const int32_t at = first + entry(i) * args_.scale_word_bytes;
      if (at >= args_.scale_bytes) break;
      std::byte* to = args_.out.scales + row * args_.scale_bytes + at;
      if (args_.out.scales_by_column)
        to = args_.out.scale_address(plan_, {args_.scale_bytes, args_.scale_element_bytes}, row, at / args_.scale_element_bytes) +
             at % args_.scale_element_bytes;
      if (args_.scale_word_bytes == 4)
        *reinterpret_cast<uint32_t*>(to) = share.scales[i];
      else
        *to = static_cast<std::byte>(share.scales[i]);
    }
  }

  const DispatchArgs& args_;
  const PlanView& plan_;
};

}  // namespace tern::kernels
