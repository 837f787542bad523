// SPDX-License-Identifier: Apache-2.0
// What an exchange on CPU ranks has between nodes: an endpoint with the thread that moves its bytes, the memory that the network writes to, a
// rail for each lane; and the error record's way to the other nodes.
//
// Lifetime: the destructor waits until what this rank sent is in the other nodes' memory, at most for the exchange's deadline; after a
// failure, for a second. Their ranks need not do anything for that. Threads: rails belong to their lanes.
#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "base/log.h"
#include "cpu/rail.h"
#include "domain/domain.h"
#include "topology/bootstrap.h"
#include "transport/proxy.h"

namespace tern::cpu {

class Network {
 public:
  // What the network writes to and reads from.
  static layout::RailMemoryLayout memory_layout(const Topology& topology, const tern_exchange_options& options);

  // Collective. `domain` is the node's, and stays; so does `memory`, of memory_layout() and zeroed.
  Network(const Domain& domain, std::byte* memory, Bootstrap& bootstrap, const tern_exchange_options& options, const Log& log,
          Deadline deadline);
  ~Network();
  Network(const Network&) = delete;
  Network& operator=(const Network&) = delete;

  // For one lane of the exchange.
  std::unique_ptr<Rail> make_rail(Lane& lane) const { return std::make_unique<Rail>(lane, place_); }

 private:
  void notice_change(int channel);
  void notice_loss(int peer, const std::string& text);
  void tell_failure();
  int failure_channel() const { return domain_.layout.num_lanes; }

  const Domain& domain_;
  int64_t timeout_ms_;
  Log log_;
  std::atomic<bool> closing_ = false;
  std::atomic<bool> failure_told_ = false;
  std::byte* memory_;
  std::unique_ptr<Region> region_;
  RailPlace place_;
  std::unique_ptr<Proxy> proxy_;
};

}  // namespace tern::cpu
