// SPDX-License-Identifier: Apache-2.0
// The kernel that combines a round of a batch whose rows travel in another form than the caller's: in FP32, or in the 10-bit encoding.
#pragma once

#include "kernels/combine.h"

namespace tern::kernels {

struct WireCombineArgs {
  CombineArgs combine;     // rows_staged; its rings, parts and runs are not used
  int32_t wire = 0;        // tern_wire
  int64_t wire_bytes = 0;  // of a row on its way
};

// Loads the kernels' code on the current device.
cudaError_t prepare_wire_combine();
// `num_blocks` blocks; all of them, and those of the peers on the same device, must be able to run at the same time.
cudaError_t launch_wire_combine(const WireCombineArgs& args, int num_blocks, cudaStream_t stream);

}  // namespace tern::kernels
