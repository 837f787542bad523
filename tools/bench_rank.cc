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
#include "tools/progress.h"

namespace tern::tools {
namespace {

size_t stamps_bytes(const BenchSetting& setting) {
  constexpr size_t kAlignment = 4096;
  return (Meter::board_bytes(setting.shape.routing.num_ranks(), setting.options.iters) + kAlignment - 1) / kAlignment * kAlignment;
}

// Rows that rank r receives (dispatch) are column r of the messages; those it gets back (combine) are row r.
TrafficBytes bytes_of(const BatchShape& shape, int64_t row_bytes, bool by_destination) {
  const auto messages = count_messages(shape.routing);
  const int num_ranks = shape.routing.num_ranks();
  TrafficBytes most;
  for (int rank = 0; rank < num_ranks; ++rank) {
    TrafficBytes bytes;
    for (int peer = 0; peer < num_ranks; ++peer) {
      const int from = by_destination ? peer : rank, to = by_destination ? rank : peer;
      const int64_t num_bytes = messages[static_cast<size_t>(from * num_ranks + to)] * row_bytes;
      bytes.logical += num_bytes;
      bytes.wire += peer == rank ? 0 : num_bytes;
    }
    most = {std::max(most.logical, bytes.logical), std::max(most.wire, bytes.wire)};
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
  std::function<void()> run;
  std::function<std::optional<std::string>()> check;  // after poison and run
  TrafficBytes bytes;
};

class BenchRank {
 public:
  BenchRank(const BenchSetting& setting, RankContext& context)
      : setting_(setting),
        shape_(setting.shape),
        context_(context),
        meter_(context, setting.options.iters),
        progress_(context.rank == 0),
        exchange_(context.group, exchange_options(setting)),
        with_windows_(setting.options.buffers != "caller"),
        with_caller_(setting.options.buffers != "window") {}

  std::vector<BenchRecord> run() {
    measure_ceiling();
    if (with_windows_) measure_buffers(true);
    measure_ceiling();
    if (with_caller_) measure_buffers(false);
    measure_ceiling();
    for (BenchRecord& record : records_) record.ceiling_us = ceiling_of(record.op);
    return std::move(records_);
  }

 private:
  static tern_exchange_options exchange_options(const BenchSetting& setting) {
    const BatchShape& shape = setting.shape;
    const RowFormat& format = shape.format;
    const int64_t arriving = format.arriving_row_bytes(shape.hidden) + format.arriving_scale_bytes(shape.hidden);
    return {.device = parse_device(setting.options.device),
            .window_bytes = setting.options.buffers == "caller" ? 0 : window_bytes(shape),
            .max_tokens = std::max<int64_t>(1, shape.routing.max_tokens()),
            .max_row_bytes = std::max({arriving, format.given_row_bytes(shape.hidden), format.combine_row_bytes(shape.hidden)}),
            .max_topk = shape.routing.num_topk,
            .max_experts = shape.routing.num_experts,
            .timeout_ms = setting.options.timeout_ms,
            .mode = parse_mode(setting.options.mode)};
  }

  // Several times in a run, because the machine may not be equally busy all the time: the fastest counts.
  void measure_ceiling() {
    progress_.show("plain copy", static_cast<int64_t>(records_.size()), num_steps());
    const CopyCeiling ceiling(shape_, context_, stamps_bytes(setting_));
    push_us_ = std::min(push_us_, ceiling.push(meter_).median_us());
    pull_us_ = std::min(pull_us_, ceiling.pull(meter_).median_us());
  }

  // A round trip is a dispatch and a combine. Nothing to compare with where no rows move to another rank.
  double ceiling_of(const std::string& op) const {
    if (op == "plan" || dispatch_bytes().wire == 0) return 0;
    if (op == "combine") return pull_us_;
    return op.starts_with("round_trip") ? push_us_ + pull_us_ : push_us_;
  }

  void measure_buffers(bool in_windows) {
    RankBatch batch(shape_, context_.rank, exchange_, in_windows);
    const std::string buffers = in_windows ? "window" : "caller";
    measure_exact(batch, buffers);
    if (small_batch()) measure_worst(batch, buffers);
  }

  // Counts are exchanged first, then the rows: three calls.
  void measure_exact(RankBatch& batch, const std::string& buffers) {
    Plan plan(exchange_, plan_options(shape_, TERN_EXTENT_EXACT));
    const auto route = [&] { plan.route(batch.routing()); };
    const auto dispatch = [&] { plan.dispatch(batch.dispatch_args()); };
    const auto combine = [&] { plan.combine(batch.combine_args()); };
    const auto check_both = [&] { return first_of(batch.check_dispatch(), batch.check_combine()); };
    if (records_.empty()) measure(plan, batch, {"plan", route, [] { return std::nullopt; }, {}}, {"", "exact"});
    route();
    measure(plan, batch, {"dispatch", dispatch, [&] { return batch.check_dispatch(); }, dispatch_bytes()}, {buffers, "exact"});
    measure(plan, batch, {"combine", combine, [&] { return batch.check_combine(); }, combine_bytes()}, {buffers, "exact"});
    const auto round_trip = [&] {
      route();
      dispatch();
      combine();
    };
    measure(plan, batch, {"round_trip", round_trip, check_both, both_bytes()}, {buffers, "exact"});
  }

  // The counts travel with the rows: two calls.
  void measure_worst(RankBatch& batch, const std::string& buffers) {
    Plan plan(exchange_, plan_options(shape_, TERN_EXTENT_WORST));
    const auto route_dispatch = [&] { plan.dispatch(batch.routing(), batch.dispatch_args()); };
    const auto round_trip = [&] {
      route_dispatch();
      plan.combine(batch.combine_args());
    };
    const auto check_both = [&] { return first_of(batch.check_dispatch(), batch.check_combine()); };
    measure(plan, batch, {"route_dispatch", route_dispatch, [&] { return batch.check_dispatch(); }, dispatch_bytes()}, {buffers, "worst"});
    measure(plan, batch, {"round_trip_worst", round_trip, check_both, both_bytes()}, {buffers, "worst"});
  }

  struct Labels {
    std::string buffers, extent;
  };

  // Checked before and after the timed runs, each time on poisoned outputs.
  void measure(const Plan& plan, RankBatch& batch, const Operation& operation, const Labels& labels) {
    progress_.show(operation.op + " " + labels.buffers, static_cast<int64_t>(records_.size()) + 1, num_steps());
    auto wrong = run_checked(batch, operation);
    BenchRecord record;
    record.op = operation.op;
    record.buffers = labels.buffers;
    record.extent = labels.extent;
    record.bytes = operation.bytes;
    record.times = meter_.measure(operation.run);
    record.mode = plan.info().latency_path != 0 ? "latency" : "throughput";
    if (auto wrong_now = run_checked(batch, operation); !wrong) wrong = std::move(wrong_now);
    record.wrong = gather_wrong(context_, wrong);
    records_.push_back(std::move(record));
  }

  static std::optional<std::string> run_checked(RankBatch& batch, const Operation& operation) {
    batch.poison();
    operation.run();
    return operation.check();
  }

  static std::optional<std::string> first_of(const std::optional<std::string>& a, const std::optional<std::string>& b) { return a ? a : b; }

  bool small_batch() const {
    if (setting_.options.mode != "auto") return setting_.options.mode == "latency";
    constexpr int64_t kMostBytes = 1 << 20;  // what is measured in one call too, whichever path the engine then takes
    return shape_.routing.max_tokens() * shape_.format.given_row_bytes(shape_.hidden) <= kMostBytes;
  }

  int64_t num_steps() const { return 2 + (with_windows_ + with_caller_) * (small_batch() ? 5 : 3); }

  TrafficBytes dispatch_bytes() const {
    return bytes_of(shape_, shape_.format.arriving_row_bytes(shape_.hidden) + shape_.format.arriving_scale_bytes(shape_.hidden), true);
  }
  TrafficBytes combine_bytes() const { return bytes_of(shape_, shape_.format.combine_row_bytes(shape_.hidden), false); }
  TrafficBytes both_bytes() const {
    const TrafficBytes there = dispatch_bytes(), back = combine_bytes();
    return {there.logical + back.logical, there.wire + back.wire};
  }

  const BenchSetting& setting_;
  const BatchShape& shape_;
  RankContext& context_;
  Meter meter_;
  Progress progress_;
  Exchange exchange_;
  bool with_windows_, with_caller_;
  double push_us_ = std::numeric_limits<double>::max(), pull_us_ = std::numeric_limits<double>::max();
  std::vector<BenchRecord> records_;
};

}  // namespace

size_t bench_board_bytes(const BenchSetting& setting) { return stamps_bytes(setting) + CopyCeiling::board_bytes(setting.shape); }

std::vector<BenchRecord> measure_all(const BenchSetting& setting, RankContext& context) { return BenchRank(setting, context).run(); }

}  // namespace tern::tools
