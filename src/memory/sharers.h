// SPDX-License-Identifier: Apache-2.0
// The two ways of sharing segments; sharing.h chooses.
#pragma once

#include <array>
#include <cstdint>
#include <memory>

#include "memory/sharing.h"

namespace tern {

// Where the threads of one process hand their segments over. Rank 0 makes it and gives its address to the others.
class Hub;

Hub* make_hub(int num_ranks);

// Each of the hub's ranks makes exactly one sharer; with the last of them goes the hub. (A rank that never does leaves the hub
// behind: a few bytes, instead of a pointer that leads nowhere.)
std::unique_ptr<SegmentSharer> make_hub_sharer(int rank, Hub* hub);

using SocketKey = std::array<uint64_t, 2>;

std::unique_ptr<SegmentSharer> make_socket_sharer(const Topology& topology, const SocketKey& key);

// What every way checks of the arguments of share().
void check_share(int rank, size_t num_ranks, const std::shared_ptr<Segment>& mine, const std::string& tag,
                 std::span<const uint8_t> is_member);

}  // namespace tern
