// SPDX-License-Identifier: Apache-2.0
// The host's part of a lane of a GPU rank between nodes: a thread that does what operations need of the network, when the GPU comes to it.
//
//   const uint64_t command = lane.add([=](NodeLane& l) { ... }, nullptr);
//   launch_talk({.steps = {.command = command, .asks_first = true, .takes_epochs = 1, ...}});   // the command begins when this runs
//
//   in the command:  lane.rail().start_round(...);  lane.grant(epoch);  lane.await_gpu(operation);  lane.rail().send_round(...);  ...
//
// Lane and rail are those of CPU ranks: deadlines, the record of who failed, epochs, credits and the comparison of calls are the same.
// A command that fails ends the exchange: the GPU hears of it with its next answer, and the other nodes over the network. Under TERN_ON_TIMEOUT_MASK
// the lane says with each answer who is missing; and if that is this rank itself, only its own GPU stops.
//
// Lifetime: the end waits for the command that runs, which has deadlines. Threads: one enqueues, commands run on the lane's own, which calls
// nothing of CUDA behind its start (providers that copy from GPUs by themselves may). Memory: what the GPU wrote before it asked is visible behind
// await_gpu(), what a command wrote before it answered to kernels behind the step that awaits the answer. Between commands the lane grants the
// rail's next epoch when its banks are free.
#pragma once

#include <atomic>
#include <functional>
#include <map>
#include <mutex>
#include <thread>

#include "cpu/epochs.h"
#include "cpu/lane.h"
#include "cpu/network.h"
#include "cpu/rail.h"
#include "cuda/buffers.h"
#include "kernels/rail.h"

namespace tern::cuda {

class NodeLane {
 public:
  using Command = std::function<void(NodeLane&)>;
  struct Options {
    int index = 0;
    int64_t timeout_ms = 0;
    tern_timeout_policy on_timeout = TERN_ON_TIMEOUT_ABORT;
    // Throws what this rank's GPU has reported, and tells the other hosts whom it goes on without.
    std::function<void()> hear_gpu = {};
    std::function<void()> enter_gpu = {};  // RailMemory::enter_gpu
  };

  NodeLane(const std::shared_ptr<DevicePool>& pool, const Domain& domain, const cpu::Network& network, SpanLog& spans, Options options);
  ~NodeLane();

  // ---- The caller's thread.

  // `owner`: of a command that may be asked for again and again, until forget(owner); nullptr: it is asked for once.
  uint64_t add(Command command, const void* owner);
  void forget(const void* owner);
  kernels::HostCell* cell() const { return cell_.data(); }
  kernels::HostTalk* talk() const { return talk_.data(); }
  // The rail's epochs in the order of the calls: which sends are open.
  cpu::Epochs& epochs() { return epochs_; }
  // The generation has ended, and no kernel runs: ends the thread. The next one begins with fresh words, epochs and rail, and without commands.
  void stop();
  void restart(const cpu::Network& network);
  // A kernel uses its memory still, which must not go.
  void abandon_memory();

  // ---- Commands.

  cpu::Lane& lane() { return lane_; }
  cpu::Rail& rail() { return *rail_; }
  // The banks of `epoch` may be filled, an operation's first.
  void grant(uint64_t epoch);
  // The GPU's next question is answered with the banks of `epoch`.
  void answer(uint64_t epoch);
  // Until the GPU has come to its next step.
  void await_gpu(tern_operation operation);
  // Under TERN_ON_TIMEOUT_MASK: until the ranks of the node have what their rails bring, or go on without it. Kernels, which wait for each other
  // behind this, do not see who is held up by another node.
  void meet(const cpu::RailTrip& trip);

 private:
  struct Entry {
    Command command;
    const void* owner;
  };

  void run();
  bool await_command();
  bool has_asked() const;
  bool masks() const { return options_.on_timeout == TERN_ON_TIMEOUT_MASK; }
  int own_rank() const { return domain_.rank_of_group(domain_.rank); }
  void await_step(tern_operation operation);
  void tell_absences();
  Command take(uint64_t number);
  void give_up(const tern_failure& failure);

  const Options options_;
  const Domain& domain_;
  const std::shared_ptr<DevicePool> pool_;
  PinnedBuffer<kernels::HostCell> cell_;
  DeviceBuffer<kernels::HostTalk> talk_;
  cpu::Epochs epochs_;
  cpu::Lane lane_;
  std::unique_ptr<cpu::Rail> rail_;
  uint64_t asked_ = 0;     // steps that have been seen
  uint64_t answered_ = 0;  // questions
  uint64_t granted_ = 0;   // epochs
  uint64_t begun_ = 0;     // commands
  std::mutex mutex_;
  std::map<uint64_t, Entry> commands_;  // guarded by mutex_
  uint64_t next_number_ = 1;            // guarded by mutex_
  std::atomic<bool> stop_ = false;
  std::thread thread_;
};

}  // namespace tern::cuda
