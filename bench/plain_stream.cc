// SPDX-License-Identifier: Apache-2.0
#include "bench/plain_stream.h"

#include <sched.h>

#include <algorithm>

#include "base/error.h"

namespace tern::bench {
namespace {

constexpr int64_t kTimeoutMs = 30'000;

std::vector<int> rails_of(const Shape& shape, int rank) {
  std::vector<int> rails;
  for (int rail = rank % shape.ranks_per_node; rail < shape.num_ranks; rail += shape.ranks_per_node)
    if (rail != rank) rails.push_back(rail);
  return rails;
}

// Where the pieces of a rank begin, that leave it or arrive there, in the order of its rails; and the end of the last one.
std::vector<size_t> begins_of(const Workload& workload, int rank, bool leaving) {
  const Shape& shape = workload.shape();
  std::vector<size_t> begins{0};
  for (const int rail : rails_of(shape, rank)) {
    const int64_t rows = leaving ? workload.num_crossing(rank, shape.node_of(rail)) : workload.num_crossing(rail, shape.node_of(rank));
    begins.push_back(begins.back() + static_cast<size_t>(rows * shape.row_bytes()));
  }
  return begins;
}

}  // namespace

PlainStream::PlainStream(const Workload& workload, const Processes& processes)
    : workload_(workload), rails_(rails_of(workload.shape(), workload.rank())) {
  const std::unique_ptr<Bootstrap> bootstrap = processes.make_bootstrap();
  const HostSeat seat = seat_on_host(discover(*bootstrap, "", Deadline::in_ms(kTimeoutMs)));
  endpoint_ = make_endpoint(*bootstrap, {.seat = seat}, Deadline::in_ms(kTimeoutMs));
  for (Side* side : {&leaving_, &arriving_}) {
    const bool leaving = side == &leaving_;
    side->begins = begins_of(workload, workload.rank(), leaving);
    for (const int rail : rails_) {
      const std::vector<int> theirs = rails_of(workload.shape(), rail);
      const auto place = static_cast<size_t>(std::find(theirs.begin(), theirs.end(), workload.rank()) - theirs.begin());
      side->places.push_back(begins_of(workload, rail, !leaving)[place]);
    }
    const size_t num_bytes = std::max<size_t>(1, side->begins.back());
    side->memory = make_private_memory(static_cast<int64_t>(num_bytes));
    side->region = std::make_unique<Region>(endpoint_->register_memory(side->memory->data(), num_bytes));
    side->remotes.resize(static_cast<size_t>(processes.num_ranks()));
    bootstrap->allgather(&side->region->remote(), side->remotes.data(), sizeof(RemoteRegion), Deadline::in_ms(kTimeoutMs));
  }
  workload.fill_leaving(leaving_.memory->data());
}

// Whoever begins epoch e has seen e - 1 of its rails, who had then used up e - 2: so two at most are under way.
void PlainStream::move(const Side& from, const Side& to) {
  const Deadline deadline = Deadline::in_ms(kTimeoutMs);
  ++epoch_;
  std::vector<Put> puts;
  for (size_t i = 0; i < rails_.size(); ++i)
    puts.push_back({.peer = rails_[i],
                    .from = from.region.get(),
                    .from_offset = from.begins[i],
                    .to = to.remotes[static_cast<size_t>(rails_[i])],
                    .to_offset = from.places[i],
                    .num_bytes = from.begins[i + 1] - from.begins[i],
                    .epoch = epoch_,
                    .last = true,
                    .confirmed = false});
  const auto is_complete = [&](int rail) { return endpoint_->complete(rail, 0, epoch_); };
  for (;;) {
    std::erase_if(puts, [&](Put& put) { return endpoint_->try_put(put); });
    if (puts.empty() && std::all_of(rails_.begin(), rails_.end(), is_complete)) break;
    if (endpoint_->progress()) continue;
    ::sched_yield();  // there may be more ranks than cores
    if (deadline.passed()) fail(TERN_TIMEOUT, "the plain stream did not arrive within {} s", kTimeoutMs / 1000);
  }
  for (const int rail : rails_) endpoint_->retire(rail, 0, epoch_);
  endpoint_->flush(deadline);
}

void PlainStream::add_to(Contenders& contenders) {
  const auto add = [&](const char* operation, Result result, const Side& from, const Side& to) {
    contenders.push_back({operation, "plain stream", Kind::kCeiling, result, std::span(to.memory->data(), to.begins.back()),
                          [this, &from, &to] { move(from, to); }});
  };
  add("dispatch", Result::kCrossed, leaving_, arriving_);
  add("combine", Result::kLeaving, arriving_, leaving_);
}

}  // namespace tern::bench
