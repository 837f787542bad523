// SPDX-License-Identifier: Apache-2.0
// Where ranks that are to begin a generation read what each of them has to say about it, and write it themselves. Everybody's word is the
// last one that was written; nobody waits for anybody here.
//
//   council.propose({generation, false, mask});
//   while (!council.proposal_of(3)) council.pause();
//
// Ranks of the council are numbered as in its topology. Threads: one at a time.
#pragma once

#include <cstdint>
#include <optional>

#include "domain/proposal.h"
#include "topology/topology.h"

namespace tern {

class Council {
 public:
  virtual ~Council() = default;

  virtual const Topology& topology() const = 0;
  int rank() const { return topology().rank; }
  int num_ranks() const { return topology().num_ranks; }

  // Of the generation that ends.
  virtual uint32_t generation() const = 0;
  virtual bool is_masked(int r) const = 0;

  // Among those who go on. nullopt: it has said nothing yet.
  virtual void propose(const Proposal& proposal) = 0;
  virtual std::optional<Proposal> proposal_of(int r) = 0;

  // Between those who go on and those who were masked out: see admission.h. Generations; 0: none.
  virtual void call_roll(uint64_t generation) = 0;
  virtual uint64_t roll_call_of(int r) = 0;
  virtual void answer(uint64_t generation) = 0;
  virtual uint64_t answer_of(int r) = 0;
  virtual void decide(const Proposal& decision) = 0;
  virtual std::optional<Proposal> decision_of(int r) = 0;

  // A moment, in which the others' words may come. Recoveries are rare: looking again is simpler than being woken.
  virtual void pause() = 0;
};

}  // namespace tern
