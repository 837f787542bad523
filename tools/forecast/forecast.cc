// SPDX-License-Identifier: Apache-2.0
#include "forecast/forecast.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "layout/device_window.h"
#include "plan/batch_path.h"

namespace tern::tools {
namespace {

constexpr double kMega = 1e6;
// The library's own: src/cuda/plan.cc, src/cuda/latency.cc, src/cuda/window_layout.cc.
constexpr int64_t kTokensPerSm = 64;
constexpr int64_t kMostRoomBytes = 4 << 20, kSpareRowBytes = 1024;
constexpr int64_t kMostParts = 128, kLeastPartBytes = 2048;
// Until so much has crossed the network of GPU ranks the other stages have nothing to do. Fitted to batches of up to 2 MB: a round of the library
// has up to 8 MiB to each node (src/cuda/node_operations.cc), and the next one leaves while it is on its way.
constexpr double kNetworkPieceBytes = 1 << 20;

double us_of(double bytes, double gbps) { return bytes == 0 ? 0 : bytes * 1e-3 / gbps; }

// Bytes that workers move, kind by kind; each kind takes its own time of them.
class Work {
 public:
  void add(const char* what, double bytes, double gbps) {
    if (bytes == 0) return;
    us_ += us_of(bytes, gbps);
    terms_.push_back(fmt::format("{} {:.2f} MB / {:g} GB/s", what, bytes / kMega, gbps));
  }
  Stage stage(const char* name, double num_workers, const char* workers) const {
    const std::string terms = terms_.empty() ? "nothing" : fmt::format("{}", fmt::join(terms_, " + "));
    return {name, us_ / num_workers, true, fmt::format("({}) / {:g} {}", terms, num_workers, workers)};
  }

 private:
  double us_ = 0;
  std::vector<std::string> terms_;
};

// The dispatch routes.
bool is_one_call(const std::string& op) { return op == "route_dispatch" || op == "round_trip_worst"; }

Stage transfer(const char* name, double bytes, double gbps) {
  return {name, us_of(bytes, gbps), true, fmt::format("{:.2f} MB / {:g} GB/s", bytes / kMega, gbps)};
}

}  // namespace

double Step::us() const {
  double slowest_us = 0, others_us = 0;
  for (const Stage& stage : stages) {
    if (stage.overlaps)
      slowest_us = std::max(slowest_us, stage.us);
    else
      others_us += stage.us;
  }
  return slowest_us + others_us;
}

const Stage& Step::slowest() const {
  return *std::ranges::max_element(stages, {}, [](const Stage& stage) { return stage.us; });
}

double OperationForecast::us() const {
  double sum = 0;
  for (const Step& step : steps) sum += step.us();
  return sum;
}

int64_t Forecaster::row_bytes_of(const std::string& op) const {
  return op == "combine" ? batch_.combine_row_bytes : batch_.dispatch_row_bytes + batch_.dispatch_scale_bytes;
}

// Of an exchange that is made for this batch. Between nodes the kernels take what all nodes bring at once.
bool Forecaster::has_room_for_small_kernels(const std::string& op, tern_mode mode) const {
  const Places& places = batch_.places;
  const int64_t num_tokens = places.num_nodes * batch_.num_tokens;
  if (places.num_ranks() > layout::kMostLatencyRanks || num_tokens > layout::kMostLatencyTokens) return false;
  if (batch_.choices.num_topk > layout::kMostLatencyTopk) return false;
  return mode == TERN_MODE_LATENCY || num_tokens * (row_bytes_of(op) - kSpareRowBytes) <= kMostRoomBytes;
}

// Does it take the latency path? Between nodes that is: does a dispatch route on its way?
bool Forecaster::is_small(const std::string& op, const OperationChoice& choice) const {
  const bool is_between_nodes = batch_.places.num_nodes > 1, routes = op != "combine" && is_one_call(choice.op);
  if (is_between_nodes && !routes) return false;
  if (on_gpu() && !is_between_nodes && !has_room_for_small_kernels(op, choice.mode)) return false;
  if (choice.mode != TERN_MODE_AUTO) return choice.mode == TERN_MODE_LATENCY;
  const int64_t row_bytes = row_bytes_of(op);
  if (!on_gpu() || is_between_nodes) {
    const int64_t most_kb = !is_between_nodes ? kSmallKb : on_gpu() ? kRoutedOnTheWayKbGpu : kRoutedOnTheWayKbCpu;
    const int64_t bytes_of_row = op == "combine" ? row_bytes : batch_.dispatch_row_bytes;  // without its scales
    return batch_.num_tokens * bytes_of_row <= most_kb << 10;
  }
  const int most = static_cast<int>(costs_.workers);
  return is_pushed({.operation = op == "combine" ? TERN_OP_COMBINE : TERN_OP_DISPATCH,
                    .routes = routes,
                    .num_ranks = batch_.places.ranks_per_node,
                    .num_tokens = batch_.num_tokens,
                    .messages_per_token = std::min(batch_.places.ranks_per_node, batch_.choices.num_topk),
                    .row_bytes = row_bytes,
                    .num_sms = choice.num_sms > 0 ? std::min(choice.num_sms, most) : most,
                    .are_sms_asked = choice.num_sms > 0});
}

// GPU ranks have kernels of their own for small batches. Between nodes these take all that they have room for, routed on its way or not.
bool Forecaster::takes_small_kernels(const std::string& op, const OperationChoice& choice) const {
  if (!on_gpu()) return false;
  if (batch_.places.num_nodes == 1) return is_small(op, choice);
  return choice.mode != TERN_MODE_THROUGHPUT && has_room_for_small_kernels(op, choice.mode);
}

// A block for each message that may arrive, or for each part of a row that is sent if these are more, and one for the routing.
int64_t Forecaster::small_blocks(const std::string& op) const {
  const bool is_combine = op == "combine";
  const int64_t num_messages = batch_.places.num_ranks() * batch_.num_tokens;
  const int64_t num_rows = is_combine ? num_messages : batch_.places.num_nodes * batch_.num_tokens;
  const int64_t row_bytes = is_combine ? batch_.combine_row_bytes : batch_.dispatch_row_bytes;
  int log2 = 0;
  while ((is_combine || !batch_.casts) && log2 < layout::kMostRowPartsLog2 && num_rows << (log2 + 1) <= kMostParts &&
         row_bytes >> (log2 + 1) >= kLeastPartBytes)
    ++log2;
  return std::max(num_messages, num_rows << log2) + 1;
}

// CPU: a rank's share of the node's cores.
double Forecaster::workers(int num_sms) const { return on_gpu() ? num_sms : std::min(1.0, costs_.workers / batch_.places.ranks_per_node); }

double Forecaster::ranks_per_core() const { return std::max(1.0, batch_.places.ranks_per_node / costs_.workers); }

int Forecaster::library_sms(const OperationChoice& choice) const {
  if (!on_gpu()) return 0;
  const int64_t row_bytes = row_bytes_of(choice.op);
  const int most = static_cast<int>(costs_.workers);
  if (choice.op == "plan")
    return static_cast<int>(std::min<int64_t>({most, kSaturatingSms, (batch_.num_tokens + kTokensPerSm - 1) / kTokensPerSm}));
  if (takes_small_kernels(choice.op, choice)) return static_cast<int>(std::min<int64_t>(small_blocks(choice.op), most));
  return sms_for_bytes(most, batch_.num_tokens * row_bytes);
}

int Forecaster::best_sms(const OperationChoice& choice) const {
  if (!on_gpu()) return 0;
  constexpr double kAlmost = 1.01;
  const auto us_with = [&](int num_sms) {
    OperationChoice with = choice;
    with.num_sms = num_sms;
    return predict(with).us();
  };
  const int most = static_cast<int>(costs_.workers);
  double least_us = us_with(most);  // on one path more SMs are never slower, but with fewer the other one may be taken
  for (int num_sms = 1; num_sms < most; ++num_sms) least_us = std::min(least_us, us_with(num_sms));
  int num_sms = 1;
  while (num_sms < most && us_with(num_sms) > least_us * kAlmost) ++num_sms;
  return num_sms;
}

void Forecaster::add_trips(Step& step, double fixed_us, const std::string& how) const {
  const int num_peers = batch_.places.ranks_per_node - 1;
  if (on_gpu())
    step.stages.push_back({"fixed", fixed_us, false, how});
  else
    step.stages.push_back(
        {"fixed", fixed_us + num_peers * costs_.trip_us * ranks_per_core(), false,
         fmt::format("{} + {} peers x {:g} us x {:g} ranks on a core", how, num_peers, costs_.trip_us, ranks_per_core())});
}

void Forecaster::add_wake(Step& step) const {
  const int num_peers = batch_.places.ranks_per_node - 1;
  step.stages.push_back({"wake", num_peers * costs_.wake_us * ranks_per_core(), false,
                         fmt::format("{} peers x {:g} us x {:g} ranks on a core", num_peers, costs_.wake_us, ranks_per_core())});
}

void Forecaster::add_network(Step& step, double bytes) const {
  const int num_rails = batch_.places.num_nodes - 1;
  if (num_rails == 0) return;
  if (on_gpu()) {
    step.stages.push_back(transfer("network", bytes, costs_.net_gbps));
    const double piece = std::min(1.0, kNetworkPieceBytes * num_rails / bytes);
    double sum_us = 0, slowest_us = 0;
    for (const Stage& stage : step.stages) {
      if (!stage.overlaps) continue;
      sum_us += stage.us;
      slowest_us = std::max(slowest_us, stage.us);
    }
    step.stages.push_back({"fill", costs_.net_host_us + costs_.net_latency_us + piece * (sum_us - slowest_us), false,
                           fmt::format("{:g} us host + {:g} us trip + the first piece ({:.1f} %) of the faster stages", costs_.net_host_us,
                                       costs_.net_latency_us, piece * 100)});
    return;
  }
  const double of_cores = workers(0) * costs_.worker_net_gbps, gbps = std::min(costs_.net_gbps, of_cores);
  const double trips_us = num_rails * costs_.net_latency_us * ranks_per_core();
  const std::string rate =
      gbps < of_cores ? fmt::format("{:g} GB/s", gbps) : fmt::format("({:g} cores x {:g} GB/s)", workers(0), costs_.worker_net_gbps);
  step.stages.push_back({"network", std::max(us_of(bytes, gbps), trips_us), false,
                         fmt::format("the longer of {:.2f} MB / {} and {} rails x {:g} us x {:g} ranks on a core", bytes / kMega, rate,
                                     num_rails, costs_.net_latency_us, ranks_per_core())});
}

// Rows that are copied, by the workers and beside that by the memory. On CPU ranks a staged row is read again while it is in the caches, so
// staging comes on top.
void Forecaster::add_rows(Step& step, const RowWork& rows, int num_sms) const {
  const char* name = on_gpu() ? "SMs" : "cores";
  Work work, staging;
  work.add("rows", rows.rows, rows.rows_gbps);
  (on_gpu() ? work : staging).add("staged", rows.staged, rows.staged_gbps);
  work.add("rows of experts", rows.entries, rows.entries_gbps);
  step.stages.push_back(work.stage(name, workers(num_sms), name));
  const double sharers = on_gpu() ? 1 : batch_.places.ranks_per_node;
  const double bytes = (rows.rows + rows.entries + (on_gpu() ? rows.staged : 0)) * sharers;
  if (bytes > costs_.cache_mb * kMega) step.stages.push_back(transfer("memory", bytes, costs_.memory_gbps));
  if (!on_gpu() && rows.staged > 0) {
    step.stages.push_back(staging.stage("staging", workers(num_sms), name));
    step.stages.back().overlaps = false;
  }
}

Step Forecaster::route(bool exact, RouteWay way) const {
  Step step{.name = "route", .stages = {}};
  const double messages = static_cast<double>(batch_.num_tokens) * batch_.reach.ranks;
  const double per_message_ns = costs_.message_ns / (on_gpu() ? 1 : workers(0));
  step.stages.push_back({"messages", messages * per_message_ns * 1e-3, false, fmt::format("{:.0f} x {:g} ns", messages, per_message_ns)});
  if (way == RouteWay::kAlone) add_trips(step, costs_.route_us, fmt::format("{:g} us", costs_.route_us));
  if (on_gpu() && exact && batch_.places.num_nodes == 1)  // else it is hosts that count
    step.stages.push_back({"host", costs_.host_us, false, fmt::format("{:g} us until it knows the counts", costs_.host_us)});
  const double net_us = way == RouteWay::kInKernel ? costs_.net_small_route_us : costs_.net_route_us;
  if (on_gpu() && batch_.places.num_nodes > 1)
    step.stages.push_back({"counts", net_us, false, fmt::format("{:g} us between nodes", net_us)});
  if (way == RouteWay::kAlone) add_network(step, load_of_route(batch_).network);
  return step;
}

Step Forecaster::small_step(const std::string& name, double fixed_us, const Load& load) const {
  Step step{.name = name, .stages = {{"fixed", fixed_us, false, fmt::format("{:g} us launch and trips", fixed_us)}}};
  step.stages.push_back(transfer("link", load.link, costs_.small_gbps));
  add_network(step, load.network);
  return step;
}

// `routed`: along a plan that has been routed, or routes itself in an operation of its own.
Step Forecaster::dispatch(const OperationChoice& choice, bool routed) const {
  const Load load = load_of_dispatch(batch_, !routed);
  if (takes_small_kernels("dispatch", choice))
    return small_step("dispatch", costs_.small_dispatch_us - (routed ? costs_.small_route_us : 0), load);

  // On a GPU a token is staged once, and pulled by all; or it is delivered, from window to window. On a CPU it is pushed into the bank of each
  // other rank.
  const double staged = choice.in_windows ? 0 : on_gpu() ? load.tokens : load.link;
  const bool is_delivered = choice.in_windows && on_gpu() && batch_.layout == TERN_LAYOUT_RANK_MAJOR && batch_.places.num_nodes == 1;
  Step step{.name = "dispatch", .stages = {}};
  add_rows(step,
           {.rows = load.rows(),
            .rows_gbps = is_delivered ? costs_.deliver_gbps : costs_.copy_gbps,
            .staged = staged,
            .staged_gbps = costs_.stage_gbps,
            .entries = load.entries,
            .entries_gbps = costs_.spread_gbps},
           choice.num_sms);
  if (on_gpu()) step.stages.push_back(transfer("link", load.link, costs_.link_gbps * (is_delivered ? costs_.delivered_link_share : 1)));
  const double fixed_us = costs_.dispatch_us + (choice.in_windows ? 0 : costs_.stage_us);
  add_trips(step, fixed_us,
            fmt::format("{:g} us{}", costs_.dispatch_us, choice.in_windows ? "" : fmt::format(" + {:g} us staging", costs_.stage_us)));
  add_network(step, load.network);
  return step;
}

Step Forecaster::combine(const OperationChoice& choice) const {
  const Load load = load_of_combine(batch_);
  if (takes_small_kernels("combine", choice)) return small_step("combine", costs_.small_combine_us, load);

  // Rows of the expert layouts are summed first, and one row of each token goes on.
  const bool stages = !choice.in_windows || (on_gpu() && batch_.layout != TERN_LAYOUT_RANK_MAJOR);
  const double staged = stages ? load.link : 0;
  Step step{.name = "combine", .stages = {}};
  add_rows(step,
           {.rows = load.rows(),
            .rows_gbps = costs_.sum_gbps,
            .staged = staged,
            .staged_gbps = on_gpu() ? costs_.sum_gbps : costs_.stage_gbps,
            .entries = load.entries,
            .entries_gbps = costs_.sum_gbps},
           choice.num_sms);
  if (on_gpu()) step.stages.push_back(transfer("link", load.link, costs_.link_gbps * (stages ? costs_.staged_link_share : 1)));
  add_trips(step, costs_.combine_us, fmt::format("{:g} us", costs_.combine_us));
  add_network(step, load.network);
  return step;
}

// One operation of a choice that may have several, with the kernels and the SMs that it takes.
OperationChoice Forecaster::as(const std::string& op, const OperationChoice& choice) const {
  OperationChoice single = choice;
  single.op = op;
  single.mode = takes_small_kernels(op, choice) ? TERN_MODE_LATENCY : TERN_MODE_THROUGHPUT;
  const int asked = choice.num_sms > 0 ? choice.num_sms : library_sms(single);
  single.num_sms = on_gpu() ? std::min(asked, static_cast<int>(costs_.workers)) : 0;
  return single;
}

OperationForecast Forecaster::predict(const OperationChoice& choice) const {
  const std::string& op = choice.op;
  const bool is_round_trip = op == "round_trip" || op == "round_trip_worst";
  const bool in_one_call = is_one_call(op);
  const bool routes = is_round_trip || in_one_call || op == "plan" || op == "plan_dispatch";
  const bool dispatches = is_round_trip || in_one_call || op == "dispatch" || op == "plan_dispatch";
  const bool combines = is_round_trip || op == "combine";
  if (!routes && !dispatches && !combines) fail(TERN_INVALID_ARGUMENT, "plan: there is no operation \"{}\"", op);

  OperationForecast forecast{.num_sms = as(op, choice).num_sms,
                             .small = op != "plan" && is_small(op, choice),
                             .small_kernels = op != "plan" && takes_small_kernels(op, choice)};
  const bool routes_within = in_one_call && forecast.small;
  const auto add = [&](Step step, const Load& load) {
    forecast.steps.push_back(std::move(step));
    forecast.wire_bytes += load.rows() * (1 - 1.0 / batch_.places.num_ranks());
    forecast.link_bytes += load.link;
    forecast.network_bytes += load.network;
  };
  const bool routes_in_kernel = routes_within && takes_small_kernels("dispatch", as("dispatch", choice));
  const RouteWay way = routes_in_kernel ? RouteWay::kInKernel : routes_within ? RouteWay::kWithDispatch : RouteWay::kAlone;
  const bool is_a_step = routes && !(routes_in_kernel && batch_.places.num_nodes == 1);
  if (is_a_step) add(route(choice.exact, way), routes_within ? Load{} : load_of_route(batch_));
  if (dispatches) add(dispatch(as("dispatch", choice), !routes_within), load_of_dispatch(batch_, routes_within));
  if (combines) add(combine(as("combine", choice)), load_of_combine(batch_));
  if (!on_gpu()) add_wake(forecast.steps.front());
  return forecast;
}

}  // namespace tern::tools
