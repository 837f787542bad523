// SPDX-License-Identifier: Apache-2.0
#include "tools/bench_options.h"

#include <fmt/ranges.h>
#include <CLI/CLI.hpp>

#include <filesystem>
#include <optional>
#include <vector>

#include "base/error.h"
#include "routing/routing_file.h"
#include "tools/models.h"

namespace tern::tools {
namespace {

constexpr const char* kOperations[] = {"plan",           "dispatch",         "combine",         "round_trip",    "plan_dispatch",
                                       "route_dispatch", "round_trip_worst", "dispatch_phases", "combine_phases"};
constexpr int kDefaultRanks = 4;
constexpr int64_t kDefaultTokens = 1024;

// The generator that is asked for; none if --routing names a file.
std::optional<RoutingKind> choose_generator(const TrafficOptions& options, const Model& model) {
  if (options.routing.empty()) return options.skew ? RoutingKind::kZipf : model.routing;
  return find_generator(options.routing);
}

Traffic replay(const TrafficOptions& options, const Model& model) {
  if (!std::filesystem::exists(options.routing))
    fail(TERN_INVALID_ARGUMENT, "--routing \"{}\" is neither a file nor one of: {}", options.routing, fmt::join(generator_names(), ", "));
  Traffic traffic{read_routing(options.routing), "file " + options.routing, model.hidden};
  const auto require_equal = [&](const char* flag, int64_t asked, int64_t found) {
    if (asked != 0 && asked != found)
      fail(TERN_INVALID_ARGUMENT, "{} {} is asked for, {} holds {}: leave the flag out", flag, asked, options.routing, found);
  };
  require_equal("--ranks", options.ranks, traffic.routing.num_ranks());
  require_equal("--tokens", options.tokens, traffic.routing.max_tokens());
  require_equal("--experts", options.experts, traffic.routing.num_experts);
  require_equal("--topk", options.topk, traffic.routing.num_topk);
  return traffic;
}

}  // namespace

void add_traffic_flags(CLI::App& app, TrafficOptions& options, const char* default_ranks) {
  app.add_option("--model", options.model, "Shape to take: " + fmt::format("{}", fmt::join(model_names(), ", ")))
      ->check(CLI::IsMember(model_names()))
      ->capture_default_str();
  app.add_option(
      "--routing", options.routing,
      fmt::format("Generator ({}) or a routing file; default: as the model routes, zipf with --skew", fmt::join(generator_names(), ", ")));
  app.add_option("--ranks", options.ranks, std::string("Ranks; default: ") + default_ranks)->check(CLI::Range(1, 1024));
  app.add_option("--tokens", options.tokens, "Tokens on each rank (1024)")->check(CLI::Range(int64_t{1}, int64_t{1} << 24));
  app.add_option("--experts", options.experts, "Experts in all; default: the model's")->check(CLI::Range(1, 1 << 20));
  app.add_option("--topk", options.topk, "Experts of each token; default: the model's")->check(CLI::Range(1, 64));
  app.add_option("--skew", options.skew, "zipf: popularity of experts falls as 1 / position^SKEW (1)")->check(CLI::Range(0.0, 16.0));
  app.add_option("--seed", options.seed, "Of routing and contents; the same seed gives the same batch everywhere")->capture_default_str();
}

void add_bench_flags(CLI::App& app, BenchOptions& options) {
  app.add_option("--device", options.device, "cpu, cuda or auto")->check(CLI::IsMember({"cpu", "cuda", "auto"}))->capture_default_str();
  app.add_option("--launch", options.launch,
                 "Start ranks here as processes or threads; default: the launcher's ranks (torchrun, mpirun, srun), else processes")
      ->check(CLI::IsMember({"processes", "threads"}));
  add_traffic_flags(app, options.traffic, "one for each GPU, 4 on the CPU, or as many as the launcher started");
  app.add_option("--hidden", options.hidden, "Elements of a row; default: the model's")->check(CLI::Range(int64_t{1}, int64_t{1} << 24));
  app.add_option("--dtype", options.dtype, fmt::format("{}", fmt::join(row_format_names(), ", ")))
      ->check(CLI::IsMember(row_format_names()))
      ->capture_default_str();
  app.add_option("--layout", options.layout, fmt::format("{}", fmt::join(layout_names(), ", ")))
      ->check(CLI::IsMember(layout_names()))
      ->capture_default_str();
  app.add_option("--wire", options.wire, "As what a combine's sums travel: dtype, or fp32 (GPUs: not on the latency path)")
      ->check(CLI::IsMember({"dtype", "fp32"}))
      ->capture_default_str();
  app.add_option("--mode", options.mode, "auto, throughput or latency")
      ->check(CLI::IsMember({"auto", "throughput", "latency"}))
      ->capture_default_str();
  app.add_option("--on-timeout", options.on_timeout,
                 "abort, or mask: what it costs to be able to go on without a rank (GPUs: --ops route_dispatch, round_trip_worst)")
      ->check(CLI::IsMember({"abort", "mask"}))
      ->capture_default_str();
  app.add_option("--buffers", options.buffers, "Where rows lie: window (zero copy), caller, or both")
      ->check(CLI::IsMember({"window", "caller", "both"}))
      ->capture_default_str();
  app.add_flag_callback("--zero-copy", [&options] { options.buffers = "window"; }, "The same as --buffers window");
  app.add_option("--alignment", options.alignment, "expert_major: rows of each expert are padded to a multiple of this")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  app.add_option("--combine", options.combine,
                 "What is summed where: hierarchical (a rank's rows there) or exact (all at the token's owner)")
      ->check(CLI::IsMember({"hierarchical", "exact"}))
      ->capture_default_str();
  app.add_option(
         "--ops", options.ops,
         fmt::format(
             "Operations to measure, of: {}; the last two, of GPUs, time sends and receives each by itself; default: all the others, "
             "on the CPU without plan_dispatch and, of batches over 1 MiB, without route_dispatch and round_trip_worst",
             fmt::join(kOperations, ", ")))
      ->delimiter(',')
      ->check(CLI::IsMember(std::vector<std::string>(std::begin(kOperations), std::end(kOperations))));
  app.add_option("--num-sms", options.num_sms,
                 "GPUs: SMs that operations take, several numbers are measured one by one; 0: as the engine chooses")
      ->delimiter(',')
      ->check(CLI::Range(0, 1024));
  app.add_flag("--graph", options.graph, "GPUs: each run is the replay of a CUDA graph");
  app.add_option("--chain", options.chain, "GPUs: runs that are timed together, one behind the other; what counts is their mean (1)")
      ->check(CLI::Range(1, 1000));
  app.add_flag("--cold", options.cold, "GPUs: before each run the L2 cache is filled with something else");
  app.add_flag(
      "--table{large}", options.table,
      "GPUs: many settings, line by line, as a Markdown table: large (batches), small (batches, replayed one by one), or paths (both "
      "ways of the same batch); of the other flags only --device, --launch, --ranks, --iters, --graph, --chain, --cold, --seed, "
      "--timeout and --json count");
  app.add_option("--iters", options.iters, "Timed repetitions; default 30, on GPUs 100, with --table=small 10000")
      ->check(CLI::Range(int64_t{1}, int64_t{1000000}));
  app.add_option("--timeout", options.timeout_ms, "Deadline of every wait, milliseconds")
      ->check(CLI::Range(int64_t{1}, int64_t{86400000}))
      ->capture_default_str();
  app.add_option("--json", options.json, "Also write the results to this file");
}

Traffic make_traffic(const TrafficOptions& options, int num_ranks) {
  const Model& model = find_model(options.model);
  const auto kind = choose_generator(options, model);
  if (options.skew && kind != RoutingKind::kZipf)
    fail(TERN_INVALID_ARGUMENT, "--skew {} is of the generator zipf, --routing asks for {}: leave one of them out", *options.skew,
         options.routing);
  if (!kind) return replay(options, model);

  const int experts = options.experts != 0 ? options.experts : model.experts, topk = options.topk != 0 ? options.topk : model.topk;
  if (experts == 0 || topk == 0) fail(TERN_INVALID_ARGUMENT, "--model custom needs --experts and --topk");
  const RoutingShape shape{num_ranks, options.tokens != 0 ? options.tokens : kDefaultTokens, topk, experts};
  const RoutingOptions routing{.kind = *kind, .skew = options.skew.value_or(1.0), .seed = options.seed};
  return {generate_routing(shape, routing), describe_routing(routing), model.hidden};
}

LaunchOptions choose_launch(const std::string& launch, int ranks, int64_t timeout_ms, const ChosenDevice& device) {
  const int default_ranks = device.cuda() ? device.num_gpus : kDefaultRanks;
  LaunchOptions options{.num_ranks = ranks != 0 ? ranks : default_ranks, .timeout_ms = timeout_ms};
  const auto found = find_launcher();
  if (launch == "threads") {
    options.kind = LaunchKind::kThreads;
  } else if (launch.empty() && found) {
    options.kind = LaunchKind::kEnvironment;
    if (ranks == 0) options.num_ranks = found->num_ranks;
  }
  require_room(device, options);
  return options;
}

tern_device_type parse_device(const std::string& name) {
  if (name == "cpu") return TERN_DEVICE_CPU;
  return name == "cuda" ? TERN_DEVICE_CUDA : TERN_DEVICE_AUTO;
}

tern_timeout_policy parse_timeout_policy(const std::string& name) { return name == "mask" ? TERN_ON_TIMEOUT_MASK : TERN_ON_TIMEOUT_ABORT; }

tern_mode parse_mode(const std::string& name) {
  if (name == "throughput") return TERN_MODE_THROUGHPUT;
  return name == "latency" ? TERN_MODE_LATENCY : TERN_MODE_AUTO;
}

}  // namespace tern::tools
