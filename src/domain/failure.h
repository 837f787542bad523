// SPDX-License-Identifier: Apache-2.0
// The error record of a generation: who waited for whom (ranks of the group), in which operation, lane and epoch. The first rank that fails
// writes it into every window of its domain, so that all the others stop waiting too.
#pragma once

#include <tern/tern.h>

#include <optional>
#include <string>

#include "domain/domain.h"

namespace tern {

const char* operation_name(int operation);

// "rank 3 waited 10 s for rank 1 (process 1234 is stopped): dispatch, lane 0, epoch 41, saw 40"
std::string failure_text(const Domain& domain, const tern_failure& failure);

// What is recorded in this rank's window, if anything.
std::optional<tern_failure> recorded_failure(const Domain& domain);

// The same record elsewhere: tern_failure, layout::FailureCell (but for its state), layout::FailureRecord.
template <typename From, typename To>
void copy_failure(const From& from, To& to) {
  to.status = static_cast<decltype(to.status)>(from.status);
  to.waiter = from.waiter;
  to.awaited = from.awaited;
  to.lane = from.lane;
  to.operation = from.operation;
  to.expected_epoch = from.expected_epoch;
  to.seen_epoch = from.seen_epoch;
}

// Records the failure in every window where none is yet, and wakes everybody up. Never waits.
void announce_failure(const Domain& domain, const tern_failure& failure);

// Throws what is recorded: TERN_ABORTED, or the recorded status on the rank that waited.
[[noreturn]] void throw_recorded(const Domain& domain, const tern_failure& failure);

}  // namespace tern
