// SPDX-License-Identifier: Apache-2.0
#include "cuda/transfer.h"

#include <algorithm>

#include "base/error.h"
#include "domain/failure.h"
#include "kernels/shared_memory.h"
#include "plan/batch_path.h"

namespace tern::cuda {
namespace {

constexpr int64_t kAlignment = 16;

}  // namespace

OperationStream::OperationStream(const CudaPlan& plan, const tern_launch& launch)
    : lane_(plan.exchange().lane(launch.lane)),
      end_(plan.end_of(launch.lane)),
      launch_(launch),
      stream_(launch.own_stream != 0 ? lane_.stream.get() : static_cast<cudaStream_t>(launch.stream)) {
  auto event = static_cast<cudaEvent_t>(launch.after_event);
  if (event == nullptr && launch.own_stream != 0) {
    event = lane_.begin.get();
    check(cudaEventRecord(event, static_cast<cudaStream_t>(launch.stream)), "recording where an operation starts");
  }
  if (event != nullptr) check(cudaStreamWaitEvent(stream_, event, 0), "waiting for the event before an operation");
}

// An operation that failed may have enqueued some of its kernels.
OperationStream::~OperationStream() {
  if (!finished_) record_end();
}

void OperationStream::finish() {
  finished_ = true;
  record_end();
  if (launch_.done_event != nullptr)
    check(cudaEventRecord(static_cast<cudaEvent_t>(launch_.done_event), stream_), "recording the event behind an operation");
}

bool OperationStream::is_captured() const {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream_, &status), "asking whether a stream is captured");
  return status != cudaStreamCaptureStatusNone;
}

// For the lane and the plan. Whoever replays a captured operation knows when it has run.
void OperationStream::record_end() {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const bool is_known = cudaStreamIsCapturing(stream_, &status) == cudaSuccess;
  if (is_known && status != cudaStreamCaptureStatusNone) return;
  if (is_known && cudaEventRecord(end_->get(), stream_) == cudaSuccess)
    lane_.end = end_;
  else
    static_cast<void>(cudaGetLastError());  // or the next launch would be told of it
}

int choose_num_sms(const CudaExchange& exchange, const tern_launch& launch, int64_t bytes) {
  const int most = exchange.facts().share_sms();
  const int asked = launch.num_sms > 0 ? launch.num_sms : exchange.options().num_sms;
  return asked > 0 ? std::min(asked, most) : sms_for_bytes(most, bytes);
}

int32_t chunks_per_round(const CudaPlan& plan, int64_t staging_bytes, int64_t token_bytes, const char* operation) {
  const kernels::PlanView& tables = plan.tables();
  if (token_bytes == 0) return tables.num_chunks;
  const int64_t chunk_bytes = token_bytes * tables.tokens_per_chunk;
  const auto chunks = static_cast<int32_t>(std::min<int64_t>(staging_bytes / chunk_bytes, tables.num_chunks));
  if (chunks > 0) return chunks;
  const int64_t total = plan.exchange().window_layout().staging_bytes * plan.exchange().num_lanes() * layout::kNumBanks;
  fail(TERN_OUT_OF_MEMORY,
       "{}: {} tokens, the least that a round carries of {}, need {} bytes of staging, of which there are {}; create the exchange with "
       "staging_bytes of at least {}, better {} for one round",
       operation, tables.tokens_per_chunk, tables.max_tokens, chunk_bytes, staging_bytes, (total / staging_bytes + 1) * chunk_bytes,
       (total / staging_bytes + 1) * chunk_bytes * tables.num_chunks);
}

int32_t num_rounds(const CudaPlan& plan, int32_t chunks_per_round, tern_phase phase, int64_t most_tokens, const char* operation) {
  const kernels::PlanView& tables = plan.tables();
  const int64_t num_chunks = (most_tokens + tables.tokens_per_chunk - 1) / tables.tokens_per_chunk;
  const auto rounds = static_cast<int32_t>(std::max<int64_t>(1, (num_chunks + chunks_per_round - 1) / chunks_per_round));
  if (phase != TERN_PHASE_WHOLE && rounds > 1)
    fail(TERN_OUT_OF_MEMORY,
         "{}: a send must fit the staging, {} tokens need {} rounds; create the exchange with staging_bytes of at least {}", operation,
         tables.max_tokens, rounds,
         plan.exchange().window_layout().staging_bytes * plan.exchange().num_lanes() * layout::kNumBanks * rounds);
  return rounds;
}

void check_room(const CudaLane& lane, tern_operation operation, int32_t num_rounds) {
  const uint64_t last = lane.next_epoch + static_cast<uint64_t>(num_rounds) - 1;
  if (!lane.open_sends.empty() && lane.open_sends.front() + layout::kNumBanks <= last)
    fail(TERN_INVALID_STATE, "{}: it needs the staging of a send that has not been received yet; at most {} sends may be under way",
         operation_name(operation), layout::kNumBanks);
}

int32_t consumed_lag(const CudaLane& lane) {
  return lane.open_sends.empty() ? 0 : static_cast<int32_t>(lane.next_epoch - lane.open_sends.front());
}

kernels::ExchangeView enter_lane(CudaExchange& exchange, int32_t lane_idx, bool sends) {
  CudaLane& lane = exchange.lane(lane_idx);
  kernels::ExchangeView view = exchange.view(lane_idx);
  view.consumed_lag_before = consumed_lag(lane);
  if (sends) ++lane.next_epoch;
  ++exchange.counters().rounds;
  view.consumed_lag = consumed_lag(lane);
  return view;
}

kernels::TransferArgs make_round(const CudaPlan& plan, int32_t lane_idx, const RoundOptions& options) {
  kernels::TransferArgs args;
  args.shape = options.shape;
  args.operation = options.operation;
  args.sends = options.phase != TERN_PHASE_RECEIVE;
  args.receives = options.phase != TERN_PHASE_SEND;
  args.exchange = enter_lane(plan.exchange(), lane_idx, args.sends);
  args.ticket = options.ticket;
  args.tokens_per_chunk = plan.tables().tokens_per_chunk;
  args.first_chunk = options.chunks.begin;
  args.end_chunk = options.chunks.end;
  return args;
}

layout::PulledPart staged_part(const kernels::TransferArgs& transfer, const layout::StagedSlot& slot, int64_t offset, int64_t bytes) {
  if (bytes == 0) return {};
  return {.offset = offset - transfer.first_token() * slot.stride(), .stride = slot.stride(), .in_heap = 0, .staged = 1};
}

layout::PulledPart heap_part(int64_t heap_offset, int64_t step) {
  return {.offset = heap_offset, .stride = step, .in_heap = 1, .staged = 0};
}

int64_t ring_bytes(int32_t num_ranks) {
  constexpr int64_t kArrivals = 4096;
  return kernels::kMostSharedBytes - layout::align_up(num_ranks * kernels::kSourceViewBytes, layout::kBulkLine) - kArrivals;
}

int32_t ring_stages(int64_t shared_bytes, int32_t num_warps, int32_t stage_bytes, int32_t least) {
  constexpr int64_t kMostStages = 16;
  const int64_t arrival = sizeof(uint64_t);
  return static_cast<int32_t>(std::clamp<int64_t>(shared_bytes / num_warps / (stage_bytes + arrival), least, kMostStages));
}

void check_alignment(const char* operation, const char* name, const void* pointer, int64_t stride_bytes) {
  if (reinterpret_cast<uintptr_t>(pointer) % kAlignment != 0 || stride_bytes % kAlignment != 0)
    fail(TERN_INVALID_ARGUMENT, "{}: {} is at {} with steps of {} bytes; GPU ranks need multiples of {}", operation, name, pointer,
         stride_bytes, kAlignment);
}

void check_zero_copy(const CudaPlan& plan, const char* operation, const void* rows, int64_t row_bytes, bool zero_copy) {
  const int64_t window_bytes = plan.exchange().options().window_bytes;
  if (!zero_copy || plan.exchange().heap_offset(rows, plan.num_rows() * row_bytes) >= 0) return;
  if (rows == nullptr && window_bytes > 0) return;
  fail(TERN_INVALID_ARGUMENT,
       "{}: zero_copy is set, but the {} bytes of rows are not in this rank's window of {} bytes; take them from tern_window_alloc, or set "
       "it "
       "to 0",
       operation, plan.num_rows() * row_bytes, window_bytes);
}

}  // namespace tern::cuda
