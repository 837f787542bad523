// SPDX-License-Identifier: Apache-2.0
#include "cuda/plan.h"

#include <algorithm>
#include <atomic>
#include <thread>

#include "base/error.h"
#include "cuda/operations.h"
#include "cuda/transfer.h"
#include "domain/failure.h"

namespace tern::cuda {
namespace {

constexpr int kMostRouteBlocks = 32;
constexpr int64_t kTokensPerRouteBlock = 64;

// Places tables one after the other; with no memory it only measures.
class Placer {
 public:
  explicit Placer(std::byte* memory) : memory_(memory) {}
  template <typename T>
  void place(T*& table, int64_t size) {
    table = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + num_bytes_);
    num_bytes_ += layout::align_up(size * static_cast<int64_t>(sizeof(T)), 256);
  }
  int64_t num_bytes() const { return num_bytes_; }

 private:
  std::byte* memory_;
  int64_t num_bytes_ = 0;
};

int64_t place_tables(const PlanShape& shape, std::byte* memory, kernels::PlanView& v) {
  constexpr int32_t kTopkGranule = 4;  // rows of tables are loaded 16 bytes at a time
  v.max_tokens = shape.max_tokens;
  v.num_experts = shape.num_experts;
  v.local_experts = shape.local_experts();
  v.num_topk = shape.num_topk;
  v.topk_stride = static_cast<int32_t>(layout::align_up(shape.num_topk, kTopkGranule));
  v.messages_per_token = shape.max_messages_per_token();
  v.tokens_per_chunk = static_cast<int32_t>((shape.max_tokens + layout::kMaxChunks - 1) / layout::kMaxChunks);
  v.num_chunks = static_cast<int32_t>((shape.max_tokens + v.tokens_per_chunk - 1) / v.tokens_per_chunk);
  v.layout = shape.layout;
  v.alignment = shape.alignment;
  v.row_capacity = shape.row_capacity;
  v.padded_group_rows = shape.padded_group_rows();
  const int64_t num_entries = shape.max_tokens * shape.num_topk, num_received = shape.max_messages() * v.topk_stride;
  Placer p(memory);
  p.place(v.num_tokens, shape.num_ranks);
  p.place(v.counts, int64_t{shape.num_ranks} * v.num_counts(shape.num_ranks));
  p.place(v.experts, num_entries);
  p.place(v.entry_rows, num_entries);
  p.place(v.messages, shape.max_tokens * v.messages_per_token);
  p.place(v.received_begin, shape.num_ranks + 1);
  p.place(v.chunk_begin, int64_t{shape.num_ranks} * (layout::kMaxChunks + 1));
  p.place(v.source_token, shape.max_messages());
  p.place(v.received_experts, num_received);
  p.place(v.received_rows, num_received);
  p.place(v.group_begin, v.local_experts + 1);
  p.place(v.source_begin, int64_t{v.local_experts} * shape.num_ranks);
  p.place(v.weights_sent, num_entries);
  p.place(v.weights_received, num_received);
  p.place(v.weights_from_owner, num_received);
  p.place(v.dispatch_ticket, 1);
  p.place(v.combine_ticket, 1);
  return p.num_bytes();
}

int64_t tables_bytes(const PlanShape& shape) {
  kernels::PlanView measured;
  return place_tables(shape, nullptr, measured);
}

}  // namespace

PlanTables::PlanTables(int device, const PlanShape& shape) : memory_(device, static_cast<size_t>(tables_bytes(shape))) {
  place_tables(shape, memory_.data(), view_);
}

CudaPlan::CudaPlan(CudaExchange& exchange, const PlanShape& shape)
    : exchange_(exchange),
      shape_(shape),
      tables_(exchange.facts().device, shape),
      routed_event_(exchange.facts().device),
      received_per_rank_(static_cast<size_t>(shape.num_ranks)),
      received_per_expert_(static_cast<size_t>(shape.local_experts())),
      sent_per_rank_(static_cast<size_t>(shape.num_ranks)),
      pair_counts_(static_cast<size_t>(shape.num_ranks) * static_cast<size_t>(shape.num_ranks)) {
  const kernels::PlanView& v = tables();
  const layout::RoutingBankLayout bank{.num_counts = v.num_counts(shape.num_ranks), .num_topk = shape.num_topk};
  if (bank.bytes(shape.max_tokens) > exchange.window_layout().routing_bytes)
    fail(TERN_OUT_OF_MEMORY,
         "plan: the routing of {} tokens with top-{} of {} experts needs {} bytes from each rank, the exchange has {}; create it with "
         "max_tokens, max_topk and max_experts of at least these",
         shape.max_tokens, shape.num_topk, shape.num_experts, bank.bytes(shape.max_tokens), exchange.window_layout().routing_bytes);
  const auto num_counts = static_cast<size_t>(v.num_counts(shape.num_ranks));
  block_counts_ = {exchange.facts().device, kMostRouteBlocks * num_counts};
  const int32_t num_warps = kernels::route_counting_warps(shape.num_experts, shape.num_ranks);
  const int64_t workspace = kernels::route_workspace(shape.num_experts, shape.local_experts(), shape.num_ranks, num_warps);
  if (!kernels::route_fits_shared(workspace)) workspace_ = {exchange.facts().device, kMostRouteBlocks * static_cast<size_t>(workspace)};
  if (shape.extent == TERN_EXTENT_EXACT) {
    host_counts_ = {exchange.facts().device, static_cast<size_t>(shape.num_ranks) * (num_counts + 1)};
    host_ticket_ = {exchange.facts().device, 1};
  }
}

CudaPlan::~CudaPlan() = default;

void CudaPlan::check_routing(const tern_routing& routing) const {
  constexpr auto kBad = TERN_INVALID_ARGUMENT;
  if (routing.num_tokens < 0 || routing.num_tokens > shape_.max_tokens)
    fail(kBad, "routing: num_tokens is {}, must be 0 to the plan's max_tokens {}", routing.num_tokens, shape_.max_tokens);
  if (routing.token_in_rank != nullptr && routing.topk_idx != nullptr)
    fail(kBad, "routing: both topk_idx and token_in_rank are given; give one");
  if (shape_.num_topk == 0) {
    if (routing.token_in_rank == nullptr && routing.num_tokens > 0)
      fail(kBad, "routing: token_in_rank is NULL, but the plan's num_topk is 0, which means routing by token_in_rank");
    return;
  }
  if (routing.token_in_rank != nullptr) fail(kBad, "routing: token_in_rank needs a plan with num_topk 0; this one has {}", shape_.num_topk);
  if (routing.topk_idx_type != TERN_INDEX_INT64 && routing.topk_idx_type != TERN_INDEX_INT32)
    fail(kBad, "routing: topk_idx_type is {}, which is no tern_index_type", static_cast<int>(routing.topk_idx_type));
  if (routing.topk_idx == nullptr && routing.num_tokens > 0) fail(kBad, "routing: topk_idx is NULL with {} tokens", routing.num_tokens);
}

void CudaPlan::check_ready(const char* operation, const tern_launch& launch, bool must_be_dispatched) const {
  exchange_.check_health();
  if (!routed_) fail(TERN_INVALID_STATE, "{}: the plan is not routed; call tern_plan_route, or give the dispatch a routing", operation);
  if (must_be_dispatched && !dispatched_)
    fail(TERN_INVALID_STATE, "{}: the plan has not been dispatched; its rows are not known here", operation);
  if (generation_ != exchange_.generation())
    fail(TERN_STALE_PLAN, "the plan was routed in generation {}, the exchange is in generation {} since its last recovery; route it again",
         generation_, exchange_.generation());
  static_cast<void>(launch);
}

void CudaPlan::check_not_under_way(const char* operation) const {
  if (is_under_way(dispatch_ticket_) || is_under_way(combine_ticket_))
    fail(TERN_INVALID_STATE, "{}: a send along this plan has not been received yet", operation);
}

kernels::RouteArgs CudaPlan::route_args(const tern_routing& routing, CudaLane& lane, int32_t lane_idx) const {
  const kernels::PlanView& v = tables();
  kernels::RouteArgs args;
  args.exchange = exchange_.view(lane_idx);
  args.plan = v;
  args.shape = call_shape(shape_);
  args.bank = {.num_counts = v.num_counts(shape_.num_ranks), .num_topk = shape_.num_topk};
  if (shape_.extent == TERN_EXTENT_EXACT) {
    args.host = {host_counts_.data(), host_counts_.data() + shape_.num_ranks * v.num_counts(shape_.num_ranks), host_ticket_.data(),
                 awaited_ticket_};
  }
  args.topk_idx = routing.topk_idx;
  args.is_int32 = routing.topk_idx_type == TERN_INDEX_INT32;
  args.token_in_rank = routing.token_in_rank;
  args.tokens_per_expert = routing.tokens_per_expert;
  args.num_tokens = static_cast<int32_t>(routing.num_tokens);
  args.device_num_tokens = routing.device_num_tokens;
  args.num_counting_warps = kernels::route_counting_warps(shape_.num_experts, shape_.num_ranks);
  args.block_counts = block_counts_.data();
  args.workspace = workspace_.data();
  ++lane.next_epoch;
  if (!lane.open_sends.empty()) args.exchange.consumed_lag = static_cast<int32_t>(lane.next_epoch - lane.open_sends.front());
  return args;
}

void CudaPlan::enqueue_route(const tern_routing& routing, const tern_launch& launch, cudaStream_t stream) {
  CudaLane& lane = exchange_.lane(launch.lane);
  dispatch_ticket_ = combine_ticket_ = {};
  routed_ = dispatched_ = weights_carried_ = false;
  ++awaited_ticket_;
  const int64_t blocks = (shape_.max_tokens + kTokensPerRouteBlock - 1) / kTokensPerRouteBlock;
  num_sms_ = static_cast<int32_t>(std::min<int64_t>({blocks, kMostRouteBlocks, choose_num_sms(exchange_, launch, blocks * kBytesPerSm)}));
  check(kernels::launch_route(route_args(routing, lane, launch.lane), num_sms_, stream), "launching the kernel of route");
  generation_ = exchange_.generation();
  num_tokens_ = routing.device_num_tokens != nullptr ? -1 : routing.num_tokens;
  tokens_bound_ = routing.num_tokens;
  num_rows_ = shape_.row_capacity;
  num_received_ = -1;
  most_tokens_ = shape_.max_tokens;
  ++exchange_.counters().num_routes;
}

void CudaPlan::route(const tern_routing& routing, const tern_launch& launch) {
  const DeviceGuard guard(exchange_.facts().device);
  exchange_.check_health();
  check_not_under_way("route");
  CudaLane& lane = exchange_.lane(launch.lane);
  check_room(lane, TERN_OP_ROUTE, 1);
  const OperationStream stream(lane, launch);
  enqueue_route(routing, launch, stream.get());
  stream.finish();
  if (shape_.extent == TERN_EXTENT_EXACT) await_counts(launch);
  routed_ = true;
}

// Until the GPU has them, or says why not. It has a deadline of its own from the time when its kernel starts; the host's is a second one for a
// kernel that never does.
void CudaPlan::await_counts(const tern_launch& launch) {
  const Deadline deadline = Deadline::in_ms(2 * exchange_.options().timeout_ms + 1000);
  constexpr int kSpinsPerLook = 1000;
  for (int64_t spin = 1;; ++spin) {
    if (std::atomic_ref<uint64_t>(*host_ticket_.data()).load(std::memory_order_acquire) == awaited_ticket_) break;
    if (spin % kSpinsPerLook != 0) continue;
    exchange_.check_health();
    if (deadline.passed())
      fail(TERN_TIMEOUT, "route: rank {} waited for its own GPU, lane {}: work before it on the stream has not ended in time", shape_.rank,
           launch.lane);
    std::this_thread::yield();
  }
  read_counts();
}

void CudaPlan::read_counts() {
  const int32_t num_ranks = shape_.num_ranks, rank = shape_.rank;
  const int32_t num_counts = tables().num_counts(num_ranks);
  const int32_t* counts = host_counts_.data();
  const int32_t* tokens = counts + num_ranks * num_counts;
  const auto messages = [&](int32_t from, int32_t to) { return counts[from * num_counts + shape_.num_experts + to]; };
  num_received_ = 0;
  for (int32_t r = 0; r < num_ranks; ++r) {
    num_received_ += messages(r, rank);
    received_per_rank_[static_cast<size_t>(r)] = messages(r, rank);
    sent_per_rank_[static_cast<size_t>(r)] = messages(rank, r);
    for (int32_t to = 0; to < num_ranks; ++to) pair_counts_[static_cast<size_t>(r * num_ranks + to)] = messages(r, to);
  }
  int64_t padded_entries = 0;
  for (int32_t e = 0; e < shape_.local_experts(); ++e) {
    int32_t entries = 0;
    for (int32_t r = 0; r < num_ranks; ++r) entries += counts[r * num_counts + rank * shape_.local_experts() + e];
    received_per_expert_[static_cast<size_t>(e)] = entries;
    padded_entries += layout::align_up(entries, shape_.alignment);
  }
  num_tokens_ = tokens_bound_ = tokens[rank];
  most_tokens_ = *std::max_element(tokens, tokens + num_ranks);
  if (shape_.layout == TERN_LAYOUT_RANK_MAJOR) num_rows_ = num_received_;
  if (shape_.layout == TERN_LAYOUT_EXPERT_MAJOR) num_rows_ = padded_entries;
}

void CudaPlan::dispatch(const DispatchCall& call, const tern_launch& launch) {
  const DeviceGuard guard(exchange_.facts().device);
  const bool receives_only = launch.phase == TERN_PHASE_RECEIVE;
  const bool routes = call.args.routing != nullptr && !receives_only;
  if (routes)
    exchange_.check_health();
  else
    check_ready("dispatch", launch, false);
  if (receives_only && dispatch_ticket_.epoch == 0)
    fail(TERN_INVALID_STATE, "dispatch: nothing to receive; the plan's last dispatch was not a send, or has been received");
  if (!receives_only) check_not_under_way("dispatch");
  DispatchOperation operation(*this, call, launch, routes ? shape_.max_tokens : most_tokens_);
  operation.check(dispatch_ticket_, routes ? 1 : 0);
  CudaLane& lane = exchange_.lane(launch.lane);
  const OperationStream stream(lane, launch);
  if (routes) enqueue_route(*call.args.routing, launch, stream.get());
  operation.enqueue(stream.get(), dispatch_ticket_);
  stream.finish();
  routed_ = true;
  num_sms_ = operation.num_sms();
  if (!receives_only) weights_carried_ = call.carries_weights;
  if (launch.phase == TERN_PHASE_SEND) return;
  dispatched_ = true;
  ++exchange_.counters().num_dispatches;
  if (num_received_ >= 0) exchange_.counters().received_rows += static_cast<uint64_t>(num_received_);
}

void CudaPlan::combine(const CombineCall& call, const tern_launch& launch) {
  const DeviceGuard guard(exchange_.facts().device);
  check_ready("combine", launch, true);
  const bool receives_only = launch.phase == TERN_PHASE_RECEIVE;
  if (is_under_way(dispatch_ticket_))
    fail(TERN_INVALID_STATE, "combine: a dispatch along this plan has been sent and not received yet");
  if (receives_only && combine_ticket_.epoch == 0)
    fail(TERN_INVALID_STATE, "combine: nothing to receive; the plan's last combine was not a send, or has been received");
  if (!receives_only && is_under_way(combine_ticket_)) fail(TERN_INVALID_STATE, "combine: the plan's last send has not been received yet");
  if (call.args.weighting == TERN_WEIGHTS_DISPATCH && !weights_carried_)
    fail(TERN_INVALID_STATE, "combine: weighting is TERN_WEIGHTS_DISPATCH, but the plan's last dispatch carried no topk_weights");
  CombineOperation operation(*this, call, launch);
  operation.check(combine_ticket_);
  const OperationStream stream(exchange_.lane(launch.lane), launch);
  operation.enqueue(stream.get(), combine_ticket_);
  stream.finish();
  num_sms_ = operation.num_sms();
  if (launch.phase != TERN_PHASE_SEND) ++exchange_.counters().num_combines;
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
  if (num_received_ < 0) return info;
  info.received_per_rank = received_per_rank_.data();
  info.received_per_expert = received_per_expert_.data();
  info.sent_per_rank = sent_per_rank_.data();
  info.pair_counts = pair_counts_.data();
  return info;
}

}  // namespace tern::cuda
