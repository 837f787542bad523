// SPDX-License-Identifier: Apache-2.0
#include "devices/rank_device.h"

#include "devices/backends.h"

namespace tern::tools {

std::unique_ptr<RankDevice> make_rank_device(tern_device_type type, int32_t device_index) {
  if (type == TERN_DEVICE_AUTO) type = num_cuda_devices() > 0 ? TERN_DEVICE_CUDA : TERN_DEVICE_CPU;
  return type == TERN_DEVICE_CUDA ? make_cuda_device(device_index) : make_cpu_device();
}

}  // namespace tern::tools
