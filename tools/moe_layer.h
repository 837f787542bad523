// SPDX-License-Identifier: Apache-2.0
// The arithmetic of one Mixture-of-Experts layer in the manner of DeepSeek-V3: a sigmoid gate that picks experts from the
// best groups, and experts with SwiGLU. All weights follow from a seed, so every rank makes those of its own experts and
// nobody sends any. The same functions serve the ranks (float) and the dense check (double).
//
//   const GateChoice choice = Gate(shape).choose(tokens);         // [num_tokens, hidden]
//   const ExpertWeights<float> weights(shape, expert);
//   const Matrix<float> out = weights.apply(rows);               // [rows, hidden] -> [rows, hidden]
#pragma once

#include <Eigen/Core>
#include <cstdint>
#include <span>
#include <vector>

namespace tern::tools {

struct LayerShape {
  int64_t hidden = 7168;
  int num_experts = 256;
  int num_topk = 8;
  int num_groups = 8;
  int max_groups = 4;
  int64_t expert_width = 32;    // 2048 in the real model
  double routed_scaling = 2.5;  // the chosen weights sum to this
  uint64_t seed = 1;
};

template <typename Real>
using Matrix = Eigen::Matrix<Real, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

struct GateChoice {
  std::vector<int32_t> topk_idx;    // [num_tokens, num_topk]
  std::vector<float> topk_weights;  // likewise
};

// bf16 values of one rank's tokens, [num_tokens, hidden].
std::vector<uint16_t> make_tokens(const LayerShape& shape, int rank, int64_t num_tokens);

// The values of [rows, hidden] bf16 rows.
template <typename Real>
Matrix<Real> widen(std::span<const uint16_t> rows, int64_t hidden);

// Scores in double, so that rounding cannot make two computations choose different experts.
class Gate {
 public:
  explicit Gate(const LayerShape& shape);

  GateChoice choose(const Matrix<double>& tokens) const;

 private:
  LayerShape shape_;
  Matrix<double> weights_;  // [num_experts, hidden]
};

template <typename Real>
class ExpertWeights {
 public:
  ExpertWeights(const LayerShape& shape, int expert);

  // down(silu(gate(x)) * up(x)) of each row.
  Matrix<Real> apply(const Matrix<Real>& rows) const;

 private:
  Matrix<Real> gate_, up_;  // [expert_width, hidden]
  Matrix<Real> down_;       // [hidden, expert_width]
};

}  // namespace tern::tools
