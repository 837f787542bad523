// SPDX-License-Identifier: Apache-2.0
#include <cstring>

#include "base/error.h"
#include "base/knobs.h"
#include "engine/objects.h"
#include "layout/flags.h"
#include "topology/nodes.h"

namespace tern {
namespace {

constexpr size_t kLongestName = 63;

std::string text_or(const char* text, const char* otherwise, const char* what) {
  const std::string value = text == nullptr || *text == '\0' ? otherwise : text;
  if (value.size() > kLongestName)
    fail(TERN_INVALID_ARGUMENT, "group: {} has {} bytes, at most {} are allowed", what, value.size(), kLongestName);
  return value;
}

void check_options(const tern_group_options& o) {
  if (o.timeout_ms < 0) fail(TERN_INVALID_ARGUMENT, "group: timeout_ms is {}, must not be negative", o.timeout_ms);
  if (o.log_level < TERN_LOG_OFF || o.log_level > TERN_LOG_DEBUG)
    fail(TERN_INVALID_ARGUMENT, "group: log_level is {}, which is no tern_log_level", static_cast<int>(o.log_level));
  if (o.ranks_per_node < 0) fail(TERN_INVALID_ARGUMENT, "group: ranks_per_node is {}, must not be negative", o.ranks_per_node);
  text_or(o.name, "tern", "name");
  text_or(o.node, "", "node");
}

Deadline creation_deadline(const tern_group_options& o) { return Deadline::in_ms(o.timeout_ms > 0 ? o.timeout_ms : knobs().timeout_ms); }

// The name of a rank's node, as far as it is declared.
std::string node_name(const tern_group_options& o, int rank, int num_ranks) {
  const std::string given = text_or(o.node, "", "node");
  return given.empty() ? declared_node(rank, num_ranks, o.ranks_per_node > 0 ? o.ranks_per_node : knobs().ranks_per_node) : given;
}

Log make_log(const tern_group_options& o) { return Log(o.log, o.log_context, o.log_level); }

}  // namespace

std::vector<std::shared_ptr<Group>> make_local_groups(const tern_group_options& options, int32_t num_ranks) {
  check_options(options);
  if (num_ranks < 1 || num_ranks > layout::kMaxRanks)
    fail(TERN_INVALID_ARGUMENT, "group: num_ranks is {}, must be 1 to {}", num_ranks, layout::kMaxRanks);
  std::vector<RankInfo> ranks;
  for (int r = 0; r < num_ranks; ++r) ranks.push_back(describe_self(node_name(options, r, num_ranks)));
  auto bootstraps = make_local_bootstraps(num_ranks);
  std::vector<std::shared_ptr<Group>> groups;
  for (int r = 0; r < num_ranks; ++r)
    groups.push_back(
        std::make_shared<Group>(Group{make_log(options), std::move(bootstraps[static_cast<size_t>(r)]), make_topology(r, ranks)}));
  return groups;
}

std::shared_ptr<Group> make_env_group(const tern_group_options& options) {
  check_options(options);
  const Log log = make_log(options);
  return make_allgather_group(options, make_env_bootstrap(text_or(options.name, "tern", "name"), log, creation_deadline(options)));
}

std::shared_ptr<Group> make_allgather_group(const tern_group_options& options, std::unique_ptr<Bootstrap> bootstrap) {
  check_options(options);
  Topology topology = discover(*bootstrap, node_name(options, bootstrap->rank(), bootstrap->num_ranks()), creation_deadline(options));
  return std::make_shared<Group>(Group{make_log(options), std::move(bootstrap), std::move(topology)});
}

}  // namespace tern
