// SPDX-License-Identifier: Apache-2.0
#include "tools/run_layer.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <span>
#include <vector>

#include "base/error.h"
#include "tools/bench_options.h"
#include "tools/device_buffer.h"
#include "tools/machine.h"
#include "tools/moe_layer.h"
#include "tools/numbers.h"
#include "tools/progress.h"
#include "tools/timeline.h"

namespace tern::tools {
namespace {

enum Stage { kGateStage, kRouteStage, kDispatchStage, kExpertsStage, kCombineStage, kNumStages };
constexpr const char* kStageNames[] = {"gate", "route", "dispatch", "experts", "combine"};

using StageTimes = std::array<double, kNumStages>;  // milliseconds

// What ranks leave on the board for rank 0 to look at: times, rows, and the results of all tokens.
struct RankReport {
  StageTimes stage_ms{};
  int64_t num_messages = 0;
  int64_t num_rows = 0;
};

// The timeline of a rank's last run, on the board too.
struct RankTrace {
  static constexpr int64_t kRoom = 4096;
  int64_t num_spans = 0;
  tern_span spans[kRoom];
};

struct Setting {
  const RunOptions& options;
  LayerShape layer;
  int num_ranks;
  ChosenDevice device;

  size_t result_elements() const { return static_cast<size_t>(options.tokens * layer.hidden); }
  size_t report_bytes() const { return (sizeof(RankReport) * static_cast<size_t>(num_ranks) + 255) / 256 * 256; }
  size_t trace_at() const {
    return (report_bytes() + static_cast<size_t>(num_ranks) * result_elements() * sizeof(uint16_t) + 255) / 256 * 256;
  }
  size_t board_bytes() const { return trace_at() + (options.trace.empty() ? 0 : sizeof(RankTrace) * static_cast<size_t>(num_ranks)); }
};

// The layer as one rank runs it: rows travel between the ranks' devices, gate and experts compute on the host.
class LayerRank {
 public:
  LayerRank(const Setting& setting, RankContext& context, RankDevice& device)
      : setting_(setting),
        context_(context),
        device_(device),
        exchange_(context.group, exchange_options(setting, device)),
        plan_(exchange_, {.max_tokens = setting.options.tokens,
                          .num_experts = setting.layer.num_experts,
                          .num_topk = setting.layer.num_topk,
                          .layout = TERN_LAYOUT_EXPERT_MAJOR}),
        rows_(Buffer::in_window(exchange_, row_capacity(setting) * row_bytes(setting))),
        expert_offsets_(Buffer::own(device, (local_experts(setting) + 1) * int64_t{sizeof(int64_t)})),
        tokens_(Buffer::own(device, setting.options.tokens * row_bytes(setting))),
        topk_idx_(Buffer::own(device, num_entries(setting) * int64_t{sizeof(int32_t)})),
        topk_weights_(Buffer::own(device, num_entries(setting) * int64_t{sizeof(float)})),
        results_(Buffer::own(device, setting.options.tokens * row_bytes(setting))),
        gate_(setting.layer),
        host_tokens_(make_tokens(setting.layer, context.rank, setting.options.tokens)) {
    device_.copy_in(tokens_.data(), host_tokens_.data(), tokens_.num_bytes());
    const int first = context.rank * local_experts(setting);
    for (int expert = first; expert < first + local_experts(setting); ++expert) experts_.emplace_back(setting.layer, expert);
  }

  RankReport run_once() {
    RankReport report;
    const tern_launch launch{.stream = device_.stream()};
    report.stage_ms[kGateStage] = timed([&] { choose(); });
    tern_plan_info info;
    report.stage_ms[kRouteStage] = timed([&] {
      info = plan_.route({.topk_idx = topk_idx_.data(), .topk_idx_type = TERN_INDEX_INT32, .num_tokens = setting_.options.tokens}, launch);
    });
    report.stage_ms[kDispatchStage] = timed([&] {
      plan_.dispatch({.tokens = tokens_.data(),
                      .hidden = setting_.layer.hidden,
                      .topk_weights = topk_weights_.as<float>(),
                      .out_tokens = rows_.data(),
                      .out_expert_offsets = expert_offsets_.as<int64_t>()},
                     launch);
    });
    report.stage_ms[kExpertsStage] = timed([&] { run_experts(); });
    report.stage_ms[kCombineStage] = timed([&] {
      plan_.combine(
          {.rows = rows_.data(), .hidden = setting_.layer.hidden, .weighting = TERN_WEIGHTS_DISPATCH, .out_tokens = results_.data()},
          launch);
    });
    report.num_messages = info.num_received;
    report.num_rows = info.num_rows;
    return report;
  }

  void start_trace() { exchange_.start_trace(RankTrace::kRoom); }

  void copy_trace_to(RankTrace& trace) {
    exchange_.stop_trace();
    const auto spans = exchange_.timeline().spans;
    trace.num_spans = static_cast<int64_t>(spans.size());
    std::ranges::copy(spans, trace.spans);
  }

  void copy_results_to(uint16_t* host) { device_.copy_out(host, results_.data(), results_.num_bytes()); }

 private:
  static int local_experts(const Setting& setting) { return setting.layer.num_experts / setting.num_ranks; }
  static int64_t row_bytes(const Setting& setting) { return setting.layer.hidden * int64_t{sizeof(uint16_t)}; }
  // All tokens of all ranks, as often as they can choose an expert here.
  static int64_t row_capacity(const Setting& setting) {
    return setting.options.tokens * setting.num_ranks * std::min(setting.layer.num_topk, local_experts(setting));
  }

  static int64_t num_entries(const Setting& setting) { return setting.options.tokens * setting.layer.num_topk; }

  static tern_exchange_options exchange_options(const Setting& setting, const RankDevice& device) {
    return {.device = device.type(),
            .device_index = device.index(),
            .window_bytes = row_capacity(setting) * row_bytes(setting) + 4096,
            .max_tokens = setting.options.tokens,
            .max_row_bytes = row_bytes(setting),
            .max_topk = setting.layer.num_topk,
            .max_experts = setting.layer.num_experts,
            .timeout_ms = setting.options.timeout_ms};
  }

  // Lines up with the other ranks first, so that no stage's time holds the lateness of the one before.
  template <typename Run>
  double timed(Run run) const {
    context_.align();
    const auto start = std::chrono::steady_clock::now();
    run();
    device_.synchronise();
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
  }

  void choose() {
    const GateChoice choice = gate_.choose(widen<double>(host_tokens_, setting_.layer.hidden));
    device_.copy_in(topk_idx_.data(), choice.topk_idx.data(), topk_idx_.num_bytes());
    device_.copy_in(topk_weights_.data(), choice.topk_weights.data(), topk_weights_.num_bytes());
  }

  // Each local expert replaces its rows, where they lie, by its results.
  void run_experts() {
    const int64_t hidden = setting_.layer.hidden;
    const HostBytes offsets(device_, expert_offsets_);
    std::vector<uint16_t> rows;
    for (size_t expert = 0; expert < experts_.size(); ++expert) {
      const int64_t first = offsets.as<int64_t>()[expert], count = offsets.as<int64_t>()[expert + 1] - first;
      if (count == 0) continue;
      rows.resize(static_cast<size_t>(count * hidden));
      std::byte* of_expert = rows_.data() + first * row_bytes(setting_);
      device_.copy_out(rows.data(), of_expert, count * row_bytes(setting_));
      const Matrix<float> out = experts_[expert].apply(widen<float>(rows, hidden));
      std::transform(out.data(), out.data() + out.size(), rows.begin(), to_bf16);
      device_.copy_in(of_expert, rows.data(), count * row_bytes(setting_));
    }
  }

  const Setting& setting_;
  RankContext& context_;
  RankDevice& device_;
  Exchange exchange_;
  Plan plan_;
  Buffer rows_, expert_offsets_, tokens_, topk_idx_, topk_weights_, results_;
  Gate gate_;
  std::vector<ExpertWeights<float>> experts_;
  std::vector<uint16_t> host_tokens_;
};

struct DenseResult {
  Matrix<double> values;      // [num_tokens, hidden]
  Matrix<double> magnitudes;  // sum of |weight * expert output|: what rounding errors are measured by
};

// The layer without any ranks: expert by expert, in double.
DenseResult dense_layer(const Setting& setting, Progress& progress) {
  const LayerShape& layer = setting.layer;
  std::vector<uint16_t> all;
  for (int rank = 0; rank < setting.num_ranks; ++rank) {
    const auto tokens = make_tokens(layer, rank, setting.options.tokens);
    all.insert(all.end(), tokens.begin(), tokens.end());
  }
  const Matrix<double> tokens = widen<double>(all, layer.hidden);
  const GateChoice choice = Gate(layer).choose(tokens);
  DenseResult result{Matrix<double>::Zero(tokens.rows(), layer.hidden), Matrix<double>::Zero(tokens.rows(), layer.hidden)};
  for (int expert = 0; expert < layer.num_experts; ++expert) {
    progress.show("dense check", expert, layer.num_experts);
    std::vector<int64_t> of_expert;
    std::vector<double> weights;
    for (size_t entry = 0; entry < choice.topk_idx.size(); ++entry) {
      if (choice.topk_idx[entry] != expert) continue;
      of_expert.push_back(static_cast<int64_t>(entry) / layer.num_topk);
      weights.push_back(static_cast<double>(choice.topk_weights[entry]));
    }
    if (of_expert.empty()) continue;
    const Matrix<double> out = ExpertWeights<double>(layer, expert).apply(tokens(of_expert, Eigen::all));
    for (size_t i = 0; i < of_expert.size(); ++i) {
      const auto row = static_cast<int64_t>(i);
      result.values.row(of_expert[i]) += weights[i] * out.row(row);
      result.magnitudes.row(of_expert[i]) += weights[i] * out.row(row).cwiseAbs();
    }
  }
  return result;
}

struct Comparison {
  double max_error = 0, mean_error = 0, rms_value = 0;
  double worst_share = 0;  // of the error that rounding may cause, per element
};

// bf16 has 8 significant bits: rounding to nearest changes a value by at most 2^-8 of it. A result is rounded three
// times: each expert's output, the sum of a rank's outputs, and the sum over ranks; and each of these is at most the sum
// of the magnitudes. The last term is for float arithmetic inside the experts, whose errors go with the row's size.
Comparison compare(const DenseResult& dense, std::span<const uint16_t> found) {
  constexpr double kBf16Rounding = 0x1p-8, kFloatArithmetic = 0x1p-16;
  Comparison comparison;
  double sum_errors = 0, sum_squares = 0;
  for (int64_t token = 0; token < dense.values.rows(); ++token) {
    const double slack = kFloatArithmetic * dense.magnitudes.row(token).maxCoeff();
    for (int64_t i = 0; i < dense.values.cols(); ++i) {
      const double value = dense.values(token, i);
      const double error = std::fabs(static_cast<double>(from_bf16(found[static_cast<size_t>(token * dense.values.cols() + i)])) - value);
      const double allowed = 3.02 * kBf16Rounding * dense.magnitudes(token, i) + slack;  // (1 + 2^-8)^3 - 1 < 3.02 * 2^-8
      comparison.max_error = std::max(comparison.max_error, error);
      comparison.worst_share = std::max(comparison.worst_share, std::isfinite(error) ? error / allowed : INFINITY);
      sum_errors += error;
      sum_squares += value * value;
    }
  }
  const auto count = static_cast<double>(dense.values.size());
  comparison.mean_error = sum_errors / count;
  comparison.rms_value = std::sqrt(sum_squares / count);
  return comparison;
}

void print_stages(const Setting& setting, std::span<const RankReport> reports) {
  StageTimes slowest_ms{};
  int64_t messages = 0, rows = 0;
  for (const RankReport& report : reports) {
    for (size_t stage = 0; stage < kNumStages; ++stage) slowest_ms[stage] = std::max(slowest_ms[stage], report.stage_ms[stage]);
    messages += report.num_messages;
    rows += report.num_rows;
  }
  const LayerShape& layer = setting.layer;
  const std::string what[] = {
      fmt::format("each rank scores its {} tokens for {} experts and picks {} of them", setting.options.tokens, layer.num_experts,
                  layer.num_topk),
      "ranks tell each other what they will send",
      fmt::format("{} token rows, {}, travel to the ranks of their experts", messages,
                  human_bytes(static_cast<double>(messages * layer.hidden) * sizeof(uint16_t))),
      fmt::format("{} experts on each rank work on {} rows in all", layer.num_experts / setting.num_ranks, rows),
      fmt::format("{} sums travel back and are added for {} tokens", messages, setting.options.tokens * setting.num_ranks)};
  fmt::print("  {:<10}{:>10}\n", "stage", "ms");
  for (size_t stage = 0; stage < kNumStages; ++stage)
    fmt::print("  {:<10}{:>10.2f}   {}\n", kStageNames[stage], slowest_ms[stage], what[stage]);
  fmt::print("  (median run of {}, slowest rank of each stage)\n\n", setting.options.iters);
}

// By rank 0, when all results are on the board. Returns the exit code.
int report_layer(const Setting& setting, const Board& board) {
  const LayerShape& layer = setting.layer;
  print_stages(setting, {board.shared_as<RankReport>(), static_cast<size_t>(setting.num_ranks)});
  std::fflush(stdout);
  Progress progress(true);
  const auto start = std::chrono::steady_clock::now();
  const DenseResult dense = dense_layer(setting, progress);
  progress.clear();
  const double dense_s = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  const size_t count = setting.result_elements() * static_cast<size_t>(setting.num_ranks);
  const Comparison comparison = compare(dense, {board.shared_as<uint16_t>(setting.report_bytes()), count});
  const bool right = comparison.worst_share <= 1.0;
  fmt::print("  The same layer, densely in double precision by one process ({:.1f} s), beside the {} x {} results:\n", dense_s,
             dense.values.rows(), layer.hidden);
  fmt::print("  error: mean {:.2e}, max {:.2e}, of values of {:.2e} (rms);\n", comparison.mean_error, comparison.max_error,
             comparison.rms_value);
  fmt::print("  at most {:.0f} % of what three roundings to bf16 may change (2^-8 each, of the summed magnitudes).\n\n",
             comparison.worst_share * 100);
  fmt::print("{}\n", right ? "PASSED: the layer on all ranks equals the dense layer."
                           : "FAILED: the layer on the ranks differs from the dense layer.");
  return right ? 0 : 2;
}

// The run whose stages together took the median time on this rank; ranks line up before each stage.
RankReport median_run(std::vector<RankReport> runs) {
  const auto total = [](const RankReport& report) {
    double sum = 0;
    for (const double ms : report.stage_ms) sum += ms;
    return sum;
  };
  std::ranges::sort(runs, {}, total);
  return runs[runs.size() / 2];
}

void write_trace(const Setting& setting, const Board& board) {
  const auto* traces = board.shared_as<RankTrace>(setting.trace_at());
  std::vector<RankTimeline> timelines;
  for (int rank = 0; rank < setting.num_ranks; ++rank)
    timelines.push_back({rank, {traces[rank].spans, static_cast<size_t>(traces[rank].num_spans)}});
  write_chrome_trace(setting.options.trace, timelines);
  fmt::print("  Timeline of the last run: {} (open it at https://ui.perfetto.dev)\n\n", setting.options.trace);
}

int run_rank(const Setting& setting, RankContext& context) {
  Progress progress(context.rank == 0);
  progress.show("making the experts' weights", 0, setting.options.iters + 1);
  const std::unique_ptr<RankDevice> device = make_rank_device(setting.device, context.rank);
  LayerRank layer(setting, context, *device);
  std::vector<RankReport> runs;
  const bool traced = !setting.options.trace.empty();
  layer.run_once();  // the first run finds cold caches and new pages
  for (int64_t i = 0; i < setting.options.iters; ++i) {
    progress.show("running the layer", i + 1, setting.options.iters + 1);
    if (traced && i + 1 == setting.options.iters) layer.start_trace();
    runs.push_back(layer.run_once());
  }
  progress.clear();
  context.board.shared_as<RankReport>()[context.rank] = median_run(runs);
  auto* all_results = context.board.shared_as<uint16_t>(setting.report_bytes());
  layer.copy_results_to(all_results + static_cast<size_t>(context.rank) * setting.result_elements());
  if (traced) layer.copy_trace_to(context.board.shared_as<RankTrace>(setting.trace_at())[context.rank]);
  context.align();
  if (traced && context.rank == 0) write_trace(setting, context.board);
  return context.rank == 0 ? report_layer(setting, context.board) : 0;
}

}  // namespace

void add_run_flags(CLI::App& app, RunOptions& options) {
  app.add_option("--ranks", options.ranks,
                 "Ranks, a divisor of 256; default: one for each GPU, 4 on the CPU, or as many as the launcher started")
      ->check(CLI::Range(1, 256));
  app.add_option("--device", options.device, "cpu, cuda or auto")->check(CLI::IsMember({"cpu", "cuda", "auto"}))->capture_default_str();
  app.add_option("--launch", options.launch, "Start ranks here as processes or threads; default: the launcher's ranks, else processes")
      ->check(CLI::IsMember({"processes", "threads"}));
  app.add_option("--tokens", options.tokens, "Tokens on each rank")->check(CLI::Range(int64_t{1}, int64_t{1024}))->capture_default_str();
  app.add_option("--width", options.width, "Inner width of an expert (2048 in the real model)")
      ->check(CLI::Range(int64_t{1}, int64_t{2048}))
      ->capture_default_str();
  app.add_option("--iters", options.iters, "Timed runs")->check(CLI::Range(int64_t{1}, int64_t{10000}))->capture_default_str();
  app.add_option("--seed", options.seed, "Of tokens and weights")->capture_default_str();
  app.add_option("--timeout", options.timeout_ms, "Deadline of every wait, milliseconds")
      ->check(CLI::Range(int64_t{1}, int64_t{86400000}))
      ->capture_default_str();
  app.add_option("--trace", options.trace, "Write a timeline of the last run to this file, for ui.perfetto.dev or chrome://tracing");
}

int run_layer(const RunOptions& options) {
  const ChosenDevice device = choose_device(options.device);
  LaunchOptions launch_options = choose_launch(options.launch, options.ranks, options.timeout_ms, device);
  const Setting setting{options, {.expert_width = options.width, .seed = options.seed}, launch_options.num_ranks, device};
  const LayerShape& layer = setting.layer;
  if (layer.num_experts % setting.num_ranks != 0)
    fail(TERN_INVALID_ARGUMENT, "run: {} experts do not divide by {} ranks: take 1, 2, 4, 8, ...", layer.num_experts, setting.num_ranks);
  launch_options.shared_bytes = setting.board_bytes();
  const auto found = find_launcher();
  if (launch_options.kind != LaunchKind::kEnvironment || (found && found->rank == 0)) {
    fmt::print("Tern {}: one Mixture-of-Experts layer of DeepSeek-V3's shape on {} ranks ({}), {}\n\n", version_text(tern_version()),
               setting.num_ranks, launch_name(launch_options.kind), device.cuda() ? "GPUs (gate and experts on the host)" : "CPU");
    fmt::print("  hidden {}, {} experts, the best {} of each token from at most {} of {} groups; {} tokens a rank, experts {} wide\n\n",
               layer.hidden, layer.num_experts, layer.num_topk, layer.max_groups, layer.num_groups, options.tokens, options.width);
    std::fflush(stdout);
  }
  return launch(launch_options, [&](RankContext& context) { return run_rank(setting, context); });
}

}  // namespace tern::tools
