// SPDX-License-Identifier: Apache-2.0
// What the ranks of a host have recorded, as one Chrome trace, for https://ui.perfetto.dev or chrome://tracing. Each rank is a process of
// the trace, each lane a thread of it.
//
//   write_chrome_trace("trace.json", {{0, spans_of_rank_0}, {1, spans_of_rank_1}});
#pragma once

#include <tern/tern.h>

#include <span>
#include <string>
#include <vector>

namespace tern::tools {

struct RankTimeline {
  int rank = 0;
  std::span<const tern_span> spans;
};

// As people read it: "wait for rank 2".
std::string span_name(const tern_span& span);

// Throws TERN_SYSTEM_ERROR if the file cannot be written.
void write_chrome_trace(const std::string& path, const std::vector<RankTimeline>& timelines);

}  // namespace tern::tools
