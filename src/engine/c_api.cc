// SPDX-License-Identifier: Apache-2.0
// The C interface: each function reads its structs, calls the engine, and turns exceptions into a status and a text.
#include <tern/tern.h>

#include <algorithm>
#include <cstring>
#include <new>

#include "base/error.h"
#include "engine/objects.h"
#include "engine/validate.h"

namespace {

using tern::fail;

// The text of the last error, one per thread.
std::string& last_error() {
  static thread_local std::string text;
  return text;
}

tern_status keep(tern_status status, const char* text) noexcept {
  try {
    last_error() = text;
  } catch (...) {
    last_error().clear();
  }
  return status;
}

template <typename Body>
tern_status guarded(Body body) noexcept {
  try {
    body();
    return TERN_OK;
  } catch (const tern::Failure& failure) {
    return keep(failure.status(), failure.what());
  } catch (const std::bad_alloc&) {
    return keep(TERN_OUT_OF_MEMORY, "out of memory; lower max_tokens, or the number of plans and exchanges");
  } catch (const std::exception& unexpected) {
    return keep(TERN_INTERNAL_ERROR, unexpected.what());
  } catch (...) {
    return keep(TERN_INTERNAL_ERROR, "an exception of unknown type");
  }
}

void need(const void* pointer, const char* name) {
  if (pointer == nullptr) fail(TERN_INVALID_ARGUMENT, "{} is NULL", name);
}

// Structs of every version are whole words long; another size would cut a pointer in two.
void check_size(size_t size, size_t own_size, const char* name) {
  constexpr size_t kLongest = 1 << 20;
  if (size < sizeof(size_t) || size > kLongest || size % sizeof(size_t) != 0)
    fail(TERN_INVALID_ARGUMENT, "{}: struct_size is {}, must be sizeof({}), {} in this version", name, size, name, own_size);
}

// A copy of a caller's struct: fields that an older caller does not know are zero; what a newer one knows must be zero.
template <typename Struct>
Struct read_struct(const Struct* given, const char* name) {
  need(given, name);
  const size_t size = given->struct_size;
  check_size(size, sizeof(Struct), name);
  const auto* bytes = reinterpret_cast<const unsigned char*>(given);
  if (size > sizeof(Struct) && std::any_of(bytes + sizeof(Struct), bytes + size, [](unsigned char byte) { return byte != 0; }))
    fail(TERN_UNSUPPORTED, "{}: fields are set that this version of the library ({}) does not know", name, tern_version());
  Struct result;
  std::memcpy(&result, given, std::min(size, sizeof(Struct)));
  result.struct_size = sizeof(Struct);
  return result;
}

template <typename Struct>
Struct read_optional(const Struct* given, const char* name) {
  return given == nullptr ? Struct{} : read_struct(given, name);
}

// Fills a caller's struct as far as the caller knows it.
template <typename Struct>
void write_struct(Struct* given, const Struct& result) {
  const size_t size = given->struct_size;
  std::memcpy(given, &result, std::min(size, sizeof(Struct)));
  given->struct_size = size;
}

template <typename Struct>
void check_output(const Struct* given, const char* name) {
  need(given, name);
  check_size(given->struct_size, sizeof(Struct), name);
}

tern::SpanLog& trace_of(tern_plan* plan, const tern_launch& launch) { return plan->exchange->device->trace().lane(launch.lane); }

}  // namespace

const char* tern_status_name(tern_status status) { return tern::status_name(status); }
const char* tern_last_error(void) { return last_error().c_str(); }
int32_t tern_version(void) { return TERN_VERSION_MAJOR * 10000 + TERN_VERSION_MINOR * 100 + TERN_VERSION_PATCH; }

// ---------------------------------------------------------------------------------------------------------------- group

tern_status tern_group_create_from_env(const tern_group_options* options, tern_group** group) {
  return guarded([&] {
    need(group, "group");
    *group = new tern_group{tern::make_env_group(read_optional(options, "tern_group_options"))};
  });
}

tern_status tern_group_create_from_allgather(const tern_group_options* options, int32_t rank, int32_t num_ranks,
                                             tern_allgather_fn allgather, void* context, tern_group** group) {
  return guarded([&] {
    need(group, "group");
    need(reinterpret_cast<const void*>(allgather), "allgather");
    if (num_ranks < 1 || rank < 0 || rank >= num_ranks) fail(TERN_INVALID_ARGUMENT, "group: rank {} of {} ranks", rank, num_ranks);
    const auto o = read_optional(options, "tern_group_options");
    *group = new tern_group{tern::make_allgather_group(o, tern::make_callback_bootstrap(rank, num_ranks, allgather, context))};
  });
}

tern_status tern_group_create_local(const tern_group_options* options, int32_t num_ranks, tern_group** groups) {
  return guarded([&] {
    need(groups, "groups");
    const auto made = tern::make_local_groups(read_optional(options, "tern_group_options"), num_ranks);
    std::vector<std::unique_ptr<tern_group>> handles;
    for (const auto& state : made) handles.push_back(std::make_unique<tern_group>(tern_group{state}));
    for (size_t r = 0; r < handles.size(); ++r) groups[r] = handles[r].release();
  });
}

tern_status tern_group_get_info(const tern_group* group, tern_group_info* info) {
  return guarded([&] {
    need(group, "group");
    check_output(info, "tern_group_info");
    const tern::Topology& t = group->state->topology;
    const auto rank = static_cast<size_t>(t.rank);
    tern_group_info result;
    result.rank = t.rank;
    result.num_ranks = t.num_ranks;
    result.node = t.node[rank];
    result.num_nodes = t.num_nodes;
    result.rank_in_node = t.rank_in_node[rank];
    result.ranks_in_node = t.ranks_in_node[static_cast<size_t>(result.node)];
    write_struct(info, result);
  });
}

void tern_group_destroy(tern_group* group) { delete group; }

// ------------------------------------------------------------------------------------------------------------- exchange

tern_status tern_exchange_query_memory(const tern_group* group, const tern_exchange_options* options, tern_memory_info* info) {
  return guarded([&] {
    need(group, "group");
    check_output(info, "tern_memory_info");
    write_struct(info, tern::query_memory(*group->state, read_optional(options, "tern_exchange_options")));
  });
}

tern_status tern_exchange_create(tern_group* group, const tern_exchange_options* options, tern_exchange** exchange) {
  return guarded([&] {
    need(group, "group");
    need(exchange, "exchange");
    *exchange = new tern_exchange{tern::make_exchange(group->state, read_optional(options, "tern_exchange_options"))};
  });
}

tern_status tern_exchange_get_info(const tern_exchange* exchange, tern_exchange_info* info) {
  return guarded([&] {
    need(exchange, "exchange");
    check_output(info, "tern_exchange_info");
    const tern::Exchange& state = *exchange->state;
    tern_exchange_info result;
    result.device = state.options.device;
    result.device_index = state.device->device_index();
    result.num_lanes = state.device->num_lanes();
    result.timeout_ms = state.options.timeout_ms;
    write_struct(info, result);
  });
}

void tern_exchange_destroy(tern_exchange* exchange) { delete exchange; }

tern_status tern_window_alloc(tern_exchange* exchange, int64_t bytes, void** pointer) {
  return guarded([&] {
    need(exchange, "exchange");
    need(pointer, "pointer");
    if (bytes <= 0) fail(TERN_INVALID_ARGUMENT, "window: {} bytes asked for, must be positive", bytes);
    *pointer = exchange->state->device->alloc_window(bytes);
  });
}

tern_status tern_window_free(tern_exchange* exchange, void* pointer) {
  return guarded([&] {
    need(exchange, "exchange");
    if (pointer != nullptr) exchange->state->device->free_window(pointer);
  });
}

tern_status tern_exchange_get_state(const tern_exchange* exchange, tern_exchange_state* state) {
  return guarded([&] {
    need(exchange, "exchange");
    check_output(state, "tern_exchange_state");
    write_struct(state, exchange->state->device->state());
  });
}

tern_status tern_exchange_recover(tern_exchange* exchange, const tern_recover_options* options) {
  return guarded([&] {
    need(exchange, "exchange");
    const auto o = read_optional(options, "tern_recover_options");
    if (o.timeout_ms < 0) fail(TERN_INVALID_ARGUMENT, "recover: timeout_ms is {}, must not be negative", o.timeout_ms);
    tern::DeviceExchange& device = *exchange->state->device;
    tern::with_span(device.trace().lane(0), {.operation = TERN_OP_RECOVER}, [&](tern::Span&) { device.recover(o); });
  });
}

tern_status tern_exchange_get_metrics(const tern_exchange* exchange, tern_metrics* metrics) {
  return guarded([&] {
    need(exchange, "exchange");
    check_output(metrics, "tern_metrics");
    write_struct(metrics, exchange->state->device->metrics());
  });
}

// ----------------------------------------------------------------------------------------------------------------- plan

tern_status tern_plan_create(tern_exchange* exchange, const tern_plan_options* options, tern_plan** plan) {
  return guarded([&] {
    need(exchange, "exchange");
    need(plan, "plan");
    const tern::Topology& t = exchange->state->group->topology;
    const tern::PlanShape shape = tern::make_plan_shape(read_struct(options, "tern_plan_options"), t.rank, t.num_ranks);
    *plan = new tern_plan{exchange->state, exchange->state->device->create_plan(shape)};
  });
}

void tern_plan_destroy(tern_plan* plan) { delete plan; }

tern_status tern_plan_route(tern_plan* plan, const tern_routing* routing, const tern_launch* launch, tern_plan_info* info) {
  return guarded([&] {
    need(plan, "plan");
    if (info != nullptr) check_output(info, "tern_plan_info");
    const auto r = read_struct(routing, "tern_routing");
    const auto l = read_optional(launch, "tern_launch");
    tern::check_launch(l, plan->exchange->device->num_lanes());
    if (l.phase != TERN_PHASE_WHOLE) fail(TERN_INVALID_ARGUMENT, "route: phase must be TERN_PHASE_WHOLE");
    plan->device->check_routing(r);
    tern::with_span(trace_of(plan, l), {.operation = TERN_OP_ROUTE}, [&](tern::Span&) { plan->device->route(r, l); });
    if (info != nullptr) write_struct(info, plan->device->info());
  });
}

tern_status tern_plan_get_info(const tern_plan* plan, tern_plan_info* info) {
  return guarded([&] {
    need(plan, "plan");
    check_output(info, "tern_plan_info");
    write_struct(info, plan->device->info());
  });
}

tern_status tern_plan_get_row_capacity(const tern_plan* plan, int64_t* num_rows) {
  return guarded([&] {
    need(plan, "plan");
    need(num_rows, "num_rows");
    *num_rows = plan->device->shape().row_capacity;
  });
}

tern_status tern_count_routing(tern_exchange* exchange, const tern_routing* routing, int32_t num_experts, int32_t num_topk,
                               const tern_launch* launch, const tern_routing_counts* counts) {
  return guarded([&] {
    need(exchange, "exchange");
    const auto r = read_struct(routing, "tern_routing");
    const auto c = read_struct(counts, "tern_routing_counts");
    const auto l = read_optional(launch, "tern_launch");
    tern::check_launch(l, exchange->state->device->num_lanes());
    if (r.num_tokens < 0) fail(TERN_INVALID_ARGUMENT, "routing: num_tokens is {}, must not be negative", r.num_tokens);
    const tern::Topology& t = exchange->state->group->topology;
    tern_plan_options options;
    options.max_tokens = std::max<int64_t>(1, r.num_tokens);
    options.num_experts = num_experts;
    options.num_topk = num_topk;
    tern::PlanShape shape = tern::make_plan_shape(options, t.rank, t.num_ranks);
    shape.num_nodes = t.num_nodes;
    exchange->state->device->count_routing(shape, r, l, c);
  });
}

// ----------------------------------------------------------------------------------------------------------- operations

tern_status tern_dispatch(tern_plan* plan, const tern_dispatch_args* args, const tern_launch* launch) {
  return guarded([&] {
    need(plan, "plan");
    auto a = read_struct(args, "tern_dispatch_args");
    const auto l = read_optional(launch, "tern_launch");
    tern::check_launch(l, plan->exchange->device->num_lanes());
    tern_routing routing;
    if (a.routing != nullptr) {
      routing = read_struct(a.routing, "tern_routing");
      a.routing = &routing;
    }
    const tern::DispatchCall call = tern::make_dispatch_call(a, *plan->device, l);
    tern::with_span(trace_of(plan, l), {.operation = TERN_OP_DISPATCH, .phase = l.phase},
                    [&](tern::Span&) { plan->device->dispatch(call, l); });
  });
}

tern_status tern_combine(tern_plan* plan, const tern_combine_args* args, const tern_launch* launch) {
  return guarded([&] {
    need(plan, "plan");
    const auto a = read_struct(args, "tern_combine_args");
    const auto l = read_optional(launch, "tern_launch");
    tern::check_launch(l, plan->exchange->device->num_lanes());
    const tern::CombineCall call = tern::make_combine_call(a, *plan->device, l);
    tern::with_span(trace_of(plan, l), {.operation = TERN_OP_COMBINE, .phase = l.phase},
                    [&](tern::Span&) { plan->device->combine(call, l); });
  });
}

// ------------------------------------------------------------------------------------------------------------- timeline

tern_status tern_trace_start(tern_exchange* exchange, int64_t capacity) {
  return guarded([&] {
    need(exchange, "exchange");
    exchange->state->device->trace().start(capacity);
  });
}

tern_status tern_trace_stop(tern_exchange* exchange) {
  return guarded([&] {
    need(exchange, "exchange");
    exchange->state->device->trace().stop();
  });
}

tern_status tern_trace_read(const tern_exchange* exchange, tern_span* spans, int64_t capacity, int64_t* num_spans, int64_t* num_dropped) {
  return guarded([&] {
    need(exchange, "exchange");
    need(num_spans, "num_spans");
    if (capacity < 0) fail(TERN_INVALID_ARGUMENT, "trace: capacity is {}, must not be negative", capacity);
    if (capacity > 0) need(spans, "spans");
    const tern::Trace::Totals totals = exchange->state->device->trace().read({spans, static_cast<size_t>(capacity)});
    *num_spans = totals.num_spans;
    if (num_dropped != nullptr) *num_dropped = totals.num_dropped;
  });
}
