// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "base/error.h"
#include "cpu/exchange.h"
#include "engine/engines.h"
#include "engine/objects.h"
#include "plan/window_sizing.h"
#include "topology/nodes.h"

namespace tern {
namespace {

// What the ranks must agree on. Travels as bytes.
struct Configuration {
  int32_t version;
  int32_t device;
  int64_t staging_bytes, window_bytes, max_tokens, max_row_bytes, timeout_ms;
  int32_t max_topk, max_experts, num_lanes, on_timeout, mode, bank_kib;
  bool operator==(const Configuration&) const = default;
};

std::string configuration_text(const Configuration& c) {
  return fmt::format(
      "version {}, device {}, staging_bytes {}, window_bytes {}, max_tokens {}, max_row_bytes {}, max_topk {}, max_experts {}, num_lanes "
      "{}, timeout_ms {}, on_timeout {}, "
      "mode {}, banks of {} KiB",
      c.version, c.device, c.staging_bytes, c.window_bytes, c.max_tokens, c.max_row_bytes, c.max_topk, c.max_experts, c.num_lanes,
      c.timeout_ms, c.on_timeout, c.mode, c.bank_kib);
}

// AUTO: a GPU where there is one, that of the rank's index in its node.
tern_exchange_options choose_engine(tern_exchange_options options) {
  if (options.device != TERN_DEVICE_AUTO) return options;
  options.device = cuda_engine_present() ? TERN_DEVICE_CUDA : TERN_DEVICE_CPU;
  if (options.device_index == 0) options.device_index = -1;
  return options;
}

int num_nodes(const Topology& topology) {
  check_nodes(topology);
  return topology.num_nodes;
}

void compare_configuration(Group& group, const tern_exchange_options& o, Deadline deadline) {
  const int num_ranks = group.topology.num_ranks;
  const int nodes = num_nodes(group.topology);
  const Configuration own{tern_version(),
                          o.device,
                          o.staging_bytes,
                          o.window_bytes,
                          o.max_tokens,
                          o.max_row_bytes,
                          o.timeout_ms,
                          o.max_topk,
                          o.max_experts,
                          o.num_lanes,
                          o.on_timeout,
                          o.mode,
                          static_cast<int32_t>(make_window_layout(o, num_ranks, nodes).bank_bytes >> 10)};
  std::vector<Configuration> all(static_cast<size_t>(num_ranks));
  group.bootstrap->allgather(&own, all.data(), sizeof(own), deadline);
  for (int r = 0; r < num_ranks; ++r)
    if (all[static_cast<size_t>(r)] != own)
      fail(TERN_MISMATCH,
           "exchange: rank {} asks for [{}], rank {} for [{}]; every rank must use the same options, environment and version",
           group.topology.rank, configuration_text(own), r, configuration_text(all[static_cast<size_t>(r)]));
}

}  // namespace

std::shared_ptr<Exchange> make_exchange(const std::shared_ptr<Group>& group, const tern_exchange_options& options) {
  const tern_exchange_options complete = choose_engine(complete_options(options));
  if (const std::string problem = cuda_engine_problem(); options.device == TERN_DEVICE_AUTO && !problem.empty())
    group->log.write(TERN_LOG_WARNING, "exchange: made on the CPU, since {}", problem);
  const Deadline deadline = Deadline::in_ms(complete.timeout_ms);
  make_window_layout(complete, group->topology.num_ranks,
                     num_nodes(group->topology));  // refuses bad sizes before anybody is kept waiting
  compare_configuration(*group, complete, deadline);
  auto exchange = std::make_shared<Exchange>(Exchange{group, complete, nullptr});
  exchange->device = complete.device == TERN_DEVICE_CUDA
                         ? make_cuda_exchange(group->topology, *group->bootstrap, complete, group->log, deadline)
                         : cpu::make_cpu_exchange(group->topology, *group->bootstrap, complete, group->log, deadline);
  return exchange;
}

tern_memory_info query_memory(const Group& group, const tern_exchange_options& options) {
  const tern_exchange_options complete = choose_engine(complete_options(options));
  tern_memory_info info;
  const int nodes = num_nodes(group.topology);
  if (complete.device == TERN_DEVICE_CUDA) {
    info = cuda_memory(complete, group.topology.num_ranks, nodes);
  } else {
    const layout::WindowLayout window = make_window_layout(complete, group.topology.num_ranks, nodes);
    info.control_bytes = window.control_bytes();
    info.staging_bytes = window.staging_bytes();
  }
  info.staging_bytes += num_rail_banks(complete, nodes) * rail_bank_bytes(complete, group.topology.num_ranks, nodes);
  info.window_bytes = complete.window_bytes;
  info.total_bytes = info.control_bytes + info.staging_bytes + info.window_bytes;
  return info;
}

}  // namespace tern
