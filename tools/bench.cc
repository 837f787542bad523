// SPDX-License-Identifier: Apache-2.0
#include "tools/bench.h"

#include <algorithm>

#include "base/error.h"
#include "tools/machine.h"

namespace tern::tools {
namespace {

// Measuring needs room for all ranks at once; without this check the kernel would end a rank in the middle.
void require_memory(const BenchSetting& setting) {
  const BatchShape& shape = setting.shape;
  int64_t needed_bytes = static_cast<int64_t>(bench_board_bytes(setting)) * 2;  // the ceiling's shared and own memory
  for (int rank = 0; rank < shape.routing.num_ranks(); ++rank) {
    const int64_t given_bytes = shape.format.given_row_bytes(shape.hidden) + 2 * shape.format.combine_row_bytes(shape.hidden);
    needed_bytes += window_bytes(shape) + shape.routing.num_tokens(rank) * given_bytes;
  }
  const int64_t available_bytes = read_memory_facts().available_bytes;
  if (available_bytes > 0 && needed_bytes > available_bytes / 10 * 9)
    fail(TERN_OUT_OF_MEMORY, "bench: this takes {} on all ranks together, {} are available: take fewer --tokens{}",
         human_bytes(static_cast<double>(needed_bytes)), human_bytes(static_cast<double>(available_bytes)),
         shape.layout == TERN_LAYOUT_EXPERT_PADDED ? ", or a layout other than expert_padded" : "");
}

void require_device(const BenchOptions& options) {
  if (parse_device(options.device) == TERN_DEVICE_CUDA)
    fail(TERN_UNSUPPORTED, "bench: --device cuda is asked for, this build has no CUDA engine: use --device cpu");
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

int run_bench(const BenchOptions& options) {
  require_device(options);
  LaunchOptions launch_options = choose_launch(options.launch, options.traffic.ranks, options.timeout_ms);
  const Traffic traffic = make_traffic(options.traffic, launch_options.num_ranks);
  launch_options.num_ranks = traffic.routing.num_ranks();

  const int64_t hidden = options.hidden != 0 ? options.hidden : traffic.model_hidden;
  if (hidden == 0) fail(TERN_INVALID_ARGUMENT, "--model custom needs --hidden");
  const BatchShape shape{traffic.routing, parse_row_format(options.dtype), parse_layout(options.layout), hidden, options.traffic.seed};
  BenchSetting setting{options, traffic, shape, launch_options};
  require_memory(setting);
  setting.launch.shared_bytes = bench_board_bytes(setting);

  return launch(setting.launch, [&](RankContext& context) {
    const std::vector<BenchRecord> records = measure_all(setting, context);
    const bool all_right = std::ranges::all_of(records, [](const BenchRecord& record) { return record.wrong.empty(); });
    if (context.rank == 0) {
      print_report(setting, records);
      if (!options.json.empty()) write_json(setting, records);
    }
    return all_right ? 0 : 2;
  });
}

}  // namespace tern::tools
