// SPDX-License-Identifier: Apache-2.0
// The timeline of an exchange: what tern_trace_read hands out. One log for each lane, filled by the thread that uses the lane.
//
//   Span span(log, {.kind = TERN_SPAN_SEND, .operation = TERN_OP_DISPATCH, .epoch = epoch});   // until the end of the scope
//   ...
//   span.set_bytes(bytes);
//
// While nothing is recorded a span is one load and one branch, and no clock is read. Recording allocates nothing.
//
// Threads: one at a time adds to a log. Any thread starts, stops and reads: a span is written once, before the count that publishes it.
#pragma once

#include <tern/tern.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <vector>

#include "base/error.h"

namespace tern {

class SpanLog {
 public:
  explicit SpanLog(int32_t lane_idx) : lane_idx_(lane_idx) {}

  bool is_on() const { return is_on_.load(std::memory_order_acquire); }

  // By the lane's thread. Counts the span as dropped if there is no room.
  void add(tern_span span) noexcept;

  // Begins anew with this room. No span may be open.
  void start(std::vector<tern_span> room) noexcept;
  void stop() { is_on_.store(false, std::memory_order_release); }

  std::span<const tern_span> spans() const { return {spans_.data(), static_cast<size_t>(num_spans_.load(std::memory_order_acquire))}; }
  int64_t num_dropped() const { return num_dropped_.load(std::memory_order_relaxed); }

 private:
  int32_t lane_idx_;
  std::atomic<bool> is_on_{false};
  std::vector<tern_span> spans_;
  std::atomic<int64_t> num_spans_{0};
  std::atomic<int64_t> num_dropped_{0};
};

// What is known of a span when it begins.
struct SpanFacts {
  tern_span_kind kind = TERN_SPAN_OPERATION;
  tern_operation operation = TERN_OP_NONE;
  tern_phase phase = TERN_PHASE_WHOLE;
  int32_t peer = -1;
  tern_awaited awaited = TERN_AWAITED_NOTHING;
  uint64_t epoch = 0;
  int64_t bytes = 0;
};

class Span {
 public:
  Span(SpanLog& log, const SpanFacts& facts) : log_(log) {
    if (!log.is_on()) [[likely]]
      return;
    // In the header, so that facts are only put together where they are recorded.
    span_ = tern_span{.epoch = facts.epoch,
                      .bytes = facts.bytes,
                      .kind = facts.kind,
                      .operation = facts.operation,
                      .phase = facts.phase,
                      .peer = facts.peer,
                      .awaited = facts.awaited};
    begin();
  }
  ~Span() {
    if (span_) [[unlikely]]
      end();
  }
  Span(const Span&) = delete;
  Span& operator=(const Span&) = delete;

  void set_bytes(int64_t bytes) {
    if (span_) span_->bytes = bytes;
  }
  void set_status(tern_status status) {
    if (span_) span_->status = status;
  }

 private:
  void begin() noexcept;
  void end() noexcept;

  SpanLog& log_;
  std::optional<tern_span> span_;  // only where it is recorded
};

// A span around body(span), whose status is that of the failure that ends it, if one does. Returns what the body returns.
template <typename Body>
auto with_span(SpanLog& log, const SpanFacts& facts, Body body) {
  Span span(log, facts);
  try {
    return body(span);
  } catch (const Failure& failure) {
    span.set_status(failure.status());
    throw;
  }
}

// The logs of all lanes.
class Trace {
 public:
  explicit Trace(int32_t num_lanes);

  SpanLog& lane(int32_t lane_idx) { return *logs_[static_cast<size_t>(lane_idx)]; }

  // As tern_trace_start, _stop and _read.
  void start(int64_t capacity);
  void stop();
  struct Totals {
    int64_t num_spans = 0;
    int64_t num_dropped = 0;
  };
  Totals read(std::span<tern_span> out) const;

 private:
  mutable std::mutex mutex_;  // a start gives the logs new memory
  std::vector<std::unique_ptr<SpanLog>> logs_;
};

}  // namespace tern
