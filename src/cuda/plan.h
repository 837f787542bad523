// SPDX-License-Identifier: Apache-2.0
// A plan on a GPU rank: the tables of a routed batch in GPU memory, and the operations along it. The arguments of their kernels are made in
// dispatch.cc and combine.cc; transfer.h has what those share.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/exchange.h"
#include "cuda/node_plan.h"
#include "cuda/plan_memory.h"
#include "kernels/exchange_view.h"
#include "kernels/route.h"
#include "plan/device.h"
#include "plan/routing_counts.h"

namespace tern::cuda {

// A send that has not been received, as the host knows it.
struct Ticket {
  uint64_t epoch = 0;  // of the lane's count; 0: there is none
  int32_t lane_idx = 0;
  uint32_t generation = 0;
  layout::CallShape shape;
  bool routed = false;  // the send has made the plan
};

class CudaPlan : public DevicePlan {
 public:
  CudaPlan(CudaExchange& exchange, const PlanShape& shape);
  ~CudaPlan() override;

  const PlanShape& shape() const override { return shape_; }
  void check_routing(const tern_routing& routing) const override;
  void route(const tern_routing& routing, const tern_launch& launch) override;
  void dispatch(const DispatchCall& call, const tern_launch& launch) override;
  void combine(const CombineCall& call, const tern_launch& launch) override;
  tern_plan_info info() const override;

  CudaExchange& exchange() const { return exchange_; }
  const kernels::PlanView& tables() const { return memory_.tables.view(); }
  // Between nodes: what the host has of the plan, and the tables of a batch.
  const std::shared_ptr<NodePlan>& node_plan() const { return node_plan_; }
  const kernels::RailTables& rails() const { return memory_.tables.rails(); }
  kernels::PlanView batch(int32_t node) const;
  // All batches as one (kernels::LatencyBatches).
  kernels::PlanView all_batches() const;
  const kernels::NodeRouteTables& route_tables() const { return memory_.tables.route(); }
  std::byte* tables_data() const { return memory_.tables.data(); }
  int64_t told_bytes() const { return memory_.tables.told_bytes(); }
  // Of a route's kernel, which takes an epoch of the lane.
  kernels::RouteArgs route_args(const tern_routing& routing, int32_t lane_idx, int32_t num_blocks) const;
  // To be recorded behind the operations of a lane.
  const std::shared_ptr<Event>& end_of(int32_t lane_idx) const { return memory_.ends[static_cast<size_t>(lane_idx)]; }
  // Rows of the outputs: the capacity, or with extent exact what was counted.
  int64_t num_rows() const { return num_rows_; }
  // The most tokens that any rank has routed, as far as the host knows.
  int64_t most_tokens() const { return most_tokens_; }
  // Of the kernel that has routed it last.
  int32_t route_blocks() const { return route_blocks_; }
  // Since then.
  bool is_dispatched() const { return dispatched_; }
  // Of this rank, at most: the GPU may know better.
  int64_t num_tokens() const { return tokens_bound_; }

 private:
  void check_ready(const char* operation, bool must_be_dispatched) const;
  void check_throughput_path(const char* operation) const;
  void check_not_under_way(const char* operation) const;
  bool is_under_way(const Ticket& ticket) const { return ticket.epoch != 0 && ticket.generation == exchange_.generation(); }
  void begin_routing(const tern_routing& routing);
  int32_t route_sms(const tern_launch& launch) const;
  // Between nodes.
  NodePlan::Route host_route(int32_t lane_idx) const;
  void enqueue_route(const tern_routing& routing, const tern_launch& launch, cudaStream_t stream);
  template <typename Operation, typename Begin>
  void run(const Operation& operation, const tern_launch& launch, Ticket& ticket, Begin begin);
  void check_route_room(const tern_launch& launch) const;
  void dispatch_between_nodes(const DispatchCall& call, const tern_launch& launch, bool routes);
  // Of a route with extent exact: waits until has_come() and reads what has.
  template <typename HasCome>
  void await_routing(const tern_launch& launch, HasCome has_come) const;
  kernels::HostCountsView host_counts() const;
  uint64_t load_count(size_t i) const;
  void read_counts();
  void read_table();
  void set_num_rows(int64_t padded_entries);

  CudaExchange& exchange_;
  PlanShape shape_;
  PlanMemory memory_;
  std::shared_ptr<NodePlan> node_plan_;  // nullptr: there is one node
  uint64_t awaited_ticket_ = 0;
  Ticket dispatch_ticket_, combine_ticket_;
  uint32_t generation_ = 0;
  bool routed_ = false;
  bool dispatched_ = false;
  bool weights_carried_ = false;
  bool latency_path_ = false;
  int32_t num_sms_ = 0, route_blocks_ = 0;
  int64_t num_tokens_ = 0;  // -1: the host does not know
  int64_t tokens_bound_ = 0;
  int64_t num_rows_ = 0;
  int64_t num_received_ = -1;
  int64_t most_tokens_ = 0;
  RoutingCounts counts_;
};

}  // namespace tern::cuda
