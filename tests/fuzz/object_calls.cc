// SPDX-License-Identifier: Apache-2.0
// The session itself, and its calls on groups, exchanges, windows and plans.
#include <algorithm>
#include <cstring>
#include <string>

#include "session.h"

namespace tern::fuzz {
namespace {

constexpr size_t kMostPlans = 3;
constexpr size_t kMostWindows = 4;
constexpr int kMostCalls = 64;
constexpr int64_t kTimeoutMs = 5000;

// Exchanges up to this size are made; from the other size on they must be refused.
constexpr int64_t kSmallExchangeBytes = int64_t{4} << 20;
constexpr int64_t kAbsurdExchangeBytes = int64_t{1} << 42;

void ignore_line(void*, tern_log_level, const char*) {}

// One rank sees itself; more of them cannot be reached.
int gather_from_self(void* context, const void* send, void* recv, size_t bytes) {
  const auto num_ranks = *static_cast<const int32_t*>(context);
  if (num_ranks != 1) return 1;
  std::memcpy(recv, send, bytes);
  return 0;
}

bool never_written() { return true; }

tern_group_options any_group_options(Input& input, std::string& name, std::string& node) {
  tern_group_options options;
  name = std::string(input.odd_one_in(4) ? input.byte() : 4, 'n');
  node = std::string(input.odd_one_in(4) ? input.byte() : 0, 'm');
  options.name = input.one_in(3) ? nullptr : name.c_str();
  options.node = input.one_in(3) ? nullptr : node.c_str();
  options.timeout_ms = input.number(1000, 1100);
  options.log = ignore_line;
  options.log_level = input.value_of<tern_log_level>(5);
  return options;
}

tern_exchange_options any_exchange_options(Input& input) {
  tern_exchange_options options;
  options.device = input.value_of<tern_device_type>(3);
  options.device_index = input.small_number(-1, 1);
  options.staging_bytes = input.one_in(2) ? 0 : input.multiple(1, 200, 1024);
  options.window_bytes = input.one_in(2) ? 0 : input.multiple(1, 200, 1024);
  options.max_tokens = input.number(0, 16);
  options.max_row_bytes = input.number(0, 200);
  options.max_topk = input.small_number(0, 9);
  options.max_experts = input.small_number(0, 64);
  options.num_lanes = input.small_number(0, 3);
  options.num_sms = input.small_number(0, 2);
  options.timeout_ms = input.number(1000, 1100);
  options.on_timeout = input.value_of<tern_timeout_policy>(2);
  options.mode = input.value_of<tern_mode>(3);
  return options;
}

}  // namespace

Session::Session(Input& input) : input_(input) {
  tern_group_options quiet;
  quiet.log = ignore_line;
  require(tern_group_create_local(&quiet, 1, &group_) == TERN_OK, "group", "a group of one rank cannot be made");
  tern_exchange_options options;
  options.device = TERN_DEVICE_CPU;
  options.staging_bytes = (2 + int64_t{input.byte()}) << 12;
  options.window_bytes = input.one_in(4) ? 0 : 32768;
  options.num_lanes = 2 + input.byte() % 2;
  options.timeout_ms = kTimeoutMs;
  options.mode = static_cast<tern_mode>(input.byte() % 3);
  require(tern_exchange_create(group_, &options, &exchange_) == TERN_OK, "exchange", "a small exchange cannot be made");
  witness_ = std::make_unique<Witness>(exchange_, kWitnessLane);
}

Session::~Session() {
  for (const TestedPlan& plan : plans_) tern_plan_destroy(plan.handle);
  witness_.reset();
  tern_exchange_destroy(exchange_);
  tern_group_destroy(group_);
}

// What most sequences need before anything can go wrong: window memory, and plans that are routed and dispatched.
void Session::prepare() {
  input_.start_tame_call();
  for (int i = input_.byte() % 3; i < 2; ++i) {
    allocate_window();
    create_plan();
    advance(plans_.back());
    advance(plans_.back());
  }
}

void Session::run() {
  prepare();
  for (int i = 0; i < kMostCalls && !input_.used_up(); ++i) call_any();
  witness_->make_round_trip("the whole sequence");
}

void Session::call_any() {
  input_.start_call();
  const int choice = input_.byte() % 20;
  if (plans_.empty() && choice < 10) return create_plan();
  TestedPlan* plan = plans_.empty() ? nullptr : &plans_[input_.byte() % plans_.size()];
  if (choice < 9 && !input_.is_wild()) return advance(*plan);
  switch (choice) {
    case 0:
    case 1: return route(*plan);
    case 2:
    case 3:
    case 4:
    case 5: return dispatch(*plan);
    case 6:
    case 7:
    case 8: return combine(*plan);
    case 9: return destroy_plan();
    case 10: return count_routing();
    case 11: return get_infos();
    case 12:
    case 13: return allocate_window();
    case 14: return free_window();
    case 15:
      if (input_.one_in(4)) return recover();
      [[fallthrough]];
    case 16: return create_exchange();
    case 17: return create_local_groups();
    case 18: return create_allgather_group();
    default: return create_plan();
  }
}

void Session::check_outcome(const char* name, tern_status status) const {
  const std::string text = tern_last_error();
  require(std::strcmp(tern_status_name(status), "TERN_UNKNOWN") != 0, name, "it returned a status that is none");
  require(status != TERN_INTERNAL_ERROR, name, "it returned TERN_INTERNAL_ERROR");
  require(status != TERN_TIMEOUT && status != TERN_ABORTED && status != TERN_MISMATCH, name,
          "one rank alone waited for, or disagreed with, itself");
  require(status == TERN_OK || (!text.empty() && text != "group is NULL"), name, "it failed without a text");
}

Session::State Session::state() const {
  tern_metrics m;
  tern_exchange_state exchange;
  require(tern_exchange_get_metrics(exchange_, &m) == TERN_OK, "metrics", "they cannot be read");
  require(tern_exchange_get_state(exchange_, &exchange) == TERN_OK, "state", "it cannot be read");
  require(exchange.health == TERN_HEALTH_OK, "state", "the exchange has failed");
  State result{{m.num_routes, m.num_dispatches, m.num_combines, m.rounds, m.received_rows, exchange.generation}, {}};
  for (const TestedPlan& plan : plans_) {
    tern_plan_info info;
    const tern_status status = tern_plan_get_info(plan.handle, &info);
    result.plans.push_back(status);
    if (status != TERN_OK) continue;
    result.plans.insert(result.plans.end(), {info.num_tokens, info.num_received, info.num_rows, info.row_capacity, info.generation,
                                             info.latency_path, info.received_per_rank[0], info.sent_per_rank[0], info.pair_counts[0]});
    result.plans.insert(result.plans.end(), info.received_per_expert, info.received_per_expert + plan.options.num_experts);
  }
  return result;
}

void Session::create_plan() {
  if (plans_.size() == kMostPlans) return destroy_plan();
  tern_plan_options options;
  options.max_tokens = input_.number(1, 20);
  options.num_experts = input_.small_number(1, 12);
  options.num_topk = input_.small_number(1, 9);
  options.layout = input_.value_of<tern_layout>(3);
  if (options.layout == TERN_LAYOUT_RANK_MAJOR && input_.one_in(4)) options.num_topk = 0;
  options.extent = input_.value_of<tern_extent>(2);
  options.expert_alignment = input_.small_number(0, 5);
  options.zero_padding = input_.small_number(0, 1);
  options.row_capacity = input_.one_in(2) ? 0 : input_.number(1, 60);
  Given<tern_plan_options> given(input_);
  TestedPlan plan;
  plan.options = given.seen(options);
  const tern_status status = make(
      "plan_create", [&] { return tern_plan_create(input_.odd_one_in(16) ? nullptr : exchange_, given.pointer(options), &plan.handle); },
      [&] { return plan.handle == nullptr; });
  if (status == TERN_OK) plans_.push_back(plan);
}

void Session::destroy_plan() {
  if (plans_.empty()) return;
  const size_t at = input_.byte() % plans_.size();
  tern_plan_destroy(plans_[at].handle);
  plans_.erase(plans_.begin() + static_cast<std::ptrdiff_t>(at));
}

void Session::get_infos() {
  const auto get = [&](const char* name, auto fields, auto function) {
    Given<decltype(fields)> given(input_);
    auto* pointer = given.pointer(fields);
    make(name, [&] { return function(pointer); }, [&] { return pointer == nullptr || given.is_unchanged(); });
  };
  get("get_state", tern_exchange_state{}, [&](tern_exchange_state* s) { return tern_exchange_get_state(exchange_, s); });
  get("exchange_get_info", tern_exchange_info{}, [&](tern_exchange_info* i) { return tern_exchange_get_info(exchange_, i); });
  get("get_metrics", tern_metrics{}, [&](tern_metrics* m) { return tern_exchange_get_metrics(exchange_, m); });
  get("group_get_info", tern_group_info{}, [&](tern_group_info* i) { return tern_group_get_info(group_, i); });
  for (const TestedPlan& plan : plans_)
    get("plan_get_info", tern_plan_info{}, [&](tern_plan_info* i) { return tern_plan_get_info(plan.handle, i); });
  restart_trace();
}

// What comes next is recorded, as far as there is room.
void Session::restart_trace() {
  constexpr int64_t kRoom = 3;
  tern_span spans[2];
  int64_t num_spans = -1, num_dropped = -1;
  require(tern_trace_read(exchange_, spans, 2, &num_spans, &num_dropped) == TERN_OK, "trace_read", "it cannot be read");
  require(num_spans >= 0 && num_spans <= kRoom * 3 && num_dropped >= 0, "trace_read", "there are more spans than have room on three lanes");
  require(num_spans == 0 || (spans[0].begin_ns > 0 && spans[0].begin_ns <= spans[0].end_ns), "trace_read", "it gave a span that is none");
  require(tern_trace_start(exchange_, kRoom) == TERN_OK, "trace_start", "it cannot be started");
}

void Session::allocate_window() {
  if (windows_.size() == kMostWindows) return free_window();
  const int64_t bytes = input_.one_in(4) ? input_.number(1, 256) : input_.multiple(1, 256, 64);
  void* memory = nullptr;
  const tern_status status =
      make("window_alloc", [&] { return tern_window_alloc(exchange_, bytes, &memory); }, [&] { return memory == nullptr; });
  if (status != TERN_OK) return;
  require(bytes > 0 && bytes <= 32768 && reinterpret_cast<uintptr_t>(memory) % 256 == 0, "window_alloc",
          "it gave what it cannot have, or badly aligned");
  auto* data = static_cast<std::byte*>(memory);
  for (const WindowMemory& other : windows_)
    require(data + bytes <= other.data || other.data + other.size_bytes <= data, "window_alloc", "it gave memory that is in use");
  windows_.push_back({data, bytes});
}

void Session::free_window() {
  const bool stray = input_.odd_one_in(2);
  if (stray || windows_.empty()) {
    std::byte outside{};
    void* pointer = windows_.empty() ? &outside : windows_[0].data + 1;
    const tern_status status = make("window_free", [&] { return tern_window_free(exchange_, pointer); }, never_written);
    require(status == TERN_INVALID_ARGUMENT, "window_free", "it took a pointer that tern_window_alloc never gave");
    return;
  }
  const size_t at = input_.byte() % windows_.size();
  const tern_status status = make("window_free", [&] { return tern_window_free(exchange_, windows_[at].data); }, never_written);
  require(status == TERN_OK, "window_free", "it refused what tern_window_alloc gave");
  windows_.erase(windows_.begin() + static_cast<std::ptrdiff_t>(at));
}

void Session::recover() {
  tern_recover_options options;
  options.timeout_ms = input_.number(1000, 1100);
  const uint8_t mask = input_.odd_one_in(2) ? input_.byte() : uint8_t{0};
  options.mask = input_.one_in(2) ? nullptr : &mask;
  options.allow_mask = input_.small_number(0, 1);
  Given<tern_recover_options> given(input_);
  tern_recover_options* pointer = given.optional_pointer(input_, options);
  const tern_status status = make("recover", [&] { return tern_exchange_recover(exchange_, pointer); }, never_written);
  if (status != TERN_OK) return;
  for (TestedPlan& plan : plans_) {
    plan.is_routed = plan.is_dispatched = false;
    plan.sent_dispatch.reset();
    plan.sent_combine.reset();
  }
}

void Session::create_exchange() {
  const tern_exchange_options options = any_exchange_options(input_);
  Given<tern_exchange_options> given(input_);
  tern_exchange_options* pointer = given.optional_pointer(input_, options);
  Given<tern_memory_info> wanted(input_);
  tern_memory_info* given_info = wanted.pointer({});
  make(
      "query_memory", [&] { return tern_exchange_query_memory(group_, pointer, given_info); },
      [&] { return given_info == nullptr || wanted.is_unchanged(); });
  tern_memory_info info;
  const tern_status can_be = make("query_memory", [&] { return tern_exchange_query_memory(group_, pointer, &info); }, never_written);
  if (can_be == TERN_OK && info.total_bytes > kSmallExchangeBytes && info.total_bytes < kAbsurdExchangeBytes) return;
  tern_exchange* exchange = nullptr;
  const tern_status status =
      make("exchange_create", [&] { return tern_exchange_create(group_, pointer, &exchange); }, [&] { return exchange == nullptr; });
  require(can_be == TERN_OK ? info.total_bytes >= 0 : status == can_be, "exchange_create", "it disagrees with tern_exchange_query_memory");
  require(can_be != TERN_OK || info.total_bytes < kAbsurdExchangeBytes || status != TERN_OK, "exchange_create",
          "it gave more memory than there is");
  tern_exchange_destroy(exchange);
}

void Session::create_local_groups() {
  std::string name, node;
  const tern_group_options options = any_group_options(input_, name, node);
  Given<tern_group_options> given(input_);
  const int32_t num_ranks = input_.small_number(1, 4);
  if (num_ranks > 16 && num_ranks <= 1024) return;
  std::vector<tern_group*> groups(num_ranks > 0 && num_ranks <= 1024 ? static_cast<size_t>(num_ranks) : 1);
  make(
      "group_create_local", [&] { return tern_group_create_local(given.optional_pointer(input_, options), num_ranks, groups.data()); },
      [&] { return std::all_of(groups.begin(), groups.end(), [](const tern_group* group) { return group == nullptr; }); });
  for (tern_group* group : groups) tern_group_destroy(group);
}

void Session::create_allgather_group() {
  std::string name, node;
  const tern_group_options options = any_group_options(input_, name, node);
  Given<tern_group_options> given(input_);
  int32_t num_ranks = input_.small_number(1, 1);
  const int32_t rank = input_.small_number(0, 0);
  tern_group* group = nullptr;
  const tern_status status = make(
      "group_create_from_allgather",
      [&] {
        return tern_group_create_from_allgather(given.optional_pointer(input_, options), rank, num_ranks, gather_from_self, &num_ranks,
                                                &group);
      },
      [&] { return group == nullptr; });
  require(status != TERN_OK || (num_ranks == 1 && rank == 0), "group_create_from_allgather",
          "it made a group although the caller's all-gather failed");
  tern_group_destroy(group);
}

}  // namespace tern::fuzz
