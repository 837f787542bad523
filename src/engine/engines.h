// SPDX-License-Identifier: Apache-2.0
// The engines that a build may lack. Each absence is a file that says so: no_cuda.cc.
#pragma once

#include <memory>
#include <string>

#include "base/deadline.h"
#include "base/log.h"
#include "plan/device.h"
#include "topology/bootstrap.h"
#include "topology/topology.h"

namespace tern {

// Is the engine built in, and is there a GPU that it can use?
bool cuda_engine_present();
// Why not, where a GPU is likely to be wanted: its driver is too old. "" otherwise.
std::string cuda_engine_problem();
// Control and staging of an exchange with these options, which are complete.
tern_memory_info cuda_memory(const tern_exchange_options& options, int32_t num_ranks, int32_t num_nodes);
std::unique_ptr<DeviceExchange> make_cuda_exchange(const Topology& topology, Bootstrap& bootstrap, const tern_exchange_options& options,
                                                   const Log& log, Deadline deadline);

}  // namespace tern
