// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "base/error.h"
#include "cuda/operations.h"
#include "domain/failure.h"
#include "kernels/wire_combine.h"

namespace tern::cuda {
namespace {

// How a block is divided: its warps, and how the memory of their rings is, by the shares of a warp that stages and of one that pulls from the start.
struct Division {
  int32_t num_stage_warps, num_pull_warps;
  int64_t stage_share = 1, pull_share = 1;
};

// All times below are of 4 ranks, 4096 tokens of 7168 bf16 channels, in us with 24 / 32 SMs.
Division division(const kernels::CombineArgs& args, bool bulk_copies, int32_t num_sms) {
  // Ordinary loads and stores: many warps.
  if (!bulk_copies) return !args.rows_staged ? Division{1, 15} : args.copies_rows() ? Division{10, 6} : Division{12, 4};
  // Rows from windows: with 15 pulling warps and pieces of 1 KiB 514 / 542, so 508 / 520.
  if (!args.rows_staged) return {1, 7, 2, 3};
  // Sums take an SM's instructions, more than the link: 8 + 4 warps 956 / 738, 10 + 6 860 / 663, so 765 / 585.
  if (!args.copies_rows()) return {12, 4, 4, 3};
  // Copies fill the link with about 100 warps of 28 KiB; more of them only keep the slowest chunks waiting: 4 + 6 517 / 553, 2 + 8 555 / 531.
  constexpr int32_t kCopyWarps = 96;
  return num_sms * 4 <= kCopyWarps ? Division{4, 6, 5, 3} : Division{3, 8, 5, 3};
}

void divide_block(kernels::CombineArgs& args, const CudaExchange& exchange, int32_t num_sms) {
  const Division d = division(args, exchange.facts().has_bulk_copies, num_sms);
  args.roles = {.num_stage_warps = d.num_stage_warps, .num_pull_warps = d.num_pull_warps};

  const int64_t share_bytes = ring_bytes(exchange.num_ranks()) / (d.num_stage_warps * d.stage_share + d.num_pull_warps * d.pull_share);
  const auto ring = [&](int64_t num_shares, int32_t piece_bytes) {
    constexpr int64_t kLeastSlots = 4;
    return kernels::sum_ring_shape(num_shares * share_bytes / layout::kBulkLine * layout::kBulkLine, args.row_bytes, kLeastSlots,
                                   piece_bytes);
  };
  args.stage_ring = ring(d.stage_share, kernels::kStagePieceBytes);
  args.joined_ring = ring(d.stage_share, kernels::kPullPieceBytes);
  args.pull_ring = ring(d.pull_share, kernels::kPullPieceBytes);
}

// Messages that a staging warp takes and reports together: each report waits for stores, but their chunk must not wait long for it.
int32_t stage_run(const kernels::CombineArgs& args, int64_t messages_per_warp) {
  if (messages_per_warp <= 16) return 1;
  return !args.rows_staged ? 8 : args.copies_rows() ? 2 : 4;
}

// Rows are summed in parts if there are few tokens, so that the warps come out even.
void divide_rows(kernels::CombineArgs& args, int64_t most_tokens, int32_t num_sms) {
  constexpr int64_t kItemsPerWarp = 16;
  const int64_t piece_bytes = args.pull_ring.piece_bytes;
  const int64_t parts_wanted = std::max<int64_t>(
      1, kItemsPerWarp * (args.roles.num_stage_warps + args.roles.num_pull_warps) * num_sms / std::max<int64_t>(1, most_tokens));
  const int64_t num_pieces = (args.row_bytes + piece_bytes - 1) / piece_bytes;
  const int64_t pieces_per_part = (num_pieces + parts_wanted - 1) / parts_wanted;
  args.part_bytes = static_cast<int32_t>(pieces_per_part * piece_bytes);
  args.num_parts = static_cast<int32_t>((num_pieces + pieces_per_part - 1) / pieces_per_part);
}

}  // namespace

CombineOperation::CombineOperation(const CudaPlan& plan, const CombineCall& call, const tern_launch& launch)
    : plan_(plan), call_(call), launch_(launch), per_entry_(call.args.mode == TERN_COMBINE_EXACT && plan.shape().has_expert_rows()) {
  const tern_combine_args& a = call.args;
  check_alignment("combine", "rows", a.rows);
  check_alignment("combine", "out_tokens", a.out_tokens);
  check_alignment("combine", "bias[0]", a.bias[0]);
  check_alignment("combine", "bias[1]", a.bias[1]);
  check_zero_copy(plan, "combine", a.rows, call.row_bytes, a.zero_copy != 0);
  CudaExchange& exchange = plan.exchange();
  // Rows stay where they are if the owners want them as they are: one of a message by itself is the sum already.
  const bool may_stay = launch.phase == TERN_PHASE_WHOLE && !encodes() && (per_entry_ || !plan.shape().has_expert_rows()) &&
                        exchange.lane(launch.lane).open_sends.empty();
  if (may_stay && plan.num_rows() > 0) rows_at_ = exchange.heap_offset(a.rows, plan.num_rows() * call.row_bytes);
  const int64_t rows_per_token = per_entry_ ? plan.shape().num_topk : 1;
  const int64_t weight_bytes = call.carries_weights ? plan.tables().topk_bytes() : 0;
  const layout::StagedSlot all{rows_per_token * call.wire_bytes, 0, weight_bytes};
  slot_ = {rows_at_ >= 0 ? 0 : all.row_bytes, 0, weight_bytes};
  shape_ = combine_shape(plan, call);
  const int64_t staging_bytes = exchange.window_layout().staging_bytes;
  chunks_per_round_ = tern::cuda::chunks_per_round(plan, staging_bytes / exchange.num_ranks(), all.stride(), "combine");
  num_rounds_ = tern::cuda::num_rounds(plan, chunks_per_round_, launch.phase, plan.most_tokens(), "combine");
  if (sends_weights_ahead()) {
    weight_chunks_per_round_ = tern::cuda::chunks_per_round(plan, staging_bytes, weight_slot().stride(), "combine");
    num_weight_rounds_ = tern::cuda::num_rounds(plan, weight_chunks_per_round_, TERN_PHASE_WHOLE, plan.most_tokens(), "combine");
  }
  num_sms_ = choose_num_sms(exchange, launch, plan.most_tokens() * call.row_bytes);
}

layout::StagedSlot CombineOperation::weight_slot() const {
  return {.row_bytes = 0, .scale_bytes = 0, .weight_bytes = plan_.tables().topk_bytes()};
}

bool CombineOperation::sends_weights_ahead() const {
  return !per_entry_ && call_.args.weighting == TERN_WEIGHTS_OWNER && launch_.phase != TERN_PHASE_RECEIVE;
}

layout::CallShape combine_shape(const CudaPlan& plan, const CombineCall& call) {
  layout::CallShape shape = call_shape(plan.shape());
  shape.row_bytes = call.wire_bytes;
  shape.choices |= static_cast<int32_t>(call.args.dtype) << 8 | static_cast<int32_t>(call.args.mode) << 12 |
                   static_cast<int32_t>(call.args.weighting) << 16 | static_cast<int32_t>(call.carries_weights) << 20 |
                   static_cast<int32_t>(call.args.wire) << 25;
  return shape;
}

void CombineOperation::check(const Ticket& ticket) const {
  if (launch_.phase == TERN_PHASE_RECEIVE)
    check_ticket(ticket, launch_, shape_, "combine");
  else
    check_room(plan_.exchange().lane(launch_.lane), TERN_OP_COMBINE, num_rounds_ + num_weight_rounds_);
}

void CombineOperation::enqueue(cudaStream_t stream, Ticket& ticket) const {
  if (launch_.phase == TERN_PHASE_RECEIVE) close_ticket(plan_.exchange(), launch_, ticket);
  const int32_t num_chunks = plan_.tables().num_chunks;
  for (int32_t round = 0; round < num_weight_rounds_; ++round)
    enqueue_weights_round({.plan = plan_.tables(), .chunks = chunks_of_round(num_chunks, weight_chunks_per_round_, round)}, stream);
  for (int32_t round = 0; round < num_rounds_; ++round)
    enqueue_round({.plan = plan_.tables(), .chunks = chunks_of_round(num_chunks, chunks_per_round_, round)}, stream);
  if (launch_.phase == TERN_PHASE_SEND) open_ticket(plan_.exchange(), launch_, shape_, ticket);
}

void CombineOperation::enqueue_round(const BatchRound& round, cudaStream_t stream) const {
  if (encodes()) {
    const kernels::WireCombineArgs args{round_args(round), call_.args.wire, call_.wire_bytes};
    return tern::cuda::check(kernels::launch_wire_combine(args, num_sms_, stream), "launching the kernel of combine");
  }
  tern::cuda::check(kernels::launch_combine(round_args(round), plan_.exchange().facts().has_bulk_copies, num_sms_, stream),
                    "launching the kernel of combine");
}

// The owner's weights go to the experts' ranks: a dispatch of rows that are empty.
void CombineOperation::enqueue_weights_round(const BatchRound& round, cudaStream_t stream) const {
  const layout::StagedSlot slot = weight_slot();
  const layout::CallShape shape = call_shape(plan_.shape());
  kernels::DispatchArgs args = weights_args(round);
  args.transfer = make_round(plan_, launch_.lane, {TERN_OP_WEIGHTS, TERN_PHASE_WHOLE, shape, round.chunks, nullptr});
  args.transfer.weights = staged_part(args.transfer, slot, slot.weights(), slot.weight_bytes);
  args.roles = {.num_stage_warps = 4, .num_pull_warps = 8};
  args.stage_run = round.plan.tokens_per_chunk;
  args.out.plan_weights = plan_.tables().weights_from_owner;
  args.out.num_rows = plan_.num_rows();
  args.slot = slot;
  const bool bulk = false;
  tern::cuda::check(kernels::launch_dispatch(args, bulk, num_sms_, stream), "launching the kernel that sends weights");
}

// What goes out of it.
kernels::DispatchArgs CombineOperation::weights_args(const BatchRound& round) const {
  kernels::DispatchArgs args;
  args.transfer.exchange = plan_.exchange().view(launch_.lane);
  args.transfer.operation = TERN_OP_WEIGHTS;
  args.transfer.tokens_per_chunk = round.plan.tokens_per_chunk;
  args.transfer.first_chunk = round.chunks.begin;
  args.transfer.end_chunk = round.chunks.end;
  args.plan = round.plan;
  args.plan.weights_sent = nullptr;  // those of the dispatch stay
  args.in.weights = call_.args.topk_weights;
  args.in.slots = round.slots;
  args.in.node = round.node;
  args.scale_element_bytes = 1;
  args.carries_weights = true;
  return args;
}

const float* CombineOperation::token_weights() const {
  if (!per_entry_ || call_.args.weighting == TERN_WEIGHTS_NONE) return nullptr;
  return call_.args.weighting == TERN_WEIGHTS_OWNER ? call_.args.topk_weights : plan_.tables().weights_sent;
}

kernels::CombineArgs CombineOperation::round_args(const BatchRound& round) const {
  const tern_combine_args& a = call_.args;
  const kernels::PlanView& tables = plan_.tables();
  const bool whole = launch_.phase == TERN_PHASE_WHOLE;
  kernels::CombineArgs args;
  args.transfer = make_round(plan_, launch_.lane, {TERN_OP_COMBINE, launch_.phase, shape_, round.chunks, tables.combine_ticket});
  args.plan = round.plan;
  args.dtype = a.dtype;
  args.row_bytes = call_.row_bytes;
  args.per_entry = per_entry_;
  args.rows_staged = rows_at_ < 0;
  args.own_rows_direct = whole && args.rows_staged && !encodes() && !plan_.shape().has_expert_rows();
  args.slot = slot_;
  args.rows = static_cast<const std::byte*>(a.rows);
  if (!per_entry_ && a.weighting != TERN_WEIGHTS_NONE)
    args.entry_weights = a.weighting == TERN_WEIGHTS_OWNER ? tables.weights_from_owner : tables.weights_received;
  args.returned_weights = a.row_weights;
  args.returns_weights = call_.carries_weights;
  if (round.slots.banks != nullptr) {
    args.slots = round.slots;
    args.node = round.node;
  } else {
    args.token_weights = token_weights();
    args.bias[0] = static_cast<const std::byte*>(a.bias[0]);
    args.bias[1] = static_cast<const std::byte*>(a.bias[1]);
    args.out_tokens = static_cast<std::byte*>(a.out_tokens);
    args.out_topk_weights = a.out_topk_weights;
  }
  divide_block(args, plan_.exchange(), num_sms_);
  divide_rows(args, plan_.most_tokens(), num_sms_);
  args.stage_run = stage_run(args, plan_.most_tokens() * tables.messages_per_token / (int64_t{args.roles.num_stage_warps} * num_sms_));
  kernels::TransferArgs& t = args.transfer;
  t.pushes = true;
  t.sender_bytes = plan_.exchange().window_layout().staging_bytes / plan_.exchange().num_ranks();
  t.in_place = rows_at_ >= 0;
  if (a.wait_ns != nullptr) t.wait_ns = a.wait_ns + plan_.shape().first_rank();
  t.rows = rows_at_ >= 0 ? heap_part(rows_at_, call_.row_bytes) : staged_part(t, slot_, slot_.row(), slot_.row_bytes);
  t.weights = staged_part(t, slot_, slot_.weights(), slot_.weight_bytes);
  return args;
}

void check_ticket(const Ticket& ticket, const tern_launch& launch, const layout::CallShape& shape, const char* operation) {
  if (ticket.lane_idx != launch.lane)
    fail(TERN_INVALID_ARGUMENT, "{}: the plan's last send was on lane {}, its receive is called on lane {}; use the same", operation,
         ticket.lane_idx, launch.lane);
  if (ticket.shape != shape)
    fail(TERN_INVALID_ARGUMENT,
         "{}: the plan's last send was called with other shapes or types than its receive; give it the same arguments", operation);
}

void open_ticket(CudaExchange& exchange, const tern_launch& launch, const layout::CallShape& shape, Ticket& ticket) {
  CudaLane& lane = exchange.lane(launch.lane);
  ticket = {lane.next_epoch - 1, launch.lane, exchange.generation(), shape};
  lane.open_sends.push_back(ticket.epoch);
}

void close_ticket(CudaExchange& exchange, const tern_launch& launch, Ticket& ticket) {
  auto& open_sends = exchange.lane(launch.lane).open_sends;
  open_sends.erase(std::remove(open_sends.begin(), open_sends.end(), ticket.epoch), open_sends.end());
  ticket = {};
}

}  // namespace tern::cuda
