// SPDX-License-Identifier: Apache-2.0
#include "domain/agreement.h"

#include <algorithm>

#include "base/error.h"
#include "domain/doorbell.h"
#include "domain/proposal.h"

namespace tern {
namespace {

void publish(const Domain& domain, const Proposal& proposal) {
  write_proposal(domain.proposal(domain.rank), proposal);
  domain.for_each_member([&](int peer) { ring(domain.doorbell(peer, 0)); });
}

[[noreturn]] void refuse(int rank, uint64_t generation) {
  fail(TERN_MASKED_OUT,
       "the other ranks go on without rank {} in generation {}; to join again, all ranks call tern_exchange_recover with readmit, or make "
       "a new "
       "exchange",
       rank, generation);
}

// Has rank r gone on to the generation without this one?
bool has_left_behind(const Domain& domain, int r, uint64_t generation) {
  const auto theirs = read_proposal(domain.proposal(r), domain.num_ranks);
  return theirs && theirs->generation == generation && theirs->committed && theirs->mask[static_cast<size_t>(domain.rank)] != 0;
}

class Agreement {
 public:
  Agreement(const Domain& domain, const AgreementOptions& options)
      : domain_(domain), options_(options), own_{options.generation, false, options.mask}, deadline_(Deadline::in_ms(options.timeout_ms)) {
    for (size_t r = 0; r < own_.mask.size(); ++r) own_.mask[r] |= domain.masked[r];
  }

  std::vector<uint8_t> run() {
    refuse_if_masked();
    publish(domain_, own_);
    layout::Doorbell& bell = domain_.doorbell(domain_.rank, 0);
    for (;;) {
      const uint32_t heard = listen(bell);
      const bool done = step();
      if (done || changed_) {
        stop_listening(bell);
        if (done) return own_.mask;
        continue;
      }
      if (deadline_.passed()) {
        stop_listening(bell);
        give_up_silent_ranks();
        continue;
      }
      sleep(bell, heard, std::min<std::chrono::nanoseconds>(deadline_.remaining(), std::chrono::milliseconds(20)));
    }
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
    for (int r = 0; r < domain_.num_ranks; ++r) {
      if (r == domain_.rank || domain_.is_masked(r)) continue;
      if (!goes_on(r)) {
        refuse_if_left_behind_by(r);
        continue;
      }
      const auto theirs = read_proposal(domain_.proposal(r), domain_.num_ranks);
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
      publish(domain_, own_);
      changed_ = true;
    }
    return own_.committed && all_committed;
  }

  void give_up_silent_ranks() {
    if (silent_.empty())
      fail(TERN_TIMEOUT, "recover: rank {} waited {} ms for the other ranks to agree; call it again", domain_.rank, options_.timeout_ms);
    std::string names;
    for (const int r : silent_) names += fmt::format("{}rank {}{}", names.empty() ? "" : ", ", r, describe_rank(domain_.topology, r));
    if (!options_.allow_mask)
      fail(TERN_TIMEOUT, "recover: rank {} waited {} ms for {}; set allow_mask to go on without", domain_.rank, options_.timeout_ms, names);
    for (const int r : silent_) own_.mask[static_cast<size_t>(r)] = 1;
    own_.committed = false;
    publish(domain_, own_);
    deadline_ = Deadline::in_ms(options_.timeout_ms);
  }

  // A rank that this one wants to go on without may have gone on without this one long ago: then there is a new generation already.
  void refuse_if_left_behind_by(int r) const {
    if (has_left_behind(domain_, r, own_.generation)) refuse(domain_.rank, own_.generation);
  }

  void refuse_if_masked() const {
    if (!goes_on(domain_.rank)) refuse(domain_.rank, own_.generation);
  }

  const Domain& domain_;
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
    if (has_left_behind(domain, r, next)) refuse(domain.rank, next);
  });
}

std::vector<uint8_t> agree_on_mask(const Domain& domain, const AgreementOptions& options) { return Agreement(domain, options).run(); }

}  // namespace tern
