// SPDX-License-Identifier: Apache-2.0
#include "trace/trace.h"

#include <algorithm>
#include <chrono>
#include <utility>

namespace tern {
namespace {

constexpr int64_t kDefaultCapacity = 65536;
constexpr int64_t kMostCapacity = 1 << 24;

// The clock that all processes of a host share.
int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

void SpanLog::add(tern_span span) noexcept {
  const int64_t num_spans = num_spans_.load(std::memory_order_relaxed);
  if (num_spans == static_cast<int64_t>(spans_.size())) {
    num_dropped_.fetch_add(1, std::memory_order_relaxed);
    return;
  }
  span.lane = lane_idx_;
  spans_[static_cast<size_t>(num_spans)] = span;
  num_spans_.store(num_spans + 1, std::memory_order_release);
}

void SpanLog::start(std::vector<tern_span> room) noexcept {
  spans_ = std::move(room);
  num_spans_.store(0, std::memory_order_relaxed);
  num_dropped_.store(0, std::memory_order_relaxed);
  is_on_.store(true, std::memory_order_release);
}

void Span::begin() noexcept { span_->begin_ns = now_ns(); }

void Span::end() noexcept {
  span_->end_ns = now_ns();
  log_.add(*span_);
}

Trace::Trace(int32_t num_lanes) {
  for (int32_t lane_idx = 0; lane_idx < num_lanes; ++lane_idx) logs_.push_back(std::make_unique<SpanLog>(lane_idx));
}

void Trace::start(int64_t capacity) {
  if (capacity < 0 || capacity > kMostCapacity)
    fail(TERN_INVALID_ARGUMENT, "trace: room for {} spans on each lane asked for; must be from 0, for {}, to {}", capacity,
         kDefaultCapacity, kMostCapacity);
  // All or nothing; and written here, so that no operation meets a page for the first time.
  std::vector<std::vector<tern_span>> rooms(logs_.size());
  for (auto& room : rooms) room.resize(static_cast<size_t>(capacity == 0 ? kDefaultCapacity : capacity));
  const std::lock_guard lock(mutex_);
  for (size_t i = 0; i < logs_.size(); ++i) logs_[i]->start(std::move(rooms[i]));
}

void Trace::stop() {
  const std::lock_guard lock(mutex_);
  for (const auto& log : logs_) log->stop();
}

Trace::Totals Trace::read(std::span<tern_span> out) const {
  const std::lock_guard lock(mutex_);
  Totals totals;
  for (const auto& log : logs_) {
    const auto spans = log->spans();
    const auto room = spans.first(std::min(spans.size(), out.size()));
    std::copy(room.begin(), room.end(), out.begin());
    out = out.subspan(room.size());
    totals.num_spans += static_cast<int64_t>(spans.size());
    totals.num_dropped += log->num_dropped();
  }
  return totals;
}

}  // namespace tern
