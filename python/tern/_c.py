# SPDX-License-Identifier: Apache-2.0
"""tern.h in ctypes: its enums and structs, field by field, and the types of its functions.

python/tests/test_c_interface.py reads tern.h and fails if the two differ. Nothing here loads the library: _library.py does.
"""

from __future__ import annotations

import ctypes
import enum
from ctypes import POINTER, c_char_p, c_int32, c_int64, c_size_t, c_uint8, c_uint32, c_uint64, c_void_p
from typing import Any

VERSION = 100  # MAJOR * 10000 + MINOR * 100 + PATCH that this file was written for


class Status(enum.IntEnum):
    OK = 0
    INVALID_ARGUMENT = 1
    INVALID_STATE = 2
    OUT_OF_MEMORY = 3
    UNSUPPORTED = 4
    TIMEOUT = 5
    ABORTED = 6
    MISMATCH = 7
    STALE_PLAN = 8
    MASKED_OUT = 9
    CAPACITY_EXCEEDED = 10
    SYSTEM_ERROR = 11
    INTERNAL_ERROR = 12


class DeviceType(enum.IntEnum):
    AUTO = 0
    CPU = 1
    CUDA = 2


class DType(enum.IntEnum):
    BF16 = 0
    FP16 = 1
    FP32 = 2
    FP8_E4M3 = 3
    BYTES = 4


class IndexType(enum.IntEnum):
    INT64 = 0
    INT32 = 1


class Layout(enum.IntEnum):
    """How the rows that arrive are laid out; tern.h, tern_layout."""

    RANK_MAJOR = 0
    EXPERT_MAJOR = 1
    EXPERT_PADDED = 2


class Extent(enum.IntEnum):
    """EXACT: the host learns the counts when the plan is routed. WORST: outputs have room for what may come; counts stay on the device."""

    EXACT = 0
    WORST = 1


class Phase(enum.IntEnum):
    """WHOLE, or SEND now and RECEIVE later, with nothing running in between."""

    WHOLE = 0
    SEND = 1
    RECEIVE = 2


class Encoding(enum.IntEnum):
    """What is done to rows on the way: nothing, or a cast to fp8 e4m3 with a scale for each 128 channels; tern.h has the formulas."""

    AS_GIVEN = 0
    FP8_F32 = 1
    FP8_F32_POW2 = 2
    FP8_UE8M0 = 3


class ScaleOrder(enum.IntEnum):
    ROW_MAJOR = 0
    COLUMN_MAJOR = 1


class CombineMode(enum.IntEnum):
    """HIERARCHICAL: rows of one token on one rank are summed there first. EXACT: the token's owner sums every expert's row."""

    HIERARCHICAL = 0
    EXACT = 1


class Weighting(enum.IntEnum):
    """NONE: a plain sum. DISPATCH: the weights that the plan's last dispatch carried. OWNER: given at combine by the tokens' owner."""

    NONE = 0
    DISPATCH = 1
    OWNER = 2


class Wire(enum.IntEnum):
    """As what a combine's rows travel: as their dtype, as a logarithm of 10 bits for each channel, or sums as FP32; see tern.h."""

    AS_DTYPE = 0
    LOG10BIT = 1
    FP32 = 2


class TimeoutPolicy(enum.IntEnum):
    ABORT = 0
    MASK = 1


class Mode(enum.IntEnum):
    """Which way operations go: AUTO decides by size."""

    AUTO = 0
    THROUGHPUT = 1
    LATENCY = 2


class LogLevel(enum.IntEnum):
    OFF = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    DEBUG = 4


class Health(enum.IntEnum):
    OK = 0
    DEGRADED = 1  # works, without the masked ranks
    FAILED = 2  # every operation raises the recorded error until Exchange.recover


class Operation(enum.IntEnum):
    NONE = 0
    ROUTE = 1
    DISPATCH = 2
    WEIGHTS = 3
    COMBINE = 4
    RECOVER = 5


class SpanKind(enum.IntEnum):
    """What a rank did in a span of its timeline; tern.h, tern_span_kind."""

    OPERATION = 0
    PLAN = 1
    SEND = 2
    WAIT = 3
    RECEIVE = 4
    REDUCE = 5


class Awaited(enum.IntEnum):
    """What a rank waited for; tern.h, tern_awaited."""

    NOTHING = 0
    MESSAGES = 1
    ADDRESS = 2
    CONSUMED = 3
    OWN_GPU = 4


LogFn = ctypes.CFUNCTYPE(None, c_void_p, c_int32, c_char_p)
AllgatherFn = ctypes.CFUNCTYPE(ctypes.c_int, c_void_p, c_void_p, c_void_p, c_size_t)


class Struct(ctypes.Structure):
    """A struct of tern.h: made zeroed, with its size in place, and with the fields that are named."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        if type(self)._fields_[0][0] == "struct_size":
            self.struct_size = ctypes.sizeof(self)


class GroupOptions(Struct):
    _fields_ = [
        ("struct_size", c_size_t),
        ("name", c_char_p),
        ("node", c_char_p),
        ("timeout_ms", c_int64),
        ("log", LogFn),
        ("log_context", c_void_p),
        ("log_level", c_int32),
        ("ranks_per_node", c_int32),
    ]


class GroupInfo(Struct):
    _fields_ = [
        ("struct_size", c_size_t),
        ("rank", c_int32),
        ("num_ranks", c_int32),
        ("node", c_int32),
        ("num_nodes", c_int32),
        ("rank_in_node", c_int32),
        ("ranks_in_node", c_int32),
    ]


class ExchangeOptions(Struct):
    _fields_ = [
        ("struct_size", c_size_t),
        ("device", c_int32),
        ("device_index", c_int32),
        ("staging_bytes", c_int64),
        ("window_bytes", c_int64),
        ("max_tokens", c_int64),
        ("max_row_bytes", c_int64),
        ("max_topk", c_int32),
        ("max_experts", c_int32),
        ("num_lanes", c_int32),
        ("num_sms", c_int32),
        ("timeout_ms", c_int64),
        ("on_timeout", c_int32),
        ("mode", c_int32),
    ]


class ExchangeInfo(Struct):
    _fields_ = [
        ("struct_size", c_size_t),
        ("device", c_int32),
        ("device_index", c_int32),
        ("num_lanes", c_int32),
        ("reserved", c_int32),
        ("timeout_ms", c_int64),
    ]


class MemoryInfo(Struct):
    _fields_ = [
        ("struct_size", c_size_t),
        ("control_bytes", c_int64),
        ("staging_bytes", c_int64),
        ("window_bytes", c_int64),
        ("total_bytes", c_int64),
    ]


class Failure(Struct):
    _fields_ = [
        ("status", c_int32),
        ("waiter", c_int32),
        ("awaited", c_int32),
        ("lane", c_int32),
        ("operation", c_int32),
        ("reserved", c_int32),
        ("expected_epoch", c_uint64),
        ("seen_epoch", c_uint64),
    ]


class ExchangeState(Struct):
    _fields_ = [
        ("struct_size", c_size_t),
        ("health", c_int32),
        ("generation", c_uint32),
        ("failure", Failure),
        ("masked", c_uint8 * 1024),
    ]


class RecoverOptions(Struct):
    _fields_ = [
        ("struct_size", c_size_t),
        ("timeout_ms", c_int64),
        ("mask", POINTER(c_uint8)),
        ("allow_mask", c_int32),
        ("readmit", c_int32),
    ]


class Metrics(Struct):
    _fields_ = [
        ("struct_size", c_size_t),
        ("num_routes", c_uint64),
        ("num_dispatches", c_uint64),
        ("num_combines", c_uint64),
        ("rounds", c_uint64),
        ("sent_bytes", c_uint64),
        ("sent_local_bytes", c_uint64),
        ("received_rows", c_uint64),
        ("waits", c_uint64),
        ("sleeps", c_uint64),
        ("wait_ns", c_uint64),
        ("timeouts", c_uint64),
        ("network_bytes", c_uint64),
    ]


class PlanOptions(Struct):
    _fields_ = [
        ("struct_size", c_size_t),
        ("max_tokens", c_int64),
        ("num_experts", c_int32),
        ("num_topk", c_int32),
        ("layout", c_int32),
        ("extent", c_int32),
        ("expert_alignment", c_int32),
        ("zero_padding", c_int32),
        ("row_capacity", c_int64),
    ]


class Routing(Struct):
    _fields_ = [
        ("struct_size", c_size_t),
        ("topk_idx", c_void_p),
        ("topk_idx_type", c_int32),
        ("reserved", c_int32),
        ("num_tokens", c_int64),
        ("token_in_rank", c_void_p),
        ("tokens_per_expert", c_void_p),
        ("device_num_tokens", c_void_p),
    ]


class Launch(Struct):
    _fields_ = [
        ("struct_size", c_size_t),
        ("stream", c_void_p),
        ("lane", c_int32),
        ("phase", c_int32),
        ("num_sms", c_int32),
        ("own_stream", c_int32),
        ("after_event", c_void_p),
        ("done_event", c_void_p),
    ]


class PlanInfo(Struct):
    _fields_ = [
        ("struct_size", c_size_t),
        ("num_tokens", c_int64),
        ("num_received", c_int64),
        ("num_rows", c_int64),
        ("row_capacity", c_int64),
        ("generation", c_uint32),
        ("latency_path", c_int32),
        ("received_per_rank", POINTER(c_int32)),
        ("received_per_expert", POINTER(c_int32)),
        ("sent_per_rank", POINTER(c_int32)),
        ("pair_counts", POINTER(c_int32)),
        ("num_sms", c_int32),
        ("reserved", c_int32),
        ("rail_tokens", POINTER(c_int32)),
        ("rail_token_in_rank", POINTER(c_uint8)),
    ]


class RoutingCounts(Struct):
    _fields_ = [
        ("struct_size", c_size_t),
        ("tokens_per_rank", c_void_p),
        ("tokens_per_node", c_void_p),
        ("tokens_per_expert", c_void_p),
        ("token_in_rank", c_void_p),
    ]


class DispatchArgs(Struct):
    _fields_ = [
        ("struct_size", c_size_t),
        ("routing", POINTER(Routing)),
        ("tokens", c_void_p),
        ("dtype", c_int32),
        ("encoding", c_int32),
        ("hidden", c_int64),
        ("token_stride_bytes", c_int64),
        ("scales", c_void_p),
        ("scale_bytes", c_int64),
        ("scale_element_bytes", c_int64),
        ("scale_token_stride_bytes", c_int64),
        ("scale_element_stride_bytes", c_int64),
        ("topk_weights", c_void_p),
        ("carry_weights", c_int32),
        ("out_scale_order", c_int32),
        ("out_tokens", c_void_p),
        ("out_scales", c_void_p),
        ("out_topk_idx", c_void_p),
        ("out_topk_weights", c_void_p),
        ("out_source_token", c_void_p),
        ("out_source_rank", c_void_p),
        ("out_row_expert", c_void_p),
        ("out_expert_offsets", c_void_p),
        ("out_expert_counts", c_void_p),
        ("out_rank_counts", c_void_p),
        ("out_expert_rank_ranges", c_void_p),
        ("zero_copy", c_int32),
        ("reserved", c_int32),
        ("wait_ns", c_void_p),
    ]


class CombineArgs(Struct):
    _fields_ = [
        ("struct_size", c_size_t),
        ("rows", c_void_p),
        ("dtype", c_int32),
        ("mode", c_int32),
        ("hidden", c_int64),
        ("weighting", c_int32),
        ("carry_weights", c_int32),
        ("topk_weights", c_void_p),
        ("row_weights", c_void_p),
        ("bias", c_void_p * 2),
        ("out_tokens", c_void_p),
        ("out_topk_weights", c_void_p),
        ("zero_copy", c_int32),
        ("wire", c_int32),
        ("wait_ns", c_void_p),
    ]


class Span(Struct):
    _fields_ = [
        ("begin_ns", c_int64),
        ("end_ns", c_int64),
        ("epoch", c_uint64),
        ("bytes", c_int64),
        ("kind", c_int32),
        ("operation", c_int32),
        ("phase", c_int32),
        ("lane", c_int32),
        ("peer", c_int32),
        ("awaited", c_int32),
        ("status", c_int32),
        ("reserved", c_int32),
    ]


_handle = c_void_p  # tern_group*, tern_exchange*, tern_plan*

# name: (result, arguments). Functions that return a tern_status are checked by errors.check.
FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "tern_status_name": (c_char_p, [c_int32]),
    "tern_last_error": (c_char_p, []),
    "tern_version": (c_int32, []),
    "tern_group_create_from_env": (c_int32, [POINTER(GroupOptions), POINTER(_handle)]),
    "tern_group_create_from_allgather": (
        c_int32,
        [POINTER(GroupOptions), c_int32, c_int32, AllgatherFn, c_void_p, POINTER(_handle)],
    ),
    "tern_group_create_local": (c_int32, [POINTER(GroupOptions), c_int32, POINTER(_handle)]),
    "tern_group_get_info": (c_int32, [_handle, POINTER(GroupInfo)]),
    "tern_group_destroy": (None, [_handle]),
    "tern_exchange_query_memory": (c_int32, [_handle, POINTER(ExchangeOptions), POINTER(MemoryInfo)]),
    "tern_exchange_create": (c_int32, [_handle, POINTER(ExchangeOptions), POINTER(_handle)]),
    "tern_exchange_get_info": (c_int32, [_handle, POINTER(ExchangeInfo)]),
    "tern_exchange_destroy": (None, [_handle]),
    "tern_window_alloc": (c_int32, [_handle, c_int64, POINTER(c_void_p)]),
    "tern_window_free": (c_int32, [_handle, c_void_p]),
    "tern_exchange_get_state": (c_int32, [_handle, POINTER(ExchangeState)]),
    "tern_exchange_recover": (c_int32, [_handle, POINTER(RecoverOptions)]),
    "tern_exchange_get_metrics": (c_int32, [_handle, POINTER(Metrics)]),
    "tern_plan_create": (c_int32, [_handle, POINTER(PlanOptions), POINTER(_handle)]),
    "tern_plan_destroy": (None, [_handle]),
    "tern_plan_route": (c_int32, [_handle, POINTER(Routing), POINTER(Launch), POINTER(PlanInfo)]),
    "tern_plan_get_info": (c_int32, [_handle, POINTER(PlanInfo)]),
    "tern_plan_get_row_capacity": (c_int32, [_handle, POINTER(c_int64)]),
    "tern_count_routing": (
        c_int32,
        [_handle, POINTER(Routing), c_int32, c_int32, POINTER(Launch), POINTER(RoutingCounts)],
    ),
    "tern_dispatch": (c_int32, [_handle, POINTER(DispatchArgs), POINTER(Launch)]),
    "tern_combine": (c_int32, [_handle, POINTER(CombineArgs), POINTER(Launch)]),
    "tern_trace_start": (c_int32, [_handle, c_int64]),
    "tern_trace_stop": (c_int32, [_handle]),
    "tern_trace_read": (c_int32, [_handle, POINTER(Span), c_int64, POINTER(c_int64), POINTER(c_int64)]),
}
