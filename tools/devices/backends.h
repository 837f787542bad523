// SPDX-License-Identifier: Apache-2.0
// The kinds of device. The absence of one is a file that says so: no_cuda.cc.
#pragma once

#include <cstdint>
#include <memory>

#include "devices/rank_device.h"

namespace tern::tools {

std::unique_ptr<RankDevice> make_cpu_device();
std::unique_ptr<RankDevice> make_cuda_device(int32_t device_index);

}  // namespace tern::tools
