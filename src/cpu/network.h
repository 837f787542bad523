// SPDX-License-Identifier: Apache-2.0
// What an exchange on CPU ranks has between nodes: an endpoint with the thread that moves its bytes, the memory that the network writes to, a
// rail for each lane; and the error record's way to the other nodes. All of it is fresh in each generation, so that a rank that was only
// stopped finds nobody whom it could harm.
//
// Lifetime: the destructor waits until what this rank sent is in the other nodes' memory, at most for the exchange's deadline; after a
// failure, for a second. Their ranks need not do anything for that. Threads: rails belong to their lanes.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/log.h"
#include "cpu/rail.h"
#include "domain/admission.h"
#include "domain/domain.h"
#include "topology/bootstrap.h"
#include "transport/proxy.h"

namespace tern::cpu {

// Where a generation's banks lie: each is asked for at most once at its start, and its memory stays until the next one. Zeroed.
struct RailMemory {
  std::function<std::byte*(size_t num_bytes)> of_host;
  // Where slots shall lie apart, if the network takes them there on all ranks; none: nowhere. Without room it may throw.
  std::function<std::byte*(size_t num_bytes)> of_slots;
  int slots_gpu = kHostMemory;              // the GPU whose memory that is
  std::function<void()> enter_gpu = [] {};  // makes it that of the calling thread: providers may use CUDA in those that move bytes
};

class Network {
 public:
  // `domain` is the node's, and stays. `gpu`: as in EndpointOptions.
  Network(const Domain& domain, const std::string& gpu, const tern_exchange_options& options, const Log& log);
  // Collective among those who are not masked out, [num_ranks of the group]; empty: nobody is. If no rank has another one in its rail, as when
  // this node is all that is left, there is no network, and none is needed.
  void start(const RailMemory& memory, Bootstrap& bootstrap, const std::vector<uint8_t>& masked, Deadline deadline);
  ~Network();
  Network(const Network&) = delete;
  Network& operator=(const Network&) = delete;

  // Ends the generation. If it has not failed, ranks that are left out may still be in its last operation: takes leave of them, as the
  // destructor does, at most for a second.
  void stop();

  // Agrees with the others on the next generation, as next_generation() does. Those who have agreed close their networks, while others may be at
  // it still: from here on that is no loss, unless nothing comes of it.
  NextGeneration agree(Council& council, const tern_recover_options& options, int64_t timeout_ms);

  // Where the banks are; until the next start.
  const RailPlace& place() const { return place_; }
  // For one lane of the exchange; until the next start.
  std::unique_ptr<Rail> make_rail(Lane& lane) const { return std::make_unique<Rail>(lane, place_); }

 private:
  std::unique_ptr<Endpoint> open(Bootstrap& bootstrap, const std::vector<uint8_t>& masked, Deadline deadline) const;
  void register_banks(Endpoint& endpoint, const RailMemory& memory, Bootstrap& bootstrap, const std::vector<uint8_t>& masked,
                      Deadline deadline);
  RemoteRegion register_slots(Endpoint& endpoint, const RailMemory& memory);
  void start_proxy(std::unique_ptr<Endpoint> endpoint, const std::function<void()>& started);
  bool take_leave(int64_t timeout_ms);
  void notice_change(int channel);
  void notice_loss(int peer, const std::string& text);
  void tell_failure();
  void turn();
  bool is_peer(int node) const { return node != place_.node && place_.serves[static_cast<size_t>(node)] != 0; }
  int failure_channel() const { return domain_.layout.num_lanes; }

  const Domain& domain_;
  std::string gpu_;
  tern_exchange_options options_;
  Log log_;
  std::atomic<bool> closing_ = false;
  std::atomic<bool> failure_told_ = false;
  std::unique_ptr<Region> region_, slots_region_;
  RailPlace place_;
  std::unique_ptr<Standing> standing_;  // with TERN_ON_TIMEOUT_MASK
  std::unique_ptr<Proxy> proxy_;
};

}  // namespace tern::cpu
