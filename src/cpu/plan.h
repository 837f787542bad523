// SPDX-License-Identifier: Apache-2.0
// A plan on a CPU rank: the routing table, the weights that travelled, and the operations along it. The operations themselves
// are in route.cc, dispatch.cc and combine.cc.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/exchange.h"
#include "plan/device.h"
#include "plan/routing_counts.h"
#include "plan/routing_table.h"
#include "rows/rows.h"

namespace tern::cpu {

// What combine needs to know about weights; [..., num_topk] each.
struct PlanWeights {
  std::vector<std::vector<float>> sent;     // [num_nodes][max_tokens] of the batches' tokens, as the last dispatch carried them
  std::vector<std::vector<float>> at_rail;  // [num_nodes][max_tokens] of other nodes' batches, given by the owners at the running combine
  std::vector<float> received;              // [max_messages] of the messages received with them
  std::vector<float> from_owner;            // [max_messages] given by the owners at the running combine
  bool carried = false;                     // by the last dispatch
};

// Memory that an operation works in, so that none allocates.
struct PlanScratch {
  explicit PlanScratch(const PlanShape& shape);

  std::vector<std::byte*> row_address;     // [ranks of the node] zero copy: where each rank's rows lie
  std::vector<std::byte*> payload_places;  // dispatch: where the row that is being sent goes
  std::vector<std::byte*> scale_places;
  std::vector<int64_t> next_message;      // [num_ranks] combine: next message of each owner
  std::vector<const std::byte*> arrived;  // [ranks of the node] combine: bank of each rank in this round
  std::vector<int32_t> next_slot;         // [ranks of the node] combine: next slot in it
  std::vector<SumTerm> terms;             // combine: of the token that is being summed
  std::vector<int32_t> group_ends;

  std::vector<size_t> next_to;                                  // [num_nodes] between nodes: next of the tokens that go there
  std::vector<const std::byte*> rail_banks[layout::kNumBanks];  // [num_nodes] by the rail's round: what has come from each node
  std::vector<int64_t> rail_slots;                              // [num_nodes] combine: next slot in it
};

// What a route works on; also that of GPU ranks between nodes.
struct RouteContext {
  Lane& lane;
  Rail* rail;  // nullptr: all ranks are on one node
  RoutingTable& table;
  PlanScratch& scratch;
  const Domain& domain() const { return lane.domain(); }
  const PlanShape& shape() const { return table.shape(); }
};

// Everything that an operation works on.
struct PlanContext : RouteContext {
  CpuExchange& exchange;
  PlanWeights& weights;
};

// Parts of the operations that concern all of them.
// Tokens whose slots fit a bank; TERN_OUT_OF_MEMORY says what staging would be needed if not even one does. An operation in one
// piece takes only as much of a bank as stays in the caches until the other side reads it; sends, and what runs while one is under way,
// must do without rounds if they can.
int64_t tokens_per_round(const PlanContext& context, const layout::BankLayout& bank, int64_t slots_per_token, tern_phase phase,
                         const char* operation);
// How rows of the batch are written where nobody here reads them: a large batch past the caches.
Store batch_store(const PlanContext& context, int64_t row_bytes);
// How slots are written: past the caches only if they are read much later, and are too much for them.
Store slot_store(const PlanContext& context, int64_t row_bytes, tern_phase phase);
// Small enough for the latency path: fewer trips, more copies. The same answer on every rank.
bool is_small(const PlanContext& context, int64_t row_bytes);
// Are these rows of an operation, outputs or inputs, used by the other ranks where they lie? TERN_INVALID_ARGUMENT if the caller promised
// that with zero_copy and they are not in this rank's window.
bool uses_window(const PlanContext& context, const char* operation, const void* rows, int64_t row_bytes, bool zero_copy);
// At least one.
int64_t num_rounds_for(const PlanContext& context, int64_t tokens_per_round);

// Walking the messages that this rank has received, source by source, as the rounds of their owners' tokens go on.
void restart_messages(const PlanContext& context);
// Calls visit(message) for the next messages from that rank of the node, of all its batches, whose tokens lie before `end`.
template <typename Visitor>
void for_each_message(const PlanContext& context, int domain_rank, int64_t end, Visitor visit) {
  for (int32_t node = 0; node < context.shape().num_nodes; ++node) {
    const int32_t source = node * context.shape().ranks_per_node() + domain_rank;
    int64_t& message = context.scratch.next_message[static_cast<size_t>(source)];
    for (; message < context.table.received_begin(source + 1) && context.table.source_token(message) < end; ++message) visit(message);
  }
}

// Between nodes: how many of the owners' tokens go over the network in a round, of which each has `slots_per_token` slots. A multiple of
// what the rounds within the node take, which is lowered where the network's banks are smaller. TERN_OUT_OF_MEMORY says what would be
// needed if not even one token fits, or for a phase not all.
void set_rail_rounds(const PlanContext& context, RailTrip& rail_trip, RoundTrip& trip, int64_t slots_per_token, tern_phase phase);
// A send phase must fit one bank.
void check_phase(const PlanContext& context, const RoundTrip& trip, tern_phase phase);

void run_route(const RouteContext& context);
// Parts of it. Between nodes: what it is to the rail; and what comes after that, in which the ranks of a node tell each other their counts and those
// of their rails.
RailTrip rail_trip_of_route(const RouteContext& context);
void run_route_in_node(const RouteContext& context);
// What a route and a dispatch that routes on its way write and read. Over the rail: the counts before the slots; in a slot's words the token, then
// where it goes in that node. `bank` is what has come from the node: its tokens become the batch of that node.
void put_counts_for(const RouteContext& context, const RailTrip& trip, uint64_t epoch, int node);
void put_token_words(const RouteContext& context, const RailTrip& trip, int node, int32_t token, std::byte* slot);
void take_tokens(const RouteContext& context, const RailTrip& trip, int node, const std::byte* bank);
// Within the node: the counts of all batches before the slots.
void put_counts_in_node(const RouteContext& context, const RoundTrip& trip, uint64_t epoch);
void take_counts_in_node(const RouteContext& context, const RoundTrip& trip, int peer, const std::byte* bank);

// A send that has not been received.
struct Ticket {
  uint64_t epoch = 0;  // 0: there is none. Between nodes: the rail's
  int32_t lane_idx = 0;
  uint32_t generation = 0;
  layout::CallShape shape;
};
// TERN_INVALID_ARGUMENT if a receive is not called as its send was: on the same lane, with the same shape.
void check_ticket(const PlanContext& context, const Ticket& ticket, const RoundTrip& trip);

// `fused`: the routing travels with the rows: counts before the slots and, between nodes, where a token goes in its slot.
struct DispatchRun {
  const DispatchCall& call;
  bool fused = false;
  tern_phase phase = TERN_PHASE_WHOLE;
  Ticket& ticket;
};
// Throws what would keep the dispatch from being started, and changes nothing. `after_route`: a route goes ahead of it.
void check_dispatch(const PlanContext& context, const DispatchRun& run, bool after_route);
void run_dispatch(const PlanContext& context, const DispatchRun& run);
// Between nodes: does the whole batch fit one round of the rail, with its routing? The same answer on every rank.
bool can_fuse(const PlanContext& context, const DispatchCall& call);

struct CombineRun {
  const CombineCall& call;
  tern_phase phase = TERN_PHASE_WHOLE;
  Ticket& ticket;
};
void run_combine(const PlanContext& context, const CombineRun& run);

class CpuPlan : public DevicePlan {
 public:
  CpuPlan(CpuExchange& exchange, const PlanShape& shape);

  const PlanShape& shape() const override { return table_.shape(); }
  void check_routing(const tern_routing& routing) const override { tern::check_routing(table_.shape(), routing); }
  void route(const tern_routing& routing, const tern_launch& launch) override;
  void dispatch(const DispatchCall& call, const tern_launch& launch) override;
  void combine(const CombineCall& call, const tern_launch& launch) override;
  tern_plan_info info() const override;

 private:
  struct Tickets {
    Ticket dispatch;
    Ticket combine;
  };

  PlanContext context(Lane& lane) { return {{lane, exchange_.rail(lane.index()), table_, scratch_}, exchange_, weights_}; }
  void check_ready(const char* operation, bool must_be_dispatched) const;
  // Must the ticket's receive come first? What was sent in an earlier generation is gone.
  bool is_under_way(const Ticket& ticket) const { return ticket.epoch != 0 && ticket.generation == exchange_.domain().generation; }
  void check_nothing_under_way(const char* operation) const;
  void set_routing(Lane& lane, const tern_routing& routing);
  void finish_routing();
  // Runs one operation, again in a new generation if other ranks call for one. `routes`: it does not need an earlier routing.
  template <typename Operation>
  void operate(const tern_launch& launch, bool routes, Operation operation);

  CpuExchange& exchange_;
  RoutingTable table_;
  PlanWeights weights_;
  PlanScratch scratch_;
  Tickets tickets_;
  uint32_t generation_ = 0;
  bool routed_ = false;
  bool dispatched_ = false;
  bool latency_path_ = false;
  RoutingCounts counts_;
};

}  // namespace tern::cpu
