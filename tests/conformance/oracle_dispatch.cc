// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <cstring>

#include "conformance/number.h"
#include "conformance/oracle.h"

namespace tern::conformance {
namespace {

using Kind = Origin::Kind;

template <typename T>
void put(Bytes& array, int64_t index, T value) {
  std::memcpy(array.data() + static_cast<size_t>(index) * sizeof(T), &value, sizeof(T));
}

template <typename T>
Bytes bytes_of(const std::vector<T>& values) {
  Bytes result(values.size() * sizeof(T));
  if (!values.empty()) std::memcpy(result.data(), values.data(), result.size());
  return result;
}

// The smallest power of two that is at least `value` (a normal, positive number), as its exponent.
int exponent_rounded_up(float value) {
  const uint32_t bits = bits_of(value);
  return static_cast<int>(bits >> 23) - 127 + ((bits & 0x7FFFFF) != 0 ? 1 : 0);
}

class Writer {
 public:
  Writer(const Case& c, const std::vector<Placement>& placements, int batch, int32_t rank)
      : c_(c), placements_(placements), self_(placements[static_cast<size_t>(rank)]), batch_(batch), rank_(rank) {
    num_rows_ = static_cast<int64_t>(self_.rows.size());
  }

  DispatchBytes write() {
    allocate();
    for (int64_t row = 0; row < num_rows_; ++row) {
      const Origin& origin = self_.rows[static_cast<size_t>(row)];
      write_marks(row, origin);
      if (origin.kind == Kind::kToken) write_token(row, origin);
      if (origin.kind == Kind::kPadding && c_.zero_padding) write_zeros(row);
    }
    if (c_.layout == TERN_LAYOUT_EXPERT_MAJOR) out_.expert_offsets = bytes_of(self_.expert_offsets);
    if (c_.layout != TERN_LAYOUT_RANK_MAJOR) out_.expert_rank_ranges = bytes_of(self_.expert_rank_ranges);
    out_.expert_counts = bytes_of(self_.received_per_expert);
    out_.rank_counts = bytes_of(self_.received_per_rank);
    return std::move(out_);
  }

 private:
  void allocate() {
    const auto make = [&](Bytes& array, int64_t bytes_per_row) { array.assign(static_cast<size_t>(num_rows_ * bytes_per_row), kPoison); };
    const bool rank_major = c_.layout == TERN_LAYOUT_RANK_MAJOR;
    make(out_.tokens, c_.arriving_token_bytes());
    make(out_.scales, c_.arriving_scale_bytes());
    make(out_.topk_idx, rank_major ? 4 * c_.num_topk : 0);
    make(out_.topk_weights, !c_.carry_weights ? 0 : rank_major ? 4 * c_.num_topk : 4);
    make(out_.source_token, 4);
    make(out_.source_rank, 4);
    make(out_.row_expert, rank_major ? 0 : 4);
  }

  // Which entry a row holds; -1 and weight 0 where it holds none.
  void write_marks(int64_t row, const Origin& origin) {
    put(out_.source_token, row, origin.source_token);
    put(out_.source_rank, row, origin.source_rank);
    if (c_.layout != TERN_LAYOUT_RANK_MAJOR) {
      put(out_.row_expert, row, origin.local_expert);
      if (!out_.topk_weights.empty() && origin.kind == Kind::kToken) put(out_.topk_weights, row, weight(origin, origin.k));
      return;
    }
    for (int32_t k = 0; k < c_.num_topk; ++k) {
      const int32_t local = origin.kind == Kind::kToken ? local_expert(origin, k) : -1;
      put(out_.topk_idx, row * c_.num_topk + k, local);
      if (!out_.topk_weights.empty()) put(out_.topk_weights, row * c_.num_topk + k, local >= 0 ? weight(origin, k) : 0.0f);
    }
  }

  int32_t local_expert(const Origin& origin, int32_t k) const {
    const Placement& source = placements_[static_cast<size_t>(origin.source_rank)];
    const int64_t expert = source.topk_idx[static_cast<size_t>(origin.source_token * c_.num_topk + k)];
    return expert >= 0 && expert / c_.experts_per_rank == rank_ ? static_cast<int32_t>(expert % c_.experts_per_rank) : -1;
  }

  float weight(const Origin& origin, int32_t k) const {
    return make_weight(c_, batch_, origin.source_rank, WeightUse::kDispatch, origin.source_token * c_.num_topk + k);
  }

  void write_token(int64_t row, const Origin& origin) {
    Bytes token(static_cast<size_t>(c_.token_bytes())), scales(static_cast<size_t>(c_.arriving_scale_bytes()));
    make_token(c_, batch_, origin.source_rank, origin.source_token, token);
    if (c_.casts()) {
      const Bytes given = std::move(token);
      cast_oracle(c_, given, token, scales);
    } else {
      make_scales(c_, batch_, origin.source_rank, origin.source_token, scales);
    }
    std::copy(token.begin(), token.end(), out_.tokens.begin() + row * c_.arriving_token_bytes());
    write_scales(row, scales);
  }

  void write_zeros(int64_t row) {
    std::fill_n(out_.tokens.begin() + row * c_.arriving_token_bytes(), c_.arriving_token_bytes(), uint8_t{0});
    write_scales(row, Bytes(static_cast<size_t>(c_.arriving_scale_bytes()), 0));
  }

  void write_scales(int64_t row, const Bytes& scales) {
    if (scales.empty()) return;
    const int64_t granule = c_.scale_granule_bytes(), num_scales = c_.arriving_scale_bytes() / granule;
    // Column-major within the whole output, or within each expert of expert_padded.
    const int64_t rows_in_block = c_.layout == TERN_LAYOUT_EXPERT_PADDED ? c_.num_ranks * c_.max_tokens : num_rows_;
    const int64_t block = row / rows_in_block, row_in_block = row % rows_in_block;
    for (int64_t i = 0; i < num_scales; ++i) {
      const int64_t at =
          c_.scale_order == TERN_SCALES_ROW_MAJOR ? row * num_scales + i : (block * num_scales + i) * rows_in_block + row_in_block;
      std::copy_n(scales.begin() + i * granule, granule, out_.scales.begin() + at * granule);
    }
  }

  const Case& c_;
  const std::vector<Placement>& placements_;
  const Placement& self_;
  const int batch_;
  const int32_t rank_;
  int64_t num_rows_;
  DispatchBytes out_;
};

}  // namespace

void cast_oracle(const Case& c, const Bytes& row, Bytes& values, Bytes& scales) {
  values.assign(static_cast<size_t>(c.hidden), 0);
  scales.assign(static_cast<size_t>(c.arriving_scale_bytes()), 0);
  std::vector<float> numbers(values.size());
  decode_row(c.dtype, row, numbers);
  for (size_t first = 0; first < numbers.size(); first += 128) {
    const size_t last = std::min(first + 128, numbers.size());
    float amax = 1e-4f;
    for (size_t i = first; i < last; ++i) amax = std::max(amax, std::fabs(numbers[i]));
    const float scale = amax * (1.0f / 448.0f);
    const int exponent = exponent_rounded_up(scale);
    const float inverse = 448.0f / amax, power = std::ldexp(1.0f, exponent);
    for (size_t i = first; i < last; ++i) numbers[i] = c.encoding == TERN_ENCODING_FP8_F32 ? numbers[i] * inverse : numbers[i] / power;
    if (c.encoding == TERN_ENCODING_FP8_UE8M0)
      scales[first / 128] = static_cast<uint8_t>(exponent + 127);
    else
      put(scales, static_cast<int64_t>(first / 128), c.encoding == TERN_ENCODING_FP8_F32 ? scale : power);
  }
  encode_row(TERN_DTYPE_FP8_E4M3, numbers, values);
}

DispatchBytes dispatch_oracle(const Case& c, const std::vector<Placement>& placements, int batch, int32_t rank) {
  return Writer(c, placements, batch, rank).write();
}

}  // namespace tern::conformance
