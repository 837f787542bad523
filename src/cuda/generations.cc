// SPDX-License-Identifier: Apache-2.0
// The generations of an exchange on a GPU rank: what this one's state is, why it ends, and how the next one begins.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "base/error.h"
#include "cuda/exchange.h"
#include "domain/agreement.h"
#include "domain/failure.h"
#include "domain/given_up.h"
#include "memory/host_segment.h"

namespace tern::cuda {
namespace {

tern_failure to_failure(const layout::FailureRecord& record) {
  tern_failure failure;
  copy_failure(record, failure);
  return failure;
}

template <typename T>
T load_from_gpu(const T& word) {
  return std::atomic_ref<T>(const_cast<T&>(word)).load(std::memory_order_acquire);
}

}  // namespace

std::optional<tern_failure> CudaExchange::known_failure() const {
  if (const auto recorded = recorded_failure(control_)) return recorded;
  const kernels::Mailbox& mailbox = *mailbox_.data();
  if (load_from_gpu(mailbox.failure_set) == 0) return std::nullopt;
  const tern_failure failure = to_failure(mailbox.failure);
  if (failure.status == TERN_MASKED_OUT) return failure;  // the others go on
  announce_failure(control_, failure);
  return recorded_failure(control_);
}

void CudaExchange::note(tern_status status, int32_t lane_idx, tern_operation operation) const {
  layout::FailureRecord& notice = mailbox_.data()->notice;
  notice.waiter = notice.awaited = control_.rank_of_group(rank());
  notice.lane = lane_idx;
  notice.operation = operation;
  std::atomic_ref<int32_t>(notice.status).store(status, std::memory_order_release);
}

// With masks: this rank's GPU would find all others missing.
void CudaExchange::check_health() const {
  hear_gpu();
  if (!masks_late_ranks()) return;
  if (council_ == nullptr) return refuse_if_left_out(control_, board_);
  if (is_given_up(control_, control_.topology.rank))
    fail(TERN_MASKED_OUT, "the other ranks have given up rank {}, which was missing for too long", control_.topology.rank);
  // Many notes: looked through now and then.
  if (!looks_at_council_.passed()) return;
  constexpr int64_t kLookEveryMs = 10;
  looks_at_council_ = Deadline::in_ms(kLookEveryMs);
  refuse_if_left_out(*council_);
}

void CudaExchange::hear_gpu() const {
  if (const auto failure = known_failure()) throw_recorded(control_, *failure);
  if (!masks_late_ranks() || council_ == nullptr) return;
  for (int r = 0; r < num_ranks(); ++r)
    if (gpu_gave_up(r) && !is_given_up(control_, control_.rank_of_group(r))) announce_given_up(control_, control_.rank_of_group(r));
}

tern_exchange_state CudaExchange::state() const {
  const std::lock_guard lock(generation_mutex_);
  tern_exchange_state result;
  result.generation = control_.generation;
  std::copy(control_.masked.begin(), control_.masked.end(), result.masked + control_.first_rank);
  const std::vector<uint8_t> missed = given_up();
  for (size_t r = 0; r < missed.size(); ++r) result.masked[r] |= missed[r];
  for (int r = 0; council_ != nullptr && r < control_.topology.num_ranks; ++r)
    if (council_->is_masked(r)) result.masked[r] = 1;
  const bool degraded = std::any_of(std::begin(result.masked), std::end(result.masked), [](uint8_t m) { return m != 0; });
  result.health = degraded ? TERN_HEALTH_DEGRADED : TERN_HEALTH_OK;
  const layout::FailureRecord& notice = mailbox_.data()->notice;
  if (load_from_gpu(notice.status) != TERN_OK) result.failure = to_failure(notice);
  if (const auto failure = known_failure()) {
    result.failure = *failure;
    result.health = TERN_HEALTH_FAILED;
  }
  return result;
}

bool CudaExchange::gpu_gave_up(int r) const { return masks_late_ranks() && load_from_gpu(mailbox_.data()->given_up[r]) != 0; }

// [ranks of the group] that operations of this generation go on without, by what the GPU has told so far, and between nodes the hosts.
std::vector<uint8_t> CudaExchange::given_up() const {
  std::vector<uint8_t> result(static_cast<size_t>(control_.topology.num_ranks));
  for (int r = 0; r < num_ranks() && masks_late_ranks(); ++r)
    result[static_cast<size_t>(control_.rank_of_group(r))] = gpu_gave_up(r) ? 1 : 0;
  for (size_t r = 0; r < result.size() && nodes_ != nullptr; ++r)
    if (is_given_up(control_, static_cast<int>(r))) result[r] = 1;
  return result;
}

tern_metrics CudaExchange::metrics() const {
  tern_metrics m;
  m.num_routes = counters_.routes;
  m.num_dispatches = counters_.dispatches;
  m.num_combines = counters_.combines;
  m.rounds = counters_.rounds;
  m.received_rows = counters_.received_rows;
  for (int r = 0; r < num_ranks(); ++r) m.timeouts += gpu_gave_up(r) ? 1 : 0;
  if (nodes_ == nullptr) return m;
  m.timeouts += nodes_->timeouts();
  m.network_bytes = nodes_->network_bytes();
  return m;
}

void CudaExchange::recover(const tern_recover_options& options) {
  const DeviceGuard guard(facts_.device);
  const int64_t timeout_ms = options.timeout_ms > 0 ? bounded_timeout_ms(options.timeout_ms) : options_.timeout_ms;
  await_idle(Deadline::in_ms(timeout_ms));
  // Whom operations have waited for is not waited for again, unless the caller would let it in.
  tern_recover_options wanted = options;
  if (nodes_ != nullptr) nodes_->hear_standing();
  std::vector<uint8_t> mask = given_up();
  for (size_t r = 0; r < mask.size() && options.mask != nullptr; ++r) mask[r] |= options.mask[r];
  if (options.readmit == 0) wanted.mask = mask.data();
  const NextGeneration next =
      council_ != nullptr ? nodes_->network().agree(*council_, wanted, timeout_ms) : next_generation(control_, board_, wanted, timeout_ms);
  begin_generation(next, timeout_ms);
  log_.write(TERN_LOG_WARNING, "rank {}: generation {} starts, {} of {} ranks masked out", control_.topology.rank, control_.generation,
             std::count(next.masked.begin(), next.masked.end(), 1), control_.topology.num_ranks);
}

// If it does not come about, the exchange has failed, whatever it was before: its network is gone, or its heap has other memory than the
// others know.
void CudaExchange::begin_generation(const NextGeneration& next, int64_t timeout_ms) {
  try {
    if (council_ == nullptr) return share_windows(next.masked, next.generation, Deadline::in_ms(timeout_ms));
    cpu::GoingOnBootstrap bootstrap(*council_, next);
    nodes_->stop();
    const Deadline deadline = Deadline::in_ms(timeout_ms);
    const auto first = next.masked.begin() + control_.first_rank;
    share_windows({first, first + control_.num_ranks}, next.generation, deadline);
    nodes_->start(bootstrap, next.masked, deadline);
    const std::lock_guard lock(generation_mutex_);
    council_->begin(next);
  } catch (const std::exception& error) {
    const int rank = control_.topology.rank;
    announce_failure(control_, {status_of(error), rank, rank, 0, TERN_OP_RECOVER, 0, 0, 0});
    throw;
  }
}

std::vector<std::shared_ptr<Segment>> CudaExchange::share_device(std::shared_ptr<DeviceSegment> mine, const std::string& tag,
                                                                 const std::vector<uint8_t>& member, Deadline deadline) {
  auto shared = sharer_->share(std::move(mine), tag, member, deadline);
  if (sharer_->shares_address_space())
    for (const auto& segment : shared)
      if (segment != nullptr) static_cast<DeviceSegment&>(*segment).grant(facts_.device);
  return shared;
}

// Fresh internal windows for everybody who goes on; heaps keep their addresses and contents, on memory that masked ranks cannot reach.
void CudaExchange::share_windows(const std::vector<uint8_t>& masked, uint32_t generation, Deadline deadline) {
  std::vector<uint8_t> member(masked.size());
  std::transform(masked.begin(), masked.end(), member.begin(), [](uint8_t m) { return static_cast<uint8_t>(m == 0); });
  const SharedBy shared_by = sharer_->shares_address_space() ? SharedBy::kThreads : SharedBy::kProcesses;
  const auto window_bytes = static_cast<size_t>(layout_.total_bytes());
  auto window = DeviceSegment::create(window_bytes, facts_.device, shared_by);
  window->fill(static_cast<size_t>(layout_.slots(0, 0)), static_cast<size_t>(layout_.slots(layout_.num_lanes, 0) - layout_.slots(0, 0)),
               layout::kUnwrittenByte);
  auto windows = share_device(std::move(window), fmt::format("gpu-window-{}", generation), member, deadline);
  std::vector<std::shared_ptr<Segment>> heaps(masked.size());
  if (options_.window_bytes > 0) {
    auto own = std::static_pointer_cast<DeviceSegment>(heaps_[static_cast<size_t>(rank())]);
    if (own == nullptr)
      own = DeviceSegment::create(static_cast<size_t>(options_.window_bytes), facts_.device, shared_by);
    else
      own->renew();
    heaps = share_device(own, fmt::format("gpu-heap-{}", generation), member, deadline);
  }
  const auto control_bytes = static_cast<size_t>(control_.layout.total_bytes());
  auto control = sharer_->share(HostSegment::create(control_bytes, shared_by), fmt::format("control-{}", generation), member, deadline);
  const std::lock_guard lock(generation_mutex_);
  windows_ = std::move(windows);
  heaps_ = std::move(heaps);
  control_.windows = std::move(control);
  control_.masked = masked;
  control_.generation = generation;
  set_pointers();
  reset_lanes();
}

void CudaExchange::set_pointers() {
  const auto num = static_cast<size_t>(num_ranks());
  std::vector<std::byte*> windows(num), heaps(num);
  for (size_t r = 0; r < num; ++r) {
    windows[r] = windows_[r] == nullptr ? nullptr : windows_[r]->data();
    heaps[r] = heaps_[r] == nullptr ? nullptr : heaps_[r]->data();
  }
  const auto copy = [&](const DeviceBuffer<std::byte*>& to, const std::vector<std::byte*>& from) {
    check(cudaMemcpyAsync(to.data(), from.data(), num * sizeof(std::byte*), cudaMemcpyHostToDevice, pool_->stream().get()),
          "copying the addresses of windows");
  };
  copy(window_pointers_, windows);
  copy(heap_pointers_, heaps);
  pool_->stream().wait(Deadline::in_ms(options_.timeout_ms), "copying the addresses of windows");
}

// Epochs start again.
void CudaExchange::reset_lanes() {
  std::memset(static_cast<void*>(mailbox_.data()), 0, sizeof(kernels::Mailbox));
  const auto clear = [&](void* memory, size_t bytes) {
    check(cudaMemsetAsync(memory, 0, bytes, pool_->stream().get()), "clearing the state of lanes");
  };
  clear(failed_.data(), sizeof(uint32_t));
  if (masks_late_ranks()) clear(attendance_.data(), sizeof(kernels::Attendance));
  for (const auto& lane : lanes_) {
    clear(lane->state.data(), sizeof(kernels::LaneState));
    clear(lane->staged_counters.data(), lane->staged_counters.size() * sizeof(uint32_t));
    lane->next_epoch = 1;
    lane->open_sends.clear();
  }
  pool_->stream().wait(Deadline::in_ms(options_.timeout_ms), "clearing the state of lanes");
}

}  // namespace tern::cuda
