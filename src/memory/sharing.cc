// SPDX-License-Identifier: Apache-2.0
#include "memory/sharing.h"

#include "base/error.h"
#include "base/random.h"
#include "memory/sharers.h"

namespace tern {
namespace {

struct Invitation {
  SocketKey key;
  uint64_t hub;  // address, in the process of rank 0
};

void check_one_host(const Topology& topology) {
  int stranger = -1;
  std::string places;
  for (int r = 0; r < topology.num_ranks; ++r) {
    if (!topology.same_host(r) && stranger < 0) stranger = r;
    places += fmt::format("{}rank {} on {}", r == 0 ? "" : ", ", r, topology.ranks[r].host_name.data());
  }
  if (stranger < 0) return;
  const std::string here = topology.ranks[topology.rank].host_name.data();
  const bool same_name = here == topology.ranks[stranger].host_name.data();
  fail(TERN_UNSUPPORTED,
       "ranks {} and {} share no memory: they are on different hosts{}, and exchanges between hosts are not there yet. Run all ranks of a "
       "group on one host ({})",
       topology.rank, stranger, same_name ? ", or in containers with different network namespaces" : "", places);
}

bool one_process(const Topology& topology) {
  for (int r = 0; r < topology.num_ranks; ++r)
    if (!topology.same_process(r)) return false;
  return true;
}

}  // namespace

std::unique_ptr<SegmentSharer> make_segment_sharer(const Topology& topology, Bootstrap& bootstrap, Deadline deadline) {
  check_one_host(topology);  // alike on all ranks, so that none waits below for one that has failed here
  const bool threads = one_process(topology);
  Invitation mine = {};
  if (topology.rank == 0) {
    mine.key = random_value<SocketKey>("sharing of segments");
    if (threads) mine.hub = reinterpret_cast<uint64_t>(make_hub(topology.num_ranks));
  }
  std::vector<Invitation> all(topology.num_ranks);
  bootstrap.allgather(&mine, all.data(), sizeof(mine), deadline);
  if (threads) return make_hub_sharer(topology.rank, reinterpret_cast<Hub*>(all[0].hub));
  return make_socket_sharer(topology, all[0].key);
}

void check_share(int rank, size_t num_ranks, const std::shared_ptr<Segment>& mine, const std::string& tag,
                 std::span<const uint8_t> is_member) {
  constexpr size_t kLongestTagBytes = 48;
  if (mine == nullptr || tag.empty() || tag.size() > kLongestTagBytes || is_member.size() != num_ranks || is_member[rank] == 0)
    fail(TERN_INTERNAL_ERROR, "share(\"{}\"): rank {} of {} needs a segment, a tag of 1 to {} bytes and to be a member ({} entries)", tag,
         rank, num_ranks, kLongestTagBytes, is_member.size());
}

}  // namespace tern
