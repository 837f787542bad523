// SPDX-License-Identifier: Apache-2.0
#include "topology/star_bootstrap.h"

#include <algorithm>
#include <cstring>
#include <optional>

#include "base/error.h"
#include "topology/socket.h"

namespace tern {
namespace {

constexpr uint32_t kFrameMagic = 0x4e524554;  // "TERN"

struct Frame {
  uint32_t magic = kFrameMagic;
  int32_t status = TERN_OK;  // of the allgather, from rank 0; if it failed, the payload is the text
  uint64_t number = 0;       // allgathers before this one
  uint64_t bytes = 0;        // of one rank's share; of the text if it failed
};

class StarBootstrap final : public Bootstrap {
 public:
  StarBootstrap(int rank, int num_ranks, std::vector<Fd> links) : rank_(rank), num_ranks_(num_ranks), links_(std::move(links)) {}

  int rank() const override { return rank_; }
  int num_ranks() const override { return num_ranks_; }

  void allgather(const void* send, void* recv, size_t bytes, Deadline deadline) override {
    if (failure_) throw *failure_;
    try {
      if (rank_ == 0)
        gather_and_answer(send, recv, bytes, deadline);
      else
        ask_rank_0(send, recv, bytes, deadline);
    } catch (const Failure& failure) {
      give_up(failure);
      throw;
    }
    ++number_;
  }

 private:
  void gather_and_answer(const void* send, void* recv, size_t bytes, Deadline deadline);
  void receive_from_all(std::vector<Inbound>& inbound, Deadline deadline) const;
  void check_frames(const std::vector<Frame>& frames, size_t bytes) const;
  void ask_rank_0(const void* send, void* recv, size_t bytes, Deadline deadline);
  void check_link(Io result) const;
  void give_up(const Failure& failure);

  int rank_, num_ranks_;
  std::vector<Fd> links_;
  uint64_t number_ = 0;
  std::optional<Failure> failure_;
};

// Rank 0 decides a little before the deadline, so that its verdict reaches the others before theirs.
Deadline verdict_deadline(Deadline deadline) {
  const auto left_ms = std::chrono::floor<std::chrono::milliseconds>(deadline.remaining()).count();
  return Deadline::in_ms(left_ms - left_ms / 10);
}

void StarBootstrap::gather_and_answer(const void* send, void* recv, size_t bytes, Deadline deadline) {
  const Deadline gathered_by = verdict_deadline(deadline);
  auto* all = static_cast<std::byte*>(recv);
  std::vector<Frame> frames(num_ranks_);
  std::vector<Inbound> headers(num_ranks_), payloads(num_ranks_);
  for (int r = 1; r < num_ranks_; ++r) {
    headers[r] = {.fd = links_[r].get(), .data = &frames[r], .bytes = sizeof(Frame)};
    payloads[r] = {.fd = links_[r].get(), .data = all + r * bytes, .bytes = bytes};
  }
  receive_from_all(headers, gathered_by);
  check_frames(frames, bytes);
  receive_from_all(payloads, gathered_by);
  if (bytes != 0) std::memcpy(all, send, bytes);

  const Frame answer = {.number = number_, .bytes = bytes};
  for (int r = 1; r < num_ranks_; ++r) {
    Io result = send_all(links_[r].get(), &answer, sizeof(answer), deadline);
    if (result == Io::kDone) result = send_all(links_[r].get(), all, num_ranks_ * bytes, deadline);
    if (result == Io::kClosed) fail(TERN_ABORTED, "bootstrap: rank {} has gone (its connection closed)", r);
    if (result == Io::kTimedOut) fail(TERN_TIMEOUT, "bootstrap: rank {} did not take what was gathered until the deadline", r);
  }
}

void StarBootstrap::receive_from_all(std::vector<Inbound>& inbound, Deadline deadline) const {
  const Io result = receive_all(inbound, deadline);
  if (result == Io::kDone) return;
  std::vector<int> gone, missing;
  for (int r = 0; r < num_ranks_; ++r) {
    if (inbound[r].closed)
      gone.push_back(r);
    else if (!inbound[r].complete())
      missing.push_back(r);
  }
  if (!gone.empty()) fail(TERN_ABORTED, "bootstrap: {} of {} ranks: gone (connection closed)", name_ranks(gone), num_ranks_);
  fail(TERN_TIMEOUT, "bootstrap: waited for {} of {} ranks until the deadline; are all ranks running, and do all make the same groups?",
       name_ranks(missing), num_ranks_);
}

void StarBootstrap::check_frames(const std::vector<Frame>& frames, size_t bytes) const {
  for (int r = 1; r < num_ranks_; ++r) {
    const Frame& frame = frames[r];
    if (frame.magic != kFrameMagic || frame.number != number_)
      fail(TERN_MISMATCH, "bootstrap: rank {} is not in the same all-gather as rank 0 ({} there, {} here)", r, frame.number, number_);
    if (frame.bytes != bytes)
      fail(TERN_MISMATCH, "bootstrap: rank {} gathers {} bytes, rank 0 gathers {}; are all ranks of the same version?", r, frame.bytes,
           bytes);
  }
}

void StarBootstrap::ask_rank_0(const void* send, void* recv, size_t bytes, Deadline deadline) {
  const int link = links_[0].get();
  const Frame question = {.number = number_, .bytes = bytes};
  Io sent = send_all(link, &question, sizeof(question), deadline);
  if (sent == Io::kDone) sent = send_all(link, send, bytes, deadline);
  // A closed connection may still hold the reason why rank 0 closed it.
  if (sent == Io::kTimedOut) check_link(sent);

  Frame answer;
  check_link(receive_all(link, &answer, sizeof(answer), deadline));
  if (answer.status != TERN_OK) {
    constexpr uint64_t kLongestTextBytes = 64 << 10;
    std::string text(std::min(answer.bytes, kLongestTextBytes), '\0');
    check_link(receive_all(link, text.data(), text.size(), deadline));
    throw Failure(static_cast<tern_status>(answer.status), text);
  }
  if (answer.magic != kFrameMagic || answer.number != number_ || answer.bytes != bytes)
    fail(TERN_MISMATCH, "bootstrap: rank 0 answers all-gather {} of {} bytes, rank {} asked for {} of {}", answer.number, answer.bytes,
         rank_, number_, bytes);
  check_link(receive_all(link, recv, num_ranks_ * bytes, deadline));
}

void StarBootstrap::check_link(Io result) const {
  if (result == Io::kClosed) fail(TERN_ABORTED, "bootstrap: rank 0 has gone (its connection to rank {} closed)", rank_);
  if (result == Io::kTimedOut)
    fail(TERN_TIMEOUT, "bootstrap: rank {} waited for rank 0 until the deadline; rank 0 may itself be waiting for another rank", rank_);
}

// The others learn why: from rank 0 by a text, from any other rank by the end of its connection.
void StarBootstrap::give_up(const Failure& failure) {
  failure_ = failure;
  if (rank_ == 0)
    for (const Fd& link : links_)
      if (link) send_failure(link.get(), failure.status(), failure.what());
  links_.clear();
}

}  // namespace

std::unique_ptr<Bootstrap> make_star_bootstrap(int rank, int num_ranks, std::vector<Fd> links) {
  return std::make_unique<StarBootstrap>(rank, num_ranks, std::move(links));
}

void send_failure(int link, tern_status status, const std::string& text) {
  const Frame frame = {.status = status, .bytes = text.size()};
  const Deadline at_once = Deadline::in_ms(0);
  if (send_all(link, &frame, sizeof(frame), at_once) == Io::kDone) send_all(link, text.data(), text.size(), at_once);
}

}  // namespace tern
