// SPDX-License-Identifier: Apache-2.0
#include "tools/timeline.h"

#include <fmt/format.h>

#include <fstream>
#include <nlohmann/json.hpp>

#include "base/error.h"

namespace tern::tools {
namespace {

using Json = nlohmann::ordered_json;

const char* operation_text(tern_operation operation) {
  switch (operation) {
    case TERN_OP_NONE: break;
    case TERN_OP_ROUTE: return "route";
    case TERN_OP_DISPATCH: return "dispatch";
    case TERN_OP_WEIGHTS: return "weights";
    case TERN_OP_COMBINE: return "combine";
    case TERN_OP_RECOVER: return "recover";
  }
  return "none";
}

std::string wait_text(const tern_span& wait) {
  switch (wait.awaited) {
    case TERN_AWAITED_NOTHING:
    case TERN_AWAITED_MESSAGES: break;
    case TERN_AWAITED_ADDRESS: return fmt::format("wait for rank {}'s rows", wait.peer);
    case TERN_AWAITED_CONSUMED: return fmt::format("wait for rank {} to take what it was sent", wait.peer);
    case TERN_AWAITED_OWN_GPU: return "wait for the GPU";
  }
  return fmt::format("wait for rank {}", wait.peer);
}

double as_us(int64_t ns) { return static_cast<double>(ns) / 1e3; }

Json span_event(int rank, const tern_span& span) {
  Json args{{"operation", operation_text(span.operation)}};
  if (span.epoch > 0) args["epoch"] = span.epoch;
  if (span.bytes > 0) args["bytes"] = span.bytes;
  if (span.status != TERN_OK) args["status"] = tern_status_name(span.status);
  return {{"ph", "X"},        {"name", span_name(span)},    {"pid", rank},
          {"tid", span.lane}, {"ts", as_us(span.begin_ns)}, {"dur", as_us(span.end_ns - span.begin_ns)},
          {"args", args}};
}

}  // namespace

std::string span_name(const tern_span& span) {
  switch (span.kind) {
    case TERN_SPAN_OPERATION: break;
    case TERN_SPAN_PLAN: return "plan";
    case TERN_SPAN_SEND: return "send";
    case TERN_SPAN_WAIT: return wait_text(span);
    case TERN_SPAN_RECEIVE: return span.peer < 0 ? "fill in" : fmt::format("receive from rank {}", span.peer);
    case TERN_SPAN_REDUCE: return "reduce";
  }
  const char* phase = span.phase == TERN_PHASE_SEND ? " (send)" : span.phase == TERN_PHASE_RECEIVE ? " (receive)" : "";
  return fmt::format("{}{}", operation_text(span.operation), phase);
}

void write_chrome_trace(const std::string& path, const std::vector<RankTimeline>& timelines) {
  Json events = Json::array();
  for (const RankTimeline& timeline : timelines) {
    const auto name = [&](const char* what, const std::string& text) {
      events.push_back({{"ph", "M"}, {"name", what}, {"pid", timeline.rank}, {"tid", 0}, {"args", {{"name", text}}}});
    };
    name("process_name", fmt::format("rank {}", timeline.rank));
    for (const tern_span& span : timeline.spans) events.push_back(span_event(timeline.rank, span));
  }
  std::ofstream file(path);
  file << Json{{"traceEvents", events}, {"displayTimeUnit", "ns"}};
  file.close();
  if (!file) fail(TERN_SYSTEM_ERROR, "the timeline cannot be written to {}", path);
}

}  // namespace tern::tools
