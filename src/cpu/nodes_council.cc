// SPDX-License-Identifier: Apache-2.0
#include "cpu/nodes_council.h"

#include <atomic>
#include <chrono>
#include <cstring>
#include <thread>

#include "base/error.h"
#include "memory/host_segment.h"
#include "topology/nodes.h"

namespace tern::cpu {
namespace {

constexpr std::chrono::milliseconds kMoveEvery{50};

uint64_t load(uint64_t& word) { return std::atomic_ref(word).load(std::memory_order_relaxed); }
void store(uint64_t& word, uint64_t value) { std::atomic_ref(word).store(value, std::memory_order_relaxed); }

std::vector<int> ranks_of_other_nodes(const Topology& topology) {
  std::vector<int> ranks;
  for (int r = 0; r < topology.num_ranks; ++r)
    if (topology.node[static_cast<size_t>(r)] != topology.node[static_cast<size_t>(topology.rank)]) ranks.push_back(r);
  return ranks;
}

std::vector<std::shared_ptr<Segment>> share_notes(SegmentSharer& sharer, int num_ranks, size_t bytes, Deadline deadline) {
  const std::vector<uint8_t> everybody(static_cast<size_t>(num_ranks), 1);
  return sharer.share(HostSegment::create(bytes, sharer.shared_by()), "notes", everybody, deadline);
}

}  // namespace

NodesCouncil::NodesCouncil(const Topology& topology, const std::string& gpu, Bootstrap& bootstrap, SegmentSharer& node_sharer,
                           Deadline deadline)
    : topology_(topology),
      first_rank_(first_rank_of_node(topology)),
      masked_(static_cast<size_t>(topology.num_ranks)),
      segments_(share_notes(node_sharer, ranks_of_node(topology), (1 + kNoteWords) * sizeof(uint64_t), deadline)),
      board_(bootstrap, sizeof(Note), ranks_of_other_nodes(topology), {.seat = seat_on_host(topology), .gpu = gpu}, deadline),
      notes_(static_cast<size_t>(topology.num_ranks)),
      mover_([this](const std::stop_token& end) { keep_moving(end); }) {}

void NodesCouncil::keep_moving(const std::stop_token& end) {
  std::unique_lock lock(mutex_);
  while (!end.stop_requested()) {
    board_.progress();
    ends_.wait_for(lock, end, kMoveEvery, [] { return false; });
  }
}

void NodesCouncil::begin(const NextGeneration& next) {
  generation_ = next.generation;
  masked_ = next.masked;
}

// Under the rank's own node's eyes first: a hash tells them when it is whole.
void NodesCouncil::publish() {
  uint64_t words[kNoteWords];
  std::memcpy(words, &own_, sizeof(words));
  uint64_t* shared = shared_words(rank());
  for (size_t i = 0; i < kNoteWords; ++i) store(shared[1 + i], words[i]);
  store(shared[0], note_hash(words));
  board_.write(std::as_bytes(std::span(words)));
}

const NodesCouncil::Note& NodesCouncil::note_of(int r) {
  Note& note = notes_[static_cast<size_t>(r)];
  uint64_t words[kNoteWords];
  bool whole = false;
  if (is_in_node(r)) {
    uint64_t* shared = shared_words(r);
    for (size_t i = 0; i < kNoteWords; ++i) words[i] = load(shared[1 + i]);
    whole = load(shared[0]) == note_hash(words);
  } else {
    whole = board_.read(r, std::as_writable_bytes(std::span(words)));
  }
  if (whole) std::memcpy(&note, words, sizeof(note));
  return note;
}

NodesCouncil::Stated NodesCouncil::state(const Proposal& proposal) const {
  Stated stated{.generation = proposal.generation, .committed = proposal.committed ? uint64_t{1} : 0};
  for (size_t r = 0; r < proposal.mask.size(); ++r) stated.mask[r / 64] |= uint64_t{proposal.mask[r] != 0} << (r % 64);
  return stated;
}

std::optional<Proposal> NodesCouncil::proposal(const Stated& stated) const {
  if (stated.generation == 0) return std::nullopt;
  Proposal result{stated.generation, stated.committed != 0, std::vector<uint8_t>(masked_.size())};
  for (size_t r = 0; r < result.mask.size(); ++r) result.mask[r] = stated.mask[r / 64] >> (r % 64) & 1;
  return result;
}

void NodesCouncil::propose(const Proposal& proposal) {
  own_.proposal = state(proposal);
  publish();
}

std::optional<Proposal> NodesCouncil::proposal_of(int r) { return proposal(note_of(r).proposal); }

void NodesCouncil::call_roll(uint64_t generation) {
  own_.roll_call = generation;
  publish();
}

void NodesCouncil::answer(uint64_t generation) {
  own_.answer = generation;
  publish();
}

void NodesCouncil::decide(const Proposal& decision) {
  own_.decision = state(decision);
  publish();
}

std::optional<Proposal> NodesCouncil::decision_of(int r) { return proposal(note_of(r).decision); }

void NodesCouncil::pause() {
  board_.progress();
  std::this_thread::sleep_for(std::chrono::milliseconds(1));
}

void NodesCouncil::hand_over(const Gathered& gathered) {
  own_.gathered[gathered.step % 2] = gathered;
  publish();
}

GoingOnBootstrap::GoingOnBootstrap(NodesCouncil& council, const NextGeneration& next)
    : council_(council), masked_(next.masked), generation_(next.generation) {
  std::vector<uint64_t> words(next.masked.begin(), next.masked.end());
  words.push_back(next.generation);
  meeting_ = note_hash(words);
}

GoingOnBootstrap::~GoingOnBootstrap() {
  if (council_.generation() == generation_) return;
  for (const uint64_t step : {0, 1}) council_.hand_over({.meeting = 0, .step = step});
}

// Nobody begins the next step but one before all have this one, so two are kept.
void GoingOnBootstrap::allgather(const void* send, void* recv, size_t bytes, Deadline deadline) {
  if (bytes > NodesCouncil::kMostGatheredBytes) fail(TERN_INTERNAL_ERROR, "recover: {} bytes are too many for a note", bytes);
  NodesCouncil::Gathered own{.meeting = meeting_, .step = ++step_};
  std::memcpy(own.bytes.data(), send, bytes);
  council_.hand_over(own);
  std::memset(recv, 0, bytes * masked_.size());
  for (int r = 0; r < num_ranks(); ++r) {
    if (masked_[static_cast<size_t>(r)] != 0) continue;
    for (;;) {
      const auto proposal = council_.proposal_of(r);  // before what was handed over, which stays when the generation has begun
      const NodesCouncil::Gathered& theirs = council_.gathered_of(r, step_);
      if (theirs.meeting == meeting_ && theirs.step == step_) {
        std::memcpy(static_cast<std::byte*>(recv) + static_cast<size_t>(r) * bytes, theirs.bytes.data(), bytes);
        break;
      }
      // It has failed, and is in the next attempt already, where it waits for this rank.
      if (proposal && proposal->generation > generation_)
        fail(TERN_ABORTED, "recover: rank {}{} could not begin generation {}; call it again", r, describe_rank(council_.topology(), r),
             generation_);
      if (deadline.passed())
        fail(TERN_TIMEOUT, "recover: rank {} waited for rank {}{} to join the network of the new generation; call it again", rank(), r,
             describe_rank(council_.topology(), r));
      council_.pause();
    }
  }
}

}  // namespace tern::cpu
