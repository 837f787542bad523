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

  std::vector<uint8_t> run() {
    refuse_if_masked();
    council_.propose(own_);
    while (!step()) {
      if (changed_) continue;
      if (deadline_.passed()) give_up_silent_ranks();
      council_.pause();
    }
    return own_.mask;
  }

 private:
  bool goes_on(int r) const { return own_.mask[static_cast<size_t>(r)] == 0; }

  // Looks at every proposal once; true when all who go on have committed to the same set as this rank.
  bool step() {
    changed_ = false;
    silent_.clear();
    bool all_same = true;
    bool all_committed = true;
    Proposal next = own_;
    for (int r = 0; r < council_.num_ranks(); ++r) {
      if (r == council_.rank() || council_.is_masked(r)) continue;
      if (!goes_on(r)) {
        refuse_if_left_behind_by(r);
        continue;
      }
      const auto theirs = council_.proposal_of(r);
      if (theirs && theirs->generation > own_.generation && theirs->mask[static_cast<size_t>(council_.rank())] != 0) refuse();
      if (!theirs || theirs->generation != own_.generation) {
        silent_.push_back(r);
        all_same = all_committed = false;
        continue;
      }
      for (size_t i = 0; i < next.mask.size(); ++i) next.mask[i] |= theirs->mask[i];
      const bool same = theirs->mask == own_.mask;
      all_same = all_same && same;
      all_committed = all_committed && same && theirs->committed;
    }
    next.committed = all_same && next.mask == own_.mask;
    if (next.mask != own_.mask || next.committed != own_.committed) {
      // Ranks that learn of a silent rank need as much time from here as the one that gave it up. Sets only grow, so this ends.
      if (next.mask != own_.mask) deadline_ = Deadline::in_ms(options_.timeout_ms);
      own_ = next;
      refuse_if_masked();
      council_.propose(own_);
      changed_ = true;
    }
    return own_.committed && all_committed;
  }

  void give_up_silent_ranks() {
    if (silent_.empty())
      fail(TERN_TIMEOUT, "recover: rank {} waited {} ms for the other ranks to agree; call it again", council_.rank(), options_.timeout_ms);
    std::string names;
    for (const int r : silent_) names += fmt::format("{}rank {}{}", names.empty() ? "" : ", ", r, describe_rank(council_.topology(), r));
    if (!options_.allow_mask)
      fail(TERN_TIMEOUT, "recover: rank {} waited {} ms for {}; set allow_mask to go on without", council_.rank(), options_.timeout_ms,
           names);
    for (const int r : silent_) own_.mask[static_cast<size_t>(r)] = 1;
    own_.committed = false;
    council_.propose(own_);
    deadline_ = Deadline::in_ms(options_.timeout_ms);
  }

  // A rank that this one wants to go on without may have gone on without this one long ago: then there is a new generation already.
  void refuse_if_left_behind_by(int r) {
    if (leaves_behind(council_.proposal_of(r), council_.rank(), own_.generation)) refuse();
  }

  void refuse_if_masked() const {
    if (!goes_on(council_.rank())) refuse();
  }

  [[noreturn]] void refuse() const { refuse_rank(council_.rank(), own_.generation); }

  Council& council_;
  const AgreementOptions& options_;
  Proposal own_;
  Deadline deadline_;
  std::vector<int> silent_;
  bool changed_ = false;
};

}  // namespace

void refuse_if_left_out(const Domain& domain) {
  const uint64_t next = domain.generation + 1;
  domain.for_each_member([&](int r) {
    if (leaves_behind(read_proposal(domain.proposal(r), domain.num_ranks), domain.rank, next)) refuse_rank(domain.rank, next);
  });
}

std::vector<uint8_t> agree_on_mask(Council& council, const AgreementOptions& options) { return Agreement(council, options).run(); }

}  // namespace tern
