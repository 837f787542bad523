// SPDX-License-Identifier: Apache-2.0
#include "engine/validate.h"

#include "base/error.h"
#include "base/log_rows.h"
#include "layout/message.h"

namespace tern {
namespace {

constexpr auto kBad = TERN_INVALID_ARGUMENT;
constexpr int64_t kRowGranuleBytes = 16;
constexpr int64_t kMostRowBytes = int64_t{1} << 30;
constexpr int64_t kScaleBlock = 128;

int64_t dtype_bytes(tern_dtype dtype) {
  switch (dtype) {
    case TERN_DTYPE_BF16:
    case TERN_DTYPE_FP16: return 2;
    case TERN_DTYPE_FP32: return 4;
    case TERN_DTYPE_FP8_E4M3:
    case TERN_DTYPE_BYTES: return 1;
  }
  fail(kBad, "dtype is {}, which is no tern_dtype", static_cast<int>(dtype));
}

int64_t checked_row_bytes(const char* operation, int64_t hidden, tern_dtype dtype) {
  const int64_t element = dtype_bytes(dtype);
  if (hidden <= 0 || hidden > kMostRowBytes / element || hidden * element % kRowGranuleBytes != 0)
    fail(kBad, "{}: hidden is {} elements of {} bytes; a row must be a positive multiple of {} bytes, at most 1 GiB", operation, hidden,
         element, kRowGranuleBytes);
  return hidden * element;
}

bool is_float(tern_dtype dtype) { return dtype == TERN_DTYPE_BF16 || dtype == TERN_DTYPE_FP16 || dtype == TERN_DTYPE_FP32; }

// Rows arrive as fp8; each block of channels brings a scale.
void set_cast(DispatchCall& call) {
  const tern_dispatch_args& a = call.args;
  if (!is_float(a.dtype)) fail(kBad, "dispatch: a cast to fp8 needs bf16, fp16 or fp32 tokens, not dtype {}", static_cast<int>(a.dtype));
  if (a.scales != nullptr || a.scale_bytes != 0)
    fail(kBad, "dispatch: scales are given, but encoding {} makes them; leave them NULL", static_cast<int>(a.encoding));
  call.wire_bytes = a.hidden;
  if (call.wire_bytes % kRowGranuleBytes != 0)
    fail(kBad, "dispatch: hidden is {}; a row must be a multiple of {} bytes after the cast to fp8 too", a.hidden, kRowGranuleBytes);
  const int64_t num_blocks = (a.hidden + kScaleBlock - 1) / kScaleBlock;
  call.scale_bytes =
      a.encoding == TERN_ENCODING_FP8_UE8M0 ? layout::align_up(num_blocks, 4) : num_blocks * static_cast<int64_t>(sizeof(float));
  call.scale_element_bytes = 4;
}

void set_given_scales(DispatchCall& call, bool has_tokens) {
  tern_dispatch_args& a = call.args;
  if (a.scale_bytes < 0 || a.scale_bytes > kMostRowBytes) fail(kBad, "dispatch: scale_bytes is {}, must be 0 to 1 GiB", a.scale_bytes);
  if (a.scales != nullptr && a.scale_bytes == 0) fail(kBad, "dispatch: scales are given, but scale_bytes is 0");
  if (a.scales == nullptr && a.scale_bytes > 0 && has_tokens) fail(kBad, "dispatch: scale_bytes is {}, but scales is NULL", a.scale_bytes);
  if (a.scale_element_bytes < 0 || a.scale_token_stride_bytes < 0 || a.scale_element_stride_bytes < 0)
    fail(kBad, "dispatch: scale_element_bytes {}, scale_token_stride_bytes {} and scale_element_stride_bytes {} must not be negative",
         a.scale_element_bytes, a.scale_token_stride_bytes, a.scale_element_stride_bytes);
  call.scale_bytes = a.scale_bytes;
  // Rows of scales that are no multiple of 4 bytes move as single bytes unless the caller says otherwise.
  call.scale_element_bytes = a.scale_element_bytes > 0 ? a.scale_element_bytes : a.scale_bytes % 4 == 0 ? 4 : 1;
  if (a.scale_bytes % call.scale_element_bytes != 0)
    fail(kBad, "dispatch: scale_bytes is {}, no multiple of scale_element_bytes {}", a.scale_bytes, call.scale_element_bytes);
  if (a.scale_token_stride_bytes == 0) a.scale_token_stride_bytes = a.scale_bytes;
  if (a.scale_element_stride_bytes == 0) a.scale_element_stride_bytes = call.scale_element_bytes;
}

void check_weights(const char* operation, bool carried, const void* weights, bool needed, int32_t num_topk) {
  if (carried && num_topk == 0) fail(kBad, "{}: weights are given, but a plan routed by token_in_rank has no top-k", operation);
  if (carried && needed && weights == nullptr)
    fail(kBad, "{}: carry_weights is set, but this rank has rows and its weights are NULL", operation);
}

}  // namespace

void check_launch(const tern_launch& launch, int32_t num_lanes) {
  if (launch.lane < 0 || launch.lane >= num_lanes)
    fail(kBad, "launch: lane is {}, the exchange has lanes 0 to {}", launch.lane, num_lanes - 1);
  if (launch.phase < TERN_PHASE_WHOLE || launch.phase > TERN_PHASE_RECEIVE)
    fail(kBad, "launch: phase is {}, which is no tern_phase", static_cast<int>(launch.phase));
  if (launch.num_sms < 0) fail(kBad, "launch: num_sms is {}, must not be negative", launch.num_sms);
}

// Numbers that the host does not know (GPU ranks, extent WORST) are -1: there may be tokens, or rows.
DispatchCall make_dispatch_call(const tern_dispatch_args& args, const DevicePlan& plan, const tern_launch& launch) {
  const PlanShape& shape = plan.shape();
  DispatchCall call{.args = args};
  tern_dispatch_args& a = call.args;
  if (a.routing != nullptr) {
    if (shape.extent != TERN_EXTENT_WORST)
      fail(kBad,
           "dispatch: a routing is given, but the plan's extent is TERN_EXTENT_EXACT: outputs cannot be sized before the counts are known; "
           "use tern_plan_route, or extent WORST");
    if (launch.phase != TERN_PHASE_RECEIVE) plan.check_routing(*a.routing);  // the caller may have other indices there by then
  }
  if (launch.phase != TERN_PHASE_WHOLE && shape.extent == TERN_EXTENT_EXACT && a.routing != nullptr)
    fail(kBad, "dispatch: phases need extent WORST, or a plan that is routed");
  const int64_t num_tokens = a.routing != nullptr ? a.routing->num_tokens : plan.info().num_tokens;
  if (a.encoding < TERN_ENCODING_AS_GIVEN || a.encoding > TERN_ENCODING_FP8_UE8M0)
    fail(kBad, "dispatch: encoding is {}, which is no tern_encoding", static_cast<int>(a.encoding));
  if (a.out_scale_order != TERN_SCALES_ROW_MAJOR && a.out_scale_order != TERN_SCALES_COLUMN_MAJOR)
    fail(kBad, "dispatch: out_scale_order is {}, which is no tern_scale_order", static_cast<int>(a.out_scale_order));
  call.row_bytes = call.wire_bytes = checked_row_bytes("dispatch", a.hidden, a.dtype);
  if (a.token_stride_bytes == 0) a.token_stride_bytes = call.row_bytes;
  if (a.token_stride_bytes < call.row_bytes)
    fail(kBad, "dispatch: token_stride_bytes is {}, less than a row of {} bytes", a.token_stride_bytes, call.row_bytes);
  if (a.encoding == TERN_ENCODING_AS_GIVEN)
    set_given_scales(call, num_tokens != 0);
  else
    set_cast(call);
  if (a.tokens == nullptr && num_tokens != 0) fail(kBad, "dispatch: tokens is NULL with {} tokens", num_tokens);
  call.carries_weights = a.topk_weights != nullptr || a.carry_weights != 0;
  check_weights("dispatch", call.carries_weights, a.topk_weights, num_tokens != 0, shape.num_topk);
  const bool rows_may_come = a.routing != nullptr || shape.extent == TERN_EXTENT_WORST || plan.info().num_rows > 0;
  if (a.out_tokens == nullptr && rows_may_come) fail(kBad, "dispatch: out_tokens is NULL, but rows arrive on this rank");
  return call;
}

CombineCall make_combine_call(const tern_combine_args& args, const DevicePlan& plan, const tern_launch& launch) {
  const PlanShape& shape = plan.shape();
  const tern_plan_info info = plan.info();
  CombineCall call{.args = args};
  const tern_combine_args& a = call.args;
  if (!is_float(a.dtype)) fail(kBad, "combine: dtype is {}, must be bf16, fp16 or fp32", static_cast<int>(a.dtype));
  if (a.mode != TERN_COMBINE_HIERARCHICAL && a.mode != TERN_COMBINE_EXACT)
    fail(kBad, "combine: mode is {}, which is no tern_combine_mode", static_cast<int>(a.mode));
  if (a.weighting < TERN_WEIGHTS_NONE || a.weighting > TERN_WEIGHTS_OWNER)
    fail(kBad, "combine: weighting is {}, which is no tern_weighting", static_cast<int>(a.weighting));
  if (a.wire < TERN_WIRE_AS_DTYPE || a.wire > TERN_WIRE_FP32)
    fail(kBad, "combine: wire is {}, which is no tern_wire", static_cast<int>(a.wire));
  call.row_bytes = checked_row_bytes("combine", a.hidden, a.dtype);
  // What is not summed on the way, or is FP32 anyway, has nothing to lose.
  const bool travels_as_given = shape.has_expert_rows() ? a.mode == TERN_COMBINE_EXACT : shape.num_nodes == 1;
  if (a.wire == TERN_WIRE_FP32 && (travels_as_given || a.dtype == TERN_DTYPE_FP32)) call.args.wire = TERN_WIRE_AS_DTYPE;
  call.wire_bytes = a.wire == TERN_WIRE_LOG10BIT ? log_row_bytes(a.hidden)
                    : a.wire == TERN_WIRE_FP32   ? a.hidden * static_cast<int64_t>(sizeof(float))
                                                 : call.row_bytes;
  if (!shape.has_expert_rows() && a.weighting != TERN_WEIGHTS_NONE)
    fail(kBad,
         "combine: rows of rank_major hold several experts' results, so they cannot be weighted here; weight them before, or use an expert "
         "layout");
  if (a.weighting == TERN_WEIGHTS_OWNER && a.topk_weights == nullptr && info.num_tokens != 0)
    fail(kBad, "combine: weighting is TERN_WEIGHTS_OWNER, but topk_weights is NULL");
  call.carries_weights = a.row_weights != nullptr || a.carry_weights != 0;
  const bool has_rows = info.num_received != 0;
  check_weights("combine", call.carries_weights, a.row_weights, has_rows, shape.num_topk);
  if (a.out_topk_weights != nullptr && !call.carries_weights)
    fail(kBad,
         "combine: out_topk_weights is given, but no weights travel; give row_weights on the ranks that have rows, and set carry_weights "
         "on those that have none");
  if (a.rows == nullptr && has_rows && launch.phase != TERN_PHASE_RECEIVE)
    fail(kBad, "combine: rows is NULL, but this rank has received {} messages", info.num_received);
  if (a.out_tokens == nullptr && info.num_tokens != 0) fail(kBad, "combine: out_tokens is NULL with {} tokens", info.num_tokens);
  return call;
}

}  // namespace tern
