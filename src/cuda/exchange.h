// SPDX-License-Identifier: Apache-2.0
// An exchange on a GPU rank: its windows in GPU memory, the state of its lanes, and what happens when a generation ends.
//
// A small domain in host memory goes with it: there the hosts of the ranks tell each other why a generation ended, and agree on the next one,
// exactly as CPU ranks do. GPUs tell each other through the windows, and their own host through a mailbox.
#pragma once

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "base/log.h"
#include "cpu/nodes_council.h"
#include "cuda/device_segment.h"
#include "cuda/nodes.h"
#include "cuda/plan_memory.h"
#include "domain/admission.h"
#include "domain/domain.h"
#include "kernels/exchange_view.h"
#include "memory/offset_allocator.h"
#include "memory/sharing.h"
#include "plan/device.h"
#include "topology/bootstrap.h"

namespace tern::cuda {

// What an exchange knows of the GPUs below it.
struct DeviceFacts {
  int device = 0;
  CUcontext context = nullptr;
  int num_sms = 0;
  bool has_bulk_copies = false;
  int ranks_on_device = 1;
  // The fewest SMs that an operation may take on any rank, by the ranks' shares of their GPUs and what their exchanges ask for; the latter may differ.
  int common_sms = 1;
  bool common_sms_asked = false;  // some exchange asks for a number

  // This rank's share of the GPU.
  int share_sms() const { return std::max(1, num_sms / ranks_on_device); }
};

// Read by tern_exchange_get_metrics from any thread. Bytes within the node, and waits, are known to the GPU alone, and are not counted.
struct Counters {
  std::atomic<uint64_t> routes{0}, dispatches{0}, combines{0}, rounds{0}, received_rows{0};
};

// Host side of a lane: the order in which its operations are enqueued. Epochs themselves live on the GPU, where a replayed graph advances
// them too; here they are counted from the generation's start to know which sends are open.
struct CudaLane {
  CudaLane(const std::shared_ptr<DevicePool>& pool, int num_ranks);

  Stream stream;  // for operations that ask for the exchange's own
  Event begin;
  std::shared_ptr<Event> end;  // behind the last operation that was not captured; the event of its plan
  DeviceBuffer<kernels::LaneState> state;
  DeviceBuffer<uint32_t> staged_counters;
  uint64_t next_epoch = 1;
  std::vector<uint64_t> open_sends;
};

class CudaExchange : public DeviceExchange {
 public:
  // Collective. `options` are complete.
  CudaExchange(const Topology& topology, Bootstrap& bootstrap, const tern_exchange_options& options, const Log& log, Deadline deadline);
  ~CudaExchange() override;

  int32_t num_lanes() const override { return static_cast<int32_t>(lanes_.size()); }
  int32_t device_index() const override { return facts_.device; }
  std::unique_ptr<DevicePlan> create_plan(const PlanShape& shape) override;
  void count_routing(const PlanShape& shape, const tern_routing& routing, const tern_launch& launch,
                     const tern_routing_counts& counts) override;
  void* alloc_window(int64_t bytes) override;
  void free_window(void* pointer) override;
  tern_exchange_state state() const override;
  tern_metrics metrics() const override;
  Trace& trace() override { return trace_; }
  void recover(const tern_recover_options& options) override;

  // For the memory of plans.
  const std::shared_ptr<DevicePool>& pool() const { return pool_; }
  // Keeps the memory of a plan that has ended until its operations have run.
  void retire(PlanMemory memory) noexcept;

  const DeviceFacts& facts() const { return facts_; }
  const tern_exchange_options& options() const { return options_; }
  const layout::DeviceWindowLayout& window_layout() const { return layout_; }
  // Within the node.
  int rank() const { return control_.rank; }
  int num_ranks() const { return control_.num_ranks; }
  uint32_t generation() const { return control_.generation; }
  // Do operations go on without ranks that they have waited for in vain?
  bool masks_late_ranks() const { return options_.on_timeout == TERN_ON_TIMEOUT_MASK; }
  CudaLane& lane(int32_t index) { return *lanes_[static_cast<size_t>(index)]; }
  Counters& counters() { return counters_; }
  // nullptr: there is one node.
  Nodes* nodes() const { return nodes_.get(); }

  // What kernels of a lane get.
  kernels::ExchangeView view(int32_t lane_idx) const;

  // Offset of `pointer` in this rank's heap, or -1 if it does not lie there with `bytes` bytes behind it.
  int64_t heap_offset(const void* pointer, int64_t bytes) const;

  // Throws what ended the generation, if anything has; for the caller's thread.
  void check_health() const;
  // The text and status of a failure that this rank's GPU has reported, without throwing.
  std::optional<tern_failure> known_failure() const;
  // What is left out of an operation that completes, as found by the host.
  void note(tern_status status, int32_t lane_idx, tern_operation operation) const;

 private:
  void find_devices(const Topology& topology, Bootstrap& bootstrap, Deadline deadline);
  void share_windows(const std::vector<uint8_t>& masked, uint32_t generation, Deadline deadline);
  std::vector<std::shared_ptr<Segment>> share_device(std::shared_ptr<DeviceSegment> mine, const std::string& tag,
                                                     const std::vector<uint8_t>& member, Deadline deadline);
  void begin_generation(const NextGeneration& next, int64_t timeout_ms);
  void set_pointers();
  void reset_lanes();
  // The same by what this rank's GPU has reported; any thread. Under TERN_ON_TIMEOUT_MASK the other hosts hear whom it goes on without.
  void hear_gpu() const;
  bool gpu_gave_up(int r) const;
  std::vector<uint8_t> given_up() const;
  bool is_idle() const;
  void await_idle(Deadline deadline) const;
  void free_retired();
  void abandon_memory();

  tern_exchange_options options_;
  Log log_;
  DeviceFacts facts_;
  layout::DeviceWindowLayout layout_;
  std::unique_ptr<SegmentSharer> sharer_;
  AdmissionBoard board_;
  mutable std::mutex generation_mutex_;            // guards what a recovery replaces against tern_exchange_get_state
  Domain control_;                                 // windows in host memory; heaps are not used
  std::vector<std::shared_ptr<Segment>> windows_;  // [num_ranks] in GPU memory
  std::vector<std::shared_ptr<Segment>> heaps_;
  std::shared_ptr<DevicePool> pool_;
  DeviceBuffer<std::byte*> window_pointers_, heap_pointers_;
  DeviceBuffer<uint32_t> failed_;
  PinnedBuffer<kernels::Mailbox> mailbox_;
  DeviceBuffer<kernels::Attendance> attendance_;  // with TERN_ON_TIMEOUT_MASK
  mutable std::mutex retired_mutex_;
  std::vector<PlanMemory> retired_;  // guarded by retired_mutex_
  mutable std::mutex heap_mutex_;
  OffsetAllocator heap_allocator_;
  Trace trace_;
  std::vector<std::unique_ptr<CudaLane>> lanes_;
  Counters counters_;
  mutable Deadline looks_at_council_ = Deadline::in_ms(0);
  std::unique_ptr<cpu::NodesCouncil> council_;  // nullptr: there is one node, and `board_` serves
  std::unique_ptr<Nodes> nodes_;                // ends first
};

}  // namespace tern::cuda
