// SPDX-License-Identifier: Apache-2.0
#include "cpu/exchange.h"

#include <algorithm>
#include <thread>
#include <utility>

#include "base/error.h"
#include "base/knobs.h"
#include "cpu/plan.h"
#include "domain/given_up.h"
#include "memory/host_segment.h"
#include "plan/window_sizing.h"
#include "topology/nodes.h"

namespace tern::cpu {
namespace {

constexpr int64_t kDefaultSpinUs = 50;
constexpr int64_t kCrowdedSpinUs = 20;

LaneOptions lane_options(const tern_exchange_options& options, bool shares_cores, int num_nodes) {
  // With more ranks than cores, the rank that is waited for may need this core: spinning gives it away at once, which is cheaper than
  // to sleep and be woken, but only for as long as nobody else takes it for a whole time slice.
  const int64_t spin_us = knobs().spin_us.value_or(num_nodes > 1 ? kNetworkSpin.count() : shares_cores ? kCrowdedSpinUs : kDefaultSpinUs);
  return {.timeout_ms = options.timeout_ms,
          .spin = std::chrono::microseconds(spin_us),
          .on_timeout = options.on_timeout,
          .grace_ms = grace_ms(options.timeout_ms),
          .num_graces = num_nodes > 1 ? 1 : 0};
}

std::unique_ptr<SegmentSharer> make_node_sharer(const Topology& topology, Bootstrap& bootstrap, Deadline deadline) {
  NodeBootstrap node(bootstrap, topology);
  return make_segment_sharer(own_node(topology), node, deadline);
}

}  // namespace

CpuExchange::CpuExchange(const Topology& topology, Bootstrap& bootstrap, const tern_exchange_options& options, const Log& log,
                         Deadline deadline)
    : options_(options),
      log_(log),
      sharer_(make_node_sharer(topology, bootstrap, deadline)),
      heap_allocator_(options.window_bytes),
      trace_(options.num_lanes),
      shares_cores_(ranks_share_cores(topology)) {
  domain_.first_rank = first_rank_of_node(topology);
  domain_.rank = topology.rank - domain_.first_rank;
  domain_.num_ranks = ranks_of_node(topology);
  domain_.topology = topology;
  domain_.layout = make_window_layout(options, topology.num_ranks, topology.num_nodes);
  const auto num_ranks = static_cast<size_t>(domain_.num_ranks);
  if (topology.num_ranks > layout::kMaxRanks)
    fail(TERN_UNSUPPORTED, "exchange: {} ranks; at most {} are supported", topology.num_ranks, layout::kMaxRanks);
  domain_.windows.resize(num_ranks);
  domain_.heaps.resize(num_ranks);
  share_windows(std::vector<uint8_t>(num_ranks), 0, deadline);
  for (int i = 0; i < options.num_lanes; ++i)
    lanes_.push_back(std::make_unique<Lane>(domain_, i, lane_options(options, shares_cores_, topology.num_nodes), trace_.lane(i)));
  log_.write(TERN_LOG_INFO, "rank {} of {}: CPU exchange, window {} bytes, {} lanes with {} bytes a bank, heap {} bytes", topology.rank,
             topology.num_ranks, domain_.layout.total_bytes(), options.num_lanes, domain_.layout.bank_bytes, options.window_bytes);
  if (topology.num_nodes == 1) {
    board_ = std::make_unique<AdmissionBoard>(topology, *sharer_, deadline);
    return;
  }
  council_ = std::make_unique<NodesCouncil>(topology, "", bootstrap, *sharer_, deadline);
  network_ = std::make_unique<Network>(domain_, "", options, log);
  start_network(bootstrap, council_->masked(), deadline);
}

void CpuExchange::start_network(Bootstrap& bootstrap, const std::vector<uint8_t>& masked, Deadline deadline) {
  RailMemory memory;
  memory.of_host = [this](size_t num_bytes) {
    rail_memory_ = HostSegment::create(num_bytes, SharedBy::kThreads);
    return rail_memory_->data();
  };
  network_->start(memory, bootstrap, masked, deadline);
  rails_.clear();
  for (const auto& lane : lanes_) rails_.push_back(network_->make_rail(*lane));
  unreachable_ = masked;
  for (int32_t r = 0; r < domain_.topology.num_ranks; ++r)
    if (!rails_[0]->serves(domain_.topology.node[static_cast<size_t>(r)])) unreachable_[static_cast<size_t>(r)] = 1;
}

// Fresh internal windows for everybody who goes on; heaps keep their addresses and contents, on memory that masked ranks cannot reach.
void CpuExchange::share_windows(const std::vector<uint8_t>& masked, uint32_t generation, Deadline deadline) {
  std::vector<uint8_t> member(masked.size());
  std::transform(masked.begin(), masked.end(), member.begin(), [](uint8_t m) { return static_cast<uint8_t>(m == 0); });
  const auto rank = static_cast<size_t>(domain_.rank);
  const auto create = [&](int64_t bytes) { return HostSegment::create(static_cast<size_t>(bytes), sharer_->shared_by()); };
  auto windows = sharer_->share(create(domain_.layout.total_bytes()), fmt::format("window-{}", generation), member, deadline);
  std::vector<std::shared_ptr<Segment>> heaps(masked.size());
  if (options_.window_bytes > 0) {
    std::shared_ptr<Segment> own = domain_.heaps[rank];
    if (own == nullptr)
      own = create(options_.window_bytes);
    else
      own->renew();
    heaps = sharer_->share(own, fmt::format("heap-{}", generation), member, deadline);
  }
  {
    const std::lock_guard lock(generation_mutex_);
    domain_.windows = std::move(windows);
    domain_.heaps = std::move(heaps);
    domain_.masked = masked;
    domain_.generation = generation;
  }
  for (auto& lane : lanes_) lane->restart();
}

std::unique_ptr<DevicePlan> CpuExchange::create_plan(const PlanShape& shape) {
  PlanShape with_nodes = shape;
  with_nodes.num_nodes = num_nodes();
  return std::make_unique<CpuPlan>(*this, with_nodes);
}

void* CpuExchange::alloc_window(int64_t bytes) {
  const std::scoped_lock lock(heap_mutex_, generation_mutex_);  // recoveries replace the heaps
  const int64_t offset = heap_allocator_.allocate(bytes);       // refuses first: without window_bytes there is no heap
  return domain_.heap(domain_.rank) + offset;
}

void CpuExchange::free_window(void* pointer) {
  const std::scoped_lock lock(heap_mutex_, generation_mutex_);  // recoveries replace the heaps
  const int64_t offset = heap_offset(pointer, 0);
  if (offset < 0 || !heap_allocator_.release(offset))
    fail(TERN_INVALID_ARGUMENT, "window: {} was not returned by tern_window_alloc of this exchange, or is free already", pointer);
}

int64_t CpuExchange::heap_offset(const void* pointer, int64_t bytes) const {
  if (options_.window_bytes == 0 || pointer == nullptr) return -1;
  const int64_t offset = static_cast<const std::byte*>(pointer) - domain_.heap(domain_.rank);
  return offset >= 0 && offset + bytes <= options_.window_bytes ? offset : -1;
}

tern_exchange_state CpuExchange::state() const {
  const std::lock_guard lock(generation_mutex_);
  tern_exchange_state result;
  result.generation = domain_.generation;
  const auto failure = recorded_failure(domain_);
  const bool is_called = failure && calls_for_restart(*failure);
  for (int r = 0; r < domain_.topology.num_ranks; ++r) {
    const bool is_masked = council_ != nullptr ? council_->is_masked(r) : domain_.is_masked(r);
    if (!is_masked && !is_given_up(domain_, r) && !(is_called && failure->awaited == r)) continue;
    result.masked[r] = 1;
    result.health = TERN_HEALTH_DEGRADED;
  }
  if (failure && !is_called) {
    result.failure = *failure;
    result.health = TERN_HEALTH_FAILED;
  }
  return result;
}

tern_metrics CpuExchange::metrics() const {
  tern_metrics m;
  for (const auto& lane : lanes_) {
    const Counters& c = lane->counters();
    m.num_routes += c.routes;
    m.num_dispatches += c.dispatches;
    m.num_combines += c.combines;
    m.rounds += c.rounds;
    m.sent_bytes += c.sent_bytes;
    m.sent_local_bytes += c.sent_local_bytes;
    m.received_rows += c.received_rows;
    m.waits += c.waits;
    m.sleeps += c.sleeps;
    m.wait_ns += c.wait_ns;
    m.timeouts += c.timeouts;
    m.network_bytes += c.network_bytes;
  }
  return m;
}

void CpuExchange::recover(const tern_recover_options& options) {
  const int64_t timeout_ms = options.timeout_ms > 0 ? bounded_timeout_ms(options.timeout_ms) : options_.timeout_ms;
  begin_generation(
      council_ == nullptr ? next_generation(domain_, *board_, options, timeout_ms) : network_->agree(*council_, options, timeout_ms),
      timeout_ms);
  const tern_exchange_state now = state();
  log_.write(TERN_LOG_WARNING, "rank {}: generation {} starts, {} of {} ranks masked out", domain_.topology.rank, now.generation,
             std::count(now.masked, now.masked + domain_.topology.num_ranks, 1), domain_.topology.num_ranks);
}

// If it does not come about, the exchange has failed, whatever it was before: its network is gone, or its heap has other memory than the
// others know.
void CpuExchange::begin_generation(const NextGeneration& next, int64_t timeout_ms) {
  try {
    if (council_ == nullptr) return share_windows(next.masked, next.generation, Deadline::in_ms(timeout_ms));
    GoingOnBootstrap bootstrap(*council_, next);
    network_->stop();
    const Deadline deadline = Deadline::in_ms(timeout_ms);
    const auto first = next.masked.begin() + domain_.first_rank;
    share_windows({first, first + domain_.num_ranks}, next.generation, deadline);
    start_network(bootstrap, next.masked, deadline);
    const std::lock_guard lock(generation_mutex_);
    council_->begin(next);
  } catch (const std::exception& error) {
    // Under TERN_ON_TIMEOUT_MASK the next operation tries again, if it is for the sake of a missing rank: a call for a restart.
    const int rank = domain_.topology.rank;
    const auto missing = std::ranges::find_if(next.masked, [](uint8_t masked) { return masked != 0; });
    const bool is_tried_again = options_.on_timeout == TERN_ON_TIMEOUT_MASK && missing != next.masked.end();
    const int awaited = is_tried_again ? static_cast<int>(missing - next.masked.begin()) : rank;
    announce_failure(domain_, {status_of(error), rank, awaited, 0, TERN_OP_RECOVER, 0, 0, 0});
    throw;
  }
}

bool CpuExchange::calls_for_restart(const tern_failure& failure) const {
  return options_.on_timeout == TERN_ON_TIMEOUT_MASK && failure.operation == TERN_OP_RECOVER && failure.waiter != failure.awaited;
}

bool CpuExchange::is_called_to_restart() const {
  const auto failure = recorded_failure(domain_);
  return failure && calls_for_restart(*failure);
}

CpuExchange::Progress CpuExchange::progress(const Lane& lane) const {
  if (rails_.empty()) return {lane.next_epoch(), 0, lane.progress()};
  const Rail& rail = *rails_[static_cast<size_t>(lane.index())];
  return {lane.next_epoch(), rail.next_epoch(), lane.progress() + rail.progress()};
}

bool CpuExchange::has_open_sends(const Lane& lane) const {
  return lane.has_unreceived() || (!rails_.empty() && rails_[static_cast<size_t>(lane.index())]->has_unreceived());
}

// Who called had come to `begun` and not further.
bool CpuExchange::refuses(const tern_failure& failure, const Progress& begun) const {
  return calls_for_restart(failure) && failure.expected_epoch <= begun.lane_epoch && failure.seen_epoch <= begun.rail_epoch;
}

bool CpuExchange::needs_next_generation(const Lane& lane) const {
  if (options_.on_timeout != TERN_ON_TIMEOUT_MASK) return false;
  if (is_given_up(domain_, domain_.topology.rank)) return true;
  const auto call = recorded_failure(domain_);
  return call && refuses(*call, progress(lane));
}

// The epochs tell the others what this rank has done in this generation; it will not do more.
void CpuExchange::call_for_restart(const Lane& lane) {
  int first = 0;
  while (!lane.gave_up_rank(first)) ++first;
  const Progress now = progress(lane);
  announce_failure(domain_, {TERN_TIMEOUT, domain_.topology.rank, first, lane.index(), TERN_OP_RECOVER, 0, now.lane_epoch, now.rail_epoch});
}

void CpuExchange::start_operation(Lane& lane, bool again) {
  // What was sent is received first, on this rank as on the others.
  const bool can_restart = again || !has_open_sends(lane) || is_given_up(domain_, domain_.topology.rank);
  if (lane.gave_up_any() && !is_called_to_restart() && can_restart) call_for_restart(lane);
  if (again || (can_restart && needs_next_generation(lane)))
    restart(lane);
  else if (const auto failure = recorded_failure(domain_); failure && !calls_for_restart(*failure))
    throw_recorded(domain_, *failure);
  if (options_.on_timeout != TERN_ON_TIMEOUT_MASK || rails_.empty()) return;
  begun_ = progress(lane);
  rails_[0]->begin_operation(begun_.number);
}

void CpuExchange::finish_without_missing(tern_phase phase) {
  if (rails_.empty()) return;
  constexpr std::chrono::milliseconds kLook{2};
  const Deadline deadline = Deadline::in_ms(options_.timeout_ms + kMostGraces * grace_ms(options_.timeout_ms));
  // Nobody is named who does not come: it is missed by those who need something of it.
  while (!rails_[0]->have_all_begun(begun_.number) && !deadline.passed()) {
    const auto failure = recorded_failure(domain_);
    if (failure && !calls_for_restart(*failure)) return;
    if (failure && phase == TERN_PHASE_WHOLE && refuses(*failure, begun_)) throw_recorded(domain_, *failure);
    if (is_given_up(domain_, domain_.topology.rank)) return;
    std::this_thread::sleep_for(kLook);
  }
}

void CpuExchange::restart(Lane& lane) {
  if (!rails_.empty()) rails_[0]->hear_standing();
  std::vector<uint8_t> mask(static_cast<size_t>(domain_.topology.num_ranks));
  for (int r = 0; r < domain_.topology.num_ranks; ++r) mask[static_cast<size_t>(r)] = is_given_up(domain_, r) ? 1 : 0;
  tern_recover_options options;
  options.mask = mask.data();
  options.allow_mask = 1;
  with_span(lane.spans(), {.operation = TERN_OP_RECOVER}, [&](Span&) { recover(options); });
}

std::unique_ptr<DeviceExchange> make_cpu_exchange(const Topology& topology, Bootstrap& bootstrap, const tern_exchange_options& options,
                                                  const Log& log, Deadline deadline) {
  return std::make_unique<CpuExchange>(topology, bootstrap, options, log, deadline);
}

}  // namespace tern::cpu
