// SPDX-License-Identifier: Apache-2.0
// Everything that one operation of a scenario reads and writes, in memory of the rank's device, with the arguments that point
// to it and the comparison with the oracle. Must live until its operation is complete. Loading again, for another batch
// or for a scenario of the same shape, keeps all addresses as long as the room stays the same: that is how a captured graph
// gets other data.
#pragma once

#include <tern/tern.h>

#include <cstdint>
#include <string>
#include <vector>

#include "conformance/buffer.h"
#include "conformance/scenario.h"

namespace tern::conformance {

// Where a rank's operations find their memory.
struct RankPlace {
  int32_t rank = 0;
  tern_exchange* exchange = nullptr;
  RankDevice* device = nullptr;
  // Arrays of tokens have room for that many, at the least the rank's own.
  int64_t room_tokens = 0;

  bool on_gpu() const { return device->type() == TERN_DEVICE_CUDA; }
};

struct RoutingCall {
  tern_routing routing;

  // count_on_device: GPU ranks: num_tokens is the room, and how many there are stands in device memory.
  void load(const Scenario& scenario, const RankPlace& place, bool count_on_device);

 private:
  InputArray topk_idx_, token_in_rank_, tokens_per_expert_, num_tokens_;
};

struct DispatchCall {
  tern_dispatch_args args;
  DispatchArrays<GuardedBuffer> outputs;

  void load(const Scenario& scenario, int batch, const RankPlace& place);
  std::vector<std::string> differences(const Placement& placement);

 private:
  void load_inputs(const Case& c, const RankPlace& place, int64_t num_tokens);
  void make_outputs(const Case& c, const RankPlace& place);

  int batch_ = 0;
  DispatchBytes expected_;
  InputArray tokens_, scales_, weights_;
};

struct CombineCall {
  tern_combine_args args;
  GuardedBuffer tokens, weights;

  void load(const Scenario& scenario, int batch, const RankPlace& place);
  std::vector<std::string> differences(const Case& c);

 private:
  void load_rows(const Case& c, const RankPlace& place, const Placement& placement);
  void load_inputs(const Case& c, const RankPlace& place, const Placement& placement);
  void make_outputs(const Case& c, const RankPlace& place);

  int batch_ = 0;
  CombineBytes expected_;
  GuardedBuffer rows_;
  InputArray bias_[2], owner_weights_, row_weights_;
};

}  // namespace tern::conformance
