// SPDX-License-Identifier: Apache-2.0
// The council of ranks on several nodes (domain/council.h), and how those who go on exchange what a new generation's network needs.
//
// Each rank has a note. Those of its own node read it in shared memory, the others find it on a noticeboard. Both are made with the exchange
// and stay for all generations, since those who were masked out must be able to read them too; they are used in recoveries only.
//
//   NodesCouncil council(topology, "", bootstrap, *node_sharer, deadline);                    // collective
//   const NextGeneration next = next_generation(council, options, timeout_ms);
//   GoingOnBootstrap bootstrap(council, next);                                                // among those who go on
//   council.begin(next);
//
// Threads: one at a time. One of its own lets notes move that others have written, or await, while this rank does something else.
#pragma once

#include <array>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "base/deadline.h"
#include "domain/admission.h"
#include "domain/council.h"
#include "memory/sharing.h"
#include "topology/bootstrap.h"
#include "transport/noticeboard.h"

namespace tern::cpu {

class NodesCouncil final : public Council {
 public:
  // `gpu`: as in EndpointOptions.
  NodesCouncil(const Topology& topology, const std::string& gpu, Bootstrap& bootstrap, SegmentSharer& node_sharer, Deadline deadline);

  // The generation has begun.
  void begin(const NextGeneration& next);
  const std::vector<uint8_t>& masked() const { return masked_; }  // [num_ranks]

  const Topology& topology() const override { return topology_; }
  uint32_t generation() const override { return generation_; }
  bool is_masked(int r) const override { return masked_[static_cast<size_t>(r)] != 0; }

  void propose(const Proposal& proposal) override;
  std::optional<Proposal> proposal_of(int r) override;
  void call_roll(uint64_t generation) override;
  uint64_t roll_call_of(int r) override { return note_of(r).roll_call; }
  void answer(uint64_t generation) override;
  uint64_t answer_of(int r) override { return note_of(r).answer; }
  void decide(const Proposal& decision) override;
  std::optional<Proposal> decision_of(int r) override;
  void pause() override;

  // Gathering among those who go on, step after step. What is handed over stays until the next but one.
  static constexpr size_t kMostGatheredBytes = 768;
  struct Gathered {
    uint64_t meeting = 0;  // which ranks, for which generation
    uint64_t step = 0;     // 0: none
    std::array<std::byte, kMostGatheredBytes> bytes = {};
  };
  void hand_over(const Gathered& gathered);
  const Gathered& gathered_of(int r, uint64_t step) { return note_of(r).gathered[step % 2]; }

 private:
  void keep_moving(const std::stop_token& end);
  struct Stated {
    uint64_t generation = 0;  // 0: nothing
    uint64_t committed = 0;
    std::array<uint64_t, layout::kMaxRanks / 64> mask = {};
  };
  struct Note {
    uint64_t roll_call = 0, answer = 0;
    Stated proposal, decision;
    std::array<Gathered, 2> gathered;
  };
  static_assert(sizeof(Note) % sizeof(uint64_t) == 0);
  static constexpr size_t kNoteWords = sizeof(Note) / sizeof(uint64_t);

  Stated state(const Proposal& proposal) const;
  std::optional<Proposal> proposal(const Stated& stated) const;
  bool is_in_node(int r) const { return r >= first_rank_ && r < first_rank_ + static_cast<int>(segments_.size()); }
  uint64_t* shared_words(int r) const { return reinterpret_cast<uint64_t*>(segments_[static_cast<size_t>(r - first_rank_)]->data()); }
  void publish();
  // The last that came whole.
  const Note& note_of(int r);

  Topology topology_;
  int first_rank_;
  uint32_t generation_ = 0;
  std::vector<uint8_t> masked_;
  std::vector<std::shared_ptr<Segment>> segments_;  // [ranks of the node] hash, note
  Noticeboard board_;
  Note own_;
  std::vector<Note> notes_;  // [num_ranks]
  std::mutex mutex_;
  std::condition_variable_any ends_;
  std::jthread mover_;  // the last, so the first to end
};

// All-gathers among the ranks that go on, under the numbers of the group; those of the others are zeros.
class GoingOnBootstrap final : public Bootstrap {
 public:
  GoingOnBootstrap(NodesCouncil& council, const NextGeneration& next);
  // What was handed over is void if the generation has not begun.
  ~GoingOnBootstrap() override;

  int rank() const override { return council_.rank(); }
  int num_ranks() const override { return council_.num_ranks(); }
  void allgather(const void* send, void* recv, size_t bytes, Deadline deadline) override;

 private:
  NodesCouncil& council_;
  std::vector<uint8_t> masked_;
  uint32_t generation_;
  uint64_t meeting_;
  uint64_t step_ = 0;
};

}  // namespace tern::cpu
