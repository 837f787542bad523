// SPDX-License-Identifier: Apache-2.0
#include "tools/memory.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <tern/tern.hpp>

#include "base/error.h"

namespace tern::tools {
namespace {

constexpr int64_t kBf16Bytes = 2;
double mega(int64_t bytes) { return static_cast<double>(bytes) / 1e6; }

// Bytes of the windows that Tern itself works in. `rows_per_token`: that a rank sends back for a token at the most.
tern_memory_info internal_memory(const Group& group, const MemoryOptions& o, tern_device_type device, int64_t rows_per_token) {
  return Exchange::query_memory(group, {.device = device,
                                        .max_tokens = o.num_tokens * rows_per_token,
                                        .max_row_bytes = o.hidden * kBf16Bytes,
                                        .max_topk = o.num_topk,
                                        .max_experts = o.num_experts,
                                        .num_lanes = o.num_lanes});
}

void print_internal(const Group& group, const MemoryOptions& o, tern_device_type device, const char* engine) {
  const auto print = [&](const char* use, const tern_memory_info& info) {
    fmt::print("  {:<6} {:<42} {:>10.2f} {:>10.2f} {:>10.2f}\n", engine, use, mega(info.control_bytes), mega(info.staging_bytes),
               mega(info.total_bytes));
  };
  const tern_memory_info info = internal_memory(group, o, device, 1);
  if (info.total_bytes == 0) {
    fmt::print("  {:<6} not in this build\n", engine);
    return;
  }
  print("dispatch and combine", info);
  print("also for mode exact, in one round", internal_memory(group, o, device, o.num_topk));
}

void print_window(const char* what, int64_t num_rows, int64_t row_bytes) {
  fmt::print("  {:<49} {:>10.2f}\n", what, mega(num_rows * row_bytes));
}

}  // namespace

void add_memory_flags(CLI::App& app, MemoryOptions& options) {
  constexpr int64_t kMost = int64_t{1} << 24;
  app.add_option("--ranks", options.num_ranks, "Ranks of the group")->check(CLI::Range(1, 1024))->capture_default_str();
  app.add_option("--tokens", options.num_tokens, "Tokens of each rank, at the most")
      ->check(CLI::Range(int64_t{1}, kMost))
      ->capture_default_str();
  app.add_option("--hidden", options.hidden, "Elements of a row, which travels as bf16")
      ->check(CLI::Range(int64_t{1}, kMost))
      ->capture_default_str();
  app.add_option("--experts", options.num_experts, "Experts of all ranks")->check(CLI::Range(1, 1 << 20))->capture_default_str();
  app.add_option("--topk", options.num_topk, "Experts of a token")->check(CLI::Range(1, 64))->capture_default_str();
  app.add_option("--lanes", options.num_lanes, "Lanes of the exchange")->check(CLI::Range(1, 16))->capture_default_str();
}

int print_memory(const MemoryOptions& o) {
  if (o.num_experts % o.num_ranks != 0)
    fail(TERN_INVALID_ARGUMENT, "{} experts cannot be divided by {} ranks; choose --experts as a multiple of --ranks", o.num_experts,
         o.num_ranks);
  const std::vector<Group> groups = Group::local(o.num_ranks);
  fmt::print("{} ranks, {} tokens each, hidden {} (bf16), top-{} of {} experts, {} {}. MB (10^6 bytes) on each rank:\n\n", o.num_ranks,
             o.num_tokens, o.hidden, o.num_topk, o.num_experts, o.num_lanes, o.num_lanes == 1 ? "lane" : "lanes");
  fmt::print("Windows that Tern works in\n  {:<6} {:<42} {:>10} {:>10} {:>10}\n", "engine", "with room for", "control", "staging",
             "together");
  print_internal(groups.front(), o, TERN_DEVICE_CPU, "CPU");
  print_internal(groups.front(), o, TERN_DEVICE_CUDA, "CUDA");
  const int64_t most_messages = o.num_ranks * o.num_tokens, row_bytes = o.hidden * kBf16Bytes;
  fmt::print("\nWindow memory, if the caller asks for it (window_bytes, tern_window_alloc), of each buffer\n");
  print_window("tokens of a dispatch that GPU ranks pull in place", o.num_tokens, row_bytes);
  print_window("rows of a combine, rank_major", most_messages, row_bytes);
  print_window("rows of a combine, expert_padded", o.num_experts / o.num_ranks * most_messages, row_bytes);
  fmt::print(
      "\nThe first line of an engine is what an exchange takes for these shapes. Without the room of the second, mode exact runs in "
      "rounds\n"
      "(but for rows in window memory) and not in phases; small batches of GPU ranks need only the first. With less staging everything\n"
      "runs in rounds. TERN_STAGING_MAX_MB bounds what is computed here.\n");
  return 0;
}

}  // namespace tern::tools
