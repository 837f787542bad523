// SPDX-License-Identifier: Apache-2.0
// The engine that a command runs on, chosen before its ranks are started, and the device of each of them.
//
//   const ChosenDevice device = choose_device(options.device);          // "cpu", "cuda" or "auto"
//   require_room(device, launch_options);
//   launch(launch_options, [&](RankContext& context) {
//     const std::unique_ptr<RankDevice> mine = make_rank_device(device, context.rank);
#pragma once

#include <memory>
#include <string>

#include "devices/rank_device.h"
#include "tools/launch.h"

namespace tern::tools {

struct ChosenDevice {
  tern_device_type type = TERN_DEVICE_CPU;
  int32_t num_gpus = 0;

  bool cuda() const { return type == TERN_DEVICE_CUDA; }
};

// "auto": GPUs if there are any that this build can use. CUDA stays untouched in this process. TERN_UNSUPPORTED if "cuda" is asked for and there
// is none.
ChosenDevice choose_device(const std::string& name);

// Fails if processes would have to share a GPU: ranks that do are threads of one process.
void require_room(const ChosenDevice& device, const LaunchOptions& options);

// Rank r is on GPU r % num_gpus.
std::unique_ptr<RankDevice> make_rank_device(const ChosenDevice& device, int rank);

}  // namespace tern::tools
