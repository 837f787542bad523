// SPDX-License-Identifier: Apache-2.0
// What one rank does with a scenario: route, dispatch, combine, and after each step the comparison with the oracle. The
// steps can be called one by one, so that a test can put other things between them.
//
//   RoundTrip trip(scenario, rank, exchange);
//   trip.run();                                  // the whole cycle
//   trip.differences();                          // empty: all is right
//
// A step whose call fails throws std::runtime_error with the library's text. Like the exchange's lane, a trip belongs to one
// thread at a time; it must be destroyed before the exchange.
#pragma once

#include <tern/tern.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "conformance/buffer.h"
#include "conformance/scenario.h"

namespace tern::conformance {

class RoundTrip {
 public:
  // Creates the plan.
  RoundTrip(const Scenario& scenario, int32_t rank, tern_exchange* exchange);

  // Route, dispatch and combine with the data of batch 0; the same again along the same plan with those of batch 1.
  void run();

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
  struct DispatchCall;
  struct CombineCall;
  struct DestroyPlan {
    void operator()(tern_plan* plan) const noexcept { tern_plan_destroy(plan); }
  };

  tern_launch launch(tern_phase phase) const;
  tern_routing routing_args();
  void check_info(const tern_plan_info& info);
  void call_dispatch(tern_phase phase);
  void call_combine(tern_phase phase);
  void pause();
  void expect(const char* what, int64_t found, int64_t expected);
  void report(const std::string& text);

  const Scenario& scenario_;
  const Case& c_;
  const Placement& placement_;
  const int32_t rank_;
  tern_exchange* exchange_;
  std::unique_ptr<tern_plan, DestroyPlan> plan_;
  std::vector<int32_t> topk_idx_int32_;
  bool routed_ = false;
  int64_t num_steps_ = 0;
  std::shared_ptr<DispatchCall> dispatch_;
  std::shared_ptr<CombineCall> combine_;
  std::vector<std::string> differences_;
};

}  // namespace tern::conformance
