// SPDX-License-Identifier: Apache-2.0
// A build without CUDA.
#include "base/error.h"
#include "devices/backends.h"

namespace tern::tools {

int32_t num_cuda_devices() { return 0; }

std::unique_ptr<RankDevice> make_cuda_device(int32_t device_index) {
  fail(TERN_UNSUPPORTED, "memory of CUDA device {} is asked for, but this build has no CUDA: configure it with TERN_CUDA, or use the CPU",
       device_index);
}

}  // namespace tern::tools
