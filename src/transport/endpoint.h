// SPDX-License-Identifier: Apache-2.0
// Moves bytes between ranks of different hosts: writes into memory that a peer has registered, and tells the peer when all
// writes of an epoch are there. Knows bytes, ranks and epochs, and nothing of what they are for.
//
//   auto endpoint = make_endpoint(*bootstrap, {}, deadline);                        // collective
//   const Region window = endpoint->register_memory(address, num_bytes);
//   bootstrap->allgather(&window.remote(), remotes.data(), sizeof(RemoteRegion), deadline);
//   endpoint->put({.peer = 3, .from = &window, .to = remotes[3], .to_offset = 64, .num_bytes = 4096, .epoch = 1, .last = true}, deadline);
//   while (!endpoint->complete(2, 0, 1))                                            // what rank 2 put here in epoch 1 of channel 0
//     if (!endpoint->wait(deadline)) fail(...);
//   endpoint->retire(2, 0, 1);
//
// Order and visibility: none between puts, not even to one peer. When complete() is true, the bytes of all puts of that (peer, channel,
// epoch) are in this rank's memory, and visible to the thread that progresses. Bytes that are put must stay as they are until flush().
// Epochs of a (peer, channel) are 1, 2, 3 ...; each ends with a put that is `last`, of 0 bytes if there is nothing else to say. Two may
// be under way: epoch e may be begun once the peer has retired e - 2, and it is for the caller to know (the peer puts a word, or 0 bytes).
// Devices: a rank may have several, as many as every other; device i of one talks to device i of the others. A put of 2 kLeastStripeBytes and
// more goes over them in stripes, a smaller one whole, over the one that has the fewest bytes under way.
// Threads: an endpoint and its regions belong to one thread at a time. Nothing moves by itself: bytes may be sent, received and counted
// only while this rank is in put, progress, wait or flush, so a rank that others put to must come back until they are done.
// Deadlines: a wait that ends without what it was for is TERN_TIMEOUT with the ranks at fault, except of wait(), which returns false.
// Errors of the network are TERN_SYSTEM_ERROR with the peer's rank, once for each peer from whichever call finds out, and again from every
// put to it; the other peers can still be reached. A rank that only receives learns of a lost peer by its own deadline.
// Lifetime: destroying is never collective and waits for nothing; what was not flushed may not arrive, and what was put without being
// confirmed may be lost. An endpoint and its regions may go in any order; the connections close with the
// last of them (over ofi_rxm those of an endpoint that ends with messages under way stay open until the process ends, and peers are not told).
// Registered memory must outlive its region, and the endpoint unless that was flushed.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "base/deadline.h"
#include "base/knobs.h"
#include "topology/bootstrap.h"
#include "topology/topology.h"

namespace tern {

constexpr int kMostDevices = 8;  // of the network, for each rank
constexpr size_t kLeastStripeBytes = 64 << 10;
constexpr int kHostMemory = -1;  // instead of a GPU

// Memory that others may write to, for them. Bytes, to be exchanged.
struct RemoteRegion {
  // By one of its rank's devices.
  struct Access {
    uint64_t base = 0;  // what the provider adds offsets to: an address, or 0
    uint64_t key = 0;
  };
  uint64_t num_bytes = 0;
  std::array<Access, kMostDevices> devices = {};
};
static_assert(std::is_trivially_copyable_v<RemoteRegion> && sizeof(RemoteRegion) == 8 + kMostDevices * 16);

// Memory that may be put from and to; undone when this is destroyed.
class Region {
 public:
  // With one network device.
  struct Registration {
    RemoteRegion::Access access;
    void* descriptor = nullptr;  // for the provider
    std::shared_ptr<const void> owner;
  };

  // Without a registration it is memory like any other, which cannot be put from. `gpu`: as register_memory() was told.
  Region(std::byte* address, size_t num_bytes, std::vector<Registration> registrations = {}, int gpu = kHostMemory);
  Region(Region&&) = default;
  Region& operator=(Region&&) = default;

  std::byte* address() const { return address_; }
  bool is_on_gpu() const { return gpu_ != kHostMemory; }
  const RemoteRegion& remote() const { return remote_; }
  void* descriptor(int device) const { return registrations_[static_cast<size_t>(device)].descriptor; }

 private:
  std::byte* address_;
  RemoteRegion remote_;
  std::vector<Registration> registrations_;
  int gpu_;
};

struct Put {
  int peer = 0;
  const Region* from = nullptr;
  size_t from_offset = 0;
  RemoteRegion to;
  uint64_t to_offset = 0;
  size_t num_bytes = 0;  // 0: a notice only; needs `from` and `to` all the same
  int channel = 0;
  int64_t epoch = 0;
  bool last = false;      // of its (peer, channel, epoch)
  bool confirmed = true;  // outstanding until it is in the peer's memory; false: until it has left
  bool counted = true;    // false: outside of all epochs; the peer is not told, and finds the bytes in its memory some time, in any order
};

// Empty texts and zeros mean the default.
struct EndpointOptions {
  // The name of libfabric's provider ("verbs", or in full "verbs;ofi_rxm"). Default: TERN_FABRIC_PROVIDER, else the first of verbs, efa,
  // cxi and tcp that every rank has.
  std::string provider = knobs().fabric_provider.value_or("");
  // The rank's network devices, by libfabric's names for them ("mlx5_0", "eth0"); one may be named twice. Default: TERN_FABRIC_DOMAIN, else
  // `num_rails` of those that choose_devices() (choose_devices.h) chooses for the rank's GPU and its seat.
  std::vector<std::string> domains = knobs().fabric_domain;
  int64_t num_rails = knobs().fabric_rails;
  HostSeat seat;
  std::string gpu;  // its address on the PCI bus, "0000:1b:00.0"; "": none
  // Which providers are to put from and to its memory (GpuMemory). Default: TERN_FABRIC_GPU_MEMORY.
  int64_t gpu_memory = knobs().fabric_gpu_memory;
  // best_effort, low_latency, dedicated_access, bulk_data, scavenger, network_ctrl, dscp:0 ... dscp:63. Default: TERN_FABRIC_TCLASS.
  std::string traffic_class = knobs().fabric_tclass.value_or("");
  std::vector<uint8_t> absent = {};  // [num_ranks] 1: takes no part, and cannot be put to; empty: all do
  int num_channels = 1;
  int most_outstanding = 256;     // messages that are outstanding, of each device; fewer if the provider has fewer
  size_t most_message_bytes = 0;  // longer puts are several messages; default: the provider's limit

  int64_t num_devices() const { return domains.empty() ? num_rails : static_cast<int64_t>(domains.size()); }
};

// What a provider may do with memory of a GPU.
enum GpuMemory : int64_t {
  kNoGpuMemory = 0,      // nothing: it is given memory of the host only
  kDirectGpuMemory = 1,  // its devices may read and write it
  kAnyGpuMemory = 2      // it may also copy by itself, with CUDA
};

struct EndpointFacts {
  std::string provider;
  std::vector<std::string> domains;  // of the rank's devices
  bool traffic_class = false;        // the provider takes the class that was asked for
  size_t most_message_bytes = 0;
  int most_outstanding = 0;  // of each device
  bool gpu_memory = false;   // memory of this rank's GPU can be registered, if its driver lets the devices in
};

class Endpoint {
 public:
  virtual ~Endpoint() = default;

  virtual const EndpointFacts& facts() const = 0;

  // `num_bytes` at least 1. Registers with the network device, so it is slow: do it once for a window. `gpu`: the CUDA device whose memory it is;
  // TERN_UNSUPPORTED where facts().gpu_memory is false, TERN_SYSTEM_ERROR if the device does not get at it. What has arrived there when complete()
  // is true may still have to be made visible to the GPU (cuFlushGPUDirectRDMAWrites), on those that do not order it.
  virtual Region register_memory(void* address, size_t num_bytes, int gpu = kHostMemory) = 0;

  // Sends what can be sent of the put without waiting, and moves it on past that; true if nothing is left. Otherwise call it again with
  // the same put, after progress() or wait(); puts to others, and of other channels and epochs, may come between.
  virtual bool try_put(Put& put) = 0;
  // Progresses until all of the put is on its way. TERN_TIMEOUT names the peer.
  void put(Put put, Deadline deadline);

  // Counts what has come and what has left; does not wait. False if there was nothing.
  virtual bool progress() = 0;
  // Progresses until there was something, with pauses of up to half a millisecond; false: the deadline has passed.
  bool wait(Deadline deadline);

  // Nothing is outstanding any more: it is in its peers' memory, as far as it is confirmed, and what it was put from may change.
  // TERN_TIMEOUT names the peers that did not take theirs.
  virtual void flush(Deadline deadline) = 0;
  virtual int num_outstanding() const = 0;
  virtual int num_outstanding_to(int peer) const = 0;
  // The peer cannot be reached any more, as a call has said or will say.
  virtual bool lost(int peer) const = 0;
  // The peer may be put to again: it may have come back. For puts that are not counted, since epochs that were under way are not whole.
  virtual void try_again(int peer) = 0;

  // All that `peer` put here in this epoch of this channel has arrived. True for epochs that were retired.
  virtual bool complete(int peer, int channel, int64_t epoch) const = 0;
  // Makes room for epoch + 2. TERN_INVALID_STATE unless it is complete and the previous one retired.
  virtual void retire(int peer, int channel, int64_t epoch) = 0;
};

// Collective. All ranks agree on one provider. If one of them has none that fits, all get TERN_UNSUPPORTED with that rank and its reason:
// libfabric is not installed, or none of its providers has what is needed, or not the devices that were asked for. If they do not have as
// many devices or channels, all get TERN_MISMATCH.
std::unique_ptr<Endpoint> make_endpoint(Bootstrap& bootstrap, const EndpointOptions& options, Deadline deadline);

}  // namespace tern
