// SPDX-License-Identifier: Apache-2.0
// Ranks as threads: they meet in one room.
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <optional>

#include "base/error.h"
#include "topology/bootstrap.h"

namespace tern {
namespace {

class Room {
 public:
  explicit Room(int num_ranks) : seats_(num_ranks) {}

  int num_ranks() const { return static_cast<int>(seats_.size()); }

  void allgather(int rank, const void* send, void* recv, size_t bytes, Deadline deadline) {
    std::unique_lock lock(mutex_);
    if (failure_) throw *failure_;
    Seat& seat = seats_[rank];
    seat.arrived = true;
    seat.bytes = bytes;
    // A copy: this rank may give up and return while others still read.
    const auto* begin = static_cast<const std::byte*>(send);
    seat.sent.assign(begin, begin + bytes);
    const uint64_t round = round_;
    if (who_is([](const Seat& s) { return !s.arrived; }).empty()) finish_round();
    changed_.wait_until(lock, deadline.time(), [&] { return round_ != round || failed(); });
    if (round_ == round) {
      if (!failure_) record_failure();
      changed_.notify_all();
      throw *failure_;
    }
    // The next round cannot finish without this rank, so the result is still that of its own.
    if (bytes != 0) std::memcpy(recv, gathered_.data(), gathered_.size());
  }

  void leave(int rank) {
    const std::lock_guard lock(mutex_);
    seats_[rank].gone = true;
    changed_.notify_all();
  }

 private:
  struct Seat {
    bool arrived = false;
    bool gone = false;
    size_t bytes = 0;
    std::vector<std::byte> sent;
  };

  template <typename Predicate>
  std::vector<int> who_is(Predicate predicate) const {
    std::vector<int> result;
    for (int r = 0; r < num_ranks(); ++r)
      if (predicate(seats_[r])) result.push_back(r);
    return result;
  }

  std::vector<int> gone() const {
    return who_is([](const Seat& seat) { return seat.gone && !seat.arrived; });
  }

  bool failed() const { return failure_ || !gone().empty(); }

  void finish_round() {
    for (int r = 1; r < num_ranks(); ++r)
      if (seats_[r].bytes != seats_[0].bytes) {
        failure_.emplace(TERN_MISMATCH, fmt::format("bootstrap: rank {} gathers {} bytes, rank 0 gathers {}; all ranks must agree", r,
                                                    seats_[r].bytes, seats_[0].bytes));
        changed_.notify_all();
        return;
      }
    gathered_.clear();
    for (Seat& seat : seats_) {
      gathered_.insert(gathered_.end(), seat.sent.begin(), seat.sent.end());
      seat.arrived = false;
    }
    ++round_;
    changed_.notify_all();
  }

  // Somebody has gone, or else the deadline has passed.
  void record_failure() {
    if (const std::vector<int> left = gone(); !left.empty()) {
      failure_.emplace(TERN_ABORTED, fmt::format("bootstrap: {} of {} ranks: gone (group destroyed)", name_ranks(left), num_ranks()));
      return;
    }
    const std::vector<int> missing = who_is([](const Seat& seat) { return !seat.arrived; });
    failure_.emplace(TERN_TIMEOUT, fmt::format("bootstrap: waited for {} of {} ranks until the deadline; does a thread play each rank?",
                                               name_ranks(missing), num_ranks()));
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Seat> seats_;
  std::vector<std::byte> gathered_;
  uint64_t round_ = 0;
  std::optional<Failure> failure_;
};

class LocalBootstrap final : public Bootstrap {
 public:
  LocalBootstrap(int rank, std::shared_ptr<Room> room) : rank_(rank), room_(std::move(room)) {}
  ~LocalBootstrap() override { room_->leave(rank_); }

  int rank() const override { return rank_; }
  int num_ranks() const override { return room_->num_ranks(); }
  void allgather(const void* send, void* recv, size_t bytes, Deadline deadline) override {
    room_->allgather(rank_, send, recv, bytes, deadline);
  }

 private:
  int rank_;
  std::shared_ptr<Room> room_;
};

}  // namespace

std::vector<std::unique_ptr<Bootstrap>> make_local_bootstraps(int num_ranks) {
  if (num_ranks < 1) fail(TERN_INVALID_ARGUMENT, "group: {} ranks cannot be, at least 1 is needed", num_ranks);
  const auto room = std::make_shared<Room>(num_ranks);
  std::vector<std::unique_ptr<Bootstrap>> result;
  for (int r = 0; r < num_ranks; ++r) result.push_back(std::make_unique<LocalBootstrap>(r, room));
  return result;
}

}  // namespace tern
