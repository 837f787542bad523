// SPDX-License-Identifier: Apache-2.0
#include "tools/network_ceiling.h"

#include <algorithm>
#include <array>

#include "base/error.h"
#include "tools/meter.h"

namespace tern::tools {
namespace {

constexpr int64_t kDurationMs = 200;

Deadline patience(const RankContext& context) { return Deadline::in_ms(context.timeout_ms + RankContext::kPatienceMs); }

}  // namespace

NetworkCeiling::NetworkCeiling(const RankContext& context, const RankDevice& device)
    : context_(context), bootstrap_(context), flows_(bootstrap_, device.pci_address(), patience(context)) {
  const tern_group_info info = context.group.info();
  for (int node = 0; node < info.num_nodes; ++node)
    if (node != info.node) rails_.push_back(node * info.ranks_in_node + info.rank_in_node);
}

double NetworkCeiling::measure() {
  std::vector<Flow> streams;
  for (const int rail : rails_) streams.push_back({.peer = rail, .sends = true, .receives = true});
  const int num_writes = std::max(1, Flows::kMostWrites / static_cast<int>(rails_.size()));
  context_.align();
  flows_.run(streams, {.num_writes = num_writes, .num_under_way = 2, .least_epochs = 4, .duration_ms = kDurationMs}, patience(context_));
  double gbps = 0;
  for (const Flow& stream : streams) {
    if (!stream.problem.empty()) fail(TERN_SYSTEM_ERROR, "the plain stream to rank {}: {}", stream.peer, stream.problem);
    gbps += stream.sent_gbps;
  }
  context_.align();
  const std::array<double, 1> less{-gbps};
  return -slowest_of_ranks(context_, less).front();
}

}  // namespace tern::tools
