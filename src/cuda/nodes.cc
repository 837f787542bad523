// SPDX-License-Identifier: Apache-2.0
#include "cuda/nodes.h"

#include "base/error.h"
#include "cuda/driver.h"
#include "plan/window_sizing.h"

namespace tern::cuda {
namespace {

// Do kernels see what devices of the network have written to the GPU's memory before the host said so?
bool sees_writes(int device) { return attribute(device, cudaDevAttrGPUDirectRDMAWritesOrdering) >= cudaGPUDirectRDMAWritesOrderingOwner; }

// If that fails, whoever needs it says so.
void enter(int device) { static_cast<void>(cudaSetDevice(device)); }

}  // namespace

Nodes::Nodes(const std::shared_ptr<DevicePool>& pool, const Domain& domain, const Setup& setup)
    : pool_(pool),
      domain_(domain),
      setup_(setup),
      trace_(setup.options.num_lanes),
      network_(std::make_unique<cpu::Network>(domain, pci_address(pool->device()), setup.options, setup.log)),
      unreachable_on_gpu_(pool, static_cast<size_t>(domain.topology.num_ranks)) {}

void Nodes::start(Bootstrap& bootstrap, const std::vector<uint8_t>& masked, Deadline deadline) {
  network_->start(memory_of_banks(), bootstrap, masked, deadline);
  if (network_->place().slots == nullptr) slots_.reset();
  const int device = pool_->device();
  for (int i = 0; i < setup_.options.num_lanes; ++i) {
    if (static_cast<size_t>(i) < lanes_.size()) {
      lanes_[static_cast<size_t>(i)]->restart(*network_);
      continue;
    }
    const tern_exchange_options& options = setup_.options;
    NodeLane::Options of_lane{.index = i, .timeout_ms = options.timeout_ms, .on_timeout = options.on_timeout, .hear_gpu = setup_.hear_gpu};
    of_lane.enter_gpu = [device] { enter(device); };
    lanes_.push_back(std::make_unique<NodeLane>(pool_, domain_, *network_, trace_.lane(i), of_lane));
  }
  unreachable_ = masked;
  for (size_t r = 0; r < unreachable_.size(); ++r)
    if (!lane(0).rail().serves(topology().node[r])) unreachable_[r] = 1;
  check(
      cudaMemcpyAsync(unreachable_on_gpu_.data(), unreachable_.data(), unreachable_.size(), cudaMemcpyHostToDevice, pool_->stream().get()),
      "copying which ranks are masked");
  pool_->stream().wait(deadline, "copying which ranks are masked");
}

// Those of the generation before are registered no more when it is asked.
cpu::RailMemory Nodes::memory_of_banks() {
  const int device = pool_->device();
  cpu::RailMemory memory;
  memory.of_host = [this, device](size_t num_bytes) {
    memory_ = PinnedBuffer<std::byte>(device, num_bytes);
    return memory_.data();
  };
  memory.of_slots = [this, device](size_t num_bytes) {
    if (!sees_writes(device))
      fail(TERN_UNSUPPORTED, "{} does not order what the network writes before what the host does", device_name(device));
    slots_ = DeviceSegment::create(num_bytes, device, SharedBy::kThreads);
    return slots_->data();
  };
  memory.slots_gpu = device;
  memory.enter_gpu = [device] { enter(device); };
  return memory;
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

uint64_t Nodes::timeouts() const {
  uint64_t timeouts = 0;
  for (const auto& lane : lanes_) timeouts += lane->lane().counters().timeouts.load(std::memory_order_relaxed);
  return timeouts;
}

kernels::RailSlots Nodes::slots(int32_t lane_idx, bool have_come) const {
  const cpu::RailPlace& place = network_->place();
  std::byte* const first = slots_ != nullptr ? slots_->data() : memory_.data() + place.layout.banks_begin();
  kernels::RailSlots slots;
  static_cast<kernels::RailBanks&>(slots) = banks(lane_idx, have_come, first, place.whole_banks);
  return slots;
}

kernels::RailBanks Nodes::arrived_heads(int32_t lane_idx) const {
  const layout::RailMemoryLayout& layout = network_->place().layout;
  return banks(lane_idx, true, memory_.data() + layout.banks_begin(), layout.banks);
}

kernels::RailBanks Nodes::banks(int32_t lane_idx, bool have_come, std::byte* first, const layout::RailBanksLayout& layout) const {
  const int64_t out = layout.out(lane_idx, 0, 0), begin = have_come ? layout.in(lane_idx, 0, 0) : out;
  return {.banks = first + begin,
          .node_bytes = layout.bank_bytes,
          .pair_bytes = layout.out(lane_idx, 1, 0) - out,
          .own_node = topology().node[static_cast<size_t>(topology().rank)],
          .own_bytes = out - begin,
          .pair = &lane(lane_idx).talk()->bank};
}

void Nodes::abandon_memory() {
  for (const auto& lane : lanes_) lane->abandon_memory();
  static_cast<void>(new auto(std::move(memory_)));
  static_cast<void>(new auto(std::move(slots_)));
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
