// SPDX-License-Identifier: Apache-2.0
// What an exchange on GPU ranks has between nodes: the network of CPU ranks, on banks in pinned memory that kernels fill and read, or with slots
// in memory of the GPU where the network reaches that; and for each lane a thread that does the host's part.
//
// Lifetime: kernels must have ended before it does, unless abandon_memory() was called. Its end takes leave of the other nodes as cpu::Network
// does.
#pragma once

#include <algorithm>
#include <functional>
#include <memory>
#include <vector>

#include "cpu/network.h"
#include "cuda/device_segment.h"
#include "cuda/node_lane.h"
#include "kernels/rail.h"
#include "trace/trace.h"

namespace tern::cuda {

class Nodes {
 public:
  // What the exchange has for them.
  struct Setup {
    tern_exchange_options options;
    std::function<void()> hear_gpu;  // NodeLane::Options
    Log log;
  };

  // Collective. `domain`: the node's hosts, with a lane for each of the exchange, and stays. There is no network before the first start().
  Nodes(const std::shared_ptr<DevicePool>& pool, const Domain& domain, const Setup& setup);

  // Begins a generation, on fresh memory: collective among those who go on, [num_ranks of the group] masked or not. stop() ended the one before.
  void start(Bootstrap& bootstrap, const std::vector<uint8_t>& masked, Deadline deadline);
  // No kernel runs any more.
  void stop();
  // Ranks that are masked out, and those of nodes that this rank's tokens do not reach, because its rail there is.
  const std::vector<uint8_t>& unreachable() const { return unreachable_; }

  NodeLane& lane(int32_t index) const { return *lanes_[static_cast<size_t>(index)]; }
  int64_t bank_bytes() const { return network_->place().whole_banks.bank_bytes; }
  int32_t num_nodes() const { return topology().num_nodes; }
  // The same in GPU memory; nullptr: there are none.
  const uint8_t* unreachable_on_gpu() const {
    return std::ranges::count(unreachable_, 0) == std::ssize(unreachable_) ? nullptr : unreachable_on_gpu_.data();
  }
  uint64_t network_bytes() const;
  uint64_t timeouts() const;
  // Under TERN_ON_TIMEOUT_MASK: this rank's window knows whom the other nodes have given up.
  void hear_standing() const { lane(0).rail().hear_standing(); }
  cpu::Network& network() { return *network_; }

  // Slots that leave, or that have come, with those of the own node; what is in them is to be added.
  kernels::RailSlots leaving(int32_t lane_idx) const { return slots(lane_idx, false); }
  kernels::RailSlots arrived(int32_t lane_idx) const { return slots(lane_idx, true); }
  // Header and counts of what has come.
  kernels::RailBanks arrived_heads(int32_t lane_idx) const;

  void abandon_memory();

 private:
  cpu::RailMemory memory_of_banks();
  kernels::RailSlots slots(int32_t lane_idx, bool have_come) const;
  kernels::RailBanks banks(int32_t lane_idx, bool have_come, std::byte* first, const layout::RailBanksLayout& layout) const;

  const Topology& topology() const { return domain_.topology; }

  std::shared_ptr<DevicePool> pool_;
  const Domain& domain_;
  Setup setup_;
  PinnedBuffer<std::byte> memory_;
  std::shared_ptr<DeviceSegment> slots_;  // nullptr: they are in memory_
  Trace trace_;                           // of the commands; nothing is recorded
  std::unique_ptr<cpu::Network> network_;
  std::vector<uint8_t> unreachable_;  // [num_ranks]
  DeviceBuffer<uint8_t> unreachable_on_gpu_;
  std::vector<std::unique_ptr<NodeLane>> lanes_;
};

// The windows of the node's hosts: what they tell each other are counts.
layout::WindowLayout make_host_layout(const tern_exchange_options& options, const Topology& topology);

}  // namespace tern::cuda
