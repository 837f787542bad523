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

bool is_masked(const std::vector<uint8_t>& masked, size_t rank) { return !masked.empty() && masked[rank] != 0; }

}  // namespace

Network::Network(const Domain& domain, const std::string& gpu, const tern_exchange_options& options, const Log& log)
    : domain_(domain), gpu_(gpu), options_(options), log_(log) {}

void Network::start(const RailMemory& memory, Bootstrap& bootstrap, const std::vector<uint8_t>& masked, Deadline deadline) {
  const Topology& topology = domain_.topology;
  place_ = {};
  place_.node = topology.node[static_cast<size_t>(topology.rank)];
  for (int node = 0; node < topology.num_nodes; ++node) {
    place_.ranks.push_back(node * domain_.num_ranks + domain_.rank);
    place_.serves.push_back(is_masked(masked, static_cast<size_t>(place_.ranks.back())) ? 0 : 1);
  }
  place_.whole_banks = {topology.num_nodes, options_.num_lanes, rail_bank_bytes(options_, topology.num_ranks, topology.num_nodes)};
  place_.layout.banks = place_.whole_banks;
  failure_told_ = false;
  standing_.reset();
  region_.reset();
  slots_region_.reset();
  if (!masked.empty() && !any_rail_serves(topology, masked)) {
    const auto num_bytes = static_cast<size_t>(place_.layout.total_bytes());
    region_ = std::make_unique<Region>(memory.of_host(num_bytes), num_bytes);
    place_.memory = region_.get();
    return;
  }
  auto endpoint = open(bootstrap, masked, deadline);
  register_banks(*endpoint, memory, bootstrap, masked, deadline);
  log_.write(TERN_LOG_INFO, "rank {}: node {} of {}, network banks of {} bytes, {} bytes in all{}, over {} ({})", topology.rank,
             place_.node, topology.num_nodes, place_.whole_banks.bank_bytes, place_.layout.total_bytes(),
             place_.slots == nullptr ? "" : fmt::format(" and {} for slots on the GPU", place_.whole_banks.total_bytes()),
             endpoint->facts().provider, fmt::join(endpoint->facts().domains, ", "));
  start_proxy(std::move(endpoint), memory.enter_gpu);
}

std::unique_ptr<Endpoint> Network::open(Bootstrap& bootstrap, const std::vector<uint8_t>& masked, Deadline deadline) const {
  EndpointOptions options;
  options.num_channels = Proxy::channels_for(options_.num_lanes + 1);
  options.seat = seat_on_host(domain_.topology);
  options.gpu = gpu_;
  options.absent = masked;
  return make_endpoint(bootstrap, options, deadline);
}

// Slots lie apart if all ranks that take part can have them there.
void Network::register_banks(Endpoint& endpoint, const RailMemory& memory, Bootstrap& bootstrap, const std::vector<uint8_t>& masked,
                             Deadline deadline) {
  const Topology& topology = domain_.topology;
  std::vector<RemoteRegion> all(static_cast<size_t>(topology.num_ranks));
  const auto exchange = [&](const RemoteRegion& own) {
    bootstrap.allgather(&own, all.data(), sizeof(RemoteRegion), deadline);
    std::vector<RemoteRegion> of_rail;
    for (const int rank : place_.ranks) of_rail.push_back(all[static_cast<size_t>(rank)]);
    return of_rail;
  };
  place_.remote_slots = exchange(register_slots(endpoint, memory));
  bool all_have = true;
  for (size_t r = 0; r < all.size(); ++r) all_have = all_have && (all[r].num_bytes > 0 || is_masked(masked, r));
  if (all_have) {
    place_.slots = slots_region_.get();
    place_.layout.banks.bank_bytes = rail_head_bytes(options_, topology.num_ranks, topology.num_nodes);
  } else {
    slots_region_.reset();
  }
  const auto num_bytes = static_cast<size_t>(place_.layout.total_bytes());
  region_ = std::make_unique<Region>(endpoint.register_memory(memory.of_host(num_bytes), num_bytes));
  place_.memory = region_.get();
  place_.remote = exchange(region_->remote());
}

// Registers what this rank has for slots apart, if the network reaches it. Nothing: they are not to lie apart.
RemoteRegion Network::register_slots(Endpoint& endpoint, const RailMemory& memory) {
  if (memory.of_slots == nullptr || (memory.slots_gpu >= 0 && !endpoint.facts().gpu_memory)) return {};
  try {
    const auto num_bytes = static_cast<size_t>(place_.whole_banks.total_bytes());
    slots_region_ = std::make_unique<Region>(endpoint.register_memory(memory.of_slots(num_bytes), num_bytes, memory.slots_gpu));
    return slots_region_->remote();
  } catch (const Failure& failure) {
    log_.write(TERN_LOG_WARNING, "rank {}: what crosses the network stays in memory of the host: {}", domain_.topology.rank,
               failure.what());
    return {};
  }
}

void Network::start_proxy(std::unique_ptr<Endpoint> endpoint, const std::function<void()>& started) {
  ProxyOptions options;
  options.num_channels = options_.num_lanes + 1;
  options.region = region_.get();
  options.started = started;
  options.changed = [this](int channel) { notice_change(channel); };
  options.failed = [this](int peer, const std::string& text) { notice_loss(peer, text); };
  options.turned = [this] { turn(); };
  for (int node = 0; node < domain_.topology.num_nodes; ++node)
    if (is_peer(node)) options.peers.push_back({place_.ranks[static_cast<size_t>(node)], place_.remote[static_cast<size_t>(node)]});
  proxy_ = std::make_unique<Proxy>(std::move(endpoint), options);
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
  standing_.reset();
  place_.proxy = nullptr;  // rails stay until the next start, which may not come about
  place_.standing = nullptr;
  closing_ = false;
}

NextGeneration Network::agree(Council& council, const tern_recover_options& options, int64_t timeout_ms) {
  closing_ = true;
  try {
    return next_generation(council, options, timeout_ms);
  } catch (const Failure&) {
    closing_ = false;
    throw;
  }
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
  for (int node = 0; node < place_.layout.banks.num_nodes; ++node) {
    if (!is_peer(node) || load_acquire(proxy_->arrived(place_.ranks[static_cast<size_t>(node)], channel)) == 0) continue;
    tern_failure failure;
    std::memcpy(&failure, region_->address() + place_.layout.failure(node), sizeof(failure));
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
  std::memcpy(region_->address() + place_.layout.own_failure(), &*failure, sizeof(*failure));
  for (int node = 0; node < place_.layout.banks.num_nodes; ++node) {
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
