// SPDX-License-Identifier: Apache-2.0
#include "tools/cuda_call.h"

#include "base/error.h"

namespace tern::tools {

void fail_cuda(cudaError_t error, const char* asked) {
  const tern_status status = error == cudaErrorMemoryAllocation ? TERN_OUT_OF_MEMORY : TERN_SYSTEM_ERROR;
  fail(status, "CUDA: {}: {} ({})", asked, cudaGetErrorString(error), cudaGetErrorName(error));
}

}  // namespace tern::tools
