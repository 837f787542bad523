// SPDX-License-Identifier: Apache-2.0

#include <cstdio>
#include <future>
#include <tern/tern.hpp>

// Four ranks as threads, 8 experts that double what they get. Each token goes to two experts, whose results are averaged.
bool run_rank(const tern::Group& group) {
  constexpr int kTokens = 16, kHidden = 256, kTopk = 2;
  const tern::Exchange exchange(group, {.device = TERN_DEVICE_CPU, .max_tokens = kTokens, .max_row_bytes = 4 * kHidden});
  tern::Plan plan(exchange, {.max_tokens = kTokens, .num_experts = 8, .num_topk = kTopk, .layout = TERN_LAYOUT_EXPERT_MAJOR});

  const std::vector<float> tokens(kTokens * kHidden, 1.0f + group.rank()), weights(kTokens * kTopk, 0.5f);
  std::vector<int64_t> experts;  // what a gate would choose
  for (int t = 0; t < kTokens; ++t) experts.insert(experts.end(), {t % 8, (3 * t + 1) % 8});

  const tern_plan_info info = plan.route({.topk_idx = experts.data(), .num_tokens = kTokens});
  std::vector<float> rows(info.num_rows * kHidden), results(tokens.size());
  plan.dispatch(
      {.tokens = tokens.data(), .dtype = TERN_DTYPE_FP32, .hidden = kHidden, .topk_weights = weights.data(), .out_tokens = rows.data()});
  for (float& value : rows) value *= 2;  // the experts
  plan.combine(
      {.rows = rows.data(), .dtype = TERN_DTYPE_FP32, .hidden = kHidden, .weighting = TERN_WEIGHTS_DISPATCH, .out_tokens = results.data()});

  std::printf("rank %d: %ld rows for its experts; sent %g, got %g\n", group.rank(), long{info.num_rows}, tokens[0], results[0]);
  return results == std::vector<float>(results.size(), 2 * tokens[0]);
}

int main() {
  const std::vector<tern::Group> groups = tern::Group::local(4);
  std::vector<std::future<bool>> ranks;
  for (const tern::Group& group : groups) ranks.push_back(std::async(std::launch::async, run_rank, std::cref(group)));
  bool right = true;
  for (std::future<bool>& rank : ranks) right &= rank.get();
  return right ? 0 : 1;
}
