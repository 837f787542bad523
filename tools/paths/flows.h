// SPDX-License-Identifier: Apache-2.0
// Timed traffic between ranks over the transport's endpoint: epochs of writes, each of which the receiver answers.
//
//   Flows flows(*bootstrap, "", deadline);                                              // collective
//   std::vector<Flow> one = {{.peer = 3, .sends = true}};                               // rank 3: {.peer = ..., .receives = true}
//   flows.run(one, {.most_epochs = 100}, deadline);                                     // pings: one word there, one word back
//   flows.run(one, {.num_writes = 8, .num_under_way = 2, .duration_ms = 100}, deadline);  // a stream of large writes
//
// An epoch is a word, which says whether another one follows, and large writes; it is answered, by another word, when all of it is in
// the receiver's memory. So the sender alone decides when it has sent enough, and a rank is ready to go when run() returns.
// Threads: one. Waits look at the endpoint again and again, with pauses that grow: nothing moves unless a thread is in it.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/deadline.h"
#include "topology/bootstrap.h"
#include "transport/endpoint.h"

namespace tern::tools {

// To, from, or to and from one peer.
struct Flow {
  int peer = 0;
  bool sends = false;
  bool receives = false;

  // What run() leaves.
  std::vector<double> round_trip_us{};  // of each epoch that was sent, until its answer
  double sent_gbps = 0;                 // from the first answer to the last
  std::string problem{};                // why it did not come to its end; "" if it did
};

struct Load {
  int num_writes = 0;     // in an epoch, of Flows::kWriteBytes each; at most Flows::kMostWrites
  int num_under_way = 1;  // epochs that are sent ahead of their answers, at most 2
  int least_epochs = 1;
  int most_epochs = 1 << 30;
  int64_t duration_ms = 0;  // no epoch is begun later, once there are the least
};

class Flows {
 public:
  static constexpr size_t kWriteBytes = size_t{1} << 20;
  static constexpr int kMostWrites = 8;
  static constexpr size_t kEpochBytes = kWriteBytes * kMostWrites;

  // Collective. `gpu`: as in EndpointOptions. TERN_UNSUPPORTED on every rank if one has no provider that fits.
  Flows(Bootstrap& bootstrap, const std::string& gpu, Deadline deadline);

  const EndpointFacts& facts() const { return endpoint_->facts(); }

  // Every flow needs its counterpart on its peer, under the same load. Does not throw for what goes wrong on the way: that is the flow's
  // problem, after which its peer must not be used again.
  void run(std::vector<Flow>& flows, const Load& load, Deadline deadline);

  // The large writes that `peer` put here last, kMostWrites in an epoch, are what it sent.
  bool received_unchanged(int peer) const;

 private:
  using Clock = std::chrono::steady_clock;
  // Epochs of one peer, counted from the first run on, and the state of this run.
  struct Line {
    int64_t begun = 0, answered_here = 0;    // what this rank sent, and what of it was answered
    int64_t arrived = 0, answered_back = 0;  // what the peer sent, and what of it this rank answered
    int num_begun = 0;                       // in this run, as the rest
    int writes_left = 0;
    bool last_begun = false, last_arrived = false;
    std::optional<Put> pending;
    Clock::time_point begun_at[2], first_answer, last_answer;
  };

  size_t slot(int peer, int64_t epoch) const;
  bool finished(const Flow& flow) const;
  bool step(Flow& flow, const Load& load);
  void take_arrivals(const Flow& flow);
  bool answer(const Flow& flow);
  void take_answers(Flow& flow, const Load& load);
  bool send(const Flow& flow, const Load& load);
  bool begin_epoch(const Flow& flow, const Load& load);
  void choose_next_put(const Flow& flow, const Load& load);
  void settle(std::vector<Flow>& flows, int num_stale, Deadline deadline);
  void give_up(std::vector<Flow>& flows);
  template <typename Call>
  void blame(std::vector<Flow>& flows, Call call);

  int rank_;
  std::unique_ptr<std::byte[]> memory_;
  std::unique_ptr<Endpoint> endpoint_;
  std::optional<Region> region_;
  std::vector<RemoteRegion> remotes_;
  std::vector<Line> lines_;  // [num_ranks]
  Clock::time_point start_;
  std::string other_problem_;  // what the network said last that was about none of the flows
};

}  // namespace tern::tools
