// SPDX-License-Identifier: Apache-2.0
#include "cuda/node_lane.h"

#include <sched.h>

#include <cstring>

#include "base/error.h"
#include "base/short_pauses.h"
#include "domain/failure.h"
#include "domain/given_up.h"

namespace tern::cuda {
namespace {

// Looks at words that no bell rings for: often while something is going on, else now and then.
class Looks {
 public:
  void pause() {
    const auto waited = Deadline::Clock::now() - start_;
    if (waited < kBusy)
      ::sched_yield();
    else
      std::this_thread::sleep_for(waited < kActive ? kShort : kLong);
  }

 private:
  static constexpr std::chrono::microseconds kBusy{100}, kActive{10'000}, kShort{20}, kLong{200};
  Deadline::Clock::time_point start_ = Deadline::Clock::now();
};

constexpr int kLooksPerCheck = 64;

cpu::LaneOptions lane_options(const NodeLane::Options& options) {
  return {.timeout_ms = options.timeout_ms,
          .spin = cpu::kNetworkSpin,
          .on_timeout = options.on_timeout,
          .grace_ms = cpu::grace_ms(options.timeout_ms),
          .num_graces = 1};
}

}  // namespace

NodeLane::NodeLane(const std::shared_ptr<DevicePool>& pool, const Domain& domain, const cpu::Network& network, SpanLog& spans,
                   Options options)
    : options_(std::move(options)),
      domain_(domain),
      pool_(pool),
      cell_(pool->device(), 1),
      talk_(pool, 1),
      lane_(domain, options_.index, lane_options(options_), spans),
      rail_(network.make_rail(lane_)),
      thread_([this] { run(); }) {}

NodeLane::~NodeLane() { stop(); }

void NodeLane::stop() {
  stop_ = true;
  if (thread_.joinable()) thread_.join();
}

void NodeLane::restart(const cpu::Network& network) {
  stop();
  std::memset(static_cast<void*>(cell_.data()), 0, sizeof(kernels::HostCell));
  check(cudaMemsetAsync(talk_.data(), 0, sizeof(kernels::HostTalk), pool_->stream().get()), "clearing what the GPU knows of its host");
  pool_->stream().wait(Deadline::in_ms(options_.timeout_ms), "clearing what the GPU knows of its host");
  asked_ = answered_ = granted_ = begun_ = 0;
  epochs_.restart();
  lane_.restart();
  rail_ = network.make_rail(lane_);
  {
    const std::lock_guard lock(mutex_);
    commands_.clear();
  }
  stop_ = false;
  thread_ = std::thread([this] { run(); });
}

void NodeLane::abandon_memory() {
  stop();
  static_cast<void>(new auto(std::move(cell_)));
  static_cast<void>(new auto(std::move(talk_)));
}

uint64_t NodeLane::add(Command command, const void* owner) {
  const std::lock_guard lock(mutex_);
  commands_.emplace(next_number_, Entry{std::move(command), owner});
  return next_number_++;
}

void NodeLane::forget(const void* owner) {
  const std::lock_guard lock(mutex_);
  std::erase_if(commands_, [&](const auto& command) { return command.second.owner == owner; });
}

NodeLane::Command NodeLane::take(uint64_t number) {
  const std::lock_guard lock(mutex_);
  const auto found = commands_.find(number);
  if (found == commands_.end())
    fail(TERN_INTERNAL_ERROR, "lane {}: the GPU asks for command {}, which is not known", options_.index, number);
  Command command = found->second.command;
  if (found->second.owner == nullptr) commands_.erase(found);
  return command;
}

bool NodeLane::has_asked() const { return load_acquire(cell_[0].asked) > asked_; }

void NodeLane::grant(uint64_t epoch) {
  if (epoch <= granted_) return;
  tell_absences();
  granted_ = epoch;
  store_release(cell_[0].granted, epoch);
}

void NodeLane::answer(uint64_t epoch) {
  tell_absences();
  store_release(cell_[0].answered, kernels::HostCell::answer(++answered_, epoch % layout::kNumBanks));
}

void NodeLane::await_gpu(tern_operation operation) {
  if (!masks()) return await_step(operation);
  {
    // The GPU may be waiting for a rank of the node.
    const cpu::ShownWait shown(domain_.doorbell(domain_.rank, options_.index), own_rank());
    await_step(operation);
  }
  options_.hear_gpu();  // what goes to other nodes says whose share it lacks
  lane_.hear_given_up();
}

// Several kernels may lie between two steps, each with waits of its own.
void NodeLane::await_step(tern_operation operation) {
  constexpr int64_t kGpuShare = 8;
  const Deadline deadline = Deadline::in_ms(kGpuShare * options_.timeout_ms);
  Deadline shows_late_wait = Deadline::in_ms(options_.timeout_ms);
  Looks looks;
  for (int turn = 0; !has_asked(); ++turn) {
    looks.pause();
    if (turn % kLooksPerCheck != 0) continue;
    options_.hear_gpu();
    tell_absences();
    if (shows_late_wait.passed()) {
      lane_.show_late_wait(own_rank());
      shows_late_wait = deadline;
    }
    const bool ends = deadline.passed() || stop_;
    if (!ends || has_asked()) continue;  // who stops a lane has waited for its GPU
    announce_failure(domain_, {TERN_TIMEOUT, own_rank(), own_rank(), options_.index, operation, 0, asked_ + 1, asked_});
    fail(TERN_TIMEOUT, "{}: rank {} waited for its own GPU, lane {}", operation_name(operation), own_rank(), options_.index);
  }
  ++asked_;
}

void NodeLane::meet(const cpu::RailTrip& trip) {
  if (!masks()) return;
  const cpu::RoundTrip meeting{.operation = trip.operation, .shape = trip.shape, .bank = {}};
  lane_.run(
      meeting, [](int64_t, uint64_t) {},
      [&](int64_t, uint64_t epoch) {
        domain_.for_each_member([&](int peer) { lane_.receive_from(meeting, epoch, peer, [](const std::byte*) {}); });
      });
}

// Before an answer, which is about what has come from those who are not missing; and while the GPU may be waiting for them.
void NodeLane::tell_absences() {
  if (!masks()) return;
  if (is_given_up(domain_, own_rank())) fail(TERN_MASKED_OUT, "lane {}: the other ranks have given up rank {}", options_.index, own_rank());
  uint64_t gone = 0, absent = 0;
  for (int r = 0; r < domain_.num_ranks; ++r) gone |= uint64_t{is_given_up(domain_, domain_.rank_of_group(r))} << r;
  for (int node = 0; node < rail_->num_nodes(); ++node) absent |= uint64_t{!rail_->serves(node)} << node;
  store_release(cell_[0].gone_ranks, gone);
  store_release(cell_[0].absent_nodes, absent);
}

// False: there will be none.
bool NodeLane::await_command() {
  Looks looks;
  for (int turn = 1; !has_asked(); ++turn) {
    if (const uint64_t next = rail_->next_epoch(); next > granted_ && rail_->has_room(next)) grant(next);
    looks.pause();
    if (turn % kLooksPerCheck != 0) continue;
    options_.hear_gpu();
    const bool stops = stop_;
    if (stops && !has_asked()) return false;
  }
  ++asked_;
  return true;
}

void NodeLane::run() {
  allow_short_pauses();
  try {
    options_.enter_gpu();
    while (await_command()) take(cell_[0].commands[begun_++ % 2])(*this);
  } catch (const std::exception& error) {
    const tern_status status = status_of(error) == TERN_MASKED_OUT ? TERN_MASKED_OUT : TERN_INTERNAL_ERROR;
    give_up({status, own_rank(), own_rank(), options_.index, TERN_OP_NONE, 0, asked_, answered_});
  }
}

// With what is recorded; if nothing is, with `failure`. Of a rank that the others go on without, they hear nothing.
void NodeLane::give_up(const tern_failure& failure) {
  if (failure.status != TERN_MASKED_OUT) announce_failure(domain_, failure);
  copy_failure(failure.status != TERN_MASKED_OUT ? recorded_failure(domain_).value_or(failure) : failure, cell_[0].failure);
  store_release(cell_[0].answered, kernels::HostCell::kGaveUp);
}

}  // namespace tern::cuda
