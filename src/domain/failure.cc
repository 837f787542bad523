// SPDX-License-Identifier: Apache-2.0
#include "domain/failure.h"

#include "base/error.h"
#include "domain/doorbell.h"

namespace tern {
namespace {

constexpr const char* kAdvice = "; the exchange stays failed until tern_exchange_recover is called on the ranks that go on";

std::string mismatch_text(const tern_failure& f) {
  return fmt::format("rank {} and rank {} called different things on lane {} at epoch {}: rank {} was in {}", f.waiter, f.awaited, f.lane,
                     f.expected_epoch, f.waiter, operation_name(f.operation));
}

}  // namespace

const char* operation_name(int operation) {
  switch (operation) {
    case TERN_OP_NONE: return "nothing";
    case TERN_OP_ROUTE: return "route";
    case TERN_OP_DISPATCH: return "dispatch";
    case TERN_OP_WEIGHTS: return "combine (weights on their way)";
    case TERN_OP_COMBINE: return "combine";
    case TERN_OP_RECOVER: return "recover";
  }
  return "an unknown operation";
}

std::string failure_text(const Domain& domain, const tern_failure& f) {
  if (f.status == TERN_MISMATCH) return mismatch_text(f) + kAdvice;
  if (f.status == TERN_MASKED_OUT)
    return fmt::format("rank {} was missing for too long, and the other ranks go on without it{}", f.awaited, kAdvice);
  if (f.operation == TERN_OP_RECOVER && f.waiter == f.awaited)
    return fmt::format("rank {} could not begin the next generation{}", f.waiter, kAdvice);
  if (f.status == TERN_SYSTEM_ERROR)
    return fmt::format("rank {} lost its connection to rank {}{}{}", f.waiter, f.awaited, describe_rank(domain.topology, f.awaited),
                       kAdvice);
  return fmt::format("rank {} waited until its deadline for rank {}{}: {}, lane {}, epoch {}, saw {}{}", f.waiter, f.awaited,
                     describe_rank(domain.topology, f.awaited), operation_name(f.operation), f.lane, f.expected_epoch, f.seen_epoch,
                     kAdvice);
}

std::optional<tern_failure> recorded_failure(const Domain& domain) {
  layout::FailureCell& cell = domain.failure(domain.rank);
  if (std::atomic_ref<uint32_t>(cell.state).load(std::memory_order_acquire) != layout::kFailureSet) return std::nullopt;
  tern_failure failure;
  copy_failure(cell, failure);
  return failure;
}

void announce_failure(const Domain& domain, const tern_failure& failure) {
  domain.for_each_member([&](int owner) {
    layout::FailureCell& cell = domain.failure(owner);
    std::atomic_ref<uint32_t> state(cell.state);
    uint32_t expected = layout::kFailureNone;
    if (!state.compare_exchange_strong(expected, layout::kFailureClaimed, std::memory_order_acq_rel)) return;
    copy_failure(failure, cell);
    state.store(layout::kFailureSet, std::memory_order_release);
    for (int lane = 0; lane < domain.layout.num_lanes; ++lane) ring(domain.doorbell(owner, lane));
  });
}

void throw_recorded(const Domain& domain, const tern_failure& failure) {
  const bool own = failure.waiter == domain.rank_of_group(domain.rank);
  throw Failure(own ? failure.status : TERN_ABORTED, failure_text(domain, failure));
}

}  // namespace tern
