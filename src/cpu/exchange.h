// SPDX-License-Identifier: Apache-2.0
// An exchange on a CPU rank: its windows, lanes, and what happens when a generation ends.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "base/log.h"
#include "cpu/lane.h"
#include "cpu/network.h"
#include "cpu/nodes_council.h"
#include "domain/admission.h"
#include "domain/domain.h"
#include "memory/offset_allocator.h"
#include "memory/sharing.h"
#include "plan/count_routing.h"
#include "plan/device.h"

namespace tern::cpu {

class CpuExchange : public DeviceExchange {
 public:
  // Collective. `options` are complete.
  CpuExchange(const Topology& topology, Bootstrap& bootstrap, const tern_exchange_options& options, const Log& log, Deadline deadline);

  int32_t num_lanes() const override { return static_cast<int32_t>(lanes_.size()); }
  int32_t device_index() const override { return 0; }
  std::unique_ptr<DevicePlan> create_plan(const PlanShape& shape) override;
  void count_routing(const PlanShape& shape, const tern_routing& routing, const tern_launch&, const tern_routing_counts& counts) override {
    tern::count_routing(shape, routing, counts);
  }
  void* alloc_window(int64_t bytes) override;
  void free_window(void* pointer) override;
  tern_exchange_state state() const override;
  tern_metrics metrics() const override;
  Trace& trace() override { return trace_; }
  void recover(const tern_recover_options& options) override;

  const Domain& domain() const { return domain_; }
  const tern_exchange_options& options() const { return options_; }
  Lane& lane(int32_t index) { return *lanes_[static_cast<size_t>(index)]; }
  // The lane's way to the other nodes; nullptr: there is one node.
  Rail* rail(int32_t index) { return rails_.empty() ? nullptr : rails_[static_cast<size_t>(index)].get(); }

  // See ranks_share_cores().
  bool shares_cores() const { return shares_cores_; }

  // [num_ranks of the group] 1: what is routed there counts as routed nowhere: masked out, or on a node in which this rank's rail is.
  const std::vector<uint8_t>& unreachable() const { return num_nodes() > 1 ? unreachable_ : domain_.masked; }

  // Offset of `pointer` in this rank's heap, or -1 if it does not lie there with `bytes` bytes behind it.
  int64_t heap_offset(const void* pointer, int64_t bytes) const;

  // To be called at the start of every operation: throws what ended the generation; under TERN_ON_TIMEOUT_MASK starts the
  // next one instead, if a rank that has come as far as this one calls for it. `again`: the operation has been tried, and needs the next one.
  void start_operation(Lane& lane, bool again);
  // To be called at the end of a whole operation or a receive for which somebody was missing. Those for whom this rank would have waited over the
  // missing one may not have begun it: waits until they have, so that the operation ends on all ranks or on none. Throws if one of them
  // has called for the next generation instead.
  void finish_without_missing(tern_phase phase);
  // Is there a send of the lane that has not been received?
  bool has_open_sends(const Lane& lane) const;
  // Under TERN_ON_TIMEOUT_MASK: can what follows only be done in a new generation? Not while this rank is behind the one that called for it:
  // others may still wait for what that has done already.
  bool needs_next_generation(const Lane& lane) const;

 private:
  // How far a lane is, the same on all ranks at the same operation.
  struct Progress {
    uint64_t lane_epoch = 0;  // the next ones
    uint64_t rail_epoch = 0;  // one node: 0
    uint64_t number = 0;      // grows with every operation
  };

  void share_windows(const std::vector<uint8_t>& masked, uint32_t generation, Deadline deadline);
  void start_network(Bootstrap& bootstrap, const std::vector<uint8_t>& masked, Deadline deadline);
  // `masked`, `generation`: of the group.
  void begin_generation(const NextGeneration& next, int64_t timeout_ms);

  // Under TERN_ON_TIMEOUT_MASK: does the record only call for a new generation?
  bool calls_for_restart(const tern_failure& failure) const;
  bool is_called_to_restart() const;
  Progress progress(const Lane& lane) const;
  bool refuses(const tern_failure& failure, const Progress& of_operation) const;
  // So that every rank comes to the next generation, without those that this one has given up.
  void call_for_restart(const Lane& lane);
  void restart(Lane& lane);

  int num_nodes() const { return domain_.topology.num_nodes; }

  tern_exchange_options options_;
  Log log_;
  std::unique_ptr<SegmentSharer> sharer_;
  std::unique_ptr<AdmissionBoard> board_;  // one node
  std::unique_ptr<NodesCouncil> council_;  // several nodes
  mutable std::mutex generation_mutex_;    // guards what a recovery replaces in domain_ against tern_exchange_get_state
  Domain domain_;
  mutable std::mutex heap_mutex_;
  OffsetAllocator heap_allocator_;
  Trace trace_;
  const bool shares_cores_;
  std::vector<std::unique_ptr<Lane>> lanes_;
  std::shared_ptr<Segment> rail_memory_;
  std::unique_ptr<Network> network_;  // nullptr: one node
  std::vector<std::unique_ptr<Rail>> rails_;
  std::vector<uint8_t> unreachable_;
  Progress begun_;  // when the running operation, or the last one, began; there is one lane
};

// What an engine folder offers to src/engine.
std::unique_ptr<DeviceExchange> make_cpu_exchange(const Topology& topology, Bootstrap& bootstrap, const tern_exchange_options& options,
                                                  const Log& log, Deadline deadline);

}  // namespace tern::cpu
