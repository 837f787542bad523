// SPDX-License-Identifier: Apache-2.0
// How a generation begins: who goes on, and which ranks that were masked out come back.
//
//   AdmissionBoard board(topology, *sharer, deadline);                                  // with the exchange, all ranks
//   const NextGeneration next = next_generation(domain, board, recover_options, timeout_ms);
//   const NextGeneration next = next_generation(council, recover_options, timeout_ms);      // where the ranks are no single domain
//
// The board is a small segment of each rank that everybody maps for as long as the exchange lives, also with ranks that are masked out, who share
// no windows with the others any more: the council (council.h) of a domain. Those who go on agree (agreement.h). With `readmit` the lowest rank of
// them calls the roll then, the masked ones that are there answer, and it decides:
//
//   leader:   roll_call = generation; waits until all masked ranks have answered, or the deadline; decision = who stays masked
//   masked:   answers each roll call; comes in with the first decision after it has asked that does not mask it
//   others:   wait for the leader's decision
//
// A roll call is answered anew in each recovery, so that nobody waits for a rank that had asked and died.
#pragma once

#include <tern/tern.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "domain/council.h"
#include "domain/domain.h"
#include "domain/proposal.h"
#include "memory/sharing.h"

namespace tern {

struct NextGeneration {
  uint32_t generation = 0;
  std::vector<uint8_t> masked;  // [num_ranks]
};

class AdmissionBoard {
 public:
  // Collective.
  AdmissionBoard(const Topology& topology, SegmentSharer& sharer, Deadline deadline);

  layout::AdmissionCell& cell(int rank) const;

 private:
  std::vector<std::shared_ptr<Segment>> segments_;  // [num_ranks]
};

// One recovery, up to the windows of the new generation. Collective among those who go on, and with options.readmit those who come back.
// TERN_TIMEOUT: somebody did not answer, or the leader did not decide. TERN_MASKED_OUT: the others go on without this rank, and nobody lets
// it in until the deadline.
NextGeneration next_generation(Council& council, const tern_recover_options& options, int64_t timeout_ms);
NextGeneration next_generation(const Domain& domain, const AdmissionBoard& board, const tern_recover_options& options, int64_t timeout_ms);

// As in agreement.h.
void refuse_if_left_out(const Domain& domain, const AdmissionBoard& board);

}  // namespace tern
