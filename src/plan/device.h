// SPDX-License-Identifier: Apache-2.0
// What an engine (CPU, CUDA) is to the layer above it: an exchange's memory and its plans. src/engine validates every
// argument and fills in defaults before it calls; an engine moves bytes. A backend that is not built is a file that
// returns none.
//
// All functions throw tern::Failure. Threads: as in tern.h.
#pragma once

#include <tern/tern.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "plan/plan_shape.h"
#include "trace/trace.h"

namespace tern {

// A validated dispatch, defaults filled in.
struct DispatchCall {
  tern_dispatch_args args;
  int64_t row_bytes = 0;    // of a row as given
  int64_t wire_bytes = 0;   // of a row as it arrives
  int64_t scale_bytes = 0;  // of a row's scales as they arrive
  int64_t scale_element_bytes = 0;
  bool carries_weights = false;
};

// A validated combine, defaults filled in.
struct CombineCall {
  tern_combine_args args;
  int64_t row_bytes = 0;   // of a row as given, and as it comes out
  int64_t wire_bytes = 0;  // of a row on its way
  bool carries_weights = false;
};

class DevicePlan {
 public:
  virtual ~DevicePlan() = default;
  virtual const PlanShape& shape() const = 0;
  virtual void check_routing(const tern_routing& routing) const = 0;
  virtual void route(const tern_routing& routing, const tern_launch& launch) = 0;
  virtual void dispatch(const DispatchCall& call, const tern_launch& launch) = 0;
  virtual void combine(const CombineCall& call, const tern_launch& launch) = 0;
  // TERN_INVALID_STATE if the plan is not routed.
  virtual tern_plan_info info() const = 0;
};

class DeviceExchange {
 public:
  virtual ~DeviceExchange() = default;
  virtual int32_t num_lanes() const = 0;
  virtual int32_t device_index() const = 0;  // of the CUDA device
  virtual std::unique_ptr<DevicePlan> create_plan(const PlanShape& shape) = 0;
  // Counts of one routing by itself; nothing is communicated.
  virtual void count_routing(const PlanShape& shape, const tern_routing& routing, const tern_launch& launch,
                             const tern_routing_counts& counts) = 0;
  virtual void* alloc_window(int64_t bytes) = 0;
  virtual void free_window(void* pointer) = 0;
  virtual tern_exchange_state state() const = 0;
  virtual tern_metrics metrics() const = 0;
  virtual Trace& trace() = 0;
  virtual void recover(const tern_recover_options& options) = 0;
};

}  // namespace tern
