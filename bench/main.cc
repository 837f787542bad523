// SPDX-License-Identifier: Apache-2.0
// tern_compare: dispatch and combine with Tern, beside the same made with Open MPI and with gloo, and beside a plain copy of the same
// bytes. All in one run, in turn; every byte of every result is checked before and after. Started by mpirun: see bench/run. Ranks may be on
// several nodes of one machine, declared or network namespaces.
#include <CLI/CLI.hpp>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <optional>

#include "base/error.h"
#include "bench/all_to_all.h"
#include "bench/meter.h"
#include "bench/packed_exchange.h"
#include "bench/plain_copy.h"
#include "bench/plain_stream.h"
#include "bench/processes.h"
#include "bench/report.h"
#include "bench/tern_exchange.h"
#include "bench/workload.h"

namespace tern::bench {
namespace {

struct Options {
  int64_t num_tokens = 1024;
  int64_t num_small_tokens = 8;
  int64_t hidden = 7168;
  int num_experts = 256;
  int num_topk = 8;
  uint64_t seed = 1;
  int num_samples = 50;
  int num_small_samples = 1000;
  int num_chained = 16;
  std::string only;
  std::string json;
};

void add_options(CLI::App& app, Options& options) {
  app.add_option("--tokens", options.num_tokens, "tokens per rank")->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--small-tokens", options.num_small_tokens, "tokens per rank of the small batch")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--hidden", options.hidden, "elements of a row, a multiple of 8")->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--experts", options.num_experts, "experts, a multiple of the ranks")->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--topk", options.num_topk, "experts per token")->check(CLI::Range(1, 64))->capture_default_str();
  app.add_option("--seed", options.seed, "of tokens and routing")->capture_default_str();
  app.add_option("--samples", options.num_samples, "samples of each exchange; 0: leave this batch out")->capture_default_str();
  app.add_option("--small-samples", options.num_small_samples, "the same for the small batch")->capture_default_str();
  app.add_option("--chained", options.num_chained, "small exchanges in a row in one sample, measured besides single ones")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--only", options.only, "only contenders whose name holds this text");
  app.add_option("--json", options.json, "write what was measured into this file, too");
}

void check_options(const Options& options, int num_ranks) {
  if (num_ranks > 64) fail(TERN_INVALID_ARGUMENT, "there are {} ranks; this program compares up to 64", num_ranks);
  if (options.num_experts % num_ranks != 0)
    fail(TERN_INVALID_ARGUMENT, "{} experts on {} ranks: must be a multiple", options.num_experts, num_ranks);
  if (options.num_topk > options.num_experts)
    fail(TERN_INVALID_ARGUMENT, "top-{} of {} experts cannot be", options.num_topk, options.num_experts);
  if (options.hidden % 8 != 0) fail(TERN_INVALID_ARGUMENT, "hidden is {}; must be a multiple of 8", options.hidden);
}

// All contenders for one batch, and what they live on.
class Comparison {
 public:
  Comparison(const Shape& shape, const Processes& processes, const std::vector<AllToAll*>& libraries)
      : processes_(processes), workload_(shape, processes.rank()), tern_(workload_, processes) {
    if (shape.num_nodes() == 1)
      plain_copy_.emplace(workload_, processes).add_to(contenders_);
    else
      plain_stream_.emplace(workload_, processes).add_to(contenders_);
    tern_.add_to(contenders_);
    for (AllToAll* library : libraries) packed_.push_back(std::make_unique<PackedExchange>(workload_, *library));
    for (const auto& packed : packed_) packed->add_to(contenders_);
    const auto place = [](const Contender& c) { return c.operation == "dispatch" ? 0 : c.operation == "combine" ? 2 : 1; };
    std::stable_sort(contenders_.begin(), contenders_.end(), [&](const Contender& a, const Contender& b) { return place(a) < place(b); });
  }

  void keep_only(const std::string& text) {
    std::erase_if(contenders_, [&](const Contender& c) { return c.name.find(text) == std::string::npos; });
  }

  Section run(const Meter& meter, const Repetition& repetition) const {
    Section section{
        .shape = workload_.shape(), .repetition = repetition, .wire_bytes = 0, .local_wire_bytes = 0, .crossing_bytes = 0, .lines = {}};
    const Shape& shape = workload_.shape();
    for (int source = 0; source < shape.num_ranks; ++source) {
      const double mean_row_bytes = static_cast<double>(shape.row_bytes()) / shape.num_ranks;
      for (int to = 0; to < shape.num_ranks; ++to)
        section.wire_bytes += static_cast<double>(workload_.num_rows(source, to)) * mean_row_bytes;
      section.local_wire_bytes += static_cast<double>(workload_.num_rows(source, source)) * mean_row_bytes;
      for (int node = 0; node < shape.num_nodes(); ++node)
        if (node != shape.node_of(source))
          section.crossing_bytes += static_cast<double>(workload_.num_crossing(source, node)) * mean_row_bytes;
    }
    std::vector<bool> verified;
    for (const Contender& contender : contenders_) verified.push_back(meter.verify(workload_, contender));
    const auto measurements = meter.measure(contenders_, repetition);
    for (size_t i = 0; i < contenders_.size(); ++i) {
      const Contender& c = contenders_[i];
      const bool still_verified = meter.verify(workload_, c);
      section.lines.push_back({c.operation, c.name, c.kind, measurements[i], verified[i] && still_verified});
    }
    return section;
  }

 private:
  const Processes& processes_;
  Workload workload_;
  std::optional<PlainCopy> plain_copy_;      // within a node
  std::optional<PlainStream> plain_stream_;  // between nodes
  TernExchange tern_;
  std::vector<std::unique_ptr<PackedExchange>> packed_;
  Contenders contenders_;
};

std::vector<Section> compare(const Options& options, const Processes& processes) {
  const Meter meter(processes);
  const auto mpi = make_mpi_all_to_all(processes);
  const auto gloo = make_gloo_all_to_all(processes);
  const int ranks_per_node = processes.make_group().info().ranks_in_node;
  std::vector<AllToAll*> libraries{mpi.get()};
  if (gloo) libraries.push_back(gloo.get());
  const auto shape = [&](int64_t num_tokens) {
    return Shape{processes.num_ranks(), num_tokens, options.hidden, options.num_experts, options.num_topk, options.seed, ranks_per_node};
  };
  std::vector<Section> sections;
  const auto add = [&](int64_t num_tokens, int num_samples, const std::vector<int>& chains) {
    if (num_samples <= 0) return;
    Comparison comparison(shape(num_tokens), processes, libraries);
    comparison.keep_only(options.only);
    for (const int num_chained : chains) {
      const int samples = std::max(1, num_samples / num_chained);
      sections.push_back(comparison.run(meter, {std::max(3, samples / 20), samples, num_chained}));
    }
  };
  add(options.num_tokens, options.num_samples, {1});
  add(options.num_small_tokens, options.num_small_samples, {1, options.num_chained});
  return sections;
}

// Returns whether all data were right.
bool report(const Options& options, const std::vector<Section>& sections) {
  nlohmann::json json{{"machine", describe_machine()}, {"records", nlohmann::json::array()}};
  fmt::print("{}", machine_text(json["machine"]));
  bool verified = true;
  for (const Section& section : sections) {
    fmt::print("{}", table_text(section));
    for (const auto& record : to_json(section)) json["records"].push_back(record);
    verified = verified && std::all_of(section.lines.begin(), section.lines.end(), [](const Line& line) { return line.verified; });
  }
  if (options.json.empty()) return verified;
  std::ofstream file(options.json);
  file << json.dump(2) << '\n';
  if (!file.flush()) fail_errno("write", options.json);
  return verified;
}

int run(int argc, char** argv) {
  CLI::App app("Compares Tern with Open MPI and gloo on this machine. Started by mpirun; bench/run does it all.", "tern_compare");
  Options options;
  add_options(app, options);
  CLI11_PARSE(app, argc, argv);
  const Processes processes(&argc, &argv);
  try {
    check_options(options, processes.num_ranks());
    const auto sections = compare(options, processes);
    if (processes.rank() != 0) return 0;
    return report(options, sections) ? 0 : 1;
  } catch (const std::exception& error) {
    fmt::print(stderr, "tern_compare, rank {}: {}\n", processes.rank(), error.what());
    Processes::abort_all();
  }
}

}  // namespace
}  // namespace tern::bench

int main(int argc, char** argv) { return tern::bench::run(argc, argv); }
