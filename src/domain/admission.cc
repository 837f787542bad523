// SPDX-License-Identifier: Apache-2.0
#include "domain/admission.h"

#include <algorithm>
#include <chrono>
#include <thread>

#include "base/error.h"
#include "domain/agreement.h"
#include "domain/proposal.h"
#include "memory/host_segment.h"

namespace tern {
namespace {

uint64_t load(uint64_t& word) { return std::atomic_ref<uint64_t>(word).load(std::memory_order_seq_cst); }
void store(uint64_t& word, uint64_t value) { std::atomic_ref<uint64_t>(word).store(value, std::memory_order_seq_cst); }

class DomainCouncil final : public Council {
 public:
  DomainCouncil(const Domain& domain, const AdmissionBoard& board) : domain_(domain), board_(board) {}

  const Topology& topology() const override { return domain_.topology; }
  uint32_t generation() const override { return domain_.generation; }
  bool is_masked(int r) const override { return domain_.is_masked(r); }

  void propose(const Proposal& proposal) override { write_proposal(board_.cell(rank()).proposal, proposal); }
  std::optional<Proposal> proposal_of(int r) override { return read_proposal(board_.cell(r).proposal, num_ranks()); }

  void call_roll(uint64_t generation) override { store(board_.cell(rank()).roll_call, generation); }
  uint64_t roll_call_of(int r) override { return load(board_.cell(r).roll_call); }
  void answer(uint64_t generation) override { store(board_.cell(rank()).present, generation); }
  uint64_t answer_of(int r) override { return load(board_.cell(r).present); }
  void decide(const Proposal& decision) override { write_proposal(board_.cell(rank()).decision, decision); }
  std::optional<Proposal> decision_of(int r) override { return read_proposal(board_.cell(r).decision, num_ranks()); }

  void pause() override { std::this_thread::sleep_for(std::chrono::milliseconds(1)); }

 private:
  const Domain& domain_;
  const AdmissionBoard& board_;
};

void call_roll(Council& council, NextGeneration& next, int64_t timeout_ms) {
  council.call_roll(next.generation);
  const Deadline deadline = Deadline::in_ms(timeout_ms);
  for (bool all_here = false; !all_here;) {
    all_here = true;
    for (int r = 0; r < council.num_ranks(); ++r) {
      if (!council.is_masked(r)) continue;
      const bool is_here = council.answer_of(r) == next.generation;
      next.masked[static_cast<size_t>(r)] = is_here ? 0 : 1;
      all_here = all_here && is_here;
    }
    if (deadline.passed()) break;
    if (!all_here) council.pause();
  }
  council.decide({next.generation, true, next.masked});
}

// For ranks that have agreed on `next`, with ranks that were masked before. Takes out of next.masked who comes back, alike on all.
void admit(Council& council, NextGeneration& next, int64_t timeout_ms) {
  int leader = 0;
  while (next.masked[static_cast<size_t>(leader)] != 0) ++leader;
  if (leader == council.rank()) return call_roll(council, next, timeout_ms);
  const Deadline deadline = Deadline::in_ms(2 * timeout_ms);  // the leader waits itself
  for (;;) {
    const auto decision = council.decision_of(leader);
    if (decision && decision->generation == next.generation) {
      next.masked = decision->mask;
      return;
    }
    if (deadline.passed())
      fail(TERN_TIMEOUT, "recover: rank {} waited for rank {} to decide who is let in again; call it again", council.rank(), leader);
    council.pause();
  }
}

// The newest that anybody has made; generation 0: none.
Proposal newest_decision(Council& council) {
  Proposal newest;
  for (int r = 0; r < council.num_ranks(); ++r) {
    auto decision = council.decision_of(r);
    if (decision && decision->generation > newest.generation) newest = std::move(*decision);
  }
  return newest;
}

uint64_t newest_roll_call(Council& council) {
  uint64_t newest = 0;
  for (int r = 0; r < council.num_ranks(); ++r) newest = std::max(newest, council.roll_call_of(r));
  return newest;
}

// For a rank that is masked out.
NextGeneration ask(Council& council, int64_t timeout_ms) {
  const uint64_t before = newest_decision(council).generation;
  uint64_t answered = council.answer_of(council.rank());
  Deadline deadline = Deadline::in_ms(timeout_ms);
  for (;;) {
    const Proposal decision = newest_decision(council);
    if (decision.generation > before && decision.mask[static_cast<size_t>(council.rank())] == 0)
      return {static_cast<uint32_t>(decision.generation), decision.mask};
    const uint64_t roll_call = newest_roll_call(council);
    if (roll_call > before && roll_call > answered) {
      council.answer(answered = roll_call);
      deadline = Deadline::in_ms(2 * timeout_ms);  // the leader may wait for others
    }
    if (deadline.passed()) break;
    council.pause();
  }
  council.answer(0);
  fail(TERN_MASKED_OUT,
       "recover: the other ranks went on without rank {}, and none of them has let it in again within {} ms; they must call "
       "tern_exchange_recover with readmit at the same time",
       council.rank(), timeout_ms);
}

}  // namespace

AdmissionBoard::AdmissionBoard(const Topology& topology, SegmentSharer& sharer, Deadline deadline) {
  const std::vector<uint8_t> everybody(static_cast<size_t>(topology.num_ranks), 1);
  segments_ = sharer.share(HostSegment::create(sizeof(layout::AdmissionCell), sharer.shared_by()), "admission", everybody, deadline);
}

layout::AdmissionCell& AdmissionBoard::cell(int rank) const {
  return *reinterpret_cast<layout::AdmissionCell*>(segments_[static_cast<size_t>(rank)]->data());
}

NextGeneration next_generation(Council& council, const tern_recover_options& options, int64_t timeout_ms) {
  // Each attempt has a number of its own: what ranks said in the one before, who may be gone since, does not count.
  const auto last = council.proposal_of(council.rank());
  const uint64_t number = 1 + std::max<uint64_t>(council.generation(), last ? last->generation : 0);
  AgreementOptions agreement{number, std::vector<uint8_t>(static_cast<size_t>(council.num_ranks())), options.allow_mask != 0, timeout_ms};
  if (options.mask != nullptr)
    std::transform(options.mask, options.mask + council.num_ranks(), agreement.mask.begin(),
                   [](uint8_t m) { return static_cast<uint8_t>(m != 0); });
  NextGeneration next;
  try {
    const Proposal agreed = agree_on_mask(council, agreement);
    next = {static_cast<uint32_t>(agreed.generation), agreed.mask};
  } catch (const Failure& failure) {
    if (failure.status() != TERN_MASKED_OUT || options.readmit == 0) throw;
    return ask(council, timeout_ms);
  }
  bool any_masked = false;
  for (int r = 0; r < council.num_ranks(); ++r) any_masked = any_masked || council.is_masked(r);
  if (options.readmit != 0 && any_masked) admit(council, next, timeout_ms);
  return next;
}

NextGeneration next_generation(const Domain& domain, const AdmissionBoard& board, const tern_recover_options& options, int64_t timeout_ms) {
  DomainCouncil council(domain, board);
  return next_generation(council, options, timeout_ms);
}

void refuse_if_left_out(const Domain& domain, const AdmissionBoard& board) {
  DomainCouncil council(domain, board);
  refuse_if_left_out(council);
}

}  // namespace tern
