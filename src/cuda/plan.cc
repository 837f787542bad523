// SPDX-License-Identifier: Apache-2.0
#include "cuda/plan.h"

#include <algorithm>
#include <atomic>
#include <thread>

#include "base/error.h"
#include "cuda/latency.h"
#include "cuda/node_operations.h"
#include "cuda/operations.h"
#include "cuda/profiling.h"
#include "cuda/transfer.h"
#include "domain/failure.h"
#include "plan/batch_path.h"

namespace tern::cuda {
namespace {

constexpr int64_t kTokensPerRouteBlock = 64;

}  // namespace

CudaPlan::CudaPlan(CudaExchange& exchange, const PlanShape& shape)
    : exchange_(exchange), shape_(shape), memory_(exchange.pool(), shape, exchange.num_lanes()), counts_(shape, false) {
  if (exchange.nodes() != nullptr) {
    node_plan_ = std::make_shared<NodePlan>(exchange.facts().device, shape, exchange.nodes()->lane(0));
    memory_.of_host = node_plan_;
  }
  const kernels::PlanView& v = tables();
  const layout::RoutingBankLayout bank = v.routing_bank(shape.ranks_per_node());
  if (bank.bytes() > exchange.window_layout().routing_bytes)
    fail(TERN_OUT_OF_MEMORY,
         "plan: the routing of {} tokens with top-{} of {} experts needs {} bytes from each rank, the exchange has {}; create it with "
         "max_tokens, max_topk and max_experts of at least these",
         shape.max_tokens, shape.num_topk, shape.num_experts, bank.bytes(), exchange.window_layout().routing_bytes);
  if (!bank.fits_entries())
    fail(TERN_UNSUPPORTED,
         "plan: {} tokens of a rank with top-{} of {} experts are too many to be routed by a GPU at once; use fewer tokens",
         shape.max_tokens, shape.num_topk, shape.num_experts);
}

CudaPlan::~CudaPlan() {
  for (int32_t lane = 0; node_plan_ != nullptr && lane < exchange_.num_lanes(); ++lane) exchange_.nodes()->lane(lane).forget(this);
  exchange_.retire(std::move(memory_));
}

kernels::PlanView CudaPlan::batch(int32_t node) const {
  const int64_t first_token = node * shape_.max_tokens;
  const kernels::RailTables& r = rails();
  kernels::PlanView v = tables();
  v.first_source = node * shape_.ranks_per_node();
  v.experts = r.experts + first_token * shape_.num_topk;
  v.entry_rows = r.entry_rows + first_token * shape_.num_topk;
  v.messages = r.messages + first_token * v.messages_per_token;
  if (node != shape_.node()) v.weights_sent = nullptr;
  return v;
}

kernels::PlanView CudaPlan::all_batches() const {
  kernels::PlanView v = batch(0);
  v.weights_sent = tables().weights_sent;
  return v;
}

void CudaPlan::check_routing(const tern_routing& routing) const { check_routing_arguments(shape_, routing); }

void CudaPlan::check_ready(const char* operation, bool must_be_dispatched) const {
  exchange_.check_health();
  if (!routed_) fail(TERN_INVALID_STATE, "{}: the plan is not routed; call tern_plan_route, or give the dispatch a routing", operation);
  if (must_be_dispatched && !dispatched_)
    fail(TERN_INVALID_STATE, "{}: the plan has not been dispatched; its rows are not known here", operation);
  if (generation_ != exchange_.generation())
    fail(TERN_STALE_PLAN, "the plan was routed in generation {}, the exchange is in generation {} since its last recovery; route it again",
         generation_, exchange_.generation());
}

// Kernels of the throughput path cannot go on without a rank.
void CudaPlan::check_throughput_path(const char* operation) const {
  if (!exchange_.masks_late_ranks()) return;
  fail(TERN_UNSUPPORTED,
       "{}: under TERN_ON_TIMEOUT_MASK GPU ranks have the latency path alone: dispatches that route, of at most {} tokens with {} experts "
       "each (between nodes {} tokens of all nodes, and no combines in mode EXACT), and rows that fit the "
       "staging; this operation does not take it",
       operation, layout::kMostLatencyTokens, layout::kMostLatencyTopk, layout::kMostLatencyTokens);
}

void CudaPlan::check_not_under_way(const char* operation) const {
  if (is_under_way(dispatch_ticket_) || is_under_way(combine_ticket_))
    fail(TERN_INVALID_STATE, "{}: a send along this plan has not been received yet", operation);
}

kernels::RouteArgs CudaPlan::route_args(const tern_routing& routing, int32_t lane_idx, int32_t num_blocks) const {
  kernels::RouteArgs args(enter_lane(exchange_, lane_idx, true), tables(), num_blocks);
  args.shape = call_shape(shape_);
  if (shape_.extent == TERN_EXTENT_EXACT && node_plan_ == nullptr) args.host = host_counts();
  take_routing(routing, args);
  if (!args.memory.fits_shared()) args.workspace = memory_.workspace.data();
  return args;
}

// What the host knows of a batch before the GPU has routed it.
void CudaPlan::begin_routing(const tern_routing& routing) {
  dispatch_ticket_ = combine_ticket_ = {};
  routed_ = dispatched_ = weights_carried_ = false;
  generation_ = exchange_.generation();
  num_tokens_ = routing.device_num_tokens != nullptr ? -1 : routing.num_tokens;
  tokens_bound_ = routing.num_tokens;
  num_rows_ = shape_.row_capacity;
  num_received_ = -1;
  most_tokens_ = shape_.max_tokens;
  ++exchange_.counters().routes;
}

void CudaPlan::check_route_room(const tern_launch& launch) const {
  if (node_plan_ != nullptr) {
    NodeLane& lane = exchange_.nodes()->lane(launch.lane);
    node_plan_->check_room(lane);
    lane.epochs().check_room(TERN_OP_ROUTE, launch.lane, node_plan_->trip().num_rounds);
  } else {
    check_room(exchange_.lane(launch.lane), TERN_OP_ROUTE, 1);
  }
}

int32_t CudaPlan::route_sms(const tern_launch& launch) const {
  const int64_t blocks = (shape_.max_tokens + kTokensPerRouteBlock - 1) / kTokensPerRouteBlock;
  return static_cast<int32_t>(
      std::min<int64_t>({blocks, kernels::kMostRouteBlocks, choose_num_sms(exchange_, launch, blocks * kBytesPerSm)}));
}

NodePlan::Route CudaPlan::host_route(int32_t lane_idx) const {
  const auto note = [exchange = &exchange_, lane_idx](tern_status status) { exchange->note(status, lane_idx, TERN_OP_ROUTE); };
  return {awaited_ticket_, &exchange_.nodes()->unreachable(), note};
}

void CudaPlan::enqueue_route(const tern_routing& routing, const tern_launch& launch, cudaStream_t stream) {
  begin_routing(routing);
  ++awaited_ticket_;
  num_sms_ = route_blocks_ = route_sms(launch);
  if (node_plan_ != nullptr) {
    exchange_.nodes()->lane(launch.lane).epochs().take(node_plan_->trip().num_rounds);
    return NodeRoute(*this, routing, launch, node_plan_->trip(), num_sms_).enqueue(host_route(launch.lane), stream);
  }
  check(kernels::launch_route(route_args(routing, launch.lane, num_sms_), stream), "launching the kernel of route");
}

// Enqueues an operation that has been checked; begin(stream) comes first.
template <typename Operation, typename Begin>
void CudaPlan::run(const Operation& operation, const tern_launch& launch, Ticket& ticket, Begin begin) {
  OperationStream stream(*this, launch);
  begin(stream.get());
  operation.enqueue(stream.get(), ticket);
  stream.finish();
  num_sms_ = operation.num_sms();
}

void CudaPlan::route(const tern_routing& routing, const tern_launch& launch) {
  const ProfiledRange range("route");
  const CurrentContext current(exchange_.facts().context);
  check_throughput_path("route");
  exchange_.check_health();
  check_not_under_way("route");
  check_route_room(launch);
  OperationStream stream(*this, launch);
  enqueue_route(routing, launch, stream.get());
  stream.finish();
  latency_path_ = false;
  if (shape_.extent == TERN_EXTENT_EXACT) {
    const SpanFacts wait{.kind = TERN_SPAN_WAIT, .operation = TERN_OP_ROUTE, .peer = shape_.rank, .awaited = TERN_AWAITED_OWN_GPU};
    with_span(exchange_.trace().lane(launch.lane), wait, [&](Span&) {
      if (node_plan_ != nullptr) {
        await_routing(launch, [&] { return node_plan_->routed() == awaited_ticket_; });
        read_table();
      } else {
        await_routing(launch, [this, num_come = size_t{0}]() mutable {
          while (num_come < memory_.host_counts.size() && load_count(num_come) >> 32 == host_counts().ticket) ++num_come;
          return num_come == memory_.host_counts.size();
        });
        read_counts();
      }
    });
  }
  routed_ = true;
}

// Until the GPU has them, or says why not. It has a deadline of its own from the time when its kernel starts; the host's is a second one for a
// kernel that never does. Between nodes several waits may follow each other.
template <typename HasCome>
void CudaPlan::await_routing(const tern_launch& launch, HasCome has_come) const {
  const Deadline deadline = Deadline::in_ms((node_plan_ != nullptr ? 4 : 2) * exchange_.options().timeout_ms + 1000);
  constexpr int kSpinsPerLook = 1000;
  for (int64_t spin = 1; !has_come(); ++spin) {
    if (spin % kSpinsPerLook != 0) continue;
    exchange_.check_health();
    if (deadline.passed())
      fail(TERN_TIMEOUT, "route: rank {} waited for its own GPU, lane {}: work before it on the stream has not ended in time", shape_.rank,
           launch.lane);
    std::this_thread::yield();
  }
}

kernels::HostCountsView CudaPlan::host_counts() const {
  return {.words = memory_.host_counts.data(),
          .ticket = awaited_ticket_ & 0xffffffff,
          .local_experts = static_cast<uint32_t>(shape_.local_experts()),
          .num_ranks = static_cast<uint32_t>(shape_.num_ranks)};
}

uint64_t CudaPlan::load_count(size_t i) const {
  return std::atomic_ref<uint64_t>(memory_.host_counts.data()[i]).load(std::memory_order_acquire);
}

void CudaPlan::read_counts() {
  const int32_t num_ranks = shape_.num_ranks, rank = shape_.rank;
  const kernels::HostCountsView host = host_counts();
  const auto count = [&](int32_t source, uint32_t column) {
    return static_cast<int32_t>(load_count(static_cast<uint32_t>(source) * host.num_columns() + column));
  };
  const auto messages = [&](int32_t from, int32_t to) { return count(from, host.messages_to(static_cast<uint32_t>(to))); };
  num_received_ = 0;
  for (int32_t r = 0; r < num_ranks; ++r) {
    num_received_ += messages(r, rank);
    counts_.received_per_rank[static_cast<size_t>(r)] = messages(r, rank);
    counts_.sent_per_rank[static_cast<size_t>(r)] = messages(rank, r);
    for (int32_t to = 0; to < num_ranks; ++to) counts_.pair_counts[static_cast<size_t>(r * num_ranks + to)] = messages(r, to);
  }
  int64_t padded_entries = 0;
  for (int32_t e = 0; e < shape_.local_experts(); ++e) {
    int32_t entries = 0;
    for (int32_t r = 0; r < num_ranks; ++r) entries += count(r, static_cast<uint32_t>(e));
    counts_.received_per_expert[static_cast<size_t>(e)] = entries;
    padded_entries += layout::align_up(entries, shape_.alignment);
  }
  num_tokens_ = tokens_bound_ = count(rank, host.num_tokens());
  most_tokens_ = 0;
  for (int32_t r = 0; r < num_ranks; ++r) most_tokens_ = std::max<int64_t>(most_tokens_, count(r, host.num_tokens()));
  set_num_rows(padded_entries);
}

void CudaPlan::set_num_rows(int64_t padded_entries) {
  if (shape_.layout == TERN_LAYOUT_RANK_MAJOR) num_rows_ = num_received_;
  if (shape_.layout == TERN_LAYOUT_EXPERT_MAJOR) num_rows_ = padded_entries;
}

// Between nodes.
void CudaPlan::read_table() {
  const RoutingTable& table = node_plan_->table();
  counts_.set(table);
  num_received_ = table.num_received();
  num_tokens_ = tokens_bound_ = table.num_tokens();
  most_tokens_ = table.most_tokens_of_any_rank();
  set_num_rows(table.num_rows());
}

void CudaPlan::dispatch_between_nodes(const DispatchCall& call, const tern_launch& launch, bool routes) {
  if (routes) node_plan_->check_room(exchange_.nodes()->lane(launch.lane));
  NodeDispatch::Options options{.most_tokens = routes ? shape_.max_tokens : most_tokens_};
  options.routes_on_its_way = launch.phase == TERN_PHASE_RECEIVE ? dispatch_ticket_.routed
                                                                 : routes && NodeDispatch::can_route_on_its_way(*this, call, launch.phase);
  latency_path_ = options.routes_on_its_way;
  options.route_sms = route_sms(launch);
  const bool goes_ahead = routes && !options.routes_on_its_way;
  options.route = host_route(launch.lane);
  const NodeDispatch operation(*this, call, launch, options);
  if (!operation.is_at_once() || goes_ahead) check_throughput_path("dispatch");
  operation.check(dispatch_ticket_, goes_ahead ? node_plan_->trip().num_rounds : 0);
  run(operation, launch, dispatch_ticket_, [&](cudaStream_t stream) {
    if (goes_ahead)
      enqueue_route(*call.args.routing, launch, stream);
    else if (routes)
      begin_routing(*call.args.routing);
  });
}

void CudaPlan::dispatch(const DispatchCall& call, const tern_launch& launch) {
  const ProfiledRange range("dispatch");
  const CurrentContext current(exchange_.facts().context);
  const bool receives_only = launch.phase == TERN_PHASE_RECEIVE;
  const bool routes = call.args.routing != nullptr && !receives_only;
  if (routes)
    exchange_.check_health();
  else
    check_ready("dispatch", false);
  if (receives_only && dispatch_ticket_.epoch == 0)
    fail(TERN_INVALID_STATE, "dispatch: nothing to receive; the plan's last dispatch was not a send, or has been received");
  if (!receives_only) check_not_under_way("dispatch");
  latency_path_ = node_plan_ == nullptr && (receives_only ? took_latency_path(dispatch_ticket_) : takes_latency_path(*this, call, launch));
  if (node_plan_ != nullptr) {
    dispatch_between_nodes(call, launch, routes);
  } else if (latency_path_) {
    const LatencyDispatch operation(*this, call, launch);
    operation.check(dispatch_ticket_);
    run(operation, launch, dispatch_ticket_, [&](cudaStream_t) {
      if (routes) begin_routing(*call.args.routing);
    });
  } else {
    check_throughput_path("dispatch");
    const DispatchOperation operation(*this, call, launch, routes ? shape_.max_tokens : most_tokens_);
    operation.check(dispatch_ticket_, routes ? 1 : 0);
    run(operation, launch, dispatch_ticket_, [&](cudaStream_t stream) {
      if (routes) enqueue_route(*call.args.routing, launch, stream);
    });
  }
  routed_ = true;
  if (!receives_only) weights_carried_ = call.carries_weights;
  if (launch.phase == TERN_PHASE_SEND) return;
  dispatched_ = true;
  ++exchange_.counters().dispatches;
  if (num_received_ >= 0) exchange_.counters().received_rows += static_cast<uint64_t>(num_received_);
}

void CudaPlan::combine(const CombineCall& call, const tern_launch& launch) {
  const ProfiledRange range("combine");
  const CurrentContext current(exchange_.facts().context);
  check_ready("combine", true);
  const bool receives_only = launch.phase == TERN_PHASE_RECEIVE;
  if (is_under_way(dispatch_ticket_)) fail(TERN_INVALID_STATE, "combine: a dispatch along this plan has been sent and not received yet");
  if (receives_only && combine_ticket_.epoch == 0)
    fail(TERN_INVALID_STATE, "combine: nothing to receive; the plan's last combine was not a send, or has been received");
  if (!receives_only && is_under_way(combine_ticket_)) fail(TERN_INVALID_STATE, "combine: the plan's last send has not been received yet");
  if (call.args.weighting == TERN_WEIGHTS_DISPATCH && !weights_carried_)
    fail(TERN_INVALID_STATE, "combine: weighting is TERN_WEIGHTS_DISPATCH, but the plan's last dispatch carried no topk_weights");
  latency_path_ = node_plan_ == nullptr && (receives_only ? took_latency_path(combine_ticket_) : takes_latency_path(*this, call));
  if (node_plan_ != nullptr) {
    const NodeCombine operation(*this, call, launch);
    if (!operation.is_at_once()) check_throughput_path("combine");
    operation.check(combine_ticket_);
    run(operation, launch, combine_ticket_, [](cudaStream_t) {});
  } else if (latency_path_) {
    const LatencyCombine operation(*this, call, launch);
    operation.check(combine_ticket_);
    run(operation, launch, combine_ticket_, [](cudaStream_t) {});
  } else {
    check_throughput_path("combine");
    const CombineOperation operation(*this, call, launch);
    operation.check(combine_ticket_);
    run(operation, launch, combine_ticket_, [](cudaStream_t) {});
  }
  if (launch.phase != TERN_PHASE_SEND) ++exchange_.counters().combines;
}

tern_plan_info CudaPlan::info() const {
  if (!routed_) fail(TERN_INVALID_STATE, "plan info: the plan is not routed; call tern_plan_route, or give the dispatch a routing");
  tern_plan_info info;
  info.num_tokens = num_tokens_;
  info.num_received = num_received_;
  info.num_rows = num_rows_;
  info.row_capacity = shape_.row_capacity;
  info.generation = generation_;
  info.num_sms = num_sms_;
  info.latency_path = latency_path_ ? 1 : 0;
  if (num_received_ < 0) return info;
  counts_.tell(info);
  return info;
}

}  // namespace tern::cuda
