// SPDX-License-Identifier: Apache-2.0
// A build with the CUDA engine.
#include "cuda/driver.h"
#include "cuda/engine.h"
#include "engine/engines.h"

namespace tern {

bool cuda_engine_present() { return cuda::num_devices() > 0; }

std::string cuda_engine_problem() { return cuda::old_driver(); }

tern_memory_info cuda_memory(const tern_exchange_options& options, int32_t num_ranks, int32_t num_nodes) {
  const layout::DeviceWindowLayout window = cuda::make_device_layout(options, num_ranks, num_nodes);
  tern_memory_info info;
  info.control_bytes = window.slots(0, 0);  // rows lie behind it
  info.staging_bytes = window.total_bytes() - info.control_bytes;
  return info;
}

std::unique_ptr<DeviceExchange> make_cuda_exchange(const Topology& topology, Bootstrap& bootstrap, const tern_exchange_options& options,
                                                   const Log& log, Deadline deadline) {
  return cuda::make_exchange(topology, bootstrap, options, log, deadline);
}

}  // namespace tern
