// SPDX-License-Identifier: Apache-2.0
// A kernel that does nothing for a while: what stands behind it on the stream begins later, while the host is ahead and other ranks go on.
#pragma once

#include <cuda_runtime.h>

namespace tern::tools {

// Loads its code on the current device, before anything waits for another rank.
void prepare_pause();
void launch_pause(double us, cudaStream_t stream);

}  // namespace tern::tools
