// SPDX-License-Identifier: Apache-2.0
// What was measured, as a table for people and as JSON for programs.
#pragma once

#include <nlohmann/json.hpp>

#include <string>
#include <vector>

#include "bench/contender.h"
#include "bench/meter.h"
#include "bench/workload.h"

namespace tern::bench {

struct Line {
  std::string operation;
  std::string name;
  Kind kind;
  Measurement measured;
  bool verified;
};

struct Section {
  Shape shape;
  Repetition repetition;
  double wire_bytes;        // rows to all ranks, this one included, of one exchange: the mean over ranks
  double local_wire_bytes;  // of these, to the rank itself
  double crossing_bytes;    // between nodes: a row for each token and other node that it goes to
  std::vector<Line> lines;
};

// CPU, cores, memory, kernel and load.
nlohmann::json describe_machine();
std::string machine_text(const nlohmann::json& machine);

std::string table_text(const Section& section);
nlohmann::json to_json(const Section& section);

}  // namespace tern::bench
