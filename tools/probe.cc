// SPDX-License-Identifier: Apache-2.0
#include "tools/probe.h"

#include <array>
#include <exception>
#include <vector>

#include "base/error.h"

namespace tern::tools {
namespace {

constexpr int64_t kTimeoutMs = 5000;

// One token from every rank to every rank, which all of them then know.
void exchange_one_token(const Group& group, tern_device_type device) {
  const int num_ranks = group.num_ranks();
  Exchange exchange(
      group,
      {.device = device, .max_tokens = 1, .max_row_bytes = 16, .max_topk = num_ranks, .max_experts = num_ranks, .timeout_ms = kTimeoutMs});
  if (device == TERN_DEVICE_CUDA) return;  // tokens would have to lie on the GPU; that the exchange was made is enough
  Plan plan(exchange, {.max_tokens = 1, .num_experts = num_ranks, .num_topk = num_ranks});
  std::vector<int32_t> to_all(static_cast<size_t>(num_ranks));
  for (int rank = 0; rank < num_ranks; ++rank) to_all[static_cast<size_t>(rank)] = rank;
  plan.route({.topk_idx = to_all.data(), .topk_idx_type = TERN_INDEX_INT32, .num_tokens = 1});
  using Token = std::array<int32_t, 4>;
  const Token token{group.rank(), 1, 2, 3};
  std::vector<Token> rows(static_cast<size_t>(num_ranks));
  plan.dispatch({.tokens = token.data(), .dtype = TERN_DTYPE_BYTES, .hidden = sizeof token, .out_tokens = rows.data()});
  for (int rank = 0; rank < num_ranks; ++rank) {
    if (rows[static_cast<size_t>(rank)] != Token{rank, 1, 2, 3}) fail(TERN_INTERNAL_ERROR, "the token of rank {} arrived damaged", rank);
  }
}

}  // namespace

Probe probe_engine(tern_device_type device) {
  Probe probe{device == TERN_DEVICE_CUDA ? "CUDA engine" : "CPU engine", false, ""};
  try {
    const auto groups = Group::local(1, {.timeout_ms = kTimeoutMs});
    exchange_one_token(groups.front(), device);
    probe.works = true;
  } catch (const std::exception& error) {
    probe.reason = error.what();
  }
  return probe;
}

Probe probe_launch(LaunchKind kind) {
  Probe probe{fmt::format("CPU ranks as {}", launch_name(kind)), false, ""};
  try {
    const int code = launch({.kind = kind, .num_ranks = 2, .timeout_ms = kTimeoutMs}, [](RankContext& context) {
      exchange_one_token(context.group, TERN_DEVICE_CPU);
      return 0;
    });
    probe.works = code == 0;
    if (!probe.works) probe.reason = "two ranks could not exchange a token: the reason is printed on standard error";
  } catch (const std::exception& error) {
    probe.reason = error.what();
  }
  return probe;
}

}  // namespace tern::tools
