// SPDX-License-Identifier: Apache-2.0
#include "tools/board.h"

#include <fcntl.h>
#include <fmt/ranges.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <ctime>
#include <thread>
#include <utility>

#include "base/deadline.h"
#include "base/error.h"

namespace tern::tools {
namespace {

using Word = std::atomic<uint32_t>;
static_assert(Word::is_always_lock_free && sizeof(Word) == 4);

// std::atomic::wait is for threads of one process; ranks may be processes.
void futex_wait(Word& word, uint32_t seen, std::chrono::nanoseconds at_most) {
  const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(at_most);
  const timespec time{static_cast<time_t>(seconds.count()), static_cast<long>((at_most - seconds).count())};
  syscall(SYS_futex, &word, FUTEX_WAIT, seen, &time, nullptr, 0);
}

void futex_wake_all(Word& word) { syscall(SYS_futex, &word, FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0); }

constexpr size_t kPageBytes = 4096;
constexpr size_t round_to_pages(size_t num_bytes) { return (num_bytes + kPageBytes - 1) / kPageBytes * kPageBytes; }

}  // namespace

struct Board::Control {
  alignas(64) Word arrived;
  alignas(64) Word phase;  // counts barriers; who waits, waits for it to change
  alignas(64) Word failed;
};

struct Board::RankArea {
  static constexpr size_t kGatherBytes = 14336;
  alignas(64) Word next_phase;  // one more than the last barrier that this rank has reached
  std::byte gather[kGatherBytes];
  char failure[2048];
};

Board Board::create(const BoardOptions& options) {
  Fd fd(memfd_create("tern-board", MFD_CLOEXEC));
  if (!fd) fail_errno("memfd_create", "no shared memory for the ranks");
  Board board(options, std::move(fd));
  return board;
}

Board Board::apart(const BoardOptions& options, Gather gather) {
  Board board = create(options);
  board.gather_ = std::move(gather);
  return board;
}

Board Board::attach(const BoardOptions& options, pid_t owner, int owner_fd) {
  const std::string path = fmt::format("/proc/{}/fd/{}", owner, owner_fd);
  Fd fd(open(path.c_str(), O_RDWR | O_CLOEXEC));
  if (!fd) fail_errno("open", fmt::format("shared memory of rank 0 at {} (ranks must be processes of one user on one host)", path));
  return Board(options, std::move(fd));
}

Board::Board(const BoardOptions& options, Fd fd) : fd_(std::move(fd)), num_ranks_(options.num_ranks) {
  const size_t control_bytes = round_to_pages(sizeof(Control));
  const size_t areas_bytes = round_to_pages(sizeof(RankArea) * static_cast<size_t>(num_ranks_));
  mapped_bytes_ = control_bytes + areas_bytes + round_to_pages(options.shared_bytes);
  // Every rank asks for the same size: only the first call grows the file, and new pages are zero.
  if (ftruncate(fd_.get(), static_cast<off_t>(mapped_bytes_)) != 0) fail_errno("ftruncate", "shared memory for the ranks");
  void* memory = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, fd_.get(), 0);
  if (memory == MAP_FAILED) fail_errno("mmap", fmt::format("{} bytes of shared memory for the ranks", mapped_bytes_));
  auto* bytes = static_cast<std::byte*>(memory);
  control_ = reinterpret_cast<Control*>(bytes);
  areas_ = reinterpret_cast<RankArea*>(bytes + control_bytes);
  shared_ = bytes + control_bytes + areas_bytes;
}

Board::Board(Board&& other) noexcept
    : fd_(std::move(other.fd_)),
      num_ranks_(other.num_ranks_),
      mapped_bytes_(other.mapped_bytes_),
      control_(std::exchange(other.control_, nullptr)),
      areas_(other.areas_),
      shared_(other.shared_),
      gather_(std::move(other.gather_)) {}

Board::~Board() {
  if (control_ != nullptr) munmap(control_, mapped_bytes_);
}

void Board::barrier(int rank, int64_t timeout_ms) {
  if (!is_shared()) {
    const std::byte here{};
    std::vector<std::byte> all(static_cast<size_t>(num_ranks_));
    return gather_({&here, 1}, all.data(), timeout_ms);
  }
  const Deadline deadline = Deadline::in_ms(timeout_ms);
  const uint32_t phase = control_->phase.load(std::memory_order_acquire);
  areas_[rank].next_phase.store(phase + 1, std::memory_order_relaxed);
  if (control_->arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == static_cast<uint32_t>(num_ranks_)) {
    control_->arrived.store(0, std::memory_order_relaxed);
    control_->phase.store(phase + 1, std::memory_order_release);  // publishes `arrived` and what all ranks wrote before
    futex_wake_all(control_->phase);
    return;
  }
  // Ranks that have a core each spin for a moment, so that they start together to within a fraction of a microsecond.
  const bool may_spin = static_cast<unsigned>(num_ranks_) <= std::thread::hardware_concurrency();
  for (int i = 0; may_spin && i < 20000; ++i) {
    if (control_->phase.load(std::memory_order_acquire) != phase) return;
  }
  while (control_->phase.load(std::memory_order_acquire) == phase) {
    if (failed()) fail(TERN_ABORTED, "another rank failed");
    if (deadline.passed()) fail(TERN_TIMEOUT, "waited {} ms for rank {} to line up", timeout_ms, fmt::join(missing_ranks(phase), ", "));
    futex_wait(control_->phase, phase, std::min<std::chrono::nanoseconds>(deadline.remaining(), std::chrono::seconds(1)));
  }
}

std::vector<int> Board::missing_ranks(uint32_t phase) const {
  std::vector<int> ranks;
  for (int rank = 0; rank < num_ranks_; ++rank) {
    if (areas_[rank].next_phase.load(std::memory_order_relaxed) != phase + 1) ranks.push_back(rank);
  }
  return ranks;
}

void Board::allgather(int rank, std::span<const std::byte> send, std::byte* recv, int64_t timeout_ms) {
  if (!is_shared()) return gather_(send, recv, timeout_ms);
  for (size_t at = 0; at < send.size(); at += RankArea::kGatherBytes) {
    const size_t num_bytes = std::min(send.size() - at, RankArea::kGatherBytes);
    std::memcpy(areas_[rank].gather, send.data() + at, num_bytes);
    barrier(rank, timeout_ms);
    for (int source = 0; source < num_ranks_; ++source)
      std::memcpy(recv + static_cast<size_t>(source) * send.size() + at, areas_[source].gather, num_bytes);
    barrier(rank, timeout_ms);
  }
}

void Board::post_failure(int rank, const std::string& text) noexcept {
  std::strncpy(areas_[rank].failure, text.c_str(), sizeof areas_[rank].failure - 1);
  control_->failed.fetch_add(1, std::memory_order_release);
  futex_wake_all(control_->phase);
}

bool Board::failed() const { return control_->failed.load(std::memory_order_acquire) != 0; }

std::string Board::failure_of(int rank) const { return areas_[rank].failure; }

}  // namespace tern::tools
