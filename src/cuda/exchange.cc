// SPDX-License-Identifier: Apache-2.0
#include "cuda/exchange.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <thread>

#include "base/error.h"
#include "base/knobs.h"
#include "cuda/engine.h"
#include "cuda/plan.h"
#include "domain/agreement.h"
#include "domain/failure.h"
#include "kernels/combine.h"
#include "kernels/count_routing.h"
#include "kernels/dispatch.h"
#include "kernels/latency.h"
#include "kernels/node_route.h"
#include "kernels/rail.h"
#include "kernels/route.h"
#include "kernels/wire_combine.h"
#include "memory/host_segment.h"
#include "topology/nodes.h"

namespace tern::cuda {
namespace {

constexpr int64_t kLaneCells = layout::kMaxChunks;

// Which GPU a rank has.
struct DeviceIdentity {
  std::array<char, 16> uuid;
  int32_t domain, bus, slot;  // of the PCI bus, for people to read
  bool operator==(const DeviceIdentity&) const = default;
};

// What a rank tells the others about its GPU. Travels as bytes.
struct DeviceReport {
  DeviceIdentity identity;
  int32_t num_sms;
  int32_t asked_sms;  // 0: none
};

DeviceIdentity identify(int device) {
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, device), "reading the GPU's properties");
  DeviceIdentity result{};
  std::memcpy(result.uuid.data(), &properties.uuid, result.uuid.size());
  result.domain = properties.pciDomainID;
  result.bus = properties.pciBusID;
  result.slot = properties.pciDeviceID;
  return result;
}

tern_failure to_failure(const layout::FailureRecord& record) {
  tern_failure failure;
  copy_failure(record, failure);
  return failure;
}

template <typename T>
T load_from_gpu(const T& word) {
  return std::atomic_ref<T>(const_cast<T&>(word)).load(std::memory_order_acquire);
}

// Before anybody shares anything.
void require_supported(const tern_exchange_options& options, const Topology& topology) {
  if (options.on_timeout != TERN_ON_TIMEOUT_MASK) return;
  if (options.mode == TERN_MODE_THROUGHPUT || topology.num_nodes > 1 || topology.num_ranks > layout::kMostLatencyRanks)
    fail(TERN_UNSUPPORTED,
         "exchange: on_timeout is TERN_ON_TIMEOUT_MASK, which GPU ranks have on the latency path: on one node, not {}, with at most {} "
         "ranks, not {}, and not with TERN_MODE_THROUGHPUT; use TERN_ON_TIMEOUT_ABORT, and after an error tern_exchange_recover with "
         "allow_mask",
         topology.num_nodes, layout::kMostLatencyRanks, topology.num_ranks);
}

// By default the rank's place among those of its host, of which several nodes may be declared.
int choose_device(const tern_exchange_options& options, const Topology& topology) {
  int place = 0;
  for (int r = 0; r < topology.rank; ++r) place += topology.same_host(r) ? 1 : 0;
  const int device = options.device_index >= 0 ? options.device_index : place % std::max(1, num_devices());
  require_device(device);
  return device;
}

// All code is on the device before an operation waits for a peer: loading it later could need the device to be idle.
void load_kernels(bool bulk_copies) {
  check(kernels::prepare_route(), "loading the kernel of route");
  check(kernels::prepare_dispatch(bulk_copies), "loading the kernels of dispatch");
  check(kernels::prepare_combine(bulk_copies), "loading the kernels of combine");
  check(kernels::prepare_wire_combine(), "loading the kernels of combine in other forms");
  check(kernels::prepare_latency_dispatch(), "loading the kernel of dispatch for small batches");
  check(kernels::prepare_latency_combine(), "loading the kernels of combine for small batches");
  check(kernels::prepare_rail(), "loading the kernels between nodes");
  check(kernels::prepare_count_routing(), "loading the kernel that counts a routing");
  check(kernels::prepare_node_route(), "loading the kernels of route between nodes");
}

std::unique_ptr<SegmentSharer> make_node_sharer(const Topology& topology, Bootstrap& bootstrap, Deadline deadline) {
  NodeBootstrap node(bootstrap, topology);
  return make_segment_sharer(own_node(topology), node, deadline);
}

}  // namespace

CudaLane::CudaLane(const std::shared_ptr<DevicePool>& pool, int num_ranks)
    : stream(pool->device(), StreamPriority::kHighest),
      begin(pool->device()),
      state(pool, 1),
      staged_counters(pool, static_cast<size_t>(num_ranks * kLaneCells)) {
  open_sends.reserve(layout::kNumBanks + 1);
}

CudaExchange::CudaExchange(const Topology& topology, Bootstrap& bootstrap, const tern_exchange_options& options, const Log& log,
                           Deadline deadline)
    : options_(options),
      log_(log),
      sharer_(make_node_sharer(topology, bootstrap, deadline)),
      board_(own_node(topology), *sharer_, deadline),
      heap_allocator_(options.window_bytes),
      trace_(options.num_lanes) {
  if (topology.num_ranks > layout::kMaxRanks)
    fail(TERN_UNSUPPORTED, "exchange: {} ranks in one domain; at most {} are supported", topology.num_ranks, layout::kMaxRanks);
  facts_.device = choose_device(options, topology);
  const DeviceGuard guard(facts_.device);
  facts_.context = CurrentContext::get();
  find_devices(topology, bootstrap, deadline);
  load_kernels(facts_.has_bulk_copies);
  control_.first_rank = first_rank_of_node(topology);
  control_.rank = topology.rank - control_.first_rank;
  control_.num_ranks = ranks_of_node(topology);
  control_.topology = topology;
  control_.layout = make_host_layout(options, topology);
  const auto num_ranks = static_cast<size_t>(control_.num_ranks);
  control_.heaps.resize(num_ranks);
  layout_ = make_device_layout(options, topology.num_ranks, topology.num_nodes);
  pool_ = std::make_shared<DevicePool>(facts_.device);
  window_pointers_ = {pool_, num_ranks};
  heap_pointers_ = {pool_, num_ranks};
  failed_ = {pool_, 1};
  mailbox_ = {facts_.device, 1};
  if (masks_late_ranks()) attendance_ = {pool_, 1};
  heaps_.resize(num_ranks);
  for (int i = 0; i < options.num_lanes; ++i) lanes_.push_back(std::make_unique<CudaLane>(pool_, control_.num_ranks));
  share_windows(std::vector<uint8_t>(num_ranks), 0, deadline);
  log_.write(TERN_LOG_INFO, "rank {} of {}: CUDA exchange on {}, window {} bytes, {} lanes, heap {} bytes, {} bulk copies", topology.rank,
             topology.num_ranks, device_name(facts_.device), layout_.total_bytes(), options.num_lanes, options.window_bytes,
             facts_.has_bulk_copies ? "with" : "without");
  if (topology.num_nodes == 1) return;
  council_ = std::make_unique<cpu::NodesCouncil>(topology, pci_address(facts_.device), bootstrap, *sharer_, deadline);
  nodes_ = std::make_unique<Nodes>(pool_, control_, Nodes::Setup{options, [this] { check_health(); }, log});
  nodes_->start(bootstrap, council_->masked(), deadline);
}

CudaExchange::~CudaExchange() {
  try {
    // Kernels give up by themselves, counted from their start; those behind a kernel that gave up return at once.
    await_idle(Deadline::in_ms(2 * options_.timeout_ms));
  } catch (const Failure& failure) {
    log_.write(TERN_LOG_WARNING, "rank {}: exchange destroyed while an operation runs; its memory is lost: {}", rank(), failure.what());
    abandon_memory();
  }
}

// To the process, rather than take it away below a running kernel: that would end the CUDA context, and with it all that others do there.
void CudaExchange::abandon_memory() {
  const auto abandon = [](auto& owner) { static_cast<void>(new auto(std::move(owner))); };
  abandon(windows_);
  abandon(heaps_);
  abandon(window_pointers_);
  abandon(heap_pointers_);
  abandon(failed_);
  abandon(mailbox_);
  abandon(attendance_);
  abandon(lanes_);
  abandon(retired_);
  if (nodes_ != nullptr) nodes_->abandon_memory();
}

void CudaExchange::find_devices(const Topology& topology, Bootstrap& bootstrap, Deadline deadline) {
  facts_.num_sms = attribute(facts_.device, cudaDevAttrMultiProcessorCount);
  constexpr int kRingSharedBytes = 224 << 10;  // GPUs for workstations have bulk copies, but not the room for rings
  facts_.has_bulk_copies = attribute(facts_.device, cudaDevAttrComputeCapabilityMajor) >= 9 &&
                           attribute(facts_.device, cudaDevAttrMaxSharedMemoryPerBlockOptin) >= kRingSharedBytes && knobs().bulk_copy != 0;
  const DeviceReport own{identify(facts_.device), facts_.num_sms, options_.num_sms};
  std::vector<DeviceReport> all(static_cast<size_t>(topology.num_ranks));
  bootstrap.allgather(&own, all.data(), sizeof(own), deadline);
  const auto ranks_on = [&](const DeviceIdentity& device) {
    return static_cast<int>(std::count_if(all.begin(), all.end(), [&](const DeviceReport& report) { return report.identity == device; }));
  };
  facts_.ranks_on_device = ranks_on(own.identity);
  facts_.common_sms = facts_.share_sms();
  for (const DeviceReport& report : all) {
    const int share = std::max(1, report.num_sms / ranks_on(report.identity));
    facts_.common_sms = std::min({facts_.common_sms, share, report.asked_sms > 0 ? report.asked_sms : share});
    facts_.common_sms_asked |= report.asked_sms > 0;
  }
  if (knobs().share_gpu != 0) return;
  for (int r = 0; r < topology.num_ranks; ++r)
    if (all[static_cast<size_t>(r)].identity == own.identity && !topology.same_process(r))
      fail(TERN_UNSUPPORTED,
           "exchange: ranks {} and {} are processes on the same {}; kernels of two processes take turns there, so each wait for the other "
           "would take milliseconds. Give each process a GPU of its own, make the ranks threads of one process, or set TERN_SHARE_GPU=1",
           topology.rank, r, device_name(facts_.device));
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

// Captured operations are not seen here: whoever replays a graph knows when it has run.
bool CudaExchange::is_idle() const {
  for (const auto& lane : lanes_)
    if (lane->end != nullptr && !lane->end->passed()) return false;
  const std::lock_guard lock(retired_mutex_);
  return std::all_of(retired_.begin(), retired_.end(), [](const PlanMemory& memory) { return memory.is_idle(); });
}

void CudaExchange::await_idle(Deadline deadline) const {
  while (!is_idle()) {
    if (deadline.passed()) fail(TERN_TIMEOUT, "rank {}: an operation of this exchange has not ended in time on its stream", rank());
    std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
}

std::unique_ptr<DevicePlan> CudaExchange::create_plan(const PlanShape& shape) {
  free_retired();
  PlanShape with_nodes = shape;
  with_nodes.num_nodes = control_.topology.num_nodes;
  return std::make_unique<CudaPlan>(*this, with_nodes);
}

void CudaExchange::retire(PlanMemory memory) noexcept {
  try {
    {
      const std::lock_guard lock(retired_mutex_);
      retired_.push_back(std::move(memory));
    }
    free_retired();
  } catch (const std::exception& error) {
    log_.write(TERN_LOG_WARNING, "rank {}: the memory of a plan is kept until the exchange ends: {}", rank(), error.what());
  }
}

// The host looks whether operations have run, and no stream waits for them: streams share hardware queues, and one that waits may keep
// those of other ranks from running.
void CudaExchange::free_retired() {
  const std::lock_guard lock(retired_mutex_);
  std::erase_if(retired_, [](const PlanMemory& memory) { return memory.is_idle(); });
}

void* CudaExchange::alloc_window(int64_t bytes) {
  const std::scoped_lock lock(heap_mutex_, generation_mutex_);  // recoveries replace the heaps
  const int64_t offset = heap_allocator_.allocate(bytes);       // refuses first: without window_bytes there is no heap
  return heaps_[static_cast<size_t>(rank())]->data() + offset;
}

void CudaExchange::free_window(void* pointer) {
  const std::scoped_lock lock(heap_mutex_, generation_mutex_);  // recoveries replace the heaps
  const int64_t offset = heap_offset(pointer, 0);
  if (offset < 0 || !heap_allocator_.release(offset))
    fail(TERN_INVALID_ARGUMENT, "window: {} was not returned by tern_window_alloc of this exchange, or is free already", pointer);
}

int64_t CudaExchange::heap_offset(const void* pointer, int64_t bytes) const {
  if (options_.window_bytes == 0 || pointer == nullptr) return -1;
  const int64_t offset = static_cast<const std::byte*>(pointer) - heaps_[static_cast<size_t>(rank())]->data();
  return offset >= 0 && offset + bytes <= options_.window_bytes ? offset : -1;
}

kernels::ExchangeView CudaExchange::view(int32_t lane_idx) const {
  const CudaLane& lane = *lanes_[static_cast<size_t>(lane_idx)];
  kernels::ExchangeView view{.rank = rank(),
                             .num_ranks = num_ranks(),
                             .first_rank = control_.first_rank,
                             .lane = lane_idx,
                             .layout = layout_,
                             .far_windows = window_pointers_.data(),
                             .far_heaps = heap_pointers_.data(),
                             .state = lane.state.data(),
                             .staged_counters = lane.staged_counters.data(),
                             .failed = failed_.data(),
                             .mailbox = mailbox_.data(),
                             .attendance = masks_late_ranks() ? attendance_.data() : nullptr,
                             .timeout_ns = static_cast<uint64_t>(options_.timeout_ms) * 1'000'000};
  // Ranks wait for ranks whose hosts wait for other nodes: those shall find out first who is missing.
  if (nodes_ != nullptr) {
    view.timeout_ns += view.timeout_ns / 2;
    view.host = nodes_->lane(lane_idx).cell();
  }
  const auto data = [](const std::shared_ptr<Segment>& segment) { return segment == nullptr ? nullptr : segment->data(); };
  for (size_t r = 0; r < windows_.size() && r < kernels::ExchangeView::kInlineRanks; ++r) view.inline_windows[r] = data(windows_[r]);
  for (size_t r = 0; r < heaps_.size() && r < kernels::ExchangeView::kInlineHeaps; ++r) view.inline_heaps[r] = data(heaps_[r]);
  return view;
}

std::optional<tern_failure> CudaExchange::known_failure() const {
  if (const auto recorded = recorded_failure(control_)) return recorded;
  const kernels::Mailbox& mailbox = *mailbox_.data();
  if (load_from_gpu(mailbox.failure_set) == 0) return std::nullopt;
  const tern_failure failure = to_failure(mailbox.failure);
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

void CudaExchange::check_health() const {
  if (const auto failure = known_failure()) throw_recorded(control_, *failure);
  if (masks_late_ranks()) refuse_if_left_out(control_, board_);  // its GPU would find all others missing
}

tern_exchange_state CudaExchange::state() const {
  const std::lock_guard lock(generation_mutex_);
  tern_exchange_state result;
  result.generation = control_.generation;
  std::copy(control_.masked.begin(), control_.masked.end(), result.masked + control_.first_rank);
  const std::vector<uint8_t> missed = given_up();
  for (size_t r = 0; r < missed.size(); ++r) result.masked[static_cast<size_t>(control_.first_rank) + r] |= missed[r];
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

// Ranks that operations of this generation go on without, by what the GPU has told so far.
std::vector<uint8_t> CudaExchange::given_up() const {
  std::vector<uint8_t> result(static_cast<size_t>(num_ranks()));
  for (size_t r = 0; r < result.size() && masks_late_ranks(); ++r) result[r] = load_from_gpu(mailbox_.data()->given_up[r]) != 0 ? 1 : 0;
  return result;
}

tern_metrics CudaExchange::metrics() const {
  tern_metrics m;
  m.num_routes = counters_.routes;
  m.num_dispatches = counters_.dispatches;
  m.num_combines = counters_.combines;
  m.rounds = counters_.rounds;
  m.received_rows = counters_.received_rows;
  const std::vector<uint8_t> missed = given_up();
  m.timeouts = static_cast<uint64_t>(std::count(missed.begin(), missed.end(), 1));
  if (nodes_ != nullptr) m.network_bytes = nodes_->network_bytes();
  return m;
}

void CudaExchange::recover(const tern_recover_options& options) {
  const DeviceGuard guard(facts_.device);
  const int64_t timeout_ms = options.timeout_ms > 0 ? bounded_timeout_ms(options.timeout_ms) : options_.timeout_ms;
  await_idle(Deadline::in_ms(timeout_ms));
  // Whom operations have waited for is not waited for again, unless the caller would let it in.
  tern_recover_options wanted = options;
  std::vector<uint8_t> mask = given_up();
  for (size_t r = 0; r < mask.size() && options.mask != nullptr; ++r) mask[r] |= options.mask[r];
  if (options.readmit == 0) wanted.mask = mask.data();
  const NextGeneration next =
      council_ != nullptr ? next_generation(*council_, options, timeout_ms) : next_generation(control_, board_, wanted, timeout_ms);
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

std::unique_ptr<DeviceExchange> make_exchange(const Topology& topology, Bootstrap& bootstrap, const tern_exchange_options& options,
                                              const Log& log, Deadline deadline) {
  require_supported(options, topology);
  return std::make_unique<CudaExchange>(topology, bootstrap, options, log, deadline);
}

}  // namespace tern::cuda
