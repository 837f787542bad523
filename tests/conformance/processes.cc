// SPDX-License-Identifier: Apache-2.0
#include "conformance/processes.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstring>
#include <new>
#include <stdexcept>
#include <thread>

namespace tern::conformance {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int32_t kMostRanks = 64;
constexpr size_t kChunkBytes = 4096;
constexpr uint64_t kReturned = UINT64_MAX;  // a stage

}  // namespace

// Lives in memory that parent and children share. Two banks: a rank that is one gather ahead leaves the other bank alone.
class SharedBoard {
 public:
  struct Slot {
    alignas(64) std::atomic<uint64_t> num_arrivals{0};
    std::atomic<uint64_t> stage{0};
    uint8_t data[2][kChunkBytes] = {};
  };

  static SharedBoard* create(Clock::time_point deadline) {
    void* memory = mmap(nullptr, sizeof(SharedBoard), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error(fmt::format("mmap of {} bytes: {}", sizeof(SharedBoard), std::strerror(errno)));
    return new (memory) SharedBoard(deadline);
  }
  static void operator delete(void* memory) { munmap(memory, sizeof(SharedBoard)); }

  // Rank -1 is the parent.
  Slot& slot(int32_t rank) { return slots_[rank + 1]; }
  Clock::time_point deadline() const { return deadline_; }

  bool wait(const std::atomic<uint64_t>& counter, uint64_t value) const {
    while (counter.load(std::memory_order_acquire) < value) {
      if (Clock::now() >= deadline_) return false;
      std::this_thread::sleep_for(std::chrono::microseconds(100));
    }
    return true;
  }
  // For an arrival; a rank that has returned does not come any more.
  bool wait(const Slot& slot, uint64_t num_arrivals) const {
    while (slot.num_arrivals.load(std::memory_order_acquire) < num_arrivals) {
      const bool has_returned = slot.stage.load(std::memory_order_acquire) == kReturned;
      if (has_returned && slot.num_arrivals.load(std::memory_order_acquire) < num_arrivals) return false;
      if (Clock::now() >= deadline_) return false;
      std::this_thread::sleep_for(std::chrono::microseconds(100));
    }
    return true;
  }

 private:
  explicit SharedBoard(Clock::time_point deadline) : deadline_(deadline) {}

  const Clock::time_point deadline_;  // the steady clock is the same in all processes
  Slot slots_[kMostRanks + 1];
};

namespace {

void wait_for_stage(SharedBoard& board, int32_t rank, uint64_t stage) {
  if (!board.wait(board.slot(rank).stage, stage))
    throw std::runtime_error(fmt::format("rank {} did not reach stage {} in time", rank, stage));
}

void write_all(int fd, const std::string& text) {
  for (size_t done = 0; done < text.size();) {
    const ssize_t count = write(fd, text.data() + done, text.size() - done);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return;  // the parent is gone
    done += static_cast<size_t>(count);
  }
}

// And collects them, and closes their pipes.
template <typename Children>
void end_all(Children& children) {
  for (auto& child : children) {
    if (child.pid > 0) {
      kill(child.pid, SIGKILL);
      waitpid(child.pid, nullptr, 0);
    }
    if (child.pipe >= 0) close(child.pipe);
  }
}

// The report and a closing mark, by which the parent tells a report from a child that died on the way.
constexpr char kEndMark = '\x04';

[[noreturn]] void run_child(SharedBoard& board, int32_t rank, int32_t num_ranks, const RankProcesses::Body& body, int report_fd) {
  std::string report;
  try {
    RankSeat seat(board, rank, num_ranks);
    report = body(seat);
  } catch (const std::exception& error) {
    report = fmt::format("rank {}: {}", rank, error.what());
  }
  // Nobody waits for a stage of a rank that has ended.
  board.slot(rank).stage.store(kReturned, std::memory_order_release);
  write_all(report_fd, report + kEndMark);
  _exit(0);
}

}  // namespace

// Of no bytes, it is a barrier.
int RankSeat::allgather(void* context, const void* send, void* recv, size_t bytes) {
  auto& seat = *static_cast<RankSeat*>(context);
  size_t done = 0;
  do {
    const size_t chunk = std::min(kChunkBytes, bytes - done), bank = seat.num_gathers_++ % 2;
    SharedBoard::Slot& own = seat.board_.slot(seat.rank_);
    if (chunk > 0) std::memcpy(own.data[bank], static_cast<const uint8_t*>(send) + done, chunk);
    own.num_arrivals.store(seat.num_gathers_, std::memory_order_release);
    for (int32_t rank = 0; rank < seat.num_ranks_; ++rank) {
      SharedBoard::Slot& slot = seat.board_.slot(rank);
      if (!seat.board_.wait(slot, seat.num_gathers_)) return 1;
      if (chunk > 0) std::memcpy(static_cast<uint8_t*>(recv) + static_cast<size_t>(rank) * bytes + done, slot.data[bank], chunk);
    }
    done += chunk;
  } while (done < bytes);
  return 0;
}

void RankSeat::set_stage(uint64_t stage) { board_.slot(rank_).stage.store(stage, std::memory_order_release); }
void RankSeat::wait_for_stage(int32_t rank, uint64_t stage) const { conformance::wait_for_stage(board_, rank, stage); }

RankProcesses::RankProcesses(int32_t num_ranks, int64_t timeout_ms, const Body& body) {
  if (num_ranks > kMostRanks) throw std::runtime_error(fmt::format("{} processes are more than {}", num_ranks, kMostRanks));
  board_.reset(SharedBoard::create(Clock::now() + std::chrono::milliseconds(timeout_ms)));
  std::fflush(nullptr);
  const pid_t parent = getpid();
  const auto require = [&](bool works, const char* call, int32_t rank) {
    if (works) return;
    const int error = errno;
    end_all(children_);  // an object that did not come to be has no destructor to do it
    throw std::runtime_error(fmt::format("{} for rank {}: {}", call, rank, std::strerror(error)));
  };
  for (int32_t rank = 0; rank < num_ranks; ++rank) {
    int ends[2];
    require(pipe2(ends, O_CLOEXEC) == 0, "pipe2", rank);
    children_.push_back({-1, ends[0]});
    const pid_t pid = fork();
    if (pid == 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      if (getppid() != parent) _exit(1);  // the parent died before prctl
      close(ends[0]);
      run_child(*board_, rank, num_ranks, body, ends[1]);
    }
    const int error = errno;
    close(ends[1]);
    errno = error;
    require(pid > 0, "fork", rank);
    children_.back().pid = pid;
  }
}

RankProcesses::~RankProcesses() { end_all(children_); }

void RankProcesses::set_stage(uint64_t stage) { board_->slot(-1).stage.store(stage, std::memory_order_release); }
void RankProcesses::wait_for_stage(int32_t rank, uint64_t stage) const { conformance::wait_for_stage(*board_, rank, stage); }

std::vector<RankReport> RankProcesses::join() {
  std::vector<RankReport> reports(children_.size());
  for (size_t rank = 0; rank < children_.size(); ++rank) {
    Child& child = children_[rank];
    RankReport& report = reports[rank];
    for (;;) {
      const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(board_->deadline() - Clock::now()).count();
      pollfd readable = {child.pipe, POLLIN, 0};
      if (left <= 0 || poll(&readable, 1, static_cast<int>(left)) <= 0) break;
      char buffer[4096];
      const ssize_t count = read(child.pipe, buffer, sizeof buffer);
      if (count < 0) break;
      report.text.append(buffer, static_cast<size_t>(count));
      if (count > 0) continue;
      report.finished = !report.text.empty() && report.text.back() == kEndMark;
      break;
    }
    if (report.finished)
      report.text.pop_back();
    else
      kill(child.pid, SIGKILL);
    waitpid(child.pid, nullptr, 0);
    child.pid = -1;
  }
  return reports;
}

}  // namespace tern::conformance
