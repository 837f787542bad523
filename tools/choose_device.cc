// SPDX-License-Identifier: Apache-2.0
#include "tools/choose_device.h"

#include <cstdlib>

#include "base/error.h"
#include "tools/cuda_facts.h"

namespace tern::tools {

ChosenDevice choose_device(const std::string& name) {
  if (name == "cpu") return {};
  const int32_t num_gpus = built_with_cuda() ? count_cuda_devices_in_child() : 0;
  if (num_gpus > 0) {
    // Streams that share a hardware queue wait for each other; those of ranks that share a GPU must not. Read when CUDA starts.
    ::setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 0);
    return {TERN_DEVICE_CUDA, num_gpus};
  }
  if (name == "cuda")
    fail(TERN_UNSUPPORTED, "--device cuda is asked for, but {}: use --device cpu",
         built_with_cuda() ? "CUDA finds no GPU here (tern doctor and nvidia-smi may say why)"
                           : "this build of Tern has no CUDA engine (nvcc was not there when it was built)");
  return {};
}

void require_room(const ChosenDevice& device, const LaunchOptions& options) {
  if (device.cuda() && options.kind != LaunchKind::kThreads && options.num_ranks > device.num_gpus)
    fail(TERN_UNSUPPORTED,
         "{} ranks on {} GPUs: ranks that share a GPU must be threads of one process: use --launch threads, or fewer --ranks",
         options.num_ranks, device.num_gpus);
}

std::unique_ptr<RankDevice> make_rank_device(const ChosenDevice& device, int rank) {
  return make_rank_device(device.type, device.cuda() ? rank % device.num_gpus : 0);
}

}  // namespace tern::tools
