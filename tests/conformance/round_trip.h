// SPDX-License-Identifier: Apache-2.0
// What one rank does with a scenario: route, dispatch, combine, and after each step the comparison with the oracle. The
// steps can be called one by one, so that a test can put other things between them.
//
//   RoundTrip trip(scenario, rank, exchange, device);
//   trip.run();                                  // the whole cycle
//   trip.differences();                          // empty: all is right
//
// A step whose call fails throws std::runtime_error with the library's text; on a GPU also one whose operation fails after
// the call, since a step ends when its operation has run (sends aside). Like the exchange's lane and the device, a trip
// belongs to one thread at a time; it must be destroyed before the exchange.
#pragma once

#include <tern/tern.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "conformance/calls.h"
#include "conformance/scenario.h"

namespace tern::conformance {

// How the operations of a trip are launched, beside what its case says.
struct Launching {
  tern_launch launch;                                   // lane, phase and stream are filled in by the trip
  bool count_on_device = false;                         // GPU: with tern_routing.device_num_tokens
  std::function<void()> before = [] {}, after = [] {};  // around every call of an operation
};

class RoundTrip {
 public:
  // Creates the plan. `device` is that of the exchange.
  RoundTrip(const Scenario& scenario, int32_t rank, tern_exchange* exchange, RankDevice& device = tools::host_device());

  void launch_with(Launching launching);

  // Route, dispatch and combine with the data of batch 0; the same again along the same plan with those of batch 1.
  void run();

  // Extent WORST: routes, dispatches and combines once plainly, captures the same into a graph, and replays it `num_replays` times
  // with the routing of each scenario in turn, and with new data. The scenarios have the shape of the trip's own; see replay_scenarios().
  void run_graph(const std::vector<Scenario>& scenarios, int num_replays);

  // The whole cycle of a batch without a wait in between, for GPU ranks with extent WORST: prepare() loads the data, enqueue() puts all
  // operations on the stream, settle() waits for them and compares.
  void prepare(int batch);
  void enqueue();
  void settle();

  void route();
  // In one operation or in two phases, as the case says.
  void dispatch(int batch);
  void combine(int batch);

  // The halves of dispatch and combine, for other orders of phases. finish_ compares.
  void begin_dispatch(int batch, tern_phase phase);
  void finish_dispatch(int batch, tern_phase phase);
  void begin_combine(int batch, tern_phase phase);
  void finish_combine(int batch, tern_phase phase);

  const std::vector<std::string>& differences() const { return differences_; }
  // The bytes that the last steps left, for comparing runs with each other.
  std::vector<uint8_t> output_bytes();
  tern_plan* plan() const { return plan_.get(); }

 private:
  struct DestroyPlan {
    void operator()(tern_plan* plan) const noexcept { tern_plan_destroy(plan); }
  };

  const Case& c() const { return scenario_->c; }
  const Placement& placement() const { return scenario_->placements[static_cast<size_t>(place_.rank)]; }
  tern_launch launch(tern_phase phase) const;
  void make_room();
  void check_info(const tern_plan_info& info);
  void check_known_counts(const tern_plan_info& info);
  void check_rail_counts(const tern_plan_info& info);
  void check_unknown_counts(const tern_plan_info& info);
  void call_route(tern_plan_info* info);
  void call_dispatch(tern_phase phase);
  void call_combine(tern_phase phase);
  void await();
  void check_state();
  void pause();
  void expect(const char* what, int64_t found, int64_t expected);
  void report(const std::string& text);

  const Scenario* scenario_;
  RankPlace place_;
  Launching launching_;
  std::unique_ptr<tern_plan, DestroyPlan> plan_;
  bool routed_ = false;
  bool dispatched_beyond_capacity_ = false, routed_to_no_expert_ = false;
  int64_t num_steps_ = 0;
  RoutingCall routing_;
  std::unique_ptr<DispatchCall> dispatch_;
  std::unique_ptr<CombineCall> combine_;
  std::vector<std::string> differences_;
};

// Two trips that have been routed: three batches, with both sends of a dispatch, then of a combine, under way before the first is received.
// In order: that of the first trip is received first.
struct ReceiveOrder {
  bool dispatches_in_order = true;
  bool combines_in_order = true;
};
void run_two_in_flight(RoundTrip& first, RoundTrip& second, const ReceiveOrder& order);

}  // namespace tern::conformance
