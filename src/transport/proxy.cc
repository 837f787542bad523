// SPDX-License-Identifier: Apache-2.0
#include "transport/proxy.h"

#include <algorithm>
#include <atomic>
#include <utility>

#include "base/error.h"
#include "base/short_pauses.h"

namespace tern {
namespace {

constexpr int64_t kProbeEveryMs = 100;

// The thread's pauses: each is twice as long as the one before, from when something has happened; while puts are on their way and while
// others move the bytes they have bounds of their own.
constexpr std::chrono::microseconds kFirstPause{100}, kLongestPause{4000}, kLongestBusyPause{200}, kHelpedPause{200};

constexpr size_t kHeavyBytes = 256 << 10;  // a put that may take more than one turn

// Of the farewell channel. They come in any order.
constexpr int64_t kGoodbye = 1;
constexpr int64_t kAgreed = 2;

int data_channel(int channel) { return 2 * channel; }
int credit_channel(int channel) { return 2 * channel + 1; }

void store(uint64_t& word, uint64_t value) { std::atomic_ref<uint64_t>(word).store(value, std::memory_order_release); }

}  // namespace

Proxy::Proxy(std::unique_ptr<Endpoint> endpoint, const ProxyOptions& options)
    : endpoint_(std::move(endpoint)), options_(options), lines_(options.peers.size() * static_cast<size_t>(options.num_channels)) {
  for (const ProxyPeer& peer : options.peers) peers_.push_back({.rank = peer.rank, .region = peer.region});
  for (size_t i = 0; i < lines_.size(); ++i) {
    lines_[i].channel = static_cast<int>(i / peers_.size());
    lines_[i].peer_idx = i % peers_.size();
  }
}

Proxy::~Proxy() { stop(); }

void Proxy::stop() {
  if (!thread_.joinable()) return;
  stop_ = true;
  wake();
  thread_.join();
}

void Proxy::start() {
  thread_ = std::thread([this] { run(); });
}

const Proxy::Line& Proxy::line(int peer, int channel) const {
  const auto place = std::ranges::find(options_.peers, peer, &ProxyPeer::rank) - options_.peers.begin();
  return lines_[static_cast<size_t>(channel) * options_.peers.size() + static_cast<size_t>(place)];
}

void Proxy::put(const Put& put) {
  {
    const std::lock_guard lock(mutex_);
    queue_.push_back(put);
    queue_.back().channel = data_channel(put.channel);
  }
  has_queued_.store(true, std::memory_order_release);
  const bool is_heavy = put.num_bytes >= kHeavyBytes;
  if (is_heavy) is_heavy_ = true;
  if (!help() || is_heavy) wake();
}

void Proxy::finish(int channel, uint64_t epoch) {
  for (Line& line : lines_)
    if (line.channel == channel) line.finished.store(epoch, std::memory_order_release);
  has_finished_.store(true, std::memory_order_release);
  if (!help()) wake();
}

bool Proxy::close(Deadline deadline) {
  closing_ = true;
  wake();
  std::unique_lock lock(mutex_);
  return has_closed_.wait_until(lock, deadline.time(), [&] { return closed_; });
}

bool Proxy::help() {
  const std::unique_lock turn(turn_, std::try_to_lock);
  if (!turn.owns_lock()) return false;
  was_helped_.store(true, std::memory_order_relaxed);
  move_bytes();
  return true;
}

void Proxy::hand_over() {
  was_helped_ = false;
  wake();
}

void Proxy::wake() {
  {
    const std::lock_guard lock(mutex_);
    is_awake_ = true;
  }
  has_work_.notify_one();
}

// True: it was woken.
bool Proxy::sleep(std::chrono::microseconds longest) {
  std::unique_lock lock(mutex_);
  const bool woken = has_work_.wait_for(lock, longest, [&] { return is_awake_; });
  is_awake_ = false;
  return woken;
}

void Proxy::run() {
  allow_short_pauses();
  options_.started();
  auto pause = kFirstPause;
  while (!stop_) {
    options_.turned();
    if (was_helped_.exchange(false) && !is_heavy_ && !closing_) {
      pause = sleep(kHelpedPause) ? kFirstPause : kHelpedPause;
      continue;
    }
    bool moved = false, is_busy = false;
    {
      const std::lock_guard turn(turn_);
      moved = move_bytes();
      is_busy = !all_delivered();
      if (closing_ && !is_busy) say_farewell();
    }
    const bool woken = !moved && sleep(std::min(pause, is_busy ? kLongestBusyPause : kLongestPause));
    pause = moved || woken ? kFirstPause : std::min(2 * pause, kLongestPause);
  }
}

// With `turn_` held. False: there was nothing.
bool Proxy::move_bytes() {
  const bool has_put = start_puts();
  bool has_come = true;  // also if it throws: then it may have counted something
  report_problems([&] { has_come = endpoint_->progress(); });
  if (has_finished_.exchange(false, std::memory_order_acquire) || has_come) {
    for (Line& line : lines_) {
      report_problems([&] {
        count_arrivals(line);
        give_credits(line);
      });
    }
    for (Peer& peer : peers_) hear_farewell(peer);
  }
  if (is_heavy_ && all_delivered()) is_heavy_ = false;
  return has_put || has_come;
}

// What the network says against a peer is told once, and not at all if that has left.
template <typename Call>
void Proxy::report_problems(Call call) {
  try {
    call();
  } catch (const Failure& failure) {
    bool of_a_peer = false;
    for (Peer& peer : peers_) {
      if (!endpoint_->lost(peer.rank)) continue;
      of_a_peer = true;
      if (!peer.gone()) options_.failed(peer.rank, failure.what());
      peer.lost = true;
    }
    if (!of_a_peer) options_.failed(-1, failure.what());
  }
}

// One that the provider cannot take now does not hold up others, but those of the same epoch, of which the last one must be the last.
bool Proxy::start_puts() {
  if (has_queued_.exchange(false, std::memory_order_acquire)) {
    const std::lock_guard lock(mutex_);
    pending_.insert(pending_.end(), queue_.begin(), queue_.end());
    queue_.clear();
  }
  std::vector<std::pair<int, int>> waiting;  // peers and channels
  return std::erase_if(pending_, [&](Put& put) {
           const std::pair line{put.peer, put.channel};
           const bool can_go = std::ranges::count(waiting, line) == 0 && try_put(put);
           if (!can_go) waiting.push_back(line);
           return can_go;
         }) != 0;
}

// True: there is nothing left to do about it.
bool Proxy::try_put(Put& put) {
  Peer& peer = *std::ranges::find(peers_, put.peer, &Peer::rank);
  if (peer.has_left && !peer.lost && put.counted && put.num_bytes > 0) {  // nobody waits for what is not counted
    options_.failed(peer.rank, fmt::format("transport: rank {} has left, and cannot be put to", peer.rank));
    peer.lost = true;
  }
  if (peer.lost) return true;
  bool waits = false;
  report_problems([&] { waits = !endpoint_->try_put(put); });
  return !waits;
}

void Proxy::notify(const Peer& peer, int endpoint_channel, int64_t epoch) {
  Put notice{.peer = peer.rank, .from = options_.region, .to = peer.region, .channel = endpoint_channel, .epoch = epoch, .last = true};
  notice.confirmed = false;  // a peer may go as soon as it has what it waits for
  if (!try_put(notice)) pending_.push_back(notice);
}

void Proxy::count_arrivals(Line& line) {
  const int peer = peers_[line.peer_idx].rank;
  const uint64_t before = line.arrived + line.taken;
  while (endpoint_->complete(peer, data_channel(line.channel), static_cast<int64_t>(line.arrived + 1)))
    store(line.arrived, line.arrived + 1);
  while (endpoint_->complete(peer, credit_channel(line.channel), static_cast<int64_t>(line.taken + 1))) {
    endpoint_->retire(peer, credit_channel(line.channel), static_cast<int64_t>(line.taken + 1));
    store(line.taken, line.taken + 1);
  }
  if (line.arrived + line.taken != before) options_.changed(line.channel);
}

// Credits follow the rule of their own: the peer put this epoch, so it has counted the credit for the one before the previous.
void Proxy::give_credits(Line& line) {
  const uint64_t finished = std::min(line.finished.load(std::memory_order_acquire), line.arrived);
  while (line.credited < finished) {
    const auto epoch = static_cast<int64_t>(++line.credited);
    const Peer& peer = peers_[line.peer_idx];
    endpoint_->retire(peer.rank, data_channel(line.channel), epoch);
    if (!peer.gone()) notify(peer, credit_channel(line.channel), epoch);
  }
}

void Proxy::hear_farewell(Peer& peer) {
  if (!peer.has_left && endpoint_->complete(peer.rank, farewell_channel(), kGoodbye)) {
    peer.has_left = true;
    notify(peer, farewell_channel(), kAgreed);
  }
  peer.has_agreed = peer.has_agreed || endpoint_->complete(peer.rank, farewell_channel(), kAgreed);
}

// A peer that went while the goodbye was on its way to it does not answer. Whether it is still there shows when something is put to it.
void Proxy::probe_silent_peers() {
  if (!next_probe_.passed()) return;
  next_probe_ = Deadline::in_ms(kProbeEveryMs);
  for (const Peer& peer : peers_) {
    if (peer.closed()) continue;
    Put probe{.peer = peer.rank, .from = options_.region, .to = peer.region};
    probe.confirmed = probe.counted = false;
    try_put(probe);
  }
}

bool Proxy::all_delivered() const { return pending_.empty() && endpoint_->num_outstanding() == 0; }

// A peer that has left before needs none, since it has got everything that it waited for.
void Proxy::say_farewell() {
  for (Peer& peer : peers_) {
    if (said_farewell_ || peer.gone()) continue;
    notify(peer, farewell_channel(), kGoodbye);
    peer.was_left = true;
  }
  said_farewell_ = true;
  probe_silent_peers();
  const std::lock_guard lock(mutex_);
  closed_ = queue_.empty() && all_delivered() && std::ranges::all_of(peers_, &Peer::closed);
  if (closed_) has_closed_.notify_all();
}

}  // namespace tern
