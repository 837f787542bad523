// SPDX-License-Identifier: Apache-2.0
// One sequence of calls of the C interface, chosen by an input, on a group of one rank. Whatever is asked of it, the library
//
// - returns a known status, never TERN_INTERNAL_ERROR, and never waits for a rank that does not exist;
// - says why in tern_last_error();
// - with TERN_INVALID_ARGUMENT and TERN_INVALID_STATE writes nothing and changes nothing;
// - makes a known-good round trip on the same exchange afterwards.
//
// Arguments that cannot be checked are valid: pointers point to as much memory as the other arguments say.
#pragma once

#include <tern/tern.h>

#include <memory>
#include <optional>
#include <vector>

#include "input.h"
#include "memory.h"
#include "witness.h"

namespace tern::fuzz {

// The lane of the witness is its own.
inline constexpr int kWitnessLane = 1;

// A routing and what it points to.
struct RoutingArgs {
  // For a plan of one rank with these numbers.
  RoutingArgs(Input& input, int64_t max_tokens, int64_t num_topk, int64_t num_experts);

  Arrays arrays;
  Given<tern_routing> given;
  tern_routing seen;
  tern_routing* pointer = nullptr;
  bool may_be_passed = true;  // false: it needs more memory than we give
};

// What an operation reads and writes.
struct CallMemory {
  explicit CallMemory(Input& input) : inputs(input), outputs(input) {}
  Arrays inputs;
  Arrays outputs;
};

// What a send was called with: its receive gets the same.
struct SentDispatch {
  tern_dispatch_args args;
  std::shared_ptr<RoutingArgs> routing;
};

struct TestedPlan {
  tern_plan* handle = nullptr;
  tern_plan_options options;  // as the library saw them
  bool is_routed = false;
  bool is_dispatched = false;
  std::optional<SentDispatch> sent_dispatch;
  std::optional<tern_combine_args> sent_combine;
};

class Session {
 public:
  explicit Session(Input& input);
  ~Session();
  void run();

 private:
  struct WindowMemory {
    std::byte* data;
    int64_t size_bytes;
  };

  // Everything about the exchange that a refused call must leave alone.
  struct State {
    std::vector<uint64_t> counters;
    std::vector<int64_t> plans;
    bool operator==(const State&) const = default;
  };
  State state() const;

  // Makes a call and checks what comes of it. `unchanged` says whether all outputs are as before.
  template <typename Call, typename Unchanged>
  tern_status make(const char* name, Call call, Unchanged unchanged) {
    const State before = state();
    tern_group_get_info(nullptr, nullptr);  // leaves a text that no other call leaves
    const tern_status status = call();
    check_outcome(name, status);
    if (status == TERN_INVALID_ARGUMENT || status == TERN_INVALID_STATE) {
      require(unchanged(), name, "it was refused, but has written to its outputs");
      require(state() == before, name, "it was refused, but has changed the state of the exchange");
    }
    if (status != TERN_OK) witness_->make_round_trip(name);
    return status;
  }
  void check_outcome(const char* name, tern_status status) const;

  // Calls on objects: object_calls.cc.
  void prepare();
  void call_any();
  void create_plan();
  void destroy_plan();
  void get_infos();
  void restart_trace();
  void allocate_window();
  void free_window();
  void recover();
  void create_exchange();
  void create_local_groups();
  void create_allgather_group();

  // Operations: operation_calls.cc.
  void advance(TestedPlan& plan);
  void route(TestedPlan& plan);
  void count_routing();
  void dispatch(TestedPlan& plan);
  void combine(TestedPlan& plan);
  // In a tame call with this phase.
  tern_launch any_launch(tern_phase phase);
  tern_plan_info info_of(const TestedPlan& plan) const;
  SentDispatch any_dispatch(const TestedPlan& plan);
  tern_combine_args any_combine(const TestedPlan& plan);
  // Points the arguments to memory. False: the call would touch more than we give.
  bool add_arrays(tern_dispatch_args& args, const TestedPlan& plan, int64_t num_tokens, CallMemory& memory);
  bool add_arrays(tern_combine_args& args, const TestedPlan& plan, CallMemory& memory);
  // Memory for rows, if possible and wanted in the window.
  std::byte* make_rows(Arrays& arrays, int64_t bytes, bool& in_window);

  Input& input_;
  tern_group* group_ = nullptr;
  tern_exchange* exchange_ = nullptr;
  std::unique_ptr<Witness> witness_;
  std::vector<TestedPlan> plans_;
  std::vector<WindowMemory> windows_;
};

}  // namespace tern::fuzz
