// SPDX-License-Identifier: Apache-2.0
#include "bench/report.h"

#include <fmt/format.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>

namespace tern::bench {
namespace {

// The value of "key : value" in a file of such lines.
std::string value_in(const char* path, const std::string& key) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    const size_t colon = line.find(':');
    if (colon == std::string::npos || line.compare(0, key.size(), key) != 0) continue;
    const size_t begin = line.find_first_not_of(" \t", colon + 1);
    return begin == std::string::npos ? "" : line.substr(begin);
  }
  return "unknown";
}

// The plain copy moves the bytes of a dispatch whether or not its routing is new.
std::string ceiling_of(const std::string& operation) { return operation == "combine" ? "combine" : "dispatch"; }

// The time of the named library in the same operation; 0: it is not there.
double median_of(const Section& section, const std::string& operation, const std::string& name) {
  const auto line =
      std::find_if(section.lines.begin(), section.lines.end(), [&](const Line& l) { return l.operation == operation && l.name == name; });
  return line == section.lines.end() ? 0 : line->measured.median_us;
}

double ceiling_median(const Section& section, const Line& line) {
  return median_of(section, ceiling_of(line.operation), section.shape.num_nodes() == 1 ? "plain copy" : "plain stream");
}

std::vector<std::string> other_libraries(const Section& section) {
  std::vector<std::string> names;
  for (const Line& line : section.lines)
    if (line.kind == Kind::kOther && std::find(names.begin(), names.end(), line.name) == names.end()) names.push_back(line.name);
  return names;
}

double gbps(const Section& section, const Line& line) { return section.wire_bytes / line.measured.median_us / 1e3; }

}  // namespace

nlohmann::json describe_machine() {
  utsname names{};
  ::uname(&names);
  double load[1] = {0};
  ::getloadavg(load, 1);
  const char* yields = std::getenv("OMPI_MCA_mpi_yield_when_idle");
  return {{"cpu", value_in("/proc/cpuinfo", "model name")},
          {"cores", ::sysconf(_SC_NPROCESSORS_ONLN)},
          {"memory_bytes", ::sysconf(_SC_PHYS_PAGES) * ::sysconf(_SC_PAGESIZE)},
          {"kernel", std::string(names.sysname) + " " + names.release + " " + names.machine},
          {"load", load[0]},
          {"mpi_yield_when_idle", yields == nullptr ? "default" : yields}};
}

std::string machine_text(const nlohmann::json& machine) {
  return fmt::format("{}, {} cores, {:.0f} GiB, {}, load {:.1f}, mpi_yield_when_idle {}\n", machine["cpu"].get<std::string>(),
                     machine["cores"].get<int>(), machine["memory_bytes"].get<double>() / (1 << 30), machine["kernel"].get<std::string>(),
                     machine["load"].get<double>(), machine["mpi_yield_when_idle"].get<std::string>());
}

std::string table_text(const Section& section) {
  const Shape& shape = section.shape;
  const auto others = other_libraries(section);
  std::string text =
      fmt::format("\n{} ranks, {} tokens each, hidden {}, top-{} of {} experts, bf16; {} samples{}\n", shape.num_ranks, shape.num_tokens,
                  shape.hidden, shape.num_topk, shape.num_experts, section.repetition.num_samples,
                  section.repetition.num_chained == 1 ? "" : fmt::format(" of {} exchanges in a row", section.repetition.num_chained));
  text += fmt::format("wire bytes per rank: {:.2f} MB, {:.0f} % of them to the rank itself\n", section.wire_bytes / 1e6,
                      100 * section.local_wire_bytes / section.wire_bytes);
  if (shape.num_nodes() > 1)
    text +=
        fmt::format("{} nodes x {}; a row for each token and other node that it goes to: {:.2f} MB, which is what the plain stream moves\n",
                    shape.num_nodes(), shape.ranks_per_node, section.crossing_bytes / 1e6);
  text += '\n';
  text +=
      fmt::format("{:<18} | {:<29} | {:>9} | {:>9} | {:>9} | {:>10}", "operation", "by", "median us", "p99 us", "GB/s rank", "of ceiling");
  for (const auto& other : others) text += fmt::format(" | {:>{}}", "x " + other, other.size() + 2);
  std::string rule = fmt::format("\n{:-<18} | {:-<29} | {:->9} | {:->9} | {:->9} | {:->10}", "", "", ":", ":", ":", ":");
  for (const auto& other : others) rule += fmt::format(" | {:->{}}", ":", other.size() + 2);
  text += rule + "\n";
  for (const Line& line : section.lines) {
    text += fmt::format("{:<18} | {:<29} | {:>9.1f} | {:>9.1f} | {:>9.2f} | {:>8.0f} %", line.operation, line.name, line.measured.median_us,
                        line.measured.p99_us, gbps(section, line), 100 * ceiling_median(section, line) / line.measured.median_us);
    for (const auto& other : others) {
      const double theirs = median_of(section, line.operation, other);
      text +=
          fmt::format(" | {:>{}}", line.kind == Kind::kTern && theirs > 0 ? fmt::format("{:.2f}", theirs / line.measured.median_us) : "",
                      other.size() + 2);
    }
    text += line.verified ? "\n" : " WRONG DATA\n";
  }
  return text;
}

nlohmann::json to_json(const Section& section) {
  const Shape& shape = section.shape;
  nlohmann::json records = nlohmann::json::array();
  for (const Line& line : section.lines) {
    nlohmann::json record{{"op", line.operation},
                          {"by", line.name},
                          {"dtype", "bf16"},
                          {"ranks", shape.num_ranks},
                          {"ranks_per_node", shape.ranks_per_node},
                          {"tokens", shape.num_tokens},
                          {"hidden", shape.hidden},
                          {"topk", shape.num_topk},
                          {"experts", shape.num_experts},
                          {"samples", section.repetition.num_samples},
                          {"chained", section.repetition.num_chained},
                          {"median_us", line.measured.median_us},
                          {"p99_us", line.measured.p99_us},
                          {"wire_bytes", section.wire_bytes},
                          {"local_wire_bytes", section.local_wire_bytes},
                          {"crossing_bytes", section.crossing_bytes},
                          {"wire_gbps", gbps(section, line)},
                          {"share_of_ceiling", ceiling_median(section, line) / line.measured.median_us},
                          {"verified", line.verified}};
    for (const auto& other : other_libraries(section)) {
      const double theirs = median_of(section, line.operation, other);
      if (theirs > 0) record["times_faster_than"][other] = theirs / line.measured.median_us;
    }
    records.push_back(std::move(record));
  }
  return records;
}

}  // namespace tern::bench
