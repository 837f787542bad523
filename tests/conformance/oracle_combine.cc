// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <tuple>
#include <utility>

#include "conformance/number.h"
#include "conformance/oracle.h"

namespace tern::conformance {
namespace {

// A row that holds an entry of the token in question. Rows beyond the capacity do not exist, and count as nothing.
struct Share {
  int32_t rank;
  int64_t row;
  int32_t k;  // -1 with rank_major
};

// Every token's shares, by ascending rank; within a rank by ascending k.
std::vector<std::vector<Share>> shares_of(const Case& c, const std::vector<Placement>& placements, int32_t owner) {
  std::vector<std::vector<Share>> result(static_cast<size_t>(placements[static_cast<size_t>(owner)].num_tokens));
  for (int32_t rank = 0; rank < c.num_ranks; ++rank) {
    const std::vector<Origin>& rows = placements[static_cast<size_t>(rank)].rows;
    for (size_t row = 0; row < rows.size(); ++row) {
      if (rows[row].kind != Origin::Kind::kToken || rows[row].source_rank != owner) continue;
      result[static_cast<size_t>(rows[row].source_token)].push_back({rank, static_cast<int64_t>(row), rows[row].k});
    }
  }
  for (std::vector<Share>& shares : result)
    std::sort(shares.begin(), shares.end(), [](const Share& a, const Share& b) { return std::tie(a.rank, a.k) < std::tie(b.rank, b.k); });
  return result;
}

class Summer {
 public:
  Summer(const Case& c, int batch, int32_t owner) : c_(c), batch_(batch), owner_(owner) {}

  // What travels: each row by itself, or sums of some.
  enum class Wire { kRow, kSum };

  // acc += w * row, product and sum rounded separately.
  void add(std::vector<float>& acc, const Share& share, int64_t token, Wire wire) const {
    Bytes row(static_cast<size_t>(c_.combine_row_bytes()));
    make_result(c_, batch_, share.rank, share.row, row);
    const int64_t entry = token * c_.num_topk + share.k;
    const WeightUse use = c_.weighting == TERN_WEIGHTS_OWNER ? WeightUse::kOwner : WeightUse::kDispatch;
    const float weight = c_.weighting == TERN_WEIGHTS_NONE ? 1.0f : make_weight(c_, batch_, owner_, use, entry);
    std::vector<float> values(acc.size());
    decode_row(c_.combine_dtype, row, values);
    if (wire == Wire::kRow && c_.wire == TERN_WIRE_LOG10BIT) round_to_log10bit(values);
    for (size_t i = 0; i < acc.size(); ++i) {
      const float product = c_.weighting == TERN_WEIGHTS_NONE ? values[i] : weight * values[i];
      acc[i] = acc[i] + product;
    }
  }

  // acc += wire(sum), which leaves sum at zero.
  void add_rounded(std::vector<float>& acc, std::vector<float>& sum) const {
    if (c_.wire == TERN_WIRE_LOG10BIT) {
      round_to_log10bit(sum);
    } else if (c_.wire == TERN_WIRE_AS_DTYPE) {
      Bytes wire(static_cast<size_t>(c_.combine_row_bytes()));
      encode_row(c_.combine_dtype, sum, wire);
      decode_row(c_.combine_dtype, wire, sum);
    }
    for (size_t i = 0; i < acc.size(); ++i) acc[i] = acc[i] + std::exchange(sum[i], 0.0f);
  }

  void add_biases(std::vector<float>& acc, int64_t token) const {
    Bytes row(static_cast<size_t>(c_.combine_row_bytes()));
    std::vector<float> values(acc.size());
    for (int bias = 0; bias < c_.num_biases; ++bias) {
      make_bias(c_, batch_, owner_, bias, token, row);
      decode_row(c_.combine_dtype, row, values);
      for (size_t i = 0; i < acc.size(); ++i) acc[i] = acc[i] + values[i];
    }
  }

 private:
  const Case& c_;
  const int batch_;
  const int32_t owner_;
};

void combine_token(const Case& c, const Summer& summer, const std::vector<Share>& shares, int64_t token, Bytes& out) {
  const auto hidden = static_cast<size_t>(c.combine_hidden());
  std::vector<float> acc(hidden, 0.0f), sum(hidden, 0.0f);
  summer.add_biases(acc, token);
  if (c.combine_mode == TERN_COMBINE_EXACT && c.layout != TERN_LAYOUT_RANK_MAJOR) {
    for (int32_t k = 0; k < c.num_topk; ++k)
      for (const Share& share : shares)
        if (share.k == k) summer.add(acc, share, token, Summer::Wire::kRow);
  } else {
    // A rank's entries, a node's ranks, and with more than one node the nodes: each sum is rounded before it is added to the next.
    std::vector<float> node_sum(hidden, 0.0f);
    for (size_t i = 0; i < shares.size(); ++i) {
      const bool is_last = i + 1 == shares.size();
      summer.add(sum, shares[i], token, Summer::Wire::kSum);
      if (is_last || shares[i + 1].rank != shares[i].rank) summer.add_rounded(c.num_nodes() == 1 ? acc : node_sum, sum);
      const bool node_ends = is_last || c.node_of(shares[i + 1].rank) != c.node_of(shares[i].rank);
      if (node_ends && c.num_nodes() > 1) summer.add_rounded(acc, node_sum);
    }
  }
  const auto row_bytes = static_cast<size_t>(c.combine_row_bytes());
  encode_row(c.combine_dtype, acc, std::span(out).subspan(static_cast<size_t>(token) * row_bytes, row_bytes));
}

void return_weights(const Case& c, int batch, const std::vector<Share>& shares, int64_t token, Bytes& out) {
  for (int32_t k = 0; k < c.num_topk; ++k) {
    float sum = 0.0f, node_sum = 0.0f;
    for (size_t i = 0; i < shares.size(); ++i) {
      const Share& share = shares[i];
      if (c.layout == TERN_LAYOUT_RANK_MAJOR)
        node_sum = node_sum + make_weight(c, batch, share.rank, WeightUse::kRow, share.row * c.num_topk + k);
      else if (share.k == k)
        node_sum = node_sum + make_weight(c, batch, share.rank, WeightUse::kRow, share.row);
      if (i + 1 == shares.size() || c.node_of(shares[i + 1].rank) != c.node_of(share.rank)) sum = sum + std::exchange(node_sum, 0.0f);
    }
    encode(TERN_DTYPE_FP32, sum, out.data(), token * c.num_topk + k);
  }
}

}  // namespace

CombineBytes combine_oracle(const Case& c, const std::vector<Placement>& placements, int batch, int32_t rank) {
  const std::vector<std::vector<Share>> shares = shares_of(c, placements, rank);
  CombineBytes result;
  result.tokens.assign(shares.size() * static_cast<size_t>(c.combine_row_bytes()), kPoison);
  if (c.return_weights) result.weights.assign(shares.size() * static_cast<size_t>(c.num_topk) * sizeof(float), kPoison);
  const Summer summer(c, batch, rank);
  for (size_t token = 0; token < shares.size(); ++token) {
    combine_token(c, summer, shares[token], static_cast<int64_t>(token), result.tokens);
    if (c.return_weights) return_weights(c, batch, shares[token], static_cast<int64_t>(token), result.weights);
  }
  return result;
}

}  // namespace tern::conformance
