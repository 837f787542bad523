// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "base/error.h"
#include "cuda/operations.h"

namespace tern::cuda {
namespace {

constexpr int64_t kMostPieceBytes = 8192;
constexpr int64_t kPartAlignment = 16;
constexpr int64_t kWordBytes = 4;
constexpr int32_t kLeastStages = 2;  // one that is loaded, one that is stored
constexpr int32_t kMostStageRun = 16;
constexpr int32_t kPullRun = 4;
// Beside warps that stage rows: leaves the SM a cache for their loads, which have no ring. With what else a block has it fits the 132 KiB that
// an SM of sm_90 divides off for shared memory.
constexpr int64_t kRingBytesBesideLoads = 124 << 10;

}  // namespace

DispatchOperation::DispatchOperation(const CudaPlan& plan, const DispatchCall& call, const tern_launch& launch, int64_t most_tokens)
    : plan_(plan),
      call_(call),
      launch_(launch),
      num_tokens_(call.args.routing != nullptr ? call.args.routing->num_tokens : plan.num_tokens()) {
  const tern_dispatch_args& a = call.args;
  check_alignment("dispatch", "tokens", a.tokens, a.token_stride_bytes);
  check_alignment("dispatch", "out_tokens", a.out_tokens);
  check_zero_copy(plan, "dispatch", a.out_tokens, call.wire_bytes, a.zero_copy != 0);
  // Staging is counted as if everything went through it: every rank must come to the same rounds, wherever its rows lie.
  all_ = {call.wire_bytes, call.scale_bytes, call.carries_weights ? plan.tables().topk_bytes() : 0};
  set_parts();
  shape_ = dispatch_shape(plan, call);
  chunks_per_round_ = tern::cuda::chunks_per_round(plan, plan.exchange().window_layout().staging_bytes, all_.stride(), "dispatch");
  num_rounds_ = tern::cuda::num_rounds(plan, chunks_per_round_, launch.phase, most_tokens, "dispatch");
  num_sms_ = choose_num_sms(plan.exchange(), launch, most_tokens * call.wire_bytes);
}

// Rows and scales that lie in this rank's window stay there, unless the send returns before they are pulled.
void DispatchOperation::set_parts() {
  const tern_dispatch_args& a = call_.args;
  const CudaExchange& exchange = plan_.exchange();
  const bool may_stay = launch_.phase == TERN_PHASE_WHOLE && a.encoding == TERN_ENCODING_AS_GIVEN && num_tokens_ > 0 &&
                        plan_.exchange().lane(launch_.lane).open_sends.empty();
  if (may_stay) {
    rows_at_ = exchange.heap_offset(a.tokens, (num_tokens_ - 1) * a.token_stride_bytes + call_.row_bytes);
    const bool dense_scales = call_.scale_bytes % kPartAlignment == 0 && a.scale_token_stride_bytes % kPartAlignment == 0 &&
                              a.scale_element_stride_bytes == call_.scale_element_bytes &&
                              reinterpret_cast<uintptr_t>(a.scales) % kPartAlignment == 0;
    if (call_.scale_bytes > 0 && dense_scales)
      scales_at_ = exchange.heap_offset(a.scales, (num_tokens_ - 1) * a.scale_token_stride_bytes + call_.scale_bytes);
  }
  slot_ = all_;
  if (rows_at_ >= 0) slot_.row_bytes = 0;
  if (scales_at_ >= 0) slot_.scale_bytes = 0;
  set_delivery();
}

// In rank_major everybody knows where rows come to lie. Those in place are written by their source into outputs that are window memory, if scales
// can be too: then a row is loaded once, and not once for each rank that it goes to. Scales that the source cannot offer in place go by words; they
// are staged too, for ranks that pull.
void DispatchOperation::set_delivery() {
  const tern_dispatch_args& a = call_.args;
  const bool is_known = plan_.shape().layout == TERN_LAYOUT_RANK_MAJOR && plan_.shape().num_nodes == 1 &&
                        plan_.tables().messages_per_token <= kernels::kMostDelivered;
  // What bulk copies of others may write, or words.
  const int64_t out_alignment = call_.scale_bytes % kPartAlignment == 0 ? kPartAlignment : kWordBytes;
  const bool dense_scales = call_.scale_bytes % out_alignment == 0 && a.out_scale_order == TERN_SCALES_ROW_MAJOR &&
                            reinterpret_cast<uintptr_t>(a.out_scales) % out_alignment == 0;
  if (!is_known || !dense_scales || launch_.phase != TERN_PHASE_WHOLE || a.encoding != TERN_ENCODING_AS_GIVEN ||
      !plan_.exchange().lane(launch_.lane).open_sends.empty())
    return;
  const bool are_words = call_.scale_bytes <= kernels::kMostScaleWords * kWordBytes && a.scale_token_stride_bytes % kWordBytes == 0 &&
                         a.scale_element_stride_bytes == call_.scale_element_bytes &&
                         reinterpret_cast<uintptr_t>(a.scales) % kWordBytes == 0;
  delivers_ = rows_at_ >= 0 && (slot_.scale_bytes == 0 || are_words);
  const int64_t num_rows = dispatch_outputs(plan_, call_).num_rows;
  takes_rows_at_ = plan_.exchange().heap_offset(a.out_tokens, num_rows * call_.wire_bytes);
  if (call_.scale_bytes == 0 || a.out_scales == nullptr) return;
  takes_scales_at_ = plan_.exchange().heap_offset(a.out_scales, num_rows * call_.scale_bytes);
  if (takes_scales_at_ < 0) takes_rows_at_ = -1;
}

layout::CallShape dispatch_shape(const CudaPlan& plan, const DispatchCall& call) {
  layout::CallShape shape = call_shape(plan.shape());
  shape.row_bytes = call.wire_bytes;
  shape.scale_bytes = call.scale_bytes;
  shape.choices |= static_cast<int32_t>(call.args.dtype) << 8 | static_cast<int32_t>(call.args.encoding) << 12 |
                   static_cast<int32_t>(call.carries_weights) << 16;
  return shape;
}

void DispatchOperation::check(const Ticket& ticket, int32_t rounds_before) const {
  if (launch_.phase == TERN_PHASE_RECEIVE)
    check_ticket(ticket, launch_, shape_, "dispatch");
  else
    check_room(plan_.exchange().lane(launch_.lane), TERN_OP_DISPATCH, rounds_before + num_rounds_);
}

void DispatchOperation::enqueue(cudaStream_t stream, Ticket& ticket) const {
  if (launch_.phase == TERN_PHASE_RECEIVE) close_ticket(plan_.exchange(), launch_, ticket);
  for (int32_t round = 0; round < num_rounds_; ++round)
    enqueue_round(
        {.plan = plan_.tables(), .chunks = chunks_of_round(plan_.tables().num_chunks, chunks_per_round_, round), .is_first = round == 0},
        stream);
  if (launch_.phase == TERN_PHASE_SEND) open_ticket(plan_.exchange(), launch_, shape_, ticket);
}

void DispatchOperation::enqueue_round(const BatchRound& round, cudaStream_t stream) const {
  kernels::DispatchArgs args = round_args(round);
  // Scales of many KiB leave no room for rings.
  const int64_t least_bytes = int64_t{kLeastStages} * args.roles.num_pull_warps * args.pieces.stage_bytes;
  const bool bulk = plan_.exchange().facts().has_bulk_copies && least_bytes <= ring_bytes(plan_.exchange().num_ranks());
  args.transfer.delivers = args.transfer.delivers && bulk;
  tern::cuda::check(kernels::launch_dispatch(args, bulk, num_sms_, stream), "launching the kernel of dispatch");
}

kernels::DispatchInputs dispatch_inputs(const DispatchCall& call) {
  const tern_dispatch_args& a = call.args;
  return {.tokens = static_cast<const std::byte*>(a.tokens),
          .token_stride_bytes = a.token_stride_bytes,
          .hidden = a.hidden,
          .dtype = a.dtype,
          .encoding = a.encoding,
          .scales = static_cast<const std::byte*>(a.scales),
          .scale_token_stride_bytes = a.scale_token_stride_bytes,
          .scale_element_stride_bytes = a.scale_element_stride_bytes,
          .weights = a.topk_weights};
}

kernels::DispatchOutputs dispatch_outputs(const CudaPlan& plan, const DispatchCall& call) {
  const tern_dispatch_args& a = call.args;
  return {.tokens = static_cast<std::byte*>(a.out_tokens),
          .scales = static_cast<std::byte*>(a.out_scales),
          .topk_idx = a.out_topk_idx,
          .topk_weights = a.out_topk_weights,
          .source_token = a.out_source_token,
          .source_rank = a.out_source_rank,
          .row_expert = a.out_row_expert,
          .expert_offsets = a.out_expert_offsets,
          .expert_counts = a.out_expert_counts,
          .rank_counts = a.out_rank_counts,
          .expert_rank_ranges = a.out_expert_rank_ranges,
          .plan_weights = plan.tables().weights_received,
          .num_rows = a.routing != nullptr ? plan.shape().row_capacity : plan.num_rows(),
          .zero_padding = plan.shape().zero_padding,
          .scales_by_column = a.out_scale_order == TERN_SCALES_COLUMN_MAJOR};
}

kernels::RowPieces DispatchOperation::pieces(const kernels::WarpRoles& roles, int64_t most_bytes) const {
  const int64_t row_bytes = call_.wire_bytes;
  kernels::RowPieces p;
  p.num_pieces = static_cast<int32_t>((row_bytes + kMostPieceBytes - 1) / kMostPieceBytes);
  p.piece_bytes = static_cast<int32_t>(layout::align_up((row_bytes + p.num_pieces - 1) / p.num_pieces, layout::kBulkLine));
  const auto topk = static_cast<int32_t>(plan_.tables().topk_bytes());
  p.scales = p.piece_bytes;
  p.weights = p.scales + static_cast<int32_t>(layout::align_up(call_.scale_bytes, kPartAlignment));
  p.entries = p.weights + (call_.carries_weights ? topk : 0);
  const auto refs = delivers_ ? static_cast<int32_t>(plan_.tables().messages_per_token * sizeof(kernels::MessageRef)) : 0;
  p.stage_bytes = static_cast<int32_t>(layout::align_up(p.entries + std::max(topk, refs) + kernels::kPieceTagBytes, layout::kBulkLine));
  p.num_stages = ring_stages(most_bytes, roles.num_pull_warps, p.stage_bytes, kLeastStages);
  return p;
}

// Rows are worth a report for each two of them; where they stay in place, there is little to do for a token.
int32_t DispatchOperation::stage_run(const kernels::WarpRoles& roles, const layout::StagedSlot& slot) const {
  const int64_t tokens_per_warp = num_tokens_ / (int64_t{roles.num_stage_warps} * num_sms_);
  int32_t run = slot.row_bytes > 0 ? (tokens_per_warp >= 4 ? 2 : 1) : kMostStageRun;
  while (plan_.tables().tokens_per_chunk % run != 0) --run;
  return run;
}

// What a batch is, without how it moves.
kernels::DispatchArgs DispatchOperation::batch_args(const BatchRound& round) const {
  const tern_dispatch_args& a = call_.args;
  kernels::DispatchArgs args;
  args.plan = round.plan;
  args.in = dispatch_inputs(call_);
  args.row_bytes = call_.wire_bytes;
  args.scale_bytes = call_.scale_bytes;
  args.scale_element_bytes = static_cast<int32_t>(call_.scale_bytes > 0 ? call_.scale_element_bytes : 1);
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(a.scales) | reinterpret_cast<uintptr_t>(a.out_scales) |
                              static_cast<uintptr_t>(args.scale_element_bytes | a.scale_token_stride_bytes | a.scale_element_stride_bytes);
  args.scale_word_bytes = addresses % 4 == 0 ? 4 : 1;
  args.carries_weights = call_.carries_weights;
  return args;
}

kernels::DispatchArgs DispatchOperation::packing_args(const BatchRound& round) const {
  kernels::DispatchArgs args = batch_args(round);
  args.transfer.exchange = plan_.exchange().view(launch_.lane);
  args.transfer.operation = TERN_OP_DISPATCH;
  args.transfer.tokens_per_chunk = round.plan.tokens_per_chunk;
  args.transfer.first_chunk = round.chunks.begin;
  args.transfer.end_chunk = round.chunks.end;
  return args;
}

kernels::DispatchArgs DispatchOperation::round_args(const BatchRound& round) const {
  const tern_dispatch_args& a = call_.args;
  const bool is_packed = round.slots.banks != nullptr;
  const int64_t rows_at = is_packed ? -1 : rows_at_, scales_at = is_packed ? -1 : scales_at_;
  const layout::StagedSlot slot = is_packed ? all_ : slot_;
  kernels::DispatchArgs args = batch_args(round);
  args.transfer = make_round(plan_, launch_.lane, {TERN_OP_DISPATCH, launch_.phase, shape_, round.chunks, plan_.tables().dispatch_ticket});
  if (a.wait_ns != nullptr) args.transfer.wait_ns = a.wait_ns + plan_.shape().first_rank();
  if (is_packed) args.in = {.encoding = TERN_ENCODING_AS_GIVEN, .slots = round.slots, .node = round.node};
  const bool stages_rows = slot.row_bytes > 0 && launch_.phase != TERN_PHASE_RECEIVE;
  // Few warps deliver enough to fill the link, with 24 SMs: fp8 250 and bf16 466 us with 4 of them, 252 and 470 with 8, 254 and 473 with 12.
  const bool is_delivery = delivers_ && !is_packed;
  args.roles = {.num_stage_warps = stages_rows ? 8 : 4, .num_pull_warps = is_delivery && num_sms_ > kFewSms ? 4 : 8};
  args.stage_run = stage_run(args.roles, slot);
  // Few SMs want messages that are known far ahead, and whole rings: fp8 from the caller's memory with 8 SMs 592 us as with 24, so 412.
  const bool deals = stages_rows && num_sms_ > kFewSms;
  args.pull_run = deals ? kPullRun : 0;
  const bool is_behind_route =
      (a.routing != nullptr || !plan_.is_dispatched()) && args.transfer.sends && round.is_first && plan_.shape().num_nodes == 1;
  args.follows_closely = is_behind_route && plan_.exchange().facts().has_bulk_copies;  // sm_90
  if (args.follows_closely && a.routing != nullptr) args.route_blocks = plan_.route_blocks();
  args.out = dispatch_outputs(plan_, call_);
  args.slot = slot;
  args.writes_outputs = args.transfer.receives && round.is_first;
  const int64_t most_bytes = ring_bytes(plan_.exchange().num_ranks());
  args.pieces = pieces(args.roles, deals ? std::min(kRingBytesBesideLoads, most_bytes) : most_bytes);
  kernels::TransferArgs& t = args.transfer;
  t.in_place = rows_at >= 0 || scales_at >= 0;
  t.delivers = is_delivery;
  t.takes_rows_at = takes_rows_at_;
  t.takes_scales_at = takes_scales_at_;
  t.rows = rows_at >= 0 ? heap_part(rows_at, a.token_stride_bytes) : staged_part(t, slot, slot.row(), slot.row_bytes);
  t.scales = scales_at >= 0 ? heap_part(scales_at, a.scale_token_stride_bytes) : staged_part(t, slot, slot.scales(), slot.scale_bytes);
  t.weights = staged_part(t, slot, slot.weights(), slot.weight_bytes);
  return args;
}

}  // namespace tern::cuda
