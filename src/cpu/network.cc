// SPDX-License-Identifier: Apache-2.0
#include "cpu/network.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <cstring>

#include "base/error.h"
#include "domain/doorbell.h"
#include "domain/failure.h"
#include "domain/given_up.h"
#include "plan/window_sizing.h"

namespace tern::cpu {
namespace {

constexpr int64_t kMostTellingMs = 1000;  // for the error record to leave; peers that are gone do not take it

// Are there two ranks with the same index, on different nodes?
bool any_rail_serves(const Topology& topology, const std::vector<uint8_t>& masked) {
  std::vector<int> num_nodes_with(static_cast<size_t>(topology.num_ranks));
  for (size_t r = 0; r < masked.size(); ++r)
    if (masked[r] == 0 && ++num_nodes_with[static_cast<size_t>(topology.rank_in_node[r])] > 1) return true;
  return false;
}

}  // namespace

layout::RailMemoryLayout Network::memory_layout(const Topology& topology, const tern_exchange_options& options) {
  return {.num_nodes = topology.num_nodes,
          .num_lanes = options.num_lanes,
          .bank_bytes = rail_bank_bytes(options, topology.num_ranks, topology.num_nodes)};
}

Network::Network(const Domain& domain, const std::string& gpu, const tern_exchange_options& options, const Log& log)
    : domain_(domain), gpu_(gpu), options_(options), log_(log) {}

void Network::start(std::byte* memory, Bootstrap& bootstrap, const std::vector<uint8_t>& masked, Deadline deadline) {
  const Topology& topology = domain_.topology;
  const auto is_masked = [&](int rank) { return !masked.empty() && masked[static_cast<size_t>(rank)] != 0; };
  place_ = {};
  place_.node = topology.node[static_cast<size_t>(topology.rank)];
  for (int node = 0; node < topology.num_nodes; ++node) {
    place_.ranks.push_back(node * domain_.num_ranks + domain_.rank);
    place_.serves.push_back(is_masked(place_.ranks.back()) ? 0 : 1);
  }
  place_.layout = memory_layout(topology, options_);
  failure_told_ = false;
  standing_.reset();
  region_.reset();
  memory_ = memory;
  if (masked.empty() || any_rail_serves(topology, masked)) return open(bootstrap, masked, deadline);
  region_ = std::make_unique<Region>(memory_, static_cast<size_t>(place_.layout.total_bytes()));
  place_.memory = region_.get();
}

void Network::open(Bootstrap& bootstrap, const std::vector<uint8_t>& masked, Deadline deadline) {
  const Topology& topology = domain_.topology;
  EndpointOptions endpoint_options;
  endpoint_options.num_channels = Proxy::channels_for(options_.num_lanes + 1);
  endpoint_options.seat = seat_on_host(topology);
  endpoint_options.gpu = gpu_;
  endpoint_options.absent = masked;
  auto endpoint = make_endpoint(bootstrap, endpoint_options, deadline);
  const auto num_bytes = static_cast<size_t>(place_.layout.total_bytes());
  region_ = std::make_unique<Region>(endpoint->register_memory(memory_, num_bytes));
  place_.memory = region_.get();
  std::vector<RemoteRegion> all(static_cast<size_t>(topology.num_ranks));
  bootstrap.allgather(&region_->remote(), all.data(), sizeof(RemoteRegion), deadline);

  ProxyOptions proxy_options;
  proxy_options.num_channels = options_.num_lanes + 1;
  proxy_options.region = region_.get();
  proxy_options.changed = [this](int channel) { notice_change(channel); };
  proxy_options.failed = [this](int peer, const std::string& text) { notice_loss(peer, text); };
  proxy_options.turned = [this] { turn(); };
  for (int node = 0; node < topology.num_nodes; ++node) {
    const int rank = place_.ranks[static_cast<size_t>(node)];
    place_.remote.push_back(all[static_cast<size_t>(rank)]);
    if (is_peer(node)) proxy_options.peers.push_back({rank, place_.remote.back()});
  }
  log_.write(TERN_LOG_INFO, "rank {}: node {} of {}, network banks of {} bytes, {} bytes in all, over {} ({})", topology.rank, place_.node,
             topology.num_nodes, place_.layout.bank_bytes, num_bytes, endpoint->facts().provider,
             fmt::join(endpoint->facts().domains, ", "));
  proxy_ = std::make_unique<Proxy>(std::move(endpoint), proxy_options);
  place_.proxy = proxy_.get();
  if (options_.on_timeout == TERN_ON_TIMEOUT_MASK) standing_ = std::make_unique<Standing>(domain_, place_);
  place_.standing = standing_.get();
  proxy_->start();
}

void Network::stop() {
  const bool failed = recorded_failure(domain_).has_value();
  if (proxy_ != nullptr && !failed) take_leave(std::min(options_.timeout_ms, kMostTellingMs));
  if (proxy_ != nullptr) proxy_->stop();  // it looks at the pointer
  proxy_.reset();
  closing_ = false;
}

bool Network::take_leave(int64_t timeout_ms) {
  closing_ = true;
  return proxy_->close(Deadline::in_ms(timeout_ms));
}

Network::~Network() {
  if (proxy_ == nullptr) return;
  const bool failed = recorded_failure(domain_).has_value() || is_any_given_up(domain_);
  if (failed) tell_failure();
  if (!take_leave(failed ? std::min(options_.timeout_ms, kMostTellingMs) : options_.timeout_ms) && !failed)
    log_.write(TERN_LOG_WARNING, "rank {}: not all other nodes took leave before its exchange was destroyed; what it sent may be lost",
               domain_.rank_of_group(domain_.rank));
}

// On the proxy's thread, as the next two.
void Network::notice_change(int channel) {
  if (channel != failure_channel()) return ring(domain_.doorbell(domain_.rank, channel));
  for (int node = 0; node < place_.layout.num_nodes; ++node) {
    if (!is_peer(node) || load_acquire(proxy_->arrived(place_.ranks[static_cast<size_t>(node)], channel)) == 0) continue;
    tern_failure failure;
    std::memcpy(&failure, memory_ + place_.layout.failure(node), sizeof(failure));
    announce_failure(domain_, failure);
  }
}

void Network::notice_loss(int peer, const std::string& text) {
  if (closing_) return;
  log_.write(TERN_LOG_WARNING, "rank {}: {}", domain_.rank_of_group(domain_.rank), text);
  if (peer < 0) return;
  // No operation of this rank needs more than to know.
  if (options_.on_timeout == TERN_ON_TIMEOUT_MASK) return announce_given_up(domain_, peer);
  announce_failure(domain_, {TERN_SYSTEM_ERROR, domain_.rank_of_group(domain_.rank), peer, 0, TERN_OP_NONE, 0, 0, 0});
}

void Network::turn() {
  tell_failure();
  if (standing_ != nullptr) standing_->turn();
}

// Whoever of this node has failed, each rank tells its rail. A rank that is told tells the others too: the first may not reach them.
void Network::tell_failure() {
  const auto failure = recorded_failure(domain_);
  if (!failure || failure_told_.exchange(true)) return;
  std::memcpy(memory_ + place_.layout.own_failure(), &*failure, sizeof(*failure));
  for (int node = 0; node < place_.layout.num_nodes; ++node) {
    if (!is_peer(node)) continue;
    place_.proxy->put({.peer = place_.ranks[static_cast<size_t>(node)],
                       .from = region_.get(),
                       .from_offset = static_cast<size_t>(place_.layout.own_failure()),
                       .to = place_.remote[static_cast<size_t>(node)],
                       .to_offset = static_cast<uint64_t>(place_.layout.failure(place_.node)),
                       .num_bytes = sizeof(*failure),
                       .channel = failure_channel(),
                       .epoch = 1,
                       .last = true});
  }
}

}  // namespace tern::cpu
