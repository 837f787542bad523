// SPDX-License-Identifier: Apache-2.0
#include "cuda/latency.h"

#include <algorithm>

#include "base/knobs.h"
#include "cuda/operations.h"
#include "plan/batch_path.h"

namespace tern::cuda {
namespace {

// Parts of rows that are sent: each has an SM on every GPU that there is, and is long enough for all warps of a block.
constexpr int64_t kMostParts = 128, kLeastPartBytes = 2048;
// Sends that route take one epoch here and two otherwise, when not two of them can be under way: so this does not depend on forecasts.
constexpr int64_t kRoutedSendBytes = 4 << 20;
// What slots are made for; larger batches take the throughput path.
constexpr int64_t kMostRoomBytes = 4 << 20;
constexpr int32_t kLatencyChoice = 1 << 24;  // in CallShape::choices: what others call for a large batch is something else

layout::LatencyWords words_of(const CudaPlan& plan) {
  const PlanShape& shape = plan.shape();
  return {.num_counts = plan.tables().num_counts(shape.ranks_per_node()),
          .max_tokens = shape.max_tokens,
          .num_topk = shape.num_topk,
          .num_batches = shape.num_nodes};
}

// Of every number of local experts and every expert there may be, the borders.
constexpr bool reciprocals_are_exact() {
  for (const uint64_t divisor : {1, 2, 3, 5, 7, 32, 36, 72, 255, 256, 257, 1000, 4097, 32767, 65535}) {
    const uint64_t reciprocal = kernels::LatencyArgs::reciprocal(static_cast<int32_t>(divisor));
    for (uint64_t rank = 0; rank * divisor <= kernels::LatencyArgs::kMostExperts; rank += 1 + rank / 4)
      for (const uint64_t expert : {rank * divisor, rank * divisor + divisor - 1})
        if (reciprocal != 0 && expert <= kernels::LatencyArgs::kMostExperts && (expert * reciprocal) >> 32 != rank) return false;
  }
  return true;
}
static_assert(reciprocals_are_exact());

constexpr bool places_are_right(const layout::LatencyWords& words) {
  const kernels::LatencyPlaces places(words);
  return places.call() == words.call() && places.num_tokens() == words.num_tokens() && places.counts() == words.counts() &&
         places.presence() == words.presence() && places.num_presence() == words.num_presence() && places.entries() == words.entries() &&
         places.num_routing_words() == words.num_routing_words() && places.returned() == words.returned() &&
         places.weights() == words.weights() && places.num_counts == words.num_counts && places.num_batches == words.num_batches;
}
static_assert(places_are_right({.num_counts = 36, .max_tokens = 33, .num_topk = 8, .num_batches = 1}) &&
              places_are_right({.num_counts = 132, .max_tokens = 128, .num_topk = 9, .num_batches = 3}));

// Blocks for each message that may arrive or part that is sent, and one for the routing: what a block does one after the other takes its time, since
// it is code that is fetched and loads that are waited for.
int64_t most_blocks(const CudaPlan& plan, int64_t num_parts) { return std::max(plan.shape().max_messages(), num_parts) + 1; }

// What an operation is to the choice of its path.
struct BatchCall {
  tern_operation operation;
  bool routes;
  int32_t rows_per_token;
  int64_t row_bytes;  // with scales
  bool is_send = false;
};

bool is_faster(const CudaPlan& plan, const BatchCall& call) {
  const DeviceFacts& device = plan.exchange().facts();
  return is_pushed({.operation = call.operation,
                    .routes = call.routes,
                    .num_ranks = plan.shape().ranks_per_node(),
                    .num_tokens = call.routes ? plan.shape().max_tokens : plan.most_tokens(),
                    .messages_per_token = call.rows_per_token,
                    .row_bytes = call.row_bytes,
                    .num_sms = device.common_sms,
                    .are_sms_asked = device.common_sms_asked});
}

// Has the window room for its words and flags, and kernels numbers for all of it?
bool has_latency_path(const CudaPlan& plan) {
  const layout::DeviceWindowLayout& window = plan.exchange().window_layout();
  const PlanShape& shape = plan.shape();
  return shape.most_sent_tokens() <= window.latency_tokens && words_of(plan).num_words() <= window.latency_words && shape.num_topk > 0 &&
         shape.num_topk <= layout::kMostLatencyTopk && shape.num_experts <= kernels::LatencyArgs::kMostExperts;
}

bool is_small(const CudaPlan& plan, const BatchCall& call) {
  if (!has_latency_path(plan)) return false;
  const PlanShape& shape = plan.shape();
  switch (plan.exchange().options().mode) {
    case TERN_MODE_THROUGHPUT: return false;
    case TERN_MODE_LATENCY: return true;
    case TERN_MODE_AUTO: break;
  }
  if (plan.exchange().masks_late_ranks()) return true;
  const int64_t num_bytes = shape.max_tokens * call.row_bytes;
  if (const auto most_kb = knobs().latency_max_kb) return num_bytes <= *most_kb << 10;
  return call.routes && call.is_send ? num_bytes <= kRoutedSendBytes : is_faster(plan, call);
}

layout::LatencySlot dispatch_slot(const DispatchCall& call) { return {.row_bytes = call.wire_bytes, .scale_bytes = call.scale_bytes}; }

kernels::LatencyDispatchMemory dispatch_memory(const CudaPlan& plan, const layout::LatencySlot& slot) {
  return {plan.tables(), plan.shape().ranks_per_node(), words_of(plan), slot};
}

bool is_per_entry(const CudaPlan& plan, const CombineCall& call) {
  return call.args.mode == TERN_COMBINE_EXACT && plan.shape().has_expert_rows();
}

layout::LatencySlot combine_slot(const CudaPlan& plan, const CombineCall& call) {
  const int64_t num_rows = is_per_entry(plan, call) ? plan.shape().num_topk : 1;
  return {.row_bytes = num_rows * call.wire_bytes};
}

// See LatencyCombineArgs.
bool shares_slots(const CudaPlan& plan, const CombineCall& call) { return is_per_entry(plan, call) && !plan.exchange().masks_late_ranks(); }

// Do rows have flags? They show nothing by themselves under TERN_ON_TIMEOUT_MASK and in the 10-bit encoding. And rows of entries are so many that to
// put back what is unwritten takes longer than flags.
bool has_row_flags(const CudaPlan& plan) { return plan.exchange().masks_late_ranks(); }
bool has_row_flags(const CudaPlan& plan, const CombineCall& call) {
  return has_row_flags(plan) || call.args.wire == TERN_WIRE_LOG10BIT || is_per_entry(plan, call);
}

bool fits(const CudaPlan& plan, const layout::LatencySlot& slot, int64_t num_slots, bool has_row_flags) {
  constexpr int64_t kMostSlotBytes = 1 << 30;  // offsets in a slot, and rows, are int32_t
  const layout::DeviceWindowLayout& window = plan.exchange().window_layout();
  return slot.stride() <= kMostSlotBytes && num_slots * slot.stride() <= (has_row_flags ? window.staging_bytes : window.slot_bytes);
}

// FNV-1a over the words of what ranks must agree on.
uint32_t call_hash(tern_operation operation, const layout::CallShape& shape) {
  uint64_t hash = 0xcbf29ce484222325;
  for (const int64_t word : {int64_t{operation}, shape.row_bytes, shape.scale_bytes, shape.max_tokens, shape.row_capacity,
                             int64_t{shape.num_experts}, int64_t{shape.num_topk}, int64_t{shape.choices}, int64_t{shape.alignment}})
    hash = (hash ^ static_cast<uint64_t>(word)) * 0x100000001b3;
  return static_cast<uint32_t>(hash ^ hash >> 32);
}

// Into how many parts the rows go, of which a rank sends at most so many. All ranks must come to the same.
int32_t parts_log2(const CudaPlan& plan, int64_t num_rows, int64_t row_bytes) {
  int32_t log2 = 0;
  if (plan.exchange().masks_late_ranks()) return log2;
  while (log2 < layout::kMostRowPartsLog2 && num_rows << (log2 + 1) <= kMostParts && row_bytes >> (log2 + 1) >= kLeastPartBytes) ++log2;
  return log2;
}
// What is cast goes with scales of its channels, in one part.
int32_t dispatch_parts_log2(const CudaPlan& plan, const DispatchCall& call) {
  return call.args.encoding == TERN_ENCODING_AS_GIVEN ? parts_log2(plan, plan.shape().most_sent_tokens(), call.wire_bytes) : 0;
}
int32_t combine_parts_log2(const CudaPlan& plan, const CombineCall& call) {
  return parts_log2(plan, plan.shape().max_messages(), call.row_bytes);
}

int32_t part_bytes(int64_t row_bytes, int32_t parts_log2) {
  return static_cast<int32_t>(parts_log2 == 0 ? row_bytes
                                              : layout::align_up((row_bytes + (1 << parts_log2) - 1) >> parts_log2, kernels::kPieceBytes));
}

struct CallFacts {
  tern_operation operation;
  const layout::CallShape& shape;
  const layout::LatencySlot& slot;
  bool has_row_flags;
  int64_t row_bytes;  // that are dealt out
  int32_t parts_log2;
  uint64_t* epoch_kept;  // from a send to its receive, in GPU memory
  int32_t lag_before;
  int64_t* wait_ns;
};

kernels::LatencyArgs make_call(const CudaPlan& plan, const tern_launch& launch, const CallFacts& facts) {
  kernels::LatencyArgs args;
  args.sends = launch.phase != TERN_PHASE_RECEIVE;
  args.receives = launch.phase != TERN_PHASE_SEND;
  args.exchange = enter_lane(plan.exchange(), launch.lane, args.sends);
  args.plan = plan.shape().num_nodes > 1 ? plan.all_batches() : plan.tables();
  args.sent_tokens = static_cast<int32_t>(plan.shape().most_sent_tokens());
  args.shape = facts.shape;
  args.call_hash = call_hash(facts.operation, facts.shape);
  args.operation = facts.operation;
  args.exchange.consumed_lag_before = facts.lag_before;
  args.has_row_flags = facts.has_row_flags;
  args.follows_closely = plan.exchange().facts().has_bulk_copies;  // sm_90
  args.ticket = facts.epoch_kept;
  if (facts.wait_ns != nullptr) args.wait_ns = facts.wait_ns + plan.shape().first_rank();
  args.words = kernels::LatencyPlaces(words_of(plan));
  args.slot = facts.slot;
  args.parts_log2 = facts.parts_log2;
  args.part_bytes = part_bytes(facts.row_bytes, facts.parts_log2);
  const layout::DeviceWindowLayout& window = args.exchange.layout;
  for (int bank = 0; bank < layout::kNumBanks; ++bank) {
    args.words_at[bank] = window.words(launch.lane, static_cast<uint64_t>(bank), 0);
    const auto epoch = static_cast<uint64_t>(bank);
    args.slots_at[bank] = facts.has_row_flags ? window.staging(launch.lane, epoch) : window.slots(launch.lane, epoch);
  }
  args.row_flags_at = window.row_flags(launch.lane, 0);
  args.progress_at = window.progress(launch.lane, 0);
  args.words_stride = static_cast<int32_t>(window.latency_words);
  args.flags_stride = static_cast<int32_t>(window.num_row_flags());
  args.slot_stride = static_cast<int32_t>(facts.slot.stride());
  args.experts_reciprocal = kernels::LatencyArgs::reciprocal(plan.shape().local_experts());
  args.topk_reciprocal = kernels::LatencyArgs::reciprocal(plan.shape().num_topk);
  args.ranks_reciprocal = kernels::LatencyArgs::reciprocal(plan.shape().ranks_per_node());
  args.sources_reciprocal = kernels::LatencyArgs::reciprocal(plan.shape().num_ranks);
  return args;
}

// Or fewer, as the caller or the exchange wants it.
int latency_sms(const CudaPlan& plan, const tern_launch& launch, int64_t num_parts) {
  const int64_t blocks = most_blocks(plan, num_parts);
  const int asked = launch.num_sms > 0 ? launch.num_sms : plan.exchange().options().num_sms;
  if (asked > 0) return choose_num_sms(plan.exchange(), launch, blocks * kBytesPerSm);
  return static_cast<int>(std::min<int64_t>(blocks, plan.exchange().facts().share_sms()));
}

}  // namespace

int64_t most_latency_bytes() { return knobs().latency_max_kb ? *knobs().latency_max_kb << 10 : kMostRoomBytes; }

bool takes_latency_path(const CudaPlan& plan, const DispatchCall& call, const tern_launch& launch) {
  const layout::LatencySlot slot = dispatch_slot(call);
  const BatchCall batch{.operation = TERN_OP_DISPATCH,
                        .routes = call.args.routing != nullptr,
                        .rows_per_token = plan.shape().max_messages_per_token(),
                        .row_bytes = call.wire_bytes + call.scale_bytes,
                        .is_send = launch.phase == TERN_PHASE_SEND};
  if (!is_small(plan, batch) || !fits(plan, slot, plan.shape().max_messages(), has_row_flags(plan))) return false;
  return dispatch_memory(plan, slot).num_bytes <= kernels::kMostLatencyShared;
}

bool takes_latency_path(const CudaPlan& plan, const CombineCall& call) {
  const int64_t num_slots = shares_slots(plan, call) ? plan.shape().max_tokens : plan.shape().max_messages();
  if (call.args.wire == TERN_WIRE_FP32) return false;
  const BatchCall batch{.operation = TERN_OP_COMBINE,
                        .routes = false,
                        .rows_per_token = is_per_entry(plan, call) ? plan.shape().num_topk : plan.shape().max_messages_per_token(),
                        .row_bytes = call.wire_bytes};
  return is_small(plan, batch) && fits(plan, combine_slot(plan, call), num_slots, has_row_flags(plan, call));
}

bool takes_batches_at_once(const CudaPlan& plan, const DispatchCall& call) {
  const layout::LatencySlot slot = dispatch_slot(call);
  return plan.exchange().options().mode != TERN_MODE_THROUGHPUT && has_latency_path(plan) &&
         fits(plan, slot, plan.shape().max_messages(), has_row_flags(plan)) &&
         dispatch_memory(plan, slot).num_bytes <= kernels::kMostLatencyShared;
}

// Sums alone: rows of entries, and those that travel in another form, have kernels that write slots as they are to be. But with masks those know
// nothing of who is missing.
bool takes_batches_at_once(const CudaPlan& plan, const CombineCall& call) {
  const bool has_form =
      call.args.wire == TERN_WIRE_AS_DTYPE || (call.args.wire == TERN_WIRE_LOG10BIT && plan.exchange().masks_late_ranks());
  return plan.exchange().options().mode != TERN_MODE_THROUGHPUT && has_latency_path(plan) && has_form && !is_per_entry(plan, call) &&
         fits(plan, combine_slot(plan, call), plan.shape().max_messages(), has_row_flags(plan));
}

bool took_latency_path(const Ticket& ticket) { return (ticket.shape.choices & kLatencyChoice) != 0; }

LatencyDispatch::LatencyDispatch(const CudaPlan& plan, const DispatchCall& call, const tern_launch& launch)
    : plan_(plan),
      call_(call),
      launch_(launch),
      shape_(dispatch_shape(plan, call)),
      parts_log2_(dispatch_parts_log2(plan, call)),
      num_sms_(latency_sms(plan, launch, plan.shape().most_sent_tokens() << parts_log2_)) {
  const tern_dispatch_args& a = call.args;
  check_alignment("dispatch", "tokens", a.tokens, a.token_stride_bytes);
  check_alignment("dispatch", "out_tokens", a.out_tokens);
  check_zero_copy(plan, "dispatch", a.out_tokens, call.wire_bytes, a.zero_copy != 0);
  shape_.choices |= kLatencyChoice;
}

void LatencyDispatch::check(const Ticket& ticket) const {
  if (launch_.phase == TERN_PHASE_RECEIVE)
    check_ticket(ticket, launch_, shape_, "dispatch");
  else
    check_room(plan_.exchange().lane(launch_.lane), TERN_OP_DISPATCH, 1);
}

void LatencyDispatch::enqueue(cudaStream_t stream, Ticket& ticket) const {
  const bool receives_only = launch_.phase == TERN_PHASE_RECEIVE;
  const bool routes = receives_only ? ticket.routed : call_.args.routing != nullptr;
  const int32_t lag_before = consumed_lag(plan_.exchange().lane(launch_.lane));
  if (receives_only) close_ticket(plan_.exchange(), launch_, ticket);
  tern::cuda::check(kernels::launch_latency_dispatch(args(routes, lag_before), num_sms_, stream), "launching the kernel of dispatch");
  if (launch_.phase != TERN_PHASE_SEND) return;
  open_ticket(plan_.exchange(), launch_, shape_, ticket);
  ticket.routed = routes;
}

void LatencyDispatch::enqueue_batches(const kernels::LatencyBatches& batches, bool routes, cudaStream_t stream) const {
  kernels::LatencyDispatchArgs batch_args = args(routes, consumed_lag(plan_.exchange().lane(launch_.lane)));
  batch_args.topk_idx = batch_args.call.plan.experts;
  batch_args.is_int32 = true;
  batch_args.num_tokens = batch_args.call.sent_tokens;
  batch_args.device_num_tokens = nullptr;
  batch_args.call.batches = batches;
  batch_args.call.follows_closely = false;
  tern::cuda::check(kernels::launch_latency_dispatch(batch_args, num_sms_, stream), "launching the kernel of dispatch");
}

kernels::LatencyDispatchArgs LatencyDispatch::args(bool routes, int32_t lag_before) const {
  const layout::LatencySlot slot = dispatch_slot(call_);
  kernels::LatencyDispatchArgs args;
  args.call = make_call(plan_, launch_,
                        {TERN_OP_DISPATCH, shape_, slot, has_row_flags(plan_), call_.wire_bytes, parts_log2_,
                         plan_.tables().dispatch_ticket, lag_before, call_.args.wait_ns});
  args.memory = dispatch_memory(plan_, slot);
  args.call.routes = routes;
  if (const tern_routing* routing = call_.args.routing; routing != nullptr && routes) {
    args.topk_idx = routing->topk_idx;
    args.is_int32 = routing->topk_idx_type == TERN_INDEX_INT32;
    args.num_tokens = static_cast<int32_t>(routing->num_tokens);
    args.device_num_tokens = routing->device_num_tokens;
  }
  args.in = dispatch_inputs(call_);
  args.out = dispatch_outputs(plan_, call_);
  args.row_bytes = static_cast<int32_t>(call_.wire_bytes);
  args.scale_bytes = static_cast<int32_t>(call_.scale_bytes);
  args.scale_element_bytes = static_cast<int32_t>(call_.scale_bytes > 0 ? call_.scale_element_bytes : 1);
  args.carries_weights = call_.carries_weights;
  return args;
}

LatencyCombine::LatencyCombine(const CudaPlan& plan, const CombineCall& call, const tern_launch& launch)
    : plan_(plan),
      call_(call),
      launch_(launch),
      shape_(combine_shape(plan, call)),
      parts_log2_(combine_parts_log2(plan, call)),
      num_sms_(latency_sms(plan, launch, plan.shape().max_messages() << parts_log2_)) {
  const tern_combine_args& a = call.args;
  check_alignment("combine", "rows", a.rows);
  check_alignment("combine", "out_tokens", a.out_tokens);
  check_alignment("combine", "bias[0]", a.bias[0]);
  check_alignment("combine", "bias[1]", a.bias[1]);
  check_zero_copy(plan, "combine", a.rows, call.row_bytes, a.zero_copy != 0);
  shape_.choices |= kLatencyChoice;
}

void LatencyCombine::check(const Ticket& ticket) const {
  if (launch_.phase == TERN_PHASE_RECEIVE)
    check_ticket(ticket, launch_, shape_, "combine");
  else
    check_room(plan_.exchange().lane(launch_.lane), TERN_OP_COMBINE, 1);
}

void LatencyCombine::enqueue(cudaStream_t stream, Ticket& ticket) const {
  const int32_t lag_before = consumed_lag(plan_.exchange().lane(launch_.lane));
  if (launch_.phase == TERN_PHASE_RECEIVE) close_ticket(plan_.exchange(), launch_, ticket);
  tern::cuda::check(kernels::launch_latency_combine(args(lag_before), num_sms_, stream), "launching the kernel of combine");
  if (launch_.phase == TERN_PHASE_SEND) open_ticket(plan_.exchange(), launch_, shape_, ticket);
}

// Owners' weights have gone ahead to all nodes; biases are added when nodes are summed.
void LatencyCombine::enqueue_batches(const kernels::LatencyBatches& batches, cudaStream_t stream) const {
  kernels::LatencyCombineArgs batch_args = args(consumed_lag(plan_.exchange().lane(launch_.lane)));
  batch_args.call.batches = batches;
  batch_args.call.follows_closely = false;
  if (batch_args.sums_owner_weights) batch_args.owner_weights = plan_.rails().owner_weights;
  batch_args.bias[0] = batch_args.bias[1] = nullptr;
  tern::cuda::check(kernels::launch_latency_combine(batch_args, num_sms_, stream), "launching the kernel of combine");
}

kernels::LatencyCombineArgs LatencyCombine::args(int32_t lag_before) const {
  const tern_combine_args& a = call_.args;
  const kernels::PlanView& tables = plan_.tables();
  const layout::LatencySlot slot = combine_slot(plan_, call_);
  const bool weighs_with_owners = a.weighting == TERN_WEIGHTS_OWNER;
  kernels::LatencyCombineArgs args;
  args.is_log = a.wire == TERN_WIRE_LOG10BIT;
  args.call = make_call(plan_, launch_,
                        {TERN_OP_COMBINE, shape_, slot, has_row_flags(plan_, call_), call_.row_bytes, parts_log2_, tables.combine_ticket,
                         lag_before, a.wait_ns});
  args.dtype = a.dtype;
  args.row_bytes = static_cast<int32_t>(call_.row_bytes);
  args.wire_bytes = static_cast<int32_t>(call_.wire_bytes);
  args.piece_bytes =
      static_cast<int32_t>(layout::align_up((args.call.part_bytes + kernels::kPushingWarps - 1) / kernels::kPushingWarps, 512));
  args.per_entry = is_per_entry(plan_, call_);
  args.shares_slots = shares_slots(plan_, call_);
  args.returns_weights = call_.carries_weights;
  args.rows = static_cast<const std::byte*>(a.rows);
  args.returned_weights = a.row_weights;
  if (args.per_entry && a.weighting != TERN_WEIGHTS_NONE) args.token_weights = weighs_with_owners ? a.topk_weights : tables.weights_sent;
  if (!args.per_entry && a.weighting == TERN_WEIGHTS_DISPATCH) args.entry_weights = tables.weights_received;
  args.sums_owner_weights = !args.per_entry && weighs_with_owners;
  if (args.sums_owner_weights) args.owner_weights = a.topk_weights;
  args.bias[0] = static_cast<const std::byte*>(a.bias[0]);
  args.bias[1] = static_cast<const std::byte*>(a.bias[1]);
  args.out_tokens = static_cast<std::byte*>(a.out_tokens);
  args.out_topk_weights = a.out_topk_weights;
  return args;
}

}  // namespace tern::cuda
