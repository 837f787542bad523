// SPDX-License-Identifier: Apache-2.0
#include "conformance/round_trip.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <iterator>
#include <stdexcept>
#include <thread>

#include "conformance/random.h"

namespace tern::conformance {
namespace {

enum Stream : uint64_t { kPause = 100 };

void check_status(const char* call, tern_status found, tern_status expected) {
  if (found == expected) return;
  throw std::runtime_error(fmt::format("{} returned {}, expected {}; last error: {}", call, tern_status_name(found),
                                       tern_status_name(expected), found == TERN_OK ? "" : tern_last_error()));
}

bool names_no_expert(const Case& c, const RankRouting& routing) {
  return std::any_of(routing.topk_idx.begin(), routing.topk_idx.end(),
                     [&](int64_t expert) { return expert < -1 || expert >= c.num_experts(); });
}

const char* operation_name(int32_t operation) {
  constexpr const char* kNames[] = {"nothing", "route", "dispatch", "weights", "combine", "recover"};
  return operation >= 0 && operation < static_cast<int32_t>(std::size(kNames)) ? kNames[operation] : "an unknown operation";
}

std::string describe(const tern_failure& failure) {
  return fmt::format("{}: rank {} waited for rank {} in {}, lane {}, epoch {}, saw {}", tern_status_name(failure.status), failure.waiter,
                     failure.awaited, operation_name(failure.operation), failure.lane, failure.expected_epoch, failure.seen_epoch);
}

}  // namespace

RoundTrip::RoundTrip(const Scenario& scenario, int32_t rank, tern_exchange* exchange, RankDevice& device)
    : scenario_(&scenario),
      place_{rank, exchange, &device, scenario.placements[static_cast<size_t>(rank)].num_tokens},
      routed_to_no_expert_(names_no_expert(scenario.c, scenario.routings[static_cast<size_t>(rank)])) {
  const tern_plan_options options = scenario.plan_options();
  tern_plan* plan = nullptr;
  check_status("tern_plan_create", tern_plan_create(exchange, &options, &plan), TERN_OK);
  plan_.reset(plan);
  routing_.load(scenario, place_, false);
}

void RoundTrip::run() {
  if (!c().fused) route();
  for (int batch = 0; batch < 2; ++batch) {
    dispatch(batch);
    combine(batch);
  }
}

void RoundTrip::launch_with(Launching launching) {
  launching_ = std::move(launching);
  if (launching_.count_on_device) make_room();
}

void RoundTrip::run_graph(const std::vector<Scenario>& scenarios, int num_replays) {
  launching_.count_on_device = c().spread != Spread::kFull;
  make_room();
  prepare(0);
  enqueue();
  settle();
  const std::unique_ptr<tools::DeviceGraph> graph = place_.device->capture([this] { enqueue(); });
  for (int replay = 0; replay < num_replays; ++replay) {
    pause();
    scenario_ = &scenarios[static_cast<size_t>(replay) % scenarios.size()];
    prepare(1 + replay);
    graph->replay();
    settle();
  }
}

// For as many tokens as any batch can have.
void RoundTrip::make_room() {
  place_.room_tokens = c().max_tokens;
  routing_.load(*scenario_, place_, launching_.count_on_device);
}

void RoundTrip::prepare(int batch) {
  if (dispatch_ == nullptr) dispatch_ = std::make_unique<DispatchCall>();
  if (combine_ == nullptr) combine_ = std::make_unique<CombineCall>();
  routing_.load(*scenario_, place_, launching_.count_on_device);
  dispatch_->load(*scenario_, batch, place_);
  dispatch_->args.routing = c().fused ? &routing_.routing : nullptr;
  combine_->load(*scenario_, batch, place_);
}

void RoundTrip::enqueue() {
  if (!c().fused) call_route(nullptr);
  if (c().phases) call_dispatch(TERN_PHASE_SEND);
  call_dispatch(c().phases ? TERN_PHASE_RECEIVE : TERN_PHASE_WHOLE);
  if (c().phases) call_combine(TERN_PHASE_SEND);
  call_combine(c().phases ? TERN_PHASE_RECEIVE : TERN_PHASE_WHOLE);
}

void RoundTrip::settle() {
  dispatched_beyond_capacity_ = dispatched_beyond_capacity_ || placement().overflow;
  await();
  for (const std::string& text : dispatch_->differences(placement())) report(text);
  for (const std::string& text : combine_->differences(c())) report(text);
}

void RoundTrip::route() {
  pause();
  tern_plan_info info;
  call_route(&info);
  routed_ = true;
  check_info(info);
}

void RoundTrip::dispatch(int batch) {
  if (!c().phases) {
    begin_dispatch(batch, TERN_PHASE_WHOLE);
    return finish_dispatch(batch, TERN_PHASE_WHOLE);
  }
  begin_dispatch(batch, TERN_PHASE_SEND);
  finish_dispatch(batch, TERN_PHASE_RECEIVE);
}

void RoundTrip::combine(int batch) {
  if (!c().phases) {
    begin_combine(batch, TERN_PHASE_WHOLE);
    return finish_combine(batch, TERN_PHASE_WHOLE);
  }
  begin_combine(batch, TERN_PHASE_SEND);
  finish_combine(batch, TERN_PHASE_RECEIVE);
}

void RoundTrip::begin_dispatch(int batch, tern_phase phase) {
  pause();
  dispatch_.reset();  // gives its part of the window back first
  dispatch_ = std::make_unique<DispatchCall>();
  dispatch_->load(*scenario_, batch, place_);
  if (!routed_) dispatch_->args.routing = &routing_.routing;
  if (phase != TERN_PHASE_WHOLE) call_dispatch(phase);
}

void RoundTrip::finish_dispatch(int, tern_phase phase) {
  if (phase != TERN_PHASE_WHOLE) pause();
  call_dispatch(phase);
  dispatched_beyond_capacity_ = dispatched_beyond_capacity_ || placement().overflow;
  if (!routed_) {
    routed_ = true;
    tern_plan_info info;
    check_status("tern_plan_get_info", tern_plan_get_info(plan_.get(), &info), TERN_OK);
    check_info(info);
    const bool fits = c().num_nodes() == 1 || c().staging_bytes == 0;
    if (!place_.on_gpu() && c().mode == TERN_MODE_LATENCY && fits) expect("latency_path", info.latency_path, 1);
    if (!place_.on_gpu() && c().mode == TERN_MODE_THROUGHPUT && !c().phases) expect("latency_path", info.latency_path, 0);
  }
  await();
  for (const std::string& text : dispatch_->differences(placement())) report(text);
}

void RoundTrip::begin_combine(int batch, tern_phase phase) {
  pause();
  combine_.reset();
  combine_ = std::make_unique<CombineCall>();
  combine_->load(*scenario_, batch, place_);
  if (phase != TERN_PHASE_WHOLE) call_combine(phase);
}

void RoundTrip::finish_combine(int, tern_phase phase) {
  if (phase != TERN_PHASE_WHOLE) pause();
  call_combine(phase);
  await();
  for (const std::string& text : combine_->differences(c())) report(text);
}

void RoundTrip::call_route(tern_plan_info* info) {
  const tern_launch how = launch(TERN_PHASE_WHOLE);
  launching_.before();
  check_status("tern_plan_route", tern_plan_route(plan_.get(), &routing_.routing, &how, info), TERN_OK);
  launching_.after();
}

void RoundTrip::call_dispatch(tern_phase phase) {
  const tern_launch how = launch(phase);
  // A GPU rank learns of it when the operation has run.
  const bool overflow = placement().overflow && phase != TERN_PHASE_SEND && !place_.on_gpu();
  launching_.before();
  check_status("tern_dispatch", tern_dispatch(plan_.get(), &dispatch_->args, &how), overflow ? TERN_CAPACITY_EXCEEDED : TERN_OK);
  launching_.after();
}

void RoundTrip::call_combine(tern_phase phase) {
  const tern_launch how = launch(phase);
  launching_.before();
  check_status("tern_combine", tern_combine(plan_.get(), &combine_->args, &how), TERN_OK);
  launching_.after();
}

std::vector<uint8_t> RoundTrip::output_bytes() {
  std::vector<uint8_t> result;
  const auto append = [&](const GuardedBuffer& buffer) {
    const GuardedBuffer::Image image = buffer.read();
    result.insert(result.end(), image.bytes().begin(), image.bytes().end());
  };
  if (dispatch_ != nullptr) dispatch_->outputs.for_each([&](const char*, const GuardedBuffer& buffer) { append(buffer); });
  if (combine_ != nullptr) {
    append(combine_->tokens);
    append(combine_->weights);
  }
  return result;
}

tern_launch RoundTrip::launch(tern_phase phase) const {
  tern_launch how = launching_.launch;
  how.stream = place_.device->stream();
  how.lane = c().lane;
  how.phase = phase;
  return how;
}

void RoundTrip::check_info(const tern_plan_info& info) {
  if (c().extent == TERN_EXTENT_WORST)
    expect("row_capacity", info.row_capacity, c().capacity());
  else if (info.row_capacity < info.num_rows)
    report(fmt::format("info: row_capacity is {}, less than the {} rows there are", info.row_capacity, info.num_rows));
  if (place_.on_gpu() && info.num_sms <= 0) report(fmt::format("info: num_sms is {} on a GPU", info.num_sms));
  if (place_.on_gpu() && c().extent == TERN_EXTENT_WORST)
    check_unknown_counts(info);
  else
    check_known_counts(info);
}

void RoundTrip::check_known_counts(const tern_plan_info& info) {
  expect("num_tokens", info.num_tokens, placement().num_tokens);
  expect("num_received", info.num_received, placement().num_received);
  expect("num_rows", info.num_rows, static_cast<int64_t>(placement().rows.size()));
  for (int32_t r = 0; r < c().num_ranks; ++r) {
    const auto peer = static_cast<size_t>(r);
    expect("received_per_rank", info.received_per_rank[r], placement().received_per_rank[peer]);
    expect("sent_per_rank", info.sent_per_rank[r], placement().sent_per_rank[peer]);
    // Nobody here knows the counts of a rank that reaches nobody here.
    const bool known = reaches(c(), scenario_->masked, r, place_.rank);
    for (int32_t to = 0; to < c().num_ranks; ++to)
      expect("pair_counts", info.pair_counts[r * c().num_ranks + to],
             known ? scenario_->placements[peer].sent_per_rank[static_cast<size_t>(to)] : 0);
  }
  if (c().num_nodes() > 1 && !place_.on_gpu()) check_rail_counts(info);
  for (int32_t e = 0; e < c().experts_per_rank; ++e)
    expect("received_per_expert", info.received_per_expert[e], placement().received_per_expert[static_cast<size_t>(e)]);
}

void RoundTrip::check_rail_counts(const tern_plan_info& info) {
  const RailCounts expected = rail_oracle(c(), scenario_->placements, scenario_->routings, scenario_->masked, place_.rank);
  for (size_t node = 0; node < expected.tokens.size(); ++node) expect("rail_tokens", info.rail_tokens[node], expected.tokens[node]);
  for (size_t i = 0; i < expected.token_in_rank.size(); ++i)
    expect("rail_token_in_rank", info.rail_token_in_rank[i], expected.token_in_rank[i]);
}

// What only the device knows; what the host knows anyway may be told.
void RoundTrip::check_unknown_counts(const tern_plan_info& info) {
  expect("num_received", info.num_received, -1);
  if (info.num_tokens != -1) expect("num_tokens", info.num_tokens, placement().num_tokens);
  if (info.num_rows != -1) expect("num_rows", info.num_rows, c().capacity());
  if (info.received_per_rank != nullptr || info.received_per_expert != nullptr || info.sent_per_rank != nullptr ||
      info.pair_counts != nullptr)
    report("info: there are arrays of counts, which the host cannot know");
}

// GPU: what came of an operation is known when it has run.
void RoundTrip::await() {
  if (!place_.on_gpu()) return;
  place_.device->synchronise();
  check_state();
}

void RoundTrip::check_state() {
  tern_exchange_state state;
  check_status("tern_exchange_get_state", tern_exchange_get_state(place_.exchange, &state), TERN_OK);
  const tern_status status = state.failure.status;
  if (state.health == TERN_HEALTH_FAILED) throw std::runtime_error(fmt::format("the exchange has failed: {}", describe(state.failure)));
  const bool excused = (status == TERN_OK && !dispatched_beyond_capacity_ && !routed_to_no_expert_) ||
                       (status == TERN_CAPACITY_EXCEEDED && dispatched_beyond_capacity_) ||
                       (status == TERN_INVALID_ARGUMENT && routed_to_no_expert_);
  if (!excused)
    report(fmt::format("the state's record is {}{}{}", tern_status_name(status),
                       dispatched_beyond_capacity_ ? "; rows were beyond the capacity" : "",
                       routed_to_no_expert_ ? "; expert numbers were out of range" : ""));
}

// Deterministic places and lengths, so that ranks drift apart by several operations.
void RoundTrip::pause() {
  const Draw draw(c().seed, kPause, place_.rank);
  const int64_t step = num_steps_++;
  if (c().delays && draw.one_in(2 * step, 3)) std::this_thread::sleep_for(std::chrono::milliseconds(1 + draw.below(2 * step + 1, 6)));
}

void RoundTrip::expect(const char* what, int64_t found, int64_t expected) {
  if (found != expected) report(fmt::format("info: {} is {}, expected {}", what, found, expected));
}

void RoundTrip::report(const std::string& text) {
  constexpr size_t kMostReports = 20;
  if (differences_.size() < kMostReports) differences_.push_back(fmt::format("rank {}: {}", place_.rank, text));
}

void run_two_in_flight(RoundTrip& first, RoundTrip& second, const ReceiveOrder& order) {
  const auto each = [&](bool in_order, auto finish) {
    finish(in_order ? first : second);
    finish(in_order ? second : first);
  };
  for (int batch = 0; batch < 3; ++batch) {
    first.begin_dispatch(batch, TERN_PHASE_SEND);
    second.begin_dispatch(batch, TERN_PHASE_SEND);
    each(order.dispatches_in_order, [&](RoundTrip& trip) { trip.finish_dispatch(batch, TERN_PHASE_RECEIVE); });
    first.begin_combine(batch, TERN_PHASE_SEND);
    second.begin_combine(batch, TERN_PHASE_SEND);
    each(order.combines_in_order, [&](RoundTrip& trip) { trip.finish_combine(batch, TERN_PHASE_RECEIVE); });
  }
}

}  // namespace tern::conformance
