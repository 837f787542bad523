// SPDX-License-Identifier: Apache-2.0
// The session's operations: routings, dispatches and combines with any arguments, and memory behind them as tern.h says.
#include <algorithm>

#include "session.h"

namespace tern::fuzz {
namespace {

// The longest row, and the most scales of one, that tern.h allows.
constexpr int64_t kMostRowBytes = int64_t{1} << 30;

int64_t dtype_bytes(tern_dtype dtype) {
  switch (dtype) {
    case TERN_DTYPE_BF16:
    case TERN_DTYPE_FP16: return 2;
    case TERN_DTYPE_FP32: return 4;
    default: return 1;
  }
}

// Bytes that `count` pieces of `bytes` reach over, `stride` apart.
int64_t reach(int64_t count, int64_t stride, int64_t bytes) {
  return count <= 0 ? 0 : sum(product({count - 1, stride}), std::max<int64_t>(0, bytes));
}

// Numbers that follow from one.
class Numbers {
 public:
  explicit Numbers(uint64_t seed) : state_(seed | 1) {}
  int64_t below(int64_t limit) {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return static_cast<int64_t>(state_ >> 33) % limit;
  }

 private:
  uint64_t state_;
};

// Rows of the outputs, as tern.h has them, before anything is routed.
int64_t most_rows(const tern_plan_options& o) {
  const bool is_padded = o.layout == TERN_LAYOUT_EXPERT_PADDED;
  if (o.extent == TERN_EXTENT_WORST && o.row_capacity > 0 && !is_padded) return o.row_capacity;
  if (is_padded) return o.num_experts * o.max_tokens;
  if (o.layout == TERN_LAYOUT_RANK_MAJOR) return o.max_tokens;
  const int64_t entries = o.max_tokens * o.num_topk;
  return entries + std::min<int64_t>(entries, o.num_experts) * (std::max(1, o.expert_alignment) - 1);
}

bool has_expert_rows(const TestedPlan& plan) { return plan.options.layout != TERN_LAYOUT_RANK_MAJOR; }

// Mostly short rows, that fit into window memory; sometimes several blocks of scales.
int64_t any_hidden(Input& input) { return input.multiple(1, input.one_in(4) ? 20 : 3, input.odd_one_in(8) ? 1 : 16); }

}  // namespace

RoutingArgs::RoutingArgs(Input& input, int64_t max_tokens, int64_t num_topk, int64_t num_experts) : arrays(input), given(input) {
  tern_routing fields;
  fields.topk_idx_type = input.value_of<tern_index_type>(2);
  fields.num_tokens = input.number(0, std::clamp<int64_t>(max_tokens, 0, 200));
  seen = given.seen(fields);
  const bool is_narrow = seen.topk_idx_type == TERN_INDEX_INT32;
  const int64_t num_entries = product({seen.num_tokens, num_topk});
  const int64_t index_bytes = product({num_entries, is_narrow ? 4 : 8});
  const bool by_mask = (num_topk == 0) != input.odd_one_in(8);
  if (!by_mask || input.odd_one_in(8)) fields.topk_idx = input.odd_one_in(8) ? nullptr : arrays.make<std::byte>(index_bytes);
  if (by_mask) fields.token_in_rank = input.odd_one_in(8) ? nullptr : arrays.make<uint8_t>(seen.num_tokens);
  if (by_mask && input.one_in(2)) {
    const int64_t bytes = product({num_experts, 4});
    auto* counts = arrays.make<int32_t>(bytes);
    if (bytes > 0 && bytes <= kMostBytes) std::fill_n(counts, num_experts, input.small_number(0, 100));
    fields.tokens_per_expert = counts;
  }
  may_be_passed = arrays.has_all() || seen.num_tokens > max_tokens;
  if (fields.topk_idx != nullptr && index_bytes > 0 && index_bytes <= kMostBytes) {
    Numbers numbers(input.word());
    const int64_t wrong = input.odd_one_in(6) ? numbers.below(num_entries) : -1;
    for (int64_t i = 0; i < num_entries; ++i) {
      const int64_t expert = i == wrong ? num_experts + numbers.below(3) : numbers.below(std::max<int64_t>(0, num_experts) + 1) - 1;
      if (is_narrow)
        static_cast<int32_t*>(const_cast<void*>(fields.topk_idx))[i] = static_cast<int32_t>(expert);
      else
        static_cast<int64_t*>(const_cast<void*>(fields.topk_idx))[i] = expert;
    }
  }
  seen = given.seen(fields);
  pointer = given.pointer(fields);
}

// The call that the plan is ready for.
void Session::advance(TestedPlan& plan) {
  if (plan.sent_dispatch) return dispatch(plan);
  if (plan.sent_combine) return combine(plan);
  const bool can_route_itself = plan.options.extent == TERN_EXTENT_WORST;
  if (input_.one_in(6) || (!plan.is_routed && !can_route_itself)) return route(plan);
  if (!plan.is_dispatched || input_.one_in(3)) return dispatch(plan);
  combine(plan);
}

tern_launch Session::any_launch(tern_phase phase) {
  tern_launch launch;
  launch.lane = input_.small_number(0, 0);
  if (launch.lane == kWitnessLane) launch.lane = 2;
  launch.phase = input_.is_wild() ? input_.value_of<tern_phase>(3) : phase;
  launch.num_sms = input_.small_number(0, 1);
  return launch;
}

tern_plan_info Session::info_of(const TestedPlan& plan) const {
  tern_plan_info info;
  if (tern_plan_get_info(plan.handle, &info) != TERN_OK) info.num_rows = most_rows(plan.options);
  return info;
}

void Session::route(TestedPlan& plan) {
  RoutingArgs routing(input_, plan.options.max_tokens, plan.options.num_topk, plan.options.num_experts);
  if (!routing.may_be_passed) return;
  const tern_launch launch = any_launch(TERN_PHASE_WHOLE);
  Given<tern_launch> given_launch(input_);
  tern_launch* launch_pointer = given_launch.optional_pointer(input_, launch);
  Given<tern_plan_info> given_info(input_);
  tern_plan_info* info = given_info.optional_pointer(input_, {});
  const tern_status status = make(
      "route", [&] { return tern_plan_route(input_.odd_one_in(16) ? nullptr : plan.handle, routing.pointer, launch_pointer, info); },
      [&] { return info == nullptr || given_info.is_unchanged(); });
  if (status == TERN_OK) plan.is_routed = true;
  if (status == TERN_OK) plan.is_dispatched = false;
}

void Session::count_routing() {
  const int32_t num_topk = input_.small_number(0, 8);
  const int32_t num_experts = input_.small_number(1, 12);
  RoutingArgs routing(input_, 100, num_topk, num_experts);
  const int64_t num_tokens = routing.seen.num_tokens;
  tern_routing_counts counts;
  Arrays outputs(input_);
  counts.tokens_per_rank = outputs.maybe<int32_t>(4);
  counts.tokens_per_node = outputs.maybe<int32_t>(4);
  counts.tokens_per_expert = outputs.maybe<int32_t>(product({num_experts, 4}));
  counts.token_in_rank = outputs.maybe<uint8_t>(num_tokens);
  if (!routing.arrays.has_all() || !outputs.has_all()) return;
  Given<tern_routing_counts> given(input_);
  tern_routing_counts* pointer = given.pointer(counts);
  const tern_launch launch = any_launch(TERN_PHASE_WHOLE);
  Given<tern_launch> given_launch(input_);
  tern_launch* launch_pointer = given_launch.optional_pointer(input_, launch);
  make(
      "count_routing", [&] { return tern_count_routing(exchange_, routing.pointer, num_experts, num_topk, launch_pointer, pointer); },
      [&] { return outputs.are_unchanged(); });
}

std::byte* Session::make_rows(Arrays& arrays, int64_t bytes, bool& in_window) {
  in_window = false;
  const size_t choice = input_.byte();
  if (choice % 2 == 0 || windows_.empty()) return input_.odd_one_in(16) ? nullptr : arrays.make<std::byte>(bytes);
  const WindowMemory& window = windows_[choice / 2 % windows_.size()];
  if (bytes > window.size_bytes) return arrays.make<std::byte>(bytes);
  in_window = true;
  return arrays.borrow(window.data, window.size_bytes);
}

SentDispatch Session::any_dispatch(const TestedPlan& plan) {
  SentDispatch call;
  const tern_plan_options& o = plan.options;
  const bool must_route = !plan.is_routed && !input_.is_wild();
  if (must_route || ((o.extent == TERN_EXTENT_WORST || input_.is_wild()) && input_.one_in(2))) {
    call.routing = std::make_shared<RoutingArgs>(input_, o.max_tokens, o.num_topk, o.num_experts);
    call.args.routing = call.routing->pointer;
  }
  tern_dispatch_args& args = call.args;
  args.dtype = input_.value_of<tern_dtype>(5);
  args.encoding = input_.one_in(2) ? TERN_ENCODING_AS_GIVEN : input_.value_of<tern_encoding>(4);
  if (!input_.is_wild() && args.dtype > TERN_DTYPE_FP32) args.encoding = TERN_ENCODING_AS_GIVEN;
  args.hidden = any_hidden(input_);
  if (input_.one_in(4))
    args.token_stride_bytes =
        input_.is_wild() ? input_.multiple(1, 8, 16) : args.hidden * dtype_bytes(args.dtype) + input_.in_range(0, 8) * 16;
  if (input_.is_wild() || args.encoding == TERN_ENCODING_AS_GIVEN) {
    args.scale_bytes = input_.one_in(2) ? 0 : input_.multiple(1, 16, input_.is_wild() ? 1 : 4);
    if (input_.one_in(4)) args.scale_element_bytes = input_.multiple(0, 1, 4);
    if (input_.one_in(4)) args.scale_token_stride_bytes = input_.number(0, 200);
    if (input_.one_in(4)) args.scale_element_stride_bytes = input_.number(0, 20);
  }
  if (o.num_topk > 0 || input_.is_wild()) args.carry_weights = input_.small_number(0, 1);
  args.out_scale_order = input_.value_of<tern_scale_order>(2);
  return call;
}

bool Session::add_arrays(tern_dispatch_args& args, const TestedPlan& plan, int64_t num_tokens, CallMemory& memory) {
  const tern_plan_options& o = plan.options;
  const int64_t rows = o.extent == TERN_EXTENT_WORST ? most_rows(o) : info_of(plan).num_rows;
  const int64_t row_bytes = product({args.hidden, dtype_bytes(args.dtype)});
  const bool is_cast = args.encoding != TERN_ENCODING_AS_GIVEN;
  const int64_t token_stride = args.token_stride_bytes > 0 ? args.token_stride_bytes : row_bytes;
  const int64_t scale_bytes = is_cast ? product({sum(args.hidden, 127) / 128, 4}) : args.scale_bytes;
  const int64_t element = args.scale_element_bytes > 0 ? args.scale_element_bytes : args.scale_bytes % 4 == 0 ? 4 : 1;
  const int64_t element_stride = args.scale_element_stride_bytes > 0 ? args.scale_element_stride_bytes : element;
  const int64_t token_scales = std::max(scale_bytes, reach(args.scale_bytes / element, element_stride, element));
  const int64_t scale_stride = args.scale_token_stride_bytes > 0 ? args.scale_token_stride_bytes : args.scale_bytes;

  args.tokens = memory.inputs.make<std::byte>(reach(num_tokens, token_stride, row_bytes));
  if (args.scale_bytes != 0) args.scales = memory.inputs.make<std::byte>(reach(num_tokens, scale_stride, token_scales));
  if (args.carry_weights != 0) args.topk_weights = memory.inputs.make<float>(product({num_tokens, o.num_topk, 4}));

  Arrays& out = memory.outputs;
  bool in_window = false;
  args.out_tokens = make_rows(out, product({rows, is_cast ? args.hidden : row_bytes}), in_window);
  args.zero_copy = in_window ? input_.small_number(0, 1) : input_.odd_one_in(8);
  args.out_scales = out.maybe<std::byte>(product({rows, scale_bytes}));
  args.out_topk_idx = out.maybe<int32_t>(product({rows, o.num_topk, 4}));
  args.out_topk_weights = out.maybe<float>(product({rows, has_expert_rows(plan) ? 1 : o.num_topk, 4}));
  args.out_source_token = out.maybe<int32_t>(product({rows, 4}));
  args.out_source_rank = out.maybe<int32_t>(product({rows, 4}));
  args.out_row_expert = out.maybe<int32_t>(product({rows, 4}));
  args.out_expert_offsets = out.maybe<int64_t>((int64_t{o.num_experts} + 1) * 8);
  args.out_expert_counts = out.maybe<int32_t>(product({o.num_experts, 4}));
  args.out_rank_counts = out.maybe<int32_t>(4);
  args.out_expert_rank_ranges = out.maybe<int64_t>(product({o.num_experts, 8}));
  // What is refused before any memory is looked at needs none.
  const bool is_refused =
      row_bytes == 0 || row_bytes > kMostRowBytes || token_stride < row_bytes || args.scale_bytes < 0 || args.scale_bytes > kMostRowBytes;
  return is_refused || (memory.inputs.has_all() && out.has_all());
}

void Session::dispatch(TestedPlan& plan) {
  const tern_launch launch = any_launch(plan.sent_dispatch ? TERN_PHASE_RECEIVE : input_.one_in(3) ? TERN_PHASE_SEND : TERN_PHASE_WHOLE);
  Given<tern_launch> given_launch(input_);
  const bool completes = launch.phase == TERN_PHASE_RECEIVE && plan.sent_dispatch && !input_.odd_one_in(3);
  const SentDispatch call = completes ? *plan.sent_dispatch : any_dispatch(plan);
  if (call.routing && !call.routing->may_be_passed) return;
  Given<tern_dispatch_args> given(input_);
  tern_dispatch_args args = given.seen(call.args);
  const bool routes = args.routing != nullptr;
  const int64_t num_tokens = routes ? std::min(call.routing->seen.num_tokens, plan.options.max_tokens) : info_of(plan).num_tokens;
  CallMemory memory(input_);
  if (!add_arrays(args, plan, num_tokens, memory)) return;
  tern_dispatch_args* pointer = given.pointer(args);
  tern_launch* launch_pointer =
      launch.phase == TERN_PHASE_WHOLE ? given_launch.optional_pointer(input_, launch) : given_launch.pointer(launch);
  const tern_status status = make(
      "dispatch", [&] { return tern_dispatch(input_.odd_one_in(16) ? nullptr : plan.handle, pointer, launch_pointer); },
      [&] { return memory.outputs.are_unchanged(); });
  if (status != TERN_OK && status != TERN_CAPACITY_EXCEEDED) return;
  const bool is_sent = launch_pointer != nullptr && given_launch.seen(launch).phase == TERN_PHASE_SEND;
  plan.sent_dispatch.reset();
  if (is_sent) plan.sent_dispatch = SentDispatch{call.args, call.routing};
  plan.is_dispatched = !is_sent;
  plan.is_routed = plan.is_routed || !is_sent;
}

tern_combine_args Session::any_combine(const TestedPlan& plan) {
  tern_combine_args args;
  args.dtype = input_.value_of<tern_dtype>(3);
  args.mode = input_.value_of<tern_combine_mode>(2);
  args.hidden = any_hidden(input_);
  if (has_expert_rows(plan) || input_.is_wild()) args.weighting = input_.value_of<tern_weighting>(3);
  if (plan.options.num_topk > 0 || input_.is_wild()) args.carry_weights = input_.small_number(0, 1);
  args.wire = input_.value_of<tern_wire>(3);
  return args;
}

bool Session::add_arrays(tern_combine_args& args, const TestedPlan& plan, CallMemory& memory) {
  const tern_plan_info info = info_of(plan);
  const int64_t num_topk = plan.options.num_topk;
  const int64_t row_bytes = product({args.hidden, dtype_bytes(args.dtype)});
  const int64_t token_bytes = product({info.num_tokens, row_bytes});
  bool in_window = false;
  args.rows = make_rows(memory.inputs, product({info.num_rows, row_bytes}), in_window);
  args.zero_copy = in_window ? input_.small_number(0, 1) : input_.odd_one_in(8);
  if (args.weighting == TERN_WEIGHTS_OWNER) args.topk_weights = memory.inputs.make<float>(product({info.num_tokens, num_topk, 4}));
  if (args.carry_weights != 0)
    args.row_weights = memory.inputs.make<float>(product({info.num_rows, has_expert_rows(plan) ? 1 : num_topk, 4}));
  for (const void*& bias : args.bias) bias = memory.inputs.maybe<std::byte>(token_bytes);
  args.out_tokens = memory.outputs.make<std::byte>(token_bytes);
  args.out_topk_weights = memory.outputs.maybe<float>(product({info.num_tokens, num_topk, 4}));
  const bool is_refused = row_bytes == 0 || row_bytes > kMostRowBytes;
  return is_refused || (memory.inputs.has_all() && memory.outputs.has_all());
}

void Session::combine(TestedPlan& plan) {
  const tern_launch launch = any_launch(plan.sent_combine ? TERN_PHASE_RECEIVE : input_.one_in(3) ? TERN_PHASE_SEND : TERN_PHASE_WHOLE);
  Given<tern_launch> given_launch(input_);
  const bool completes = launch.phase == TERN_PHASE_RECEIVE && plan.sent_combine && !input_.odd_one_in(3);
  const tern_combine_args fields = completes ? *plan.sent_combine : any_combine(plan);
  Given<tern_combine_args> given(input_);
  tern_combine_args args = given.seen(fields);
  CallMemory memory(input_);
  if (!add_arrays(args, plan, memory)) return;
  tern_combine_args* pointer = given.pointer(args);
  tern_launch* launch_pointer =
      launch.phase == TERN_PHASE_WHOLE ? given_launch.optional_pointer(input_, launch) : given_launch.pointer(launch);
  const tern_status status = make(
      "combine", [&] { return tern_combine(input_.odd_one_in(16) ? nullptr : plan.handle, pointer, launch_pointer); },
      [&] { return memory.outputs.are_unchanged(); });
  if (status != TERN_OK) return;
  plan.sent_combine.reset();
  if (launch_pointer != nullptr && given_launch.seen(launch).phase == TERN_PHASE_SEND) plan.sent_combine = fields;
}

}  // namespace tern::fuzz
