// SPDX-License-Identifier: Apache-2.0
#include "cuda/exchange.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <thread>

#include "base/error.h"
#include "base/knobs.h"
#include "cuda/engine.h"
#include "cuda/plan.h"
#include "kernels/combine.h"
#include "kernels/count_routing.h"
#include "kernels/dispatch.h"
#include "kernels/latency.h"
#include "kernels/node_route.h"
#include "kernels/rail.h"
#include "kernels/route.h"
#include "kernels/wire_combine.h"
#include "topology/nodes.h"

namespace tern::cuda {
namespace {

constexpr int64_t kLaneCells = layout::kMaxChunks;

// Kernels wait so many timeouts for their host, whose waits have deadlines of their own, and which may have several in a step.
constexpr uint64_t kHostShare = 8;

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

// Before anybody shares anything.
void require_supported(const tern_exchange_options& options, const Topology& topology) {
  if (options.on_timeout != TERN_ON_TIMEOUT_MASK) return;
  if (options.mode == TERN_MODE_THROUGHPUT || topology.num_ranks > layout::kMostLatencyRanks)
    fail(TERN_UNSUPPORTED,
         "exchange: on_timeout is TERN_ON_TIMEOUT_MASK, which GPU ranks have on the latency path: with at most {} ranks, not {}, and not "
         "with TERN_MODE_THROUGHPUT; use TERN_ON_TIMEOUT_ABORT, and after an error tern_exchange_recover with allow_mask",
         layout::kMostLatencyRanks, topology.num_ranks);
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
  nodes_ = std::make_unique<Nodes>(pool_, control_, Nodes::Setup{options, [this] { hear_gpu(); }, log});
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
  if (nodes_ != nullptr) {
    view.host = nodes_->lane(lane_idx).cell();
    view.host_timeout_ns = kHostShare * view.timeout_ns;
    // Ranks wait for ranks whose hosts wait for other nodes: those shall find out first who is missing. With masks they have met before.
    if (!masks_late_ranks()) view.timeout_ns += view.timeout_ns / 2;
  }
  const auto data = [](const std::shared_ptr<Segment>& segment) { return segment == nullptr ? nullptr : segment->data(); };
  for (size_t r = 0; r < windows_.size() && r < kernels::ExchangeView::kInlineRanks; ++r) view.inline_windows[r] = data(windows_[r]);
  for (size_t r = 0; r < heaps_.size() && r < kernels::ExchangeView::kInlineHeaps; ++r) view.inline_heaps[r] = data(heaps_[r]);
  return view;
}

std::unique_ptr<DeviceExchange> make_exchange(const Topology& topology, Bootstrap& bootstrap, const tern_exchange_options& options,
                                              const Log& log, Deadline deadline) {
  require_supported(options, topology);
  return std::make_unique<CudaExchange>(topology, bootstrap, options, log, deadline);
}

}  // namespace tern::cuda
