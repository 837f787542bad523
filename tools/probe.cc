// SPDX-License-Identifier: Apache-2.0
#include "tools/probe.h"

#include <array>
#include <exception>
#include <numeric>
#include <thread>
#include <vector>

#include "base/error.h"
#include "devices/rank_device.h"

namespace tern::tools {
namespace {

constexpr int64_t kTimeoutMs = 5000;

// One token from every rank to every rank, which all of them then know.
void exchange_one_token(const Group& group, tern_device_type type) {
  const int num_ranks = group.num_ranks();
  const std::unique_ptr<RankDevice> device = make_rank_device(type, 0);
  Exchange exchange(group, {.device = type,
                            .device_index = device->index(),
                            .max_tokens = 1,
                            .max_row_bytes = 16,
                            .max_topk = num_ranks,
                            .max_experts = num_ranks,
                            .timeout_ms = kTimeoutMs});
  Plan plan(exchange, {.max_tokens = 1, .num_experts = num_ranks, .num_topk = num_ranks});
  using Token = std::array<int32_t, 4>;
  const Token token{group.rank(), 1, 2, 3};
  std::vector<int32_t> all_ranks(static_cast<size_t>(num_ranks));
  std::iota(all_ranks.begin(), all_ranks.end(), 0);
  std::vector<Token> found(all_ranks.size());
  const DeviceMemory tokens(*device, sizeof token), rows(*device, num_ranks * int64_t{sizeof token});
  const DeviceMemory to_all(*device, num_ranks * int64_t{sizeof(int32_t)});
  device->copy_in(tokens.data(), &token, tokens.num_bytes());
  device->copy_in(to_all.data(), all_ranks.data(), to_all.num_bytes());
  const tern_launch launch{.stream = device->stream()};
  plan.route({.topk_idx = to_all.data(), .topk_idx_type = TERN_INDEX_INT32, .num_tokens = 1}, launch);
  plan.dispatch({.tokens = tokens.data(), .dtype = TERN_DTYPE_BYTES, .hidden = sizeof token, .out_tokens = rows.data()}, launch);
  device->copy_out(found.data(), rows.data(), rows.num_bytes());
  for (const int32_t rank : all_ranks) {
    if (found[static_cast<size_t>(rank)] != Token{rank, 1, 2, 3}) fail(TERN_INTERNAL_ERROR, "the token of rank {} arrived damaged", rank);
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

Probe probe_network() {
  Probe probe{"network between nodes", false, ""};
  try {
    const auto groups = Group::local(2, {.timeout_ms = kTimeoutMs, .ranks_per_node = 1});
    std::array<std::string, 2> reasons;
    std::vector<std::thread> threads;
    for (size_t rank = 0; rank < groups.size(); ++rank) {
      threads.emplace_back([&, rank] {
        try {
          exchange_one_token(groups[rank], TERN_DEVICE_CPU);
        } catch (const std::exception& error) {
          reasons[rank] = error.what();
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    probe.reason = reasons[0].empty() ? reasons[1] : reasons[0];
    probe.works = probe.reason.empty();
  } catch (const std::exception& error) {
    probe.reason = error.what();
  }
  return probe;
}

}  // namespace tern::tools
