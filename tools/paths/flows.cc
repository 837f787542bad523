// SPDX-License-Identifier: Apache-2.0
#include "paths/flows.h"

#include <algorithm>
#include <cstring>

#include "base/error.h"

namespace tern::tools {
namespace {

// Channels.
constexpr int kData = 0;
constexpr int kAnswer = 1;

// The registered memory: what is sent, what is received, the two words to send, where answers go, and two words for each rank that sends.
constexpr size_t kSource = 0;
constexpr size_t kSink = Flows::kEpochBytes;
constexpr size_t kWords = 2 * Flows::kEpochBytes;
constexpr size_t kAnswers = kWords + 64;
constexpr size_t kSlots = kAnswers + 64;
constexpr uint64_t kMore = 1;
constexpr uint64_t kLast = 2;

size_t memory_bytes(int num_ranks) { return kSlots + static_cast<size_t>(num_ranks) * 2 * sizeof(uint64_t); }

// Different for every rank and place, so that what arrives elsewhere, or not at all, is seen.
uint64_t pattern(int rank, size_t word_idx) {
  return (static_cast<uint64_t>(rank) + 1) * 0x9E3779B97F4A7C15 ^ static_cast<uint64_t>(word_idx) * 0xD1342543DE82EF95;
}

double microseconds(std::chrono::steady_clock::duration time) { return std::chrono::duration<double, std::micro>(time).count(); }

}  // namespace

Flows::Flows(Bootstrap& bootstrap, const std::string& gpu, Deadline deadline)
    : rank_(bootstrap.rank()),
      memory_(new std::byte[memory_bytes(bootstrap.num_ranks())]()),
      remotes_(static_cast<size_t>(bootstrap.num_ranks())),
      lines_(static_cast<size_t>(bootstrap.num_ranks())) {
  for (size_t i = 0; i < kEpochBytes / sizeof(uint64_t); ++i) {
    const uint64_t word = pattern(rank_, i);
    std::memcpy(memory_.get() + kSource + i * sizeof(word), &word, sizeof(word));
  }
  for (const uint64_t word : {kMore, kLast}) std::memcpy(memory_.get() + kWords + (word - kMore) * sizeof(word), &word, sizeof(word));
  EndpointOptions options;
  options.num_channels = 2;
  options.seat = seat_on_host(discover(bootstrap, "", deadline));
  options.gpu = gpu;
  endpoint_ = make_endpoint(bootstrap, options, deadline);
  region_ = endpoint_->register_memory(memory_.get(), memory_bytes(bootstrap.num_ranks()));
  bootstrap.allgather(&region_->remote(), remotes_.data(), sizeof(RemoteRegion), deadline);
}

// Where the word of an epoch from `peer` lies, on every rank; two epochs may be under way.
size_t Flows::slot(int peer, int64_t epoch) const {
  return kSlots + (static_cast<size_t>(peer) * 2 + static_cast<size_t>(epoch & 1)) * sizeof(uint64_t);
}

void Flows::run(std::vector<Flow>& flows, const Load& load, Deadline deadline) {
  constexpr int kMostSleepMs = 20;
  constexpr int kRetryMs = 1;  // a provider that cannot take a put now does not always say when it can
  const int num_stale = endpoint_->num_outstanding();
  start_ = Clock::now();
  for (Flow& flow : flows) {
    Line& line = lines_[static_cast<size_t>(flow.peer)];
    line.num_begun = line.writes_left = 0;
    line.last_begun = line.last_arrived = false;
    flow.round_trip_us.clear();
    flow.sent_gbps = 0;
  }
  while (true) {
    bool refused = false;
    for (Flow& flow : flows) {
      if (!finished(flow)) blame(flows, [&] { refused |= step(flow, load); });
    }
    if (std::ranges::all_of(flows, [&](const Flow& flow) { return finished(flow); })) break;
    if (deadline.passed()) return give_up(flows);
    blame(flows, [&] { endpoint_->wait(Deadline::in_ms(std::min(refused ? kRetryMs : kMostSleepMs, deadline.remaining_ms()))); });
  }
  settle(flows, num_stale, deadline);
}

bool Flows::received_unchanged(int peer) const {
  for (size_t i = 0; i < kEpochBytes / sizeof(uint64_t); ++i) {
    const uint64_t word = pattern(peer, i);
    if (std::memcmp(memory_.get() + kSink + i * sizeof(word), &word, sizeof(word)) != 0) return false;
  }
  return true;
}

bool Flows::finished(const Flow& flow) const {
  const Line& line = lines_[static_cast<size_t>(flow.peer)];
  if (!flow.problem.empty()) return true;
  const bool sent = !flow.sends || (line.last_begun && line.answered_here == line.begun);
  return sent && (!flow.receives || (line.last_arrived && line.answered_back == line.arrived));
}

// True: the provider could not take something now.
bool Flows::step(Flow& flow, const Load& load) {
  bool refused = false;
  if (flow.receives) {
    take_arrivals(flow);
    refused = !answer(flow);
  }
  if (flow.sends) {
    take_answers(flow, load);
    refused |= !send(flow, load);
  }
  return refused;
}

void Flows::take_arrivals(const Flow& flow) {
  Line& line = lines_[static_cast<size_t>(flow.peer)];
  while (!line.last_arrived && endpoint_->complete(flow.peer, kData, line.arrived + 1)) {
    ++line.arrived;
    uint64_t word = 0;
    std::memcpy(&word, memory_.get() + slot(flow.peer, line.arrived), sizeof(word));
    line.last_arrived = word == kLast;
    endpoint_->retire(flow.peer, kData, line.arrived);
  }
}

// False, as of send(): the provider could not take it now. An answer is not confirmed: the peer may go as soon as it has it.
bool Flows::answer(const Flow& flow) {
  Line& line = lines_[static_cast<size_t>(flow.peer)];
  while (line.answered_back < line.arrived) {
    Put put{.peer = flow.peer,
            .from = &*region_,
            .from_offset = kWords,
            .to = remotes_[static_cast<size_t>(flow.peer)],
            .to_offset = kAnswers,
            .num_bytes = sizeof(uint64_t),
            .channel = kAnswer,
            .epoch = line.answered_back + 1,
            .last = true,
            .confirmed = false};
    if (!endpoint_->try_put(put)) return false;
    ++line.answered_back;
  }
  return true;
}

void Flows::take_answers(Flow& flow, const Load& load) {
  Line& line = lines_[static_cast<size_t>(flow.peer)];
  while (line.answered_here < line.begun && endpoint_->complete(flow.peer, kAnswer, line.answered_here + 1)) {
    ++line.answered_here;
    endpoint_->retire(flow.peer, kAnswer, line.answered_here);
    line.last_answer = Clock::now();
    if (flow.round_trip_us.empty()) line.first_answer = line.last_answer;
    flow.round_trip_us.push_back(microseconds(line.last_answer - line.begun_at[line.answered_here & 1]));
  }
  const auto num_bytes = static_cast<double>(load.num_writes * kWriteBytes * flow.round_trip_us.size());
  const double us = flow.round_trip_us.size() > 1 ? microseconds(line.last_answer - line.first_answer) : 0;
  if (us > 0) flow.sent_gbps = (num_bytes - static_cast<double>(load.num_writes * kWriteBytes)) / us * 1e-3;
}

bool Flows::send(const Flow& flow, const Load& load) {
  Line& line = lines_[static_cast<size_t>(flow.peer)];
  while (line.pending || line.writes_left > 0 || begin_epoch(flow, load)) {
    if (!line.pending) choose_next_put(flow, load);
    if (!endpoint_->try_put(*line.pending)) return false;
    line.pending.reset();
  }
  return true;
}

// False: there is none to begin, or not yet.
bool Flows::begin_epoch(const Flow& flow, const Load& load) {
  Line& line = lines_[static_cast<size_t>(flow.peer)];
  if (line.last_begun || line.begun - line.answered_here >= load.num_under_way) return false;
  ++line.begun;
  ++line.num_begun;
  line.writes_left = load.num_writes + 1;
  line.begun_at[line.begun & 1] = Clock::now();
  const bool late = line.begun_at[line.begun & 1] - start_ >= std::chrono::milliseconds(load.duration_ms);
  line.last_begun = line.num_begun >= load.most_epochs || (late && line.num_begun >= load.least_epochs);
  return true;
}

// The word, then the large writes.
void Flows::choose_next_put(const Flow& flow, const Load& load) {
  Line& line = lines_[static_cast<size_t>(flow.peer)];
  const size_t write_idx = static_cast<size_t>(load.num_writes - line.writes_left);  // of the large ones; the word has none
  const bool word = line.writes_left == load.num_writes + 1;
  line.pending = Put{.peer = flow.peer,
                     .from = &*region_,
                     .from_offset = word ? kWords + (line.last_begun ? sizeof(uint64_t) : 0) : kSource + write_idx * kWriteBytes,
                     .to = remotes_[static_cast<size_t>(flow.peer)],
                     .to_offset = word ? slot(rank_, line.begun) : kSink + write_idx * kWriteBytes,
                     .num_bytes = word ? sizeof(uint64_t) : kWriteBytes,
                     .channel = kData,
                     .epoch = line.begun,
                     .last = line.writes_left == 1};
  --line.writes_left;
}

// Nothing moves unless this rank is in its endpoint, so the last answers must have left before it turns to something else. What is still
// unconfirmed then has been answered all the same. `num_stale` messages of earlier flows that failed may never leave.
void Flows::settle(std::vector<Flow>& flows, int num_stale, Deadline deadline) {
  constexpr int kMostSettlingMs = 1000;
  const Deadline settled = Deadline::in_ms(std::min(kMostSettlingMs, deadline.remaining_ms()));
  while (endpoint_->num_outstanding() > num_stale && !settled.passed()) blame(flows, [&] { endpoint_->wait(settled); });
}

void Flows::give_up(std::vector<Flow>& flows) {
  for (Flow& flow : flows) {
    if (finished(flow)) continue;
    const Line& line = lines_[static_cast<size_t>(flow.peer)];
    const auto ms = std::chrono::duration_cast<std::chrono::milliseconds>(Clock::now() - start_).count();
    const bool awaits_answer = flow.sends && line.answered_here < line.begun;
    flow.problem = fmt::format(
        "rank {} waited {} ms in vain for rank {}: {}{}{}", rank_, ms, flow.peer,
        awaits_answer ? fmt::format("{} epochs of {} were answered", flow.round_trip_us.size(), line.num_begun) : "its writes did not come",
        line.pending ? ", the provider takes no more" : "", other_problem_.empty() ? "" : "; the network said before: " + other_problem_);
  }
}

// The network reports a lost peer once, from whichever call finds out.
template <typename Call>
void Flows::blame(std::vector<Flow>& flows, Call call) {
  try {
    call();
  } catch (const Failure& failure) {
    bool of_a_flow = false;
    for (Flow& flow : flows) {
      if (finished(flow) || !endpoint_->lost(flow.peer)) continue;
      flow.problem = fmt::format("rank {}: {}", rank_, failure.what());
      of_a_flow = true;
    }
    if (!of_a_flow) other_problem_ = failure.what();
  }
}

}  // namespace tern::tools
