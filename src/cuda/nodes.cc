// SPDX-License-Identifier: Apache-2.0
#include "cuda/nodes.h"

#include "plan/window_sizing.h"

namespace tern::cuda {

Nodes::Nodes(const std::shared_ptr<DevicePool>& pool, const Domain& domain, Bootstrap& bootstrap, const Setup& setup, Deadline deadline)
    : own_node_(domain.topology.node[static_cast<size_t>(domain.topology.rank)]),
      layout_(cpu::Network::memory_layout(domain.topology, setup.options)),
      memory_(pool->device(), static_cast<size_t>(layout_.total_bytes())),
      trace_(setup.options.num_lanes),
      network_(std::make_unique<cpu::Network>(domain, setup.options, setup.log)) {
  network_->start(memory_.data(), bootstrap, {}, deadline);
  for (int i = 0; i < setup.options.num_lanes; ++i)
    lanes_.push_back(std::make_unique<NodeLane>(pool, domain, *network_, trace_.lane(i),
                                                NodeLane::Options{i, setup.options.timeout_ms, setup.check_health}));
}

uint64_t Nodes::network_bytes() const {
  uint64_t bytes = 0;
  for (const auto& lane : lanes_) bytes += lane->lane().counters().network_bytes.load(std::memory_order_relaxed);
  return bytes;
}

kernels::RailSlots Nodes::slots(int32_t lane_idx, int64_t begin) const {
  kernels::RailSlots slots;
  slots.banks = memory_.data() + begin;
  slots.node_bytes = layout_.bank_bytes;
  slots.pair_bytes = layout_.out(lane_idx, 1, 0) - layout_.out(lane_idx, 0, 0);
  slots.own_node = own_node_;
  slots.own_bytes = layout_.out(lane_idx, 0, 0) - begin;
  slots.pair = &lane(lane_idx).talk()->bank;
  return slots;
}

void Nodes::abandon_memory() {
  for (const auto& lane : lanes_) lane->abandon_memory();
  static_cast<void>(new auto(std::move(memory_)));
}

layout::WindowLayout make_host_layout(const tern_exchange_options& options, const Topology& topology) {
  if (topology.num_nodes == 1)
    return {.num_ranks = topology.num_ranks, .num_lanes = 1, .bank_bytes = static_cast<int64_t>(layout::kCacheLine)};
  tern_exchange_options of_routing = options;
  of_routing.staging_bytes = 0;
  of_routing.max_row_bytes = layout::SlotLayout::kPartAlignment;
  return make_window_layout(of_routing, topology.num_ranks, topology.num_nodes);
}

}  // namespace tern::cuda
