// SPDX-License-Identifier: Apache-2.0
// What stands behind the handles of the C interface. Each holds on to what it was made from, so handles may be destroyed in any order.
#pragma once

#include <memory>

#include "base/log.h"
#include "plan/device.h"
#include "topology/bootstrap.h"
#include "topology/topology.h"

namespace tern {

struct Group {
  Log log;
  std::unique_ptr<Bootstrap> bootstrap;
  Topology topology;
};

struct Exchange {
  std::shared_ptr<Group> group;
  tern_exchange_options options;  // complete
  std::unique_ptr<DeviceExchange> device;
};

std::vector<std::shared_ptr<Group>> make_local_groups(const tern_group_options& options, int32_t num_ranks);
std::shared_ptr<Group> make_env_group(const tern_group_options& options);
std::shared_ptr<Group> make_allgather_group(const tern_group_options& options, std::unique_ptr<Bootstrap> bootstrap);

std::shared_ptr<Exchange> make_exchange(const std::shared_ptr<Group>& group, const tern_exchange_options& options);
tern_memory_info query_memory(const Group& group, const tern_exchange_options& options);

}  // namespace tern

struct tern_group {
  std::shared_ptr<tern::Group> state;
};
struct tern_exchange {
  std::shared_ptr<tern::Exchange> state;
};
struct tern_plan {
  std::shared_ptr<tern::Exchange> exchange;
  std::unique_ptr<tern::DevicePlan> device;
};
