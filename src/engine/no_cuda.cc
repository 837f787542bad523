// SPDX-License-Identifier: Apache-2.0
// A build without the CUDA engine.
#include "base/error.h"
#include "engine/engines.h"

namespace tern {

bool cuda_engine_present() { return false; }

std::string cuda_engine_problem() { return ""; }

tern_memory_info cuda_memory(const tern_exchange_options&, int32_t, int32_t) { return {}; }

std::unique_ptr<DeviceExchange> make_cuda_exchange(const Topology&, Bootstrap&, const tern_exchange_options&, const Log&, Deadline) {
  fail(TERN_UNSUPPORTED,
       "exchange: device is TERN_DEVICE_CUDA, but this build of Tern has no CUDA engine; use TERN_DEVICE_CPU or TERN_DEVICE_AUTO");
}

}  // namespace tern
