// SPDX-License-Identifier: Apache-2.0
// The measurements of `tern bench`, as one rank runs them.
#include <algorithm>
#include <array>
#include <cstring>
#include <functional>
#include <limits>
#include <optional>
#include <utility>

#include "base/error.h"
#include "tools/bench.h"
#include "tools/bench_ceiling.h"
#include "tools/network_ceiling.h"
#include "tools/progress.h"
#include "tools/stream_timer.h"

namespace tern::tools {
namespace {

// Rows that rank r receives in a dispatch, and gives back in a combine, are column r of the messages; those it sends are row r.
// Links carry both directions at once. Within a node it is the rail of a token's owner that sends it.
TrafficBytes bytes_of(const std::vector<int64_t>& messages, int num_ranks, int64_t row_bytes, int ranks_per_node) {
  std::vector<TrafficBytes> in(static_cast<size_t>(num_ranks)), out(in.size());
  for (int from = 0; from < num_ranks; ++from) {
    for (int to = 0; to < num_ranks; ++to) {
      const int64_t bytes = messages[static_cast<size_t>(from * num_ranks + to)] * row_bytes;
      const int rail = to / ranks_per_node * ranks_per_node + from % ranks_per_node;
      TrafficBytes& received = in[static_cast<size_t>(to)];
      TrafficBytes& sent = out[static_cast<size_t>(from)];
      received.logical += bytes;
      sent.logical += bytes;
      received.wire += from == to ? 0 : bytes;
      sent.wire += from == to ? 0 : bytes;
      received.link += rail == to ? 0 : bytes;
      out[static_cast<size_t>(rail)].link += rail == to ? 0 : bytes;
    }
  }
  TrafficBytes most;
  for (const auto& of_ranks : {in, out}) {
    for (const TrafficBytes& of_rank : of_ranks)
      most = {std::max(most.logical, of_rank.logical), std::max(most.wire, of_rank.wire), std::max(most.link, of_rank.link)};
  }
  return most;
}

// Does one rank say that something is wrong? The text of the first that does, on every rank.
std::string gather_wrong(const RankContext& context, const std::optional<std::string>& mine) {
  using Text = std::array<char, 512>;
  Text text{};
  if (mine) std::strncpy(text.data(), mine->c_str(), text.size() - 1);
  std::vector<Text> all(static_cast<size_t>(context.num_ranks));
  context.board.allgather(context.rank, std::as_bytes(std::span(text)), reinterpret_cast<std::byte*>(all.data()),
                          context.timeout_ms + RankContext::kPatienceMs);
  for (const Text& of_rank : all) {
    if (of_rank[0] != '\0') return of_rank.data();
  }
  return "";
}

struct Operation {
  std::string op;
  std::string extent;
  std::function<void(const tern_launch&)> run;        // GPU: puts it on the launch's stream
  std::function<std::optional<std::string>()> check;  // after poison and run
  TrafficBytes bytes;
  bool reads_counts = false;  // the host waits in the middle, so that it is the host's clock that counts
  bool in_phases = false;     // GPU: its send and its receive are timed each by itself; run is called for both
};

class BenchRank {
 public:
  BenchRank(const BenchSetting& setting, const BenchSeat& seat)
      : setting_(setting),
        shape_(setting.shape),
        seat_(seat),
        context_(seat.context),
        meter_(seat.context, setting.options.iters),
        progress_(seat.context.rank == 0),
        exchange_(seat.context.group, exchange_options(setting, seat.device)),
        with_windows_(setting.options.buffers != "caller"),
        with_caller_(setting.options.buffers != "window") {
    if (ranks_per_node() < context_.num_ranks) network_.emplace(context_, seat.device);
    if (on_gpu()) timer_ = make_stream_timer(seat.device, {.num_runs = setting.options.iters, .cold = setting.options.cold});
  }

  std::vector<BenchRecord> run() {
    measure_copy();
    if (with_windows_) measure_buffers(true);
    measure_copy();
    if (with_caller_) measure_buffers(false);
    measure_copy();
    if (records_.empty())
      fail(TERN_INVALID_ARGUMENT, "bench: nothing of what --ops asks for can be measured here; tern bench --help says what is");
    for (BenchRecord& record : records_) {
      if (on_gpu() && record.bytes.logical > 0)
        record.links = seat_.links->at(record.num_sms);
      else
        record.ceiling_us = ceiling_of(record.op);
      record.network_ceiling_gbps = network_gbps_;
    }
    return std::move(records_);
  }

 private:
  static tern_exchange_options exchange_options(const BenchSetting& setting, const RankDevice& device) {
    const BatchShape& shape = setting.shape;
    const RowFormat& format = shape.format;
    const std::vector<int>& num_sms = setting.options.num_sms;
    const bool all_given = std::ranges::all_of(num_sms, [](int count) { return count > 0; });
    const int64_t fp32_bytes = shape.wire == TERN_WIRE_FP32 ? shape.hidden * element_bytes(TERN_DTYPE_FP32) : 0;
    const int64_t arriving = format.arriving_row_bytes(shape.hidden) + format.arriving_scale_bytes(shape.hidden);
    return {.device = device.type(),
            .device_index = device.index(),
            .window_bytes = setting.options.buffers == "caller" ? 0 : window_bytes(shape),
            .max_tokens = std::max<int64_t>(1, shape.routing.max_tokens()),
            .max_row_bytes = std::max({arriving, format.given_row_bytes(shape.hidden), format.combine_row_bytes(shape.hidden), fp32_bytes}),
            .max_topk = shape.routing.num_topk,
            .max_experts = shape.routing.num_experts,
            .num_sms = all_given && !num_sms.empty() ? std::ranges::max(num_sms) : 0,
            .timeout_ms = setting.options.timeout_ms,
            .on_timeout = parse_timeout_policy(setting.options.on_timeout),
            .mode = parse_mode(setting.options.mode)};
  }

  bool on_gpu() const { return setting_.device.cuda(); }

  // On the CPU. Several times in a run, because the machine may not be equally busy all the time: the fastest counts.
  void measure_copy() {
    if (network_) network_gbps_ = std::max(network_gbps_, network_->measure());
    if (on_gpu() || !context_.board.is_shared()) return;
    progress_.show("plain copy", static_cast<int64_t>(records_.size()), num_steps());
    const CopyCeiling ceiling(shape_, context_);
    push_us_ = std::min(push_us_, ceiling.push(meter_).median_us());
    pull_us_ = std::min(pull_us_, ceiling.pull(meter_).median_us());
  }

  // A round trip is a dispatch and a combine. Nothing to compare with where no rows move to another rank, or ranks share no memory.
  double ceiling_of(const std::string& op) const {
    if (on_gpu() || op == "plan" || dispatch_bytes().wire == 0 || !context_.board.is_shared()) return 0;
    if (op == "combine") return pull_us_;
    return op.starts_with("round_trip") ? push_us_ + pull_us_ : push_us_;
  }

  void measure_buffers(bool in_windows) {
    RankBatch batch(shape_, {context_.rank, exchange_, seat_.device, in_windows, ranks_per_node()});
    const std::string buffers = in_windows ? "window" : "caller";
    measure_exact(batch, buffers);
    if (measures_worst()) measure_worst(batch, buffers);
  }

  // Counts are exchanged first, then the rows: three calls. Along the routed plan rows may travel again and again.
  void measure_exact(RankBatch& batch, const std::string& buffers) {
    Plan plan(exchange_, plan_options(shape_, TERN_EXTENT_EXACT));
    const auto route = [&](const tern_launch& launch) { plan.route(batch.routing(), launch); };
    const auto dispatch = [&](const tern_launch& launch) { plan.dispatch(batch.dispatch_args(), launch); };
    const auto combine = [&](const tern_launch& launch) { plan.combine(batch.combine_args(), launch); };
    const auto plan_dispatch = [&](const tern_launch& launch) {
      route(launch);
      dispatch(launch);
    };
    const auto round_trip = [&](const tern_launch& launch) {
      plan_dispatch(launch);
      combine(launch);
    };
    const auto dispatched = [&] { return batch.check_dispatch(); };
    const auto combined = [&] { return batch.check_combine(); };
    const auto both = [&] { return first_of(batch.check_dispatch(), batch.check_combine()); };
    const auto nothing = [] { return std::nullopt; };
    if (!measured_plan_) measure(plan, batch, {"plan", "exact", route, nothing, {}, true}, "");
    measured_plan_ = true;
    route({.stream = seat_.device.stream()});
    dispatch({.stream = seat_.device.stream()});  // a plan is dispatched before anything is combined along it
    measure(plan, batch, {"dispatch", "exact", dispatch, dispatched, dispatch_bytes()}, buffers);
    measure(plan, batch, {"combine", "exact", combine, combined, combine_bytes()}, buffers);
    if (measures_plan_dispatch())
      measure(plan, batch, {"plan_dispatch", "exact", plan_dispatch, dispatched, dispatch_bytes(), true}, buffers);
    measure(plan, batch, {"round_trip", "exact", round_trip, both, both_bytes(), true}, buffers);
  }

  // Counts stay where they are; at best they travel with the rows: two calls.
  void measure_worst(RankBatch& batch, const std::string& buffers) {
    Plan plan(exchange_, plan_options(shape_, TERN_EXTENT_WORST));
    const auto plan_dispatch = [&](const tern_launch& launch) {
      plan.route(batch.routing(), launch);
      plan.dispatch(batch.dispatch_args(), launch);
    };
    const auto route_dispatch = [&](const tern_launch& launch) { plan.dispatch(batch.routing(), batch.dispatch_args(), launch); };
    const auto round_trip = [&](const tern_launch& launch) {
      route_dispatch(launch);
      plan.combine(batch.combine_args(), launch);
    };
    const auto dispatched = [&] { return batch.check_dispatch(); };
    const auto both = [&] { return first_of(batch.check_dispatch(), batch.check_combine()); };
    if (on_gpu()) measure(plan, batch, {"plan_dispatch", "worst", plan_dispatch, dispatched, dispatch_bytes()}, buffers);
    measure(plan, batch, {"route_dispatch", "worst", route_dispatch, dispatched, dispatch_bytes()}, buffers);
    measure(plan, batch, {"round_trip_worst", "worst", round_trip, both, both_bytes()}, buffers);
    measure_phases(plan, batch, buffers);
  }

  // Only where they are asked for, since a send must fit one round.
  void measure_phases(Plan& plan, RankBatch& batch, const std::string& buffers) {
    if (!on_gpu() || setting_.options.ops.empty()) return;
    const auto dispatch = [&](const tern_launch& launch) { plan.dispatch(batch.routing(), batch.dispatch_args(), launch); };
    const auto combine = [&](const tern_launch& launch) { plan.combine(batch.combine_args(), launch); };
    const auto dispatched = [&] { return batch.check_dispatch(); };
    const auto combined = [&] { return batch.check_combine(); };
    measure(plan, batch, {"dispatch_phases", "worst", dispatch, dispatched, dispatch_bytes(), false, true}, buffers);
    dispatch({.stream = seat_.device.stream()});  // whatever was measured before
    measure(plan, batch, {"combine_phases", "worst", combine, combined, combine_bytes(), false, true}, buffers);
  }

  // With each number of SMs that is asked for.
  void measure(const Plan& plan, RankBatch& batch, const Operation& operation, const std::string& buffers) {
    if (!setting_.options.wants(operation.op)) return;
    const std::vector<int> as_chosen{0};
    for (const int num_sms : setting_.options.num_sms.empty() ? as_chosen : setting_.options.num_sms) {
      const tern_launch launch{.stream = seat_.device.stream(), .num_sms = num_sms};
      progress_.show(operation.op + " " + buffers, static_cast<int64_t>(records_.size()) + 1, num_steps());
      std::vector<BenchRecord> records =
          on_gpu() ? measure_on_gpu(batch, operation, launch) : std::vector{measure_on_cpu(batch, operation)};
      const std::array<double, 1> taken{static_cast<double>(plan.info().num_sms)};
      const auto taken_sms = static_cast<int>(slowest_of_ranks(context_, taken).front());
      for (BenchRecord& record : records) {
        record.buffers = buffers;
        record.extent = operation.extent;
        record.bytes.logical = operation.bytes.logical;
        record.bytes.wire = operation.bytes.wire;
        record.bytes.link = operation.bytes.link;
        record.mode = plan.info().latency_path != 0 ? "latency" : "throughput";
        record.num_sms = taken_sms;
        record.ranks_per_node = ranks_per_node();
        records_.push_back(std::move(record));
      }
    }
  }

  // Checked before and after the timed runs, each time on poisoned outputs.
  BenchRecord measure_on_cpu(RankBatch& batch, const Operation& operation) {
    const auto run_checked = [&] {
      batch.poison();
      operation.run({});
      return operation.check();
    };
    BenchRecord record;
    record.op = operation.op;
    record.clock = "host";
    const uint64_t before = exchange_.metrics().network_bytes;
    auto wrong = run_checked();
    record.bytes.network = network_bytes_since(before, 1);
    record.times = meter_.measure([&] { operation.run({}); });
    if (auto wrong_now = run_checked(); !wrong) wrong = std::move(wrong_now);
    record.wrong = gather_wrong(context_, wrong);
    return record;
  }

  // Of each of `num_runs`, on the rank that puts most.
  int64_t network_bytes_since(uint64_t before, int64_t num_runs) {
    const std::array<double, 1> network{static_cast<double>(exchange_.metrics().network_bytes - before)};
    return static_cast<int64_t>(slowest_of_ranks(context_, network).front()) / num_runs;
  }

  // What is timed on a stream, each by itself.
  static std::vector<StreamTimer::PutWork> parts_of(const Operation& operation, tern_launch launch, int32_t num_chained) {
    if (!operation.in_phases)
      return {[&operation, launch, num_chained] {
        for (int32_t i = 0; i < num_chained; ++i) operation.run(launch);
      }};
    std::vector<StreamTimer::PutWork> parts;
    for (const tern_phase phase : {TERN_PHASE_SEND, TERN_PHASE_RECEIVE}) {
      launch.phase = phase;
      parts.emplace_back([&operation, launch] { operation.run(launch); });
    }
    return parts;
  }

  // Outputs are poisoned after the warm-up, and what the timed runs left there is checked. A record for each part.
  std::vector<BenchRecord> measure_on_gpu(RankBatch& batch, const Operation& operation, const tern_launch& launch) {
    constexpr int kNumWarmUps = 3;
    RankDevice& device = seat_.device;
    const int32_t num_chained = operation.reads_counts || operation.in_phases ? 1 : setting_.options.chain;
    std::vector<StreamTimer::PutWork> parts = parts_of(operation, launch, num_chained);
    const uint64_t before = exchange_.metrics().network_bytes;
    for (int i = 0; i < kNumWarmUps; ++i)
      for (const auto& run : parts) run();
    device.synchronise();
    require_healthy(operation);
    const int64_t network_bytes = network_bytes_since(before, int64_t{kNumWarmUps} * num_chained);
    const bool as_graph = setting_.options.graph && !operation.reads_counts;
    std::vector<std::unique_ptr<DeviceGraph>> graphs;
    for (StreamTimer::PutWork& run : parts) {
      if (!as_graph) break;
      graphs.push_back(device.capture(run));
      run = [graph = graphs.back().get()] { graph->replay(); };
    }
    batch.poison();
    context_.align();
    std::vector<BenchRecord> records(parts.size());
    if (operation.reads_counts)
      records.front().times = meter_.measure([&] {
        parts.front()();
        device.synchronise();
      });
    else
      time_on_stream(operation, parts, num_chained, records);
    require_healthy(operation);
    for (size_t part = 0; part < parts.size(); ++part) {
      BenchRecord& record = records[part];
      record.op = operation.in_phases ? phase_name(operation.op, part) : operation.op;
      record.clock = operation.reads_counts ? "host" : as_graph ? "graph" : "stream";
      record.num_chained = num_chained;
      record.bytes.network = part == 0 ? network_bytes : 0;  // a receive puts nothing
      record.wrong = part == 0 ? gather_wrong(context_, operation.check()) : records.front().wrong;
    }
    return records;
  }

  // "dispatch_send" and "dispatch_receive".
  static std::string phase_name(const std::string& op, size_t part) {
    return op.substr(0, op.find('_')) + (part == 0 ? "_send" : "_receive");
  }

  void time_on_stream(const Operation& operation, const std::vector<StreamTimer::PutWork>& parts, int32_t num_chained,
                      std::vector<BenchRecord>& records) {
    // What a send leaves on its way has arrived after this.
    constexpr double kPauseUs = 20, kSlowGbps = 200;
    const double pause_us = operation.in_phases ? kPauseUs + static_cast<double>(operation.bytes.wire) * 1e-3 / kSlowGbps : 0;
    const auto times_us = timer_->time_parts_us(parts, pause_us);
    for (size_t part = 0; part < parts.size(); ++part) {
      records[part].times.us = slowest_of_ranks(context_, times_us[part]);
      for (double& us : records[part].times.us) us /= num_chained;
    }
  }

  // Operations on a stream do not say by themselves that they failed.
  void require_healthy(const Operation& operation) const {
    const tern_exchange_state state = exchange_.state();
    if (state.failure.status != TERN_OK)
      fail(state.failure.status, "{}: rank {} waited for rank {} in epoch {}, saw {}: {}", operation.op, state.failure.waiter,
           state.failure.awaited, state.failure.expected_epoch, state.failure.seen_epoch, tern_status_name(state.failure.status));
  }

  static std::optional<std::string> first_of(const std::optional<std::string>& a, const std::optional<std::string>& b) { return a ? a : b; }

  bool small_batch() const {
    if (setting_.options.mode != "auto") return setting_.options.mode == "latency";
    constexpr int64_t kMostBytes = 1 << 20;  // what is measured in one call too, whichever path the engine then takes
    return shape_.routing.max_tokens() * shape_.format.given_row_bytes(shape_.hidden) <= kMostBytes;
  }

  // CPU ranks: where it is asked for, or tells something new. Their hosts know the counts with both extents, and large batches are routed in an
  // operation of its own whoever asks for it.
  bool measures_plan_dispatch() const { return on_gpu() || !setting_.options.ops.empty(); }
  bool measures_worst() const {
    if (on_gpu() || setting_.options.ops.empty()) return on_gpu() || small_batch();
    return setting_.options.wants("route_dispatch") || setting_.options.wants("round_trip_worst");
  }

  int64_t num_steps() const {
    const auto of_buffers = [&](std::initializer_list<const char*> ops) {
      return (with_windows_ + with_caller_) * std::ranges::count_if(ops, [&](const char* op) { return setting_.options.wants(op); });
    };
    int64_t steps = of_buffers({"dispatch", "combine", "round_trip"});
    if (measures_worst()) steps += of_buffers({"route_dispatch", "round_trip_worst"});
    if (measures_plan_dispatch()) steps += of_buffers({"plan_dispatch"});
    if (on_gpu()) steps += of_buffers({"plan_dispatch"});
    if (on_gpu() && !setting_.options.ops.empty())
      steps += of_buffers({"dispatch_phases", "dispatch_phases", "combine_phases", "combine_phases"});
    steps += setting_.options.wants("plan");
    return steps * std::max<int64_t>(1, static_cast<int64_t>(setting_.options.num_sms.size())) + 1;
  }

  int ranks_per_node() const { return context_.group.info().ranks_in_node; }

  TrafficBytes dispatch_bytes() const {
    const RowFormat& format = shape_.format;
    return bytes_of(count_messages(shape_.routing), context_.num_ranks,
                    format.arriving_row_bytes(shape_.hidden) + format.arriving_scale_bytes(shape_.hidden), ranks_per_node());
  }
  TrafficBytes combine_bytes() const {
    return bytes_of(shape_.combines_entries() ? count_entries(shape_.routing) : count_messages(shape_.routing), context_.num_ranks,
                    shape_.combine_wire_bytes(), ranks_per_node());
  }
  TrafficBytes both_bytes() const {
    const TrafficBytes there = dispatch_bytes(), back = combine_bytes();
    return {there.logical + back.logical, there.wire + back.wire, there.link + back.link};
  }

  const BenchSetting& setting_;
  const BatchShape& shape_;
  BenchSeat seat_;
  RankContext& context_;
  Meter meter_;
  Progress progress_;
  Exchange exchange_;
  bool with_windows_, with_caller_;
  bool measured_plan_ = false;
  std::unique_ptr<StreamTimer> timer_;  // GPU
  std::optional<NetworkCeiling> network_;
  double network_gbps_ = 0;
  double push_us_ = std::numeric_limits<double>::max(), pull_us_ = std::numeric_limits<double>::max();
  std::vector<BenchRecord> records_;
};

}  // namespace

size_t bench_board_bytes(const BenchSetting& setting) { return setting.device.cuda() ? 0 : CopyCeiling::board_bytes(setting.shape); }

std::vector<BenchRecord> measure_all(const BenchSetting& setting, const BenchSeat& seat) { return BenchRank(setting, seat).run(); }

}  // namespace tern::tools
