// SPDX-License-Identifier: Apache-2.0
#include "tools/bench.h"

#include <algorithm>

#include "base/error.h"
#include "tools/bench_json.h"
#include "tools/machine.h"

namespace tern::tools {
namespace {

// Measuring needs room for all ranks of a host at once; without this check the kernel would end a rank in the middle.
void require_memory(const BenchSetting& setting, int ranks_on_host) {
  if (setting.device.cuda()) return;  // CUDA says when there is no more
  const BatchShape& shape = setting.shape;
  const int64_t given_bytes = shape.format.given_row_bytes(shape.hidden) + 2 * shape.format.combine_row_bytes(shape.hidden);
  int64_t needed_bytes = ranks_on_host * (window_bytes(shape) + shape.routing.max_tokens() * given_bytes);
  if (ranks_on_host == shape.routing.num_ranks())
    needed_bytes += static_cast<int64_t>(bench_board_bytes(setting)) * 2;  // the ceiling's shared and own memory
  const int64_t available_bytes = read_memory_facts().available_bytes;
  if (available_bytes > 0 && needed_bytes > available_bytes / 10 * 9)
    fail(TERN_OUT_OF_MEMORY, "bench: this takes {} on the {} ranks here together, {} are available: take fewer --tokens{}",
         human_bytes(static_cast<double>(needed_bytes)), ranks_on_host, human_bytes(static_cast<double>(available_bytes)),
         shape.layout == TERN_LAYOUT_EXPERT_PADDED ? ", or a layout other than expert_padded" : "");
}

void require_gpu_for_gpu_flags(const BenchOptions& options, const ChosenDevice& device) {
  if (!device.cuda() && (options.graph || options.chain > 1 || options.cold || !options.table.empty() || !options.num_sms.empty()))
    fail(TERN_INVALID_ARGUMENT, "bench: --graph, --chain, --cold, --table and --num-sms are for GPUs; these ranks are on the CPU");
  for (const std::string& op : options.ops) {
    if (!device.cuda() && op.ends_with("_phases"))
      fail(TERN_INVALID_ARGUMENT, "bench: --ops {} times halves on a GPU's stream; these ranks are on the CPU: leave it out", op);
  }
}

int bench_rank(const BenchSetting& setting, RankContext& context, BenchJson& json) {
  if (setting.launch.kind == LaunchKind::kEnvironment) {
    require_memory(setting, context.ranks_on_host);
    context.align();  // nobody takes any before all have looked
  }
  const std::unique_ptr<RankDevice> device = make_rank_device(setting.device, context.rank);
  BenchSeat seat{context, *device};
  std::unique_ptr<LinkCeiling> ceiling;
  std::vector<LinkRates> links;
  if (setting.device.cuda()) {
    ceiling = make_link_ceiling(context, *device);
    seat.links = ceiling.get();
    links = measure_links(*ceiling, setting.options.num_sms);
  }
  const std::vector<BenchRecord> records = measure_all(setting, seat);
  if (ceiling != nullptr) ceiling->close();
  if (context.rank == 0) {
    print_report(setting, records, links);
    json.add_machine(setting, links);
    json.add(setting, records);
  }
  return std::ranges::all_of(records, [](const BenchRecord& record) { return record.wrong.empty(); }) ? 0 : 2;
}

}  // namespace

double BenchRecord::gbps(int64_t num_bytes) const {
  const double us = times.median_us();
  return us > 0 ? static_cast<double>(num_bytes) / us * 1e-3 : 0;
}

double BenchRecord::ceiling_gbps() const { return ceiling_us > 0 ? static_cast<double>(bytes.wire) / ceiling_us * 1e-3 : 0; }

double BenchRecord::share_of_ceiling() const {
  const double us = times.median_us();
  return us > 0 ? ceiling_us / us : 0;
}

BatchShape batch_shape(const BenchOptions& options, const Traffic& traffic) {
  const int64_t hidden = options.hidden != 0 ? options.hidden : traffic.model_hidden;
  if (hidden == 0) fail(TERN_INVALID_ARGUMENT, "--model custom needs --hidden");
  return {.routing = traffic.routing,
          .format = parse_row_format(options.dtype),
          .layout = parse_layout(options.layout),
          .hidden = hidden,
          .seed = options.traffic.seed,
          .expert_alignment = options.alignment,
          .combine_mode = options.combine == "exact" ? TERN_COMBINE_EXACT : TERN_COMBINE_HIERARCHICAL,
          .wire = options.wire == "fp32" ? TERN_WIRE_FP32 : TERN_WIRE_AS_DTYPE};
}

std::vector<LinkRates> measure_links(LinkCeiling& ceiling, const std::vector<int>& num_sms) {
  std::vector<int> counts{8, 16, 24, 32, 48, 64, 96, 128};
  for (const int count : num_sms) {
    if (count > 0) counts.push_back(count);
  }
  std::ranges::sort(counts);
  const auto repeated = std::ranges::unique(counts);
  counts.erase(repeated.begin(), repeated.end());
  std::vector<LinkRates> rates{ceiling.copy_engines()};
  for (const int count : counts) {
    const LinkRates of_count = ceiling.at(count);
    if (of_count.num_sms == count) rates.push_back(of_count);  // else the GPU has fewer SMs
  }
  return rates;
}

int run_bench(const BenchOptions& given) {
  BenchOptions options = given;
  const ChosenDevice device = choose_device(options.device);
  require_gpu_for_gpu_flags(options, device);
  if (options.iters == 0) options.iters = options.table == "small" ? 10'000 : device.cuda() ? 100 : 30;
  if (!options.table.empty()) return run_bench_table(options, device);
  LaunchOptions launch_options = choose_launch(options.launch, options.traffic.ranks, options.timeout_ms, device);
  const Traffic traffic = make_traffic(options.traffic, launch_options.num_ranks);
  launch_options.num_ranks = traffic.routing.num_ranks();
  require_room(device, launch_options);

  BenchSetting setting{options, traffic, batch_shape(options, traffic), launch_options, device};
  if (setting.launch.kind != LaunchKind::kEnvironment) require_memory(setting, launch_options.num_ranks);
  setting.launch.shared_bytes = bench_board_bytes(setting);
  setting.launch.needs_one_host = device.cuda();
  BenchJson json;
  const int code = launch(setting.launch, [&](RankContext& context) { return bench_rank(setting, context, json); });
  if (!options.json.empty()) json.write(options.json);
  return code;
}

}  // namespace tern::tools
