// SPDX-License-Identifier: Apache-2.0
// How long an operation will take, stage by stage, and with how many SMs. No rank is started and nothing is allocated.
//
//   const Forecaster forecaster(batch, TERN_DEVICE_CUDA, default_costs(TERN_DEVICE_CUDA));
//   const OperationForecast dispatch = forecaster.predict({.op = "dispatch", .in_windows = true, .num_sms = 24});
//   dispatch.us();
//
// The model. A stage takes its bytes by the rate of what it needs: SMs or cores, the link, memory, the network. On GPUs stages overlap, so the
// slowest counts, and what is fixed comes on top: launches and trips, and between nodes the first piece of the other stages ("fill"). On CPU
// ranks staging and the network take the same cores as the rows, so they come on top too. A small batch of GPU ranks takes the latency path: launch,
// trips, and then its bytes.
#pragma once

#include <string>
#include <vector>

#include "forecast/costs.h"
#include "forecast/load.h"

namespace tern::tools {

struct Stage {
  std::string name;
  double us = 0;
  bool overlaps = false;  // with the other stages of its step that do; else it comes on top
  std::string how;
};

// One of route, dispatch, combine.
struct Step {
  std::string name;
  std::vector<Stage> stages;

  double us() const;
  const Stage& slowest() const;  // of all stages
};

struct OperationForecast {
  std::vector<Step> steps = {};
  int num_sms = 0;             // 0: CPU
  bool small = false;          // the latency path
  bool small_kernels = false;  // GPU: as on the latency path of one node, also between nodes. More SMs do not make them faster here
  double wire_bytes = 0;       // rows between this rank and others, once for each token and rank, as `tern bench` counts them
  double link_bytes = 0;       // of these, and of other nodes' tokens, what the ranks of a node send each other
  double network_bytes = 0;

  double us() const;
};

// As `tern bench` names them.
struct OperationChoice {
  std::string op;  // plan, dispatch, combine, plan_dispatch, route_dispatch, round_trip, round_trip_worst
  bool in_windows = true;
  bool exact = true;                // the host learns the counts
  int num_sms = 0;                  // 0: as the library chooses
  tern_mode mode = TERN_MODE_AUTO;  // AUTO: the library chooses the path; LATENCY as far as there is one
};

// Bytes that SMs or cores move, and what one of them moves of each kind.
struct RowWork {
  double rows = 0, rows_gbps = 0;
  double staged = 0, staged_gbps = 0;
  double entries = 0, entries_gbps = 0;
};

class Forecaster {
 public:
  Forecaster(const ForecastBatch& batch, tern_device_type device, const Costs& costs) : batch_(batch), device_(device), costs_(costs) {}

  // Throws TERN_INVALID_ARGUMENT for an unknown operation.
  OperationForecast predict(const OperationChoice& choice) const;

  // What the library takes if nothing is said: docs/design.md, "How many SMs". 0 on the CPU.
  int library_sms(const OperationChoice& choice) const;
  // The fewest SMs whose time is within a hundredth of the shortest. 0 on the CPU.
  int best_sms(const OperationChoice& choice) const;

  const ForecastBatch& batch() const { return batch_; }
  const Costs& costs() const { return costs_; }
  bool on_gpu() const { return device_ == TERN_DEVICE_CUDA; }

 private:
  OperationChoice as(const std::string& op, const OperationChoice& choice) const;
  int64_t row_bytes_of(const std::string& op) const;
  bool has_room_for_small_kernels(const std::string& op, tern_mode mode) const;
  bool is_small(const std::string& op, const OperationChoice& choice) const;
  bool takes_small_kernels(const std::string& op, const OperationChoice& choice) const;
  int64_t small_blocks(const std::string& op) const;
  double workers(int num_sms) const;
  double ranks_per_core() const;
  // How a batch is routed: by itself, in one call with a dispatch, or also by the kernel of a small one.
  enum class RouteWay { kAlone, kWithDispatch, kInKernel };
  Step route(bool exact, RouteWay way) const;
  Step dispatch(const OperationChoice& choice, bool routed) const;
  Step combine(const OperationChoice& choice) const;
  Step small_step(const std::string& name, double fixed_us, const Load& load) const;
  void add_rows(Step& step, const RowWork& rows, int num_sms) const;
  void add_network(Step& step, double bytes) const;
  void add_wake(Step& step) const;
  void add_trips(Step& step, double fixed_us, const std::string& how) const;

  ForecastBatch batch_;
  tern_device_type device_;
  Costs costs_;
};

}  // namespace tern::tools
