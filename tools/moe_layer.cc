// SPDX-License-Identifier: Apache-2.0
#include "tools/moe_layer.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "routing/random.h"
#include "tools/numbers.h"

namespace tern::tools {
namespace {

enum Stream : uint64_t { kTokens, kGate, kExpertGate, kExpertUp, kExpertDown };

// Uniform in [-1, 1), with 24 bits: exact in float and in double.
template <typename Real>
Real signed_unit(Random& random) {
  return static_cast<Real>(static_cast<int64_t>(random.next() >> 40) - (int64_t{1} << 23)) * static_cast<Real>(0x1p-23);
}

// Rows scaled so that a product with a vector of ordinary size is of ordinary size again: a power of two near
// 1 / sqrt(columns), exact in both types.
template <typename Real>
Matrix<Real> random_matrix(int64_t num_rows, int64_t num_columns, uint64_t key) {
  const auto scale = static_cast<Real>(std::exp2(-std::floor(std::log2(static_cast<double>(num_columns)) / 2)));
  Matrix<Real> matrix(num_rows, num_columns);
  Random random(key);
  for (int64_t i = 0; i < matrix.size(); ++i) matrix.data()[i] = signed_unit<Real>(random) * scale;
  return matrix;
}

// The positions of the `count` greatest scores, greatest first; equal ones by position.
std::vector<int> by_score(std::span<const double> scores, int count) {
  std::vector<int> order(scores.size());
  std::iota(order.begin(), order.end(), 0);
  std::ranges::stable_sort(order, [&](int a, int b) { return scores[static_cast<size_t>(a)] > scores[static_cast<size_t>(b)]; });
  order.resize(static_cast<size_t>(count));
  return order;
}

// DeepSeek-V3's choice for one token: the groups with the greatest sums of their two best scores, then the best experts in them.
std::vector<int> choose_experts(const LayerShape& shape, std::span<const double> scores) {
  const auto group_size = scores.size() / static_cast<size_t>(shape.num_groups);
  std::vector<double> group_scores;
  for (size_t first = 0; first < scores.size(); first += group_size) {
    const auto group = scores.subspan(first, group_size);
    double sum = 0;
    for (const int i : by_score(group, static_cast<int>(std::min<size_t>(2, group_size)))) sum += group[static_cast<size_t>(i)];
    group_scores.push_back(sum);
  }
  std::vector<double> allowed(scores.size(), -1.0);  // sigmoids are positive
  for (const int group : by_score(group_scores, shape.max_groups)) {
    const size_t first = static_cast<size_t>(group) * group_size;
    std::ranges::copy(scores.subspan(first, group_size), allowed.begin() + static_cast<std::ptrdiff_t>(first));
  }
  return by_score(allowed, shape.num_topk);
}

}  // namespace

std::vector<uint16_t> make_tokens(const LayerShape& shape, int rank, int64_t num_tokens) {
  std::vector<uint16_t> tokens(static_cast<size_t>(num_tokens * shape.hidden));
  Random random(key_of(shape.seed, kTokens, rank));
  for (uint16_t& value : tokens) value = to_bf16(signed_unit<float>(random) * 2.0f);
  return tokens;
}

template <typename Real>
Matrix<Real> widen(std::span<const uint16_t> rows, int64_t hidden) {
  Matrix<Real> matrix(static_cast<int64_t>(rows.size()) / hidden, hidden);
  std::ranges::transform(rows, matrix.data(), [](uint16_t bits) { return static_cast<Real>(from_bf16(bits)); });
  return matrix;
}

Gate::Gate(const LayerShape& shape)
    : shape_(shape), weights_(random_matrix<double>(shape.num_experts, shape.hidden, key_of(shape.seed, kGate))) {}

GateChoice Gate::choose(const Matrix<double>& tokens) const {
  const Matrix<double> logits = tokens * weights_.transpose();
  const Matrix<double> scores = (1.0 + (-logits.array()).exp()).inverse();
  GateChoice choice;
  for (int64_t token = 0; token < scores.rows(); ++token) {
    const std::span<const double> of_token(scores.data() + token * shape_.num_experts, static_cast<size_t>(shape_.num_experts));
    const std::vector<int> experts = choose_experts(shape_, of_token);
    double sum = 0;
    for (const int expert : experts) sum += of_token[static_cast<size_t>(expert)];
    for (const int expert : experts) {
      choice.topk_idx.push_back(expert);
      choice.topk_weights.push_back(static_cast<float>(of_token[static_cast<size_t>(expert)] / sum * shape_.routed_scaling));
    }
  }
  return choice;
}

template <typename Real>
ExpertWeights<Real>::ExpertWeights(const LayerShape& shape, int expert)
    : gate_(random_matrix<Real>(shape.expert_width, shape.hidden, key_of(shape.seed, kExpertGate, expert))),
      up_(random_matrix<Real>(shape.expert_width, shape.hidden, key_of(shape.seed, kExpertUp, expert))),
      down_(random_matrix<Real>(shape.hidden, shape.expert_width, key_of(shape.seed, kExpertDown, expert))) {}

template <typename Real>
Matrix<Real> ExpertWeights<Real>::apply(const Matrix<Real>& rows) const {
  const Matrix<Real> gated = rows * gate_.transpose();
  const Matrix<Real> up = rows * up_.transpose();
  const Matrix<Real> inner = gated.array() / (Real{1} + (-gated.array()).exp()) * up.array();
  return inner * down_.transpose();
}

template Matrix<float> widen<float>(std::span<const uint16_t>, int64_t);
template Matrix<double> widen<double>(std::span<const uint16_t>, int64_t);
template class ExpertWeights<float>;
template class ExpertWeights<double>;

}  // namespace tern::tools
