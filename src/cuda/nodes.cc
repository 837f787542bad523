// SPDX-License-Identifier: Apache-2.0
#include "cuda/nodes.h"

#include "plan/window_sizing.h"

namespace tern::cuda {

Nodes::Nodes(const std::shared_ptr<DevicePool>& pool, const Domain& domain, const Setup& setup)
    : pool_(pool),
      domain_(domain),
      setup_(setup),
      layout_(cpu::Network::memory_layout(domain.topology, setup.options)),
      trace_(setup.options.num_lanes),
      network_(std::make_unique<cpu::Network>(domain, pci_address(pool->device()), setup.options, setup.log)),
      unreachable_on_gpu_(pool, static_cast<size_t>(domain.topology.num_ranks)) {}

void Nodes::start(Bootstrap& bootstrap, const std::vector<uint8_t>& masked, Deadline deadline) {
  auto memory = PinnedBuffer<std::byte>(pool_->device(), static_cast<size_t>(layout_.total_bytes()));
  std::swap(memory_, memory);  // the former one is registered until the network has started
  network_->start(memory_.data(), bootstrap, masked, deadline);
  const tern_exchange_options& options = setup_.options;
  for (int i = 0; i < options.num_lanes; ++i) {
    if (static_cast<size_t>(i) < lanes_.size())
      lanes_[static_cast<size_t>(i)]->restart(*network_);
    else
      lanes_.push_back(std::make_unique<NodeLane>(pool_, domain_, *network_, trace_.lane(i),
                                                  NodeLane::Options{i, options.timeout_ms, setup_.check_health}));
  }
  unreachable_ = masked;
  for (size_t r = 0; r < unreachable_.size(); ++r)
    if (!lane(0).rail().serves(topology().node[r])) unreachable_[r] = 1;
  check(
      cudaMemcpyAsync(unreachable_on_gpu_.data(), unreachable_.data(), unreachable_.size(), cudaMemcpyHostToDevice, pool_->stream().get()),
      "copying which ranks are masked");
  pool_->stream().wait(deadline, "copying which ranks are masked");
}

void Nodes::stop() {
  for (const auto& lane : lanes_) lane->stop();
  network_->stop();
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
  slots.own_node = topology().node[static_cast<size_t>(topology().rank)];
  slots.own_bytes = layout_.out(lane_idx, 0, 0) - begin;
  slots.pair = &lane(lane_idx).talk()->bank;
  return slots;
}

void Nodes::abandon_memory() {
  for (const auto& lane : lanes_) lane->abandon_memory();
  static_cast<void>(new auto(std::move(memory_)));
  static_cast<void>(new auto(std::move(unreachable_on_gpu_)));
}

layout::WindowLayout make_host_layout(const tern_exchange_options& options, const Topology& topology) {
  if (topology.num_nodes == 1)
    return {.num_ranks = topology.num_ranks, .num_lanes = 1, .bank_bytes = static_cast<int64_t>(layout::kCacheLine)};
  tern_exchange_options of_routing = options;
  of_routing.staging_bytes = 0;
  of_routing.max_row_bytes = layout::SlotLayout::kPartAlignment;
  of_routing.max_tokens = 1;
  return make_window_layout(of_routing, topology.num_ranks, topology.num_nodes);
}

}  // namespace tern::cuda
