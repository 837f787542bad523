// SPDX-License-Identifier: Apache-2.0
#include "domain/agreement.h"

#include <algorithm>

#include "base/error.h"
#include "domain/domain.h"
#include "domain/proposal.h"

namespace tern {
namespace {

[[noreturn]] void refuse_rank(int rank, uint64_t generation) {
  fail(TERN_MASKED_OUT,
       "the other ranks go on without rank {} in generation {}; to join again, all ranks call tern_exchange_recover with readmit, or make "
       "a new exchange",
       rank, generation);
}

// Did it go on to the generation, or a later one, without that rank?
bool leaves_behind(const std::optional<Proposal>& theirs, int rank, uint64_t generation) {
  return theirs && theirs->generation >= generation && theirs->committed && theirs->mask[static_cast<size_t>(rank)] != 0;
}

class Agreement {
 public:
  Agreement(Council& council, const AgreementOptions& options)
      : council_(council),
        options_(options),
        own_{options.generation, false, options.mask},
        deadline_(Deadline::in_ms(options.timeout_ms)) {
    for (size_t r = 0; r < own_.mask.size(); ++r)
      if (council.is_masked(static_cast<int>(r))) own_.mask[r] = 1;
  }

  Proposal run() {
    refuse_if_masked();
    council_.propose(own_);
    while (!step()) {
      if (changed_) continue;
      if (deadline_.passed() && !has_patience()) give_up_late_ranks();
      council_.pause();
    }
    return own_;
  }

 private:
  bool goes_on(int r) const { return own_.mask[static_cast<size_t>(r)] == 0; }

  // Looks at every proposal once; true when all who go on have committed to the same set as this rank.
  bool step() {
    changed_ = false;
    late_.clear();
    bool all_same = true, all_committed = true;
    Proposal next = own_;
    for (int r = 0; r < council_.num_ranks(); ++r) {
      if (r == council_.rank() || council_.is_masked(r)) continue;
      const auto theirs = council_.proposal_of(r);
      // Also one that this rank wants to go on without may have gone on without this one long ago.
      if (leaves_behind(theirs, council_.rank(), council_.generation() + 1)) refuse();
      if (!goes_on(r)) continue;
      if (theirs && theirs->generation > own_.generation) {
        join(theirs->generation);
        return false;
      }
      const bool is_here = theirs && theirs->generation == own_.generation, same = is_here && theirs->mask == own_.mask;
      for (size_t i = 0; is_here && i < next.mask.size(); ++i) next.mask[i] |= theirs->mask[i];
      // Who is there does at once as the others do. One that died in the middle stays behind.
      if (!same || (own_.committed && !theirs->committed)) late_.push_back(r);
      all_same = all_same && same;
      all_committed = all_committed && same && theirs->committed;
    }
    next.committed = all_same && next.mask == own_.mask;
    if (next.mask != own_.mask || next.committed != own_.committed) change(next);
    return own_.committed && all_committed;
  }

  void change(const Proposal& next) {
    own_ = next;
    refuse_if_masked();
    council_.propose(own_);
    deadline_ =
        Deadline::in_ms(options_.timeout_ms);  // the others need as much time from here to do the same. Sets only grow, so this ends
    changed_ = true;
  }

  // Somebody is an attempt ahead. It may try again and again, which does not give this one a deadline of its own each time: a moment for the rest.
  void join(uint64_t generation) {
    const Deadline before = deadline_, moment = Deadline::in_ms(options_.timeout_ms / 4);
    change({generation, false, own_.mask});
    deadline_ = before.time() < moment.time() ? moment : before;
  }

  // Ranks that have said something get a second deadline, once: one may have come just now, or wait in the attempt before for what was agreed on.
  bool has_patience() {
    const auto has_spoken = [&](int r) {
      const auto theirs = council_.proposal_of(r);
      return theirs && theirs->generation > council_.generation();
    };
    if (was_patient_ || std::ranges::none_of(late_, has_spoken)) return false;
    deadline_ = Deadline::in_ms(options_.timeout_ms);
    return was_patient_ = true;
  }

  void give_up_late_ranks() {
    std::string names;
    for (const int r : late_) names += fmt::format("{}rank {}{}", names.empty() ? "" : ", ", r, describe_rank(council_.topology(), r));
    if (!options_.allow_mask)
      fail(TERN_TIMEOUT, "recover: rank {} waited {} ms for {}; set allow_mask to go on without", council_.rank(), options_.timeout_ms,
           names);
    Proposal without = own_;
    without.committed = false;
    for (const int r : late_) without.mask[static_cast<size_t>(r)] = 1;
    change(without);
  }

  void refuse_if_masked() {
    if (!goes_on(council_.rank())) refuse();
  }

  // What was proposed is void, so that it does not count if this rank comes back.
  [[noreturn]] void refuse() {
    const uint64_t generation = own_.generation;
    council_.propose({0, false, std::vector<uint8_t>(own_.mask.size())});
    refuse_rank(council_.rank(), generation);
  }

  Council& council_;
  const AgreementOptions& options_;
  Proposal own_;
  Deadline deadline_;
  std::vector<int> late_;
  bool changed_ = false, was_patient_ = false;
};

}  // namespace

void refuse_if_left_out(Council& council) {
  const uint64_t next = council.generation() + 1;
  for (int r = 0; r < council.num_ranks(); ++r) {
    if (r != council.rank() && !council.is_masked(r) && leaves_behind(council.proposal_of(r), council.rank(), next))
      refuse_rank(council.rank(), next);
  }
}

Proposal agree_on_mask(Council& council, const AgreementOptions& options) { return Agreement(council, options).run(); }

}  // namespace tern
