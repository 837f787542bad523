// SPDX-License-Identifier: Apache-2.0
#include "bench/tern_exchange.h"

#include <cstring>

namespace tern::bench {
namespace {

// With extent WORST the outputs have room for what can arrive at most.
int64_t worst_bytes(const Shape& shape) { return shape.num_tokens * shape.num_ranks * shape.row_bytes(); }

tern_exchange_options exchange_options(const Shape& shape) {
  return {.device = TERN_DEVICE_CPU,
          .window_bytes = 2 * worst_bytes(shape) + 4096,  // what arrives, and the experts' rows
          .max_tokens = shape.num_tokens,
          .max_row_bytes = shape.row_bytes(),
          .max_topk = shape.num_topk,
          .max_experts = shape.num_experts};
}

}  // namespace

TernExchange::TernExchange(const Workload& workload, const Processes& processes)
    : workload_(workload),
      group_(processes.make_group()),
      exchange_(group_, exchange_options(workload.shape())),
      out_window_(exchange_, worst_bytes(workload.shape())),
      rows_window_(exchange_, workload.num_received() * workload.shape().row_bytes()),
      out_memory_(make_private_memory(worst_bytes(workload.shape()))),
      combined_(make_private_memory(workload.shape().num_tokens * workload.shape().row_bytes())),
      plan_(exchange_, plan_options(TERN_EXTENT_EXACT)),
      routed_plan_(exchange_, plan_options(TERN_EXTENT_EXACT)),
      one_call_plan_(exchange_, plan_options(TERN_EXTENT_WORST)) {
  std::memcpy(rows_window_.data(), workload.expert_rows(), static_cast<size_t>(rows_window_.num_bytes()));
  plan_.route(routing());
  dispatch(plan_, out_window_.data());  // a combine needs one, also where it alone is timed
}

tern_routing TernExchange::routing() const { return {.topk_idx = workload_.topk_idx(), .num_tokens = workload_.shape().num_tokens}; }

tern_plan_options TernExchange::plan_options(tern_extent extent) const {
  const Shape& shape = workload_.shape();
  return {.max_tokens = shape.num_tokens,
          .num_experts = shape.num_experts,
          .num_topk = shape.num_topk,
          .layout = TERN_LAYOUT_RANK_MAJOR,
          .extent = extent};
}

void TernExchange::dispatch(Plan& plan, void* out) {
  plan.dispatch({.tokens = workload_.tokens(), .dtype = TERN_DTYPE_BF16, .hidden = workload_.shape().hidden, .out_tokens = out});
}

void TernExchange::combine(const void* rows) {
  plan_.combine({.rows = rows, .dtype = TERN_DTYPE_BF16, .hidden = workload_.shape().hidden, .out_tokens = combined_->data()});
}

void TernExchange::add_to(Contenders& contenders) {
  const int64_t row_bytes = workload_.shape().row_bytes();
  const auto num_received_bytes = static_cast<size_t>(workload_.num_received() * row_bytes);
  const std::span window(out_window_.as<std::byte>(), num_received_bytes);
  const std::span memory(out_memory_->data(), num_received_bytes);
  const std::span combined(combined_->data(), static_cast<size_t>(workload_.shape().num_tokens * row_bytes));
  const auto route_then_dispatch = [this](void* out) {
    routed_plan_.route(routing());
    dispatch(routed_plan_, out);
  };
  const auto one_call = [this](void* out) {
    one_call_plan_.dispatch(
        routing(), {.tokens = workload_.tokens(), .dtype = TERN_DTYPE_BF16, .hidden = workload_.shape().hidden, .out_tokens = out});
  };
  const auto add = [&](const char* operation, const char* name, std::span<std::byte> output, std::function<void()> run) {
    const Result result = output.data() == combined.data() ? Result::kCombinedByNode : Result::kDispatched;
    contenders.push_back({operation, name, Kind::kTern, result, output, std::move(run)});
  };
  add("dispatch", "Tern into windows", window, [=, this] { dispatch(plan_, window.data()); });
  add("dispatch", "Tern into caller's memory", memory, [=, this] { dispatch(plan_, memory.data()); });
  add("route and dispatch", "Tern, two calls, into windows", window, [=] { route_then_dispatch(window.data()); });
  add("route and dispatch", "Tern, one call, into windows", window, [=] { one_call(window.data()); });
  add("route and dispatch", "Tern, one call, into memory", memory, [=] { one_call(memory.data()); });
  add("combine", "Tern from windows", combined, [this] { combine(rows_window_.data()); });
  add("combine", "Tern from caller's memory", combined, [this] { combine(workload_.expert_rows()); });
}

}  // namespace tern::bench
