// SPDX-License-Identifier: Apache-2.0
// Checks the arguments of operations before anything happens, and fills in their defaults. All throw TERN_INVALID_ARGUMENT.
#pragma once

#include "plan/device.h"

namespace tern {

void check_launch(const tern_launch& launch, int32_t num_lanes);
DispatchCall make_dispatch_call(const tern_dispatch_args& args, const DevicePlan& plan, const tern_launch& launch);
CombineCall make_combine_call(const tern_combine_args& args, const DevicePlan& plan, const tern_launch& launch);

}  // namespace tern
