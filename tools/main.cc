// SPDX-License-Identifier: Apache-2.0
// The `tern` command: measures, checks and explains.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <exception>
#include <string>

#include "routing/routing_file.h"
#include "tools/bench.h"
#include "tools/bench_options.h"
#include "tools/check.h"
#include "tools/doctor.h"
#include "tools/machine.h"
#include "tools/memory.h"
#include "tools/plan.h"
#include "tools/run_layer.h"

namespace tern::tools {
namespace {

struct RoutingOptionsOfCommand {
  TrafficOptions traffic;
  std::string out;
};

int write_routing_file(const RoutingOptionsOfCommand& options) {
  constexpr int kDefaultRanks = 4;
  const Traffic traffic = make_traffic(options.traffic, options.traffic.ranks != 0 ? options.traffic.ranks : kDefaultRanks);
  write_routing(traffic.routing, options.out);
  fmt::print("{}: {} ranks, {} tokens each, top-{} of {} experts, {}\n", options.out, traffic.routing.num_ranks(),
             traffic.routing.max_tokens(), traffic.routing.num_topk, traffic.routing.num_experts, traffic.description);
  return 0;
}

int run_command(int argc, char** argv) {
  CLI::App app("Tern: expert-parallel communication for Mixture-of-Experts models", "tern");
  app.set_version_flag("--version", "tern " + version_text(tern_version()));
  app.require_subcommand(1);
  BenchOptions bench_options;
  CheckOptions check_options;
  DoctorOptions doctor_options;
  MemoryOptions memory_options;
  PlanOptions plan_options;
  RunOptions run_options;
  RoutingOptionsOfCommand routing_options;
  int code = 0;

  CLI::App* run =
      app.add_subcommand("run", "Run a whole MoE layer of DeepSeek-V3's shape on several ranks, and compare it with a dense one");
  add_run_flags(*run, run_options);
  run->callback([&] { code = run_layer(run_options); });
  CLI::App* bench = app.add_subcommand("bench", "Measure plan, dispatch, combine and the round trip, and check every byte");
  add_bench_flags(*bench, bench_options);
  bench->callback([&] { code = run_bench(bench_options); });
  CLI::App* check = app.add_subcommand("check", "Prove in under a minute that the engines present compute the right thing");
  add_check_flags(*check, check_options);
  check->callback([&] { code = run_check(check_options); });
  CLI::App* doctor = app.add_subcommand("doctor", "Show what the library sees on this machine, and which ways it takes");
  add_doctor_flags(*doctor, doctor_options);
  doctor->callback([&] { code = run_doctor(doctor_options); });
  CLI::App* memory = app.add_subcommand("memory", "Say what exchanges of given shapes take, without allocating anything");
  add_memory_flags(*memory, memory_options);
  memory->callback([&] { code = print_memory(memory_options); });
  CLI::App* plan =
      app.add_subcommand("plan", "Predict time, memory and SMs for ranks that are not here, up to 2048, and say how it was computed");
  add_plan_flags(*plan, plan_options);
  plan->callback([&] { code = run_plan(plan_options); });
  CLI::App* routing = app.add_subcommand("routing", "Write a routing file for `tern bench --routing FILE`");
  add_traffic_flags(*routing, routing_options.traffic, "4, whatever is here");
  routing->footer(
      "The file, little-endian and without padding: the letters TERNROUT; uint32 1 (the format), ranks R, experts, top-k K; uint64 the "
      "most\n"
      "tokens of any rank, and the tokens T_r of each of the R ranks; then for each rank int32 [T_r, K] expert numbers, -1: none.\n"
      "Routings of a real model can be written like that and replayed.");
  routing->add_option("--out", routing_options.out, "The file to write")->required();
  routing->callback([&] { code = write_routing_file(routing_options); });
  std::string help;  // taken while no command is parsed; later it would be that command's
  app.add_subcommand("help", "Show this help; `tern COMMAND --help` shows the flags of a command")->callback([&] {
    fmt::print("{}", help);
  });
  app.footer(
      "Exit codes: 0; 1 an error, which is printed; 2 it ran, but bytes are wrong, a case or a path failed, or a forecast is beyond "
      "--within;\n"
      "from 100 on flags that cannot be. A signal ends the command, with all its ranks, by that signal.");
  help = app.help();

  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error);
  }
  return code;
}

}  // namespace
}  // namespace tern::tools

int main(int argc, char** argv) {
  try {
    return tern::tools::run_command(argc, argv);
  } catch (const std::exception& error) {
    fmt::print(stderr, "tern: {}\n", error.what());
    return 1;
  }
}
