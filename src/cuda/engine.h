// SPDX-License-Identifier: Apache-2.0
// What this folder offers to src/engine.
#pragma once

#include <memory>

#include "base/deadline.h"
#include "base/log.h"
#include "layout/device_window.h"
#include "plan/device.h"
#include "topology/bootstrap.h"
#include "topology/topology.h"

namespace tern::cuda {

// Where things lie in the window of an exchange with these options, which are complete.
layout::DeviceWindowLayout make_device_layout(const tern_exchange_options& options, int32_t num_group_ranks, int32_t num_nodes);

// Collective.
std::unique_ptr<DeviceExchange> make_exchange(const Topology& topology, Bootstrap& bootstrap, const tern_exchange_options& options,
                                              const Log& log, Deadline deadline);

}  // namespace tern::cuda
