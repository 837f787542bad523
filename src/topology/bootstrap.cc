// SPDX-License-Identifier: Apache-2.0
#include "topology/bootstrap.h"

#include <fmt/ranges.h>

#include <cstdlib>
#include <cstring>

#include "base/error.h"
#include "base/knobs.h"
#include "topology/launch.h"
#include "topology/rendezvous.h"

namespace tern {
namespace {

class CallbackBootstrap final : public Bootstrap {
 public:
  CallbackBootstrap(int rank, int num_ranks, tern_allgather_fn function, void* context)
      : rank_(rank), num_ranks_(num_ranks), allgather_(function), context_(context) {}

  int rank() const override { return rank_; }
  int num_ranks() const override { return num_ranks_; }

  void allgather(const void* send, void* recv, size_t bytes, Deadline) override {
    const int result = allgather_(context_, send, recv, bytes);
    if (result != 0)
      fail(TERN_SYSTEM_ERROR, "rank {}: the caller's all-gather of {} bytes over {} ranks returned {}, 0 is success", rank_, bytes,
           num_ranks_, result);
  }

 private:
  int rank_, num_ranks_;
  tern_allgather_fn allgather_;
  void* context_;
};

class LoneBootstrap final : public Bootstrap {
 public:
  int rank() const override { return 0; }
  int num_ranks() const override { return 1; }
  void allgather(const void* send, void* recv, size_t bytes, Deadline) override {
    if (bytes != 0) std::memcpy(recv, send, bytes);
  }
};

}  // namespace

std::unique_ptr<Bootstrap> make_callback_bootstrap(int rank, int num_ranks, tern_allgather_fn allgather, void* context) {
  if (allgather == nullptr) fail(TERN_INVALID_ARGUMENT, "group: the all-gather is NULL");
  if (num_ranks < 1 || rank < 0 || rank >= num_ranks)
    fail(TERN_INVALID_ARGUMENT, "group: rank {} of {} ranks cannot be; ranks count from 0", rank, num_ranks);
  return std::make_unique<CallbackBootstrap>(rank, num_ranks, allgather, context);
}

std::unique_ptr<Bootstrap> make_env_bootstrap(const std::string& group_name, const Log& log, Deadline deadline) {
  const Launch launch = find_launch([](const char* name) { return std::getenv(name); }, knobs().rendezvous);
  if (launch.num_ranks == 1) {
    log.write(TERN_LOG_INFO, "group \"{}\": one rank ({})", group_name, launch.launcher);
    return std::make_unique<LoneBootstrap>();
  }
  log.write(TERN_LOG_INFO, "group \"{}\": rank {} of {} by {}, meeting at {}:{}", group_name, launch.rank, launch.num_ranks,
            launch.launcher, launch.host, launch.port);
  return meet(launch, group_name, deadline);
}

std::string name_ranks(const std::vector<int>& ranks) {
  if (ranks.empty()) return "no rank";
  if (ranks.size() == 1) return fmt::format("rank {}", ranks[0]);
  return fmt::format("ranks {} and {}", fmt::join(ranks.begin(), ranks.end() - 1, ", "), ranks.back());
}

}  // namespace tern
