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

// Recoveries are rare: looking again is simpler than being woken.
void pause() { std::this_thread::sleep_for(std::chrono::milliseconds(1)); }

uint64_t load(uint64_t& word) { return std::atomic_ref<uint64_t>(word).load(std::memory_order_seq_cst); }
void store(uint64_t& word, uint64_t value) { std::atomic_ref<uint64_t>(word).store(value, std::memory_order_seq_cst); }

}  // namespace

AdmissionBoard::AdmissionBoard(const Topology& topology, SegmentSharer& sharer, Deadline deadline)
    : rank_(topology.rank), num_ranks_(topology.num_ranks) {
  const std::vector<uint8_t> everybody(static_cast<size_t>(num_ranks_), 1);
  segments_ = sharer.share(HostSegment::create(sizeof(layout::AdmissionCell), sharer.shared_by()), "admission", everybody, deadline);
}

layout::AdmissionCell& AdmissionBoard::cell(int rank) const {
  return *reinterpret_cast<layout::AdmissionCell*>(segments_[static_cast<size_t>(rank)]->data());
}

void AdmissionBoard::admit(const std::vector<uint8_t>& masked_before, NextGeneration& next, int64_t timeout_ms) {
  int leader = 0;
  while (next.masked[static_cast<size_t>(leader)] != 0) ++leader;
  if (leader == rank_) return call_roll(masked_before, next, timeout_ms);
  const Deadline deadline = Deadline::in_ms(2 * timeout_ms);  // the leader waits itself
  for (;;) {
    const auto decision = read_proposal(cell(leader).decision, num_ranks_);
    if (decision && decision->generation == next.generation) {
      next.masked = decision->mask;
      return;
    }
    if (deadline.passed())
      fail(TERN_TIMEOUT, "recover: rank {} waited for rank {} to decide who is let in again; call it again", rank_, leader);
    pause();
  }
}

void AdmissionBoard::call_roll(const std::vector<uint8_t>& masked_before, NextGeneration& next, int64_t timeout_ms) {
  store(cell(rank_).roll_call, next.generation);
  const Deadline deadline = Deadline::in_ms(timeout_ms);
  for (bool all_here = false; !all_here;) {
    all_here = true;
    for (int r = 0; r < num_ranks_; ++r) {
      if (masked_before[static_cast<size_t>(r)] == 0) continue;
      const bool is_here = load(cell(r).present) == next.generation;
      next.masked[static_cast<size_t>(r)] = is_here ? 0 : 1;
      all_here = all_here && is_here;
    }
    if (deadline.passed()) break;
    if (!all_here) pause();
  }
  write_proposal(cell(rank_).decision, {next.generation, true, next.masked});
}

NextGeneration AdmissionBoard::ask(int64_t timeout_ms) {
  const uint64_t before = newest_decision().generation;
  uint64_t& present = cell(rank_).present;
  Deadline deadline = Deadline::in_ms(timeout_ms);
  for (;;) {
    const Proposal decision = newest_decision();
    if (decision.generation > before && decision.mask[static_cast<size_t>(rank_)] == 0)
      return {static_cast<uint32_t>(decision.generation), decision.mask};
    const uint64_t roll_call = newest_roll_call();
    if (roll_call > before && roll_call > load(present)) {
      store(present, roll_call);
      deadline = Deadline::in_ms(2 * timeout_ms);  // the leader may wait for others
    }
    if (deadline.passed()) break;
    pause();
  }
  store(present, 0);
  fail(TERN_MASKED_OUT,
       "recover: the other ranks went on without rank {}, and none of them has let it in again within {} ms; they must call "
       "tern_exchange_recover with readmit at the same time",
       rank_, timeout_ms);
}

Proposal AdmissionBoard::newest_decision() const {
  Proposal newest;
  for (int r = 0; r < num_ranks_; ++r) {
    auto decision = read_proposal(cell(r).decision, num_ranks_);
    if (decision && decision->generation > newest.generation) newest = std::move(*decision);
  }
  return newest;
}

uint64_t AdmissionBoard::newest_roll_call() const {
  uint64_t newest = 0;
  for (int r = 0; r < num_ranks_; ++r) newest = std::max(newest, load(cell(r).roll_call));
  return newest;
}

NextGeneration next_generation(const Domain& domain, AdmissionBoard& board, const tern_recover_options& options, int64_t timeout_ms) {
  AgreementOptions agreement{domain.generation + 1, std::vector<uint8_t>(static_cast<size_t>(domain.num_ranks)), options.allow_mask != 0,
                             timeout_ms};
  if (options.mask != nullptr)
    std::transform(options.mask, options.mask + domain.num_ranks, agreement.mask.begin(),
                   [](uint8_t m) { return static_cast<uint8_t>(m != 0); });
  NextGeneration next{agreement.generation, {}};
  try {
    next.masked = agree_on_mask(domain, agreement);
  } catch (const Failure& failure) {
    if (failure.status() != TERN_MASKED_OUT || options.readmit == 0) throw;
    return board.ask(timeout_ms);
  }
  const bool any_masked = std::find(domain.masked.begin(), domain.masked.end(), 1) != domain.masked.end();
  if (options.readmit != 0 && any_masked) board.admit(domain.masked, next, timeout_ms);
  return next;
}

}  // namespace tern
