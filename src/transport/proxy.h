// SPDX-License-Identifier: Apache-2.0
// Shares an endpoint between a rank's threads: what has come is a word in memory that they can wait for as for any other. Whoever waits
// moves the bytes meanwhile (help), and a thread of the proxy's own does while nobody waits.
//
//   const Region region = endpoint->register_memory(...);                    // and everybody's, exchanged
//   Proxy proxy(std::move(endpoint), {.peers = {{2, remotes[2]}, {4, remotes[4]}}, .region = &region, .changed = ...});
//   proxy.start();
//   wait_until(proxy.taken(2, 0) + 2 >= epoch);              // credit: the peer has room for this epoch
//   proxy.put({.peer = 2, ..., .epoch = epoch, .last = true});
//   while (proxy.arrived(2, 0) < epoch) proxy.help();        // what rank 2 put here in this epoch is all there
//   proxy.finish(0, epoch);                                  // ... and is no longer needed: rank 2 gets its credit
//
// Channels are the caller's; the endpoint has more (channels_for): for credits, and to say goodbye. In every epoch of a channel a rank
// either puts to all of its peers or to none.
// Memory: what was put in an epoch is visible to a thread that has seen arrived() reach it. Bytes that are put stay as they are until
// taken() has reached their epoch. Threads: any may call anything, but a channel is put to and finished by one at a time.
// Lifetime: close() takes leave of the peers: what was put to them has arrived, and they know that nothing more can be put here. Destroying
// a proxy that was not closed may lose what is under way, for them too.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "base/deadline.h"
#include "transport/endpoint.h"

namespace tern {

struct ProxyPeer {
  int rank = 0;
  RemoteRegion region;  // notices are puts of no bytes to it
};

struct ProxyOptions {
  std::vector<ProxyPeer> peers;  // ranks that are put to and received from; this one is not among them
  int num_channels = 1;
  const Region* region = nullptr;         // from which notices are put
  std::function<void()> started = [] {};  // on the proxy's thread, before anything else there
  // Must neither wait nor throw. The first two are called on whichever thread moves the bytes, one at a time, and call nothing here.
  std::function<void(int channel)> changed;                       // one of the channel's words has grown
  std::function<void(int peer, const std::string& text)> failed;  // the peer cannot be put to, once; -1: something else is wrong
  std::function<void()> turned;                                   // on the proxy's thread, at least every 20 ms
};

class Proxy {
 public:
  static int channels_for(int num_channels) { return 2 * num_channels + 1; }

  Proxy(std::unique_ptr<Endpoint> endpoint, const ProxyOptions& options);
  ~Proxy();
  Proxy(const Proxy&) = delete;
  Proxy& operator=(const Proxy&) = delete;

  // Starts the thread. Once, before anything else is called.
  void start();

  // Is on its way, or soon; of one peer and channel in the order of the calls. Not before the peer has taken the channel's epoch before the
  // previous one.
  void put(const Put& put);
  // This rank no longer needs what its peers put up to this epoch, all of which has arrived. Tells them.
  void finish(int channel, uint64_t epoch);

  // The last epoch up to which everything has arrived from the peer, or was taken by it. To be read with acquire.
  const uint64_t& arrived(int peer, int channel) const { return line(peer, channel).arrived; }
  const uint64_t& taken(int peer, int channel) const { return line(peer, channel).taken; }

  // Moves bytes on the calling thread, and lets words grow; false: another thread is at it. The proxy's own thread stands back then.
  bool help();
  // Whoever has helped will not for a while: the proxy's thread goes on at once.
  void hand_over();

  // Calls `call` while nobody moves bytes. What puts outside of all epochs write, or are put from, is looked at and changed in there. It calls
  // nothing here.
  template <typename Call>
  void while_nothing_moves(Call call) {
    const std::lock_guard turn(turn_);
    call();
  }

  // Nothing is put or finished any more: waits until everything is with its peers, says goodbye to those that have not done so themselves,
  // and waits for their answers. Their other threads have nothing to do for that. False: the deadline has passed.
  bool close(Deadline deadline);
  // Ends the thread: when this returns, nothing is called any more. The destructor does it too.
  void stop();

 private:
  struct Peer {
    int rank = 0;
    RemoteRegion region;
    bool lost = false;        // it cannot be reached
    bool has_left = false;    // it has said goodbye
    bool was_left = false;    // this rank has said goodbye to it
    bool has_agreed = false;  // and it has answered
    bool gone() const { return lost || has_left; }
    bool closed() const { return gone() ? lost || !was_left || has_agreed : has_agreed; }
  };
  // One channel of one peer.
  struct Line {
    size_t peer_idx = 0;
    int channel = 0;
    uint64_t arrived = 0;
    uint64_t taken = 0;
    std::atomic<uint64_t> finished = 0;  // as finish() was told
    uint64_t credited = 0;               // as the peer was told
  };

  const Line& line(int peer, int channel) const;
  int farewell_channel() const { return 2 * options_.num_channels; }
  void run();
  bool sleep(std::chrono::microseconds longest);
  void wake();
  bool move_bytes();
  bool start_puts();
  bool try_put(Put& put);
  void notify(const Peer& peer, int endpoint_channel, int64_t epoch);
  void count_arrivals(Line& line);
  void give_credits(Line& line);
  void hear_farewell(Peer& peer);
  void say_farewell();
  void probe_silent_peers();
  bool all_delivered() const;
  template <typename Call>
  void report_problems(Call call);

  std::unique_ptr<Endpoint> endpoint_;
  ProxyOptions options_;
  std::vector<Line> lines_;  // [channel][peer]

  // Whoever moves bytes holds it; guards the endpoint and what follows.
  std::mutex turn_;
  std::vector<Peer> peers_;
  std::vector<Put> pending_;  // taken from the queue, not yet handed to the endpoint
  bool said_farewell_ = false;
  Deadline next_probe_ = Deadline::in_ms(0);

  std::atomic<bool> closing_ = false;
  std::atomic<bool> stop_ = false;
  std::atomic<bool> was_helped_ = false;                         // since the thread looked last
  std::atomic<bool> is_heavy_ = false;                           // much is on its way: the thread helps those who help
  std::atomic<bool> has_queued_ = false, has_finished_ = false;  // since the last turn
  std::mutex mutex_;
  std::vector<Put> queue_;  // guarded, as are the next two
  bool is_awake_ = false;
  bool closed_ = false;
  std::condition_variable has_closed_;
  std::condition_variable has_work_;
  std::thread thread_;
};

}  // namespace tern
