# SPDX-License-Identifier: Apache-2.0
"""Where one batch's tokens go, and the operations along it: route, dispatch, combine."""

from __future__ import annotations

import ctypes
import math
import weakref
from dataclasses import dataclass, field
from typing import Any, Callable, Generic, Iterable, NamedTuple, Optional, Sequence, TypeVar, Union

from . import _c
from ._arrays import Array, Arrays, element_type, index_type
from ._library import lib
from .errors import CapacityExceededError, InvalidArgumentError, InvalidStateError, check
from .exchange import Exchange, choice

_CHANNELS_PER_SCALE = 128
_DEFAULT_OUTPUTS = {
    _c.Layout.RANK_MAJOR: ("topk_idx", "topk_weights", "expert_counts"),
    _c.Layout.EXPERT_MAJOR: ("topk_weights", "row_expert", "expert_offsets", "expert_counts"),
    _c.Layout.EXPERT_PADDED: ("topk_weights", "expert_counts"),
}


@dataclass(frozen=True)
class PlanInfo:
    """What the host knows of a routed plan: tern.h, tern_plan_info. On a GPU with extent WORST the counts are None, num_received -1."""

    num_tokens: int
    num_received: int
    num_rows: int
    row_capacity: int
    generation: int
    latency_path: bool
    num_sms: int
    received_per_rank: Optional[list[int]]
    received_per_expert: Optional[list[int]]
    sent_per_rank: Optional[list[int]]
    pair_counts: Optional[list[list[int]]]


@dataclass
class Dispatched:
    """What a dispatch brought; None: not asked for, or not there in this layout. R ranks, E_l local experts, N rows.

    tokens: [N, hidden]; expert_padded: [E_l, R * max_tokens, hidden], and so with the other arrays of N rows.
    scales: [N, scales]; with scale_order "column_major" a transposed view of memory [scales, N].
    topk_idx: i32 [N, top-k], local experts, -1 where an entry is not of this rank. rank_major.
    topk_weights: f32 [N, top-k], or [N] in the expert layouts.
    source_token, source_rank: i32 [N]; -1 in padding and unused rows.
    row_expert: i32 [N], local experts. Expert layouts.
    expert_offsets: i64 [E_l + 1], first row of each expert's group. expert_major.
    expert_counts: i32 [E_l], rows (entries) of each expert without padding.
    rank_counts: i32 [R], messages from each rank.
    expert_rank_ranges: i64 [E_l, R], count in the low 32 bits, first row of the expert's group in the high ones. Expert layouts.
    """

    tokens: Array
    scales: Optional[Array] = None
    topk_idx: Optional[Array] = None
    topk_weights: Optional[Array] = None
    source_token: Optional[Array] = None
    source_rank: Optional[Array] = None
    row_expert: Optional[Array] = None
    expert_offsets: Optional[Array] = None
    expert_counts: Optional[Array] = None
    rank_counts: Optional[Array] = None
    expert_rank_ranges: Optional[Array] = None


class Combined(NamedTuple):
    """tokens: [num_tokens, hidden]. topk_weights: f32 [num_tokens, top-k], the row_weights handed back, if any were given."""

    tokens: Array
    topk_weights: Optional[Array] = None


Result = TypeVar("Result")


@dataclass
class Pending(Generic[Result]):
    """An operation of which the first phase is done: the data are on their way. `receive` waits for what comes, and returns it."""

    result: Result
    _receive: Callable[[Optional[int]], None]
    _inputs: Any = field(repr=False, default=None)  # stay alive until then

    def receive(self, *, stream: Any = None) -> Result:
        """On GPU ranks, enqueues the waiting on `stream`, or torch's current one."""
        try:
            self._receive(stream)
        except CapacityExceededError as error:
            error.result = self.result
            raise
        self._inputs = None
        return self.result


class Plan:
    """Room for the routing of one batch, made once and used again; operations along it allocate nothing but their outputs.

    max_tokens: the most tokens that any rank routes, equal on all ranks. num_experts: divisible by the ranks; expert e lives on rank
        e // (num_experts // num_ranks). num_topk: 1..64, or 0 to route by token_in_rank (rank_major).
    layout: "rank_major", "expert_major" or "expert_padded". extent: "exact" or "worst".
    expert_alignment: expert_major groups start at multiples of it. zero_padding: dispatch writes zeros into padding rows.
    row_capacity: rows of the outputs with extent "worst"; 0: what can arrive at most.

    Collective operations come in the same order on every rank. A plan belongs to one lane, and so to one thread, at a time.
    """

    def __init__(
        self,
        exchange: Exchange,
        *,
        max_tokens: int,
        num_experts: int,
        num_topk: int,
        layout: Union[_c.Layout, str] = _c.Layout.RANK_MAJOR,
        extent: Union[_c.Extent, str] = _c.Extent.EXACT,
        expert_alignment: int = 1,
        zero_padding: bool = False,
        row_capacity: int = 0,
    ) -> None:
        self.exchange = exchange
        self.max_tokens, self.num_experts, self.num_topk = max_tokens, num_experts, num_topk
        self.layout, self.extent = choice(_c.Layout, layout), choice(_c.Extent, extent)
        self.num_local_experts = num_experts // exchange.group.num_ranks
        options = _c.PlanOptions(
            max_tokens=max_tokens,
            num_experts=num_experts,
            num_topk=num_topk,
            layout=self.layout,
            extent=self.extent,
            expert_alignment=expert_alignment,
            zero_padding=int(zero_padding),
            row_capacity=row_capacity,
        )
        self._native = exchange._native
        self._handle = ctypes.c_void_p()
        check(lib.tern_plan_create(self._native.handle, ctypes.byref(options), ctypes.byref(self._handle)))
        weakref.finalize(self, lib.tern_plan_destroy, self._handle)
        capacity = ctypes.c_int64()
        check(lib.tern_plan_get_row_capacity(self._handle, ctypes.byref(capacity)))
        self.row_capacity = capacity.value
        self._num_tokens = -1
        self._num_rows = self.row_capacity  # of the outputs; extent EXACT: of the last routing
        # Filled in anew by every call. A plan is used by one thread at a time.
        self._launch, self._routing = _c.Launch(), _c.Routing()
        self._dispatch_args, self._combine_args = _c.DispatchArgs(), _c.CombineArgs()

    # ---------------------------------------------------------------------------------------------------------- route

    def route(
        self,
        topk_idx: Optional[Array] = None,
        *,
        token_in_rank: Optional[Array] = None,
        tokens_per_expert: Optional[Array] = None,
        device_num_tokens: Optional[Array] = None,
        lane: int = 0,
        num_sms: int = 0,
        stream: Any = None,
    ) -> Optional[PlanInfo]:
        """Exchanges counts; then every rank knows where each row goes. Collective.

        topk_idx: int64 or int32 [num_tokens, num_topk] global experts, -1: none. Or token_in_rank: bool or uint8 [num_tokens,
        num_ranks], with tokens_per_expert i32 [num_experts] if the counts of experts matter. device_num_tokens: i32 [1] on the GPU, the
        number of tokens at the time the operation runs, for graphs.
        Returns the counts with extent EXACT (on a GPU it waits for them, without the GIL), None with WORST: ask `info`.
        """
        arrays, _inputs = self._set_routing(topk_idx, token_in_rank, tokens_per_expert, device_num_tokens)
        launch = self._launch_on(arrays, lane, num_sms, stream)
        if self.extent == _c.Extent.WORST:
            check(lib.tern_plan_route(self._handle, ctypes.byref(self._routing), launch, None))
            return None
        info = _c.PlanInfo()
        check(lib.tern_plan_route(self._handle, ctypes.byref(self._routing), launch, ctypes.byref(info)))
        self._num_rows = int(info.num_rows)
        return self._plan_info(info)

    def info(self) -> PlanInfo:
        """What the host knows of the last routing."""
        info = _c.PlanInfo()
        check(lib.tern_plan_get_info(self._handle, ctypes.byref(info)))
        return self._plan_info(info)

    def _plan_info(self, info: _c.PlanInfo) -> PlanInfo:
        num_ranks = self.exchange.group.num_ranks
        pairs = _listed(info.pair_counts, num_ranks * num_ranks)
        return PlanInfo(
            num_tokens=info.num_tokens,
            num_received=info.num_received,
            num_rows=info.num_rows,
            row_capacity=info.row_capacity,
            generation=info.generation,
            latency_path=bool(info.latency_path),
            num_sms=info.num_sms,
            received_per_rank=_listed(info.received_per_rank, num_ranks),
            received_per_expert=_listed(info.received_per_expert, self.num_local_experts),
            sent_per_rank=_listed(info.sent_per_rank, num_ranks),
            pair_counts=None if pairs is None else [pairs[r * num_ranks : (r + 1) * num_ranks] for r in range(num_ranks)],
        )

    def _set_routing(
        self, topk_idx: Any, token_in_rank: Any, tokens_per_expert: Any, device_num_tokens: Any
    ) -> tuple[Arrays, list[Array]]:
        """Returns the kind of arrays, and those that must live until the call."""
        routing = self._routing
        given, name, width = (
            (topk_idx, "topk_idx", self.num_topk)
            if token_in_rank is None
            else (token_in_rank, "token_in_rank", self.exchange.group.num_ranks)
        )
        if given is None:
            raise InvalidArgumentError("route: give topk_idx or token_in_rank")
        arrays = self.exchange._arrays.of(given)
        main = _matrix(arrays, given, name, width)
        inputs = [main]
        routing.topk_idx = routing.token_in_rank = None
        if token_in_rank is None:
            routing.topk_idx = arrays.pointer(main)
            routing.topk_idx_type = index_type(arrays, main)
        else:
            if arrays.item_bytes(main) != 1:
                raise InvalidArgumentError(f"token_in_rank has elements of type {main.dtype}; they must be bool or uint8")
            routing.token_in_rank = arrays.pointer(main)
        routing.num_tokens = main.shape[0]
        routing.tokens_per_expert = self._int32_pointer(arrays, tokens_per_expert, "tokens_per_expert", self.num_experts, inputs)
        routing.device_num_tokens = self._int32_pointer(arrays, device_num_tokens, "device_num_tokens", 1, inputs)
        self._num_tokens = int(main.shape[0])
        return arrays, inputs

    def _int32_pointer(self, arrays: Arrays, array: Any, name: str, size: int, inputs: list[Array]) -> Optional[int]:
        if array is None:
            return None
        array = arrays.dense(arrays.adopt(array, name))
        if arrays.dtype_name(array) != "int32" or math.prod(array.shape) != size:
            raise InvalidArgumentError(f"{name} is {array.dtype} of shape {list(array.shape)}; it must be int32 with {size} elements")
        inputs.append(array)
        return int(arrays.pointer(array))

    # ------------------------------------------------------------------------------------------------------- dispatch

    def dispatch(self, tokens: Array, **arguments: Any) -> Dispatched:
        """Sends this rank's tokens to the ranks of their experts, and receives what the others send. Collective.

        tokens: [num_tokens, hidden], rows of any stride; bf16, fp16, fp32, fp8, or any other type as bytes. A row is a multiple of 16
            bytes.
        topk_idx: routes the plan in the same operation (extent WORST), with device_num_tokens as in `route`.
        scales: [num_tokens, any number], any strides, travel with the tokens.
        topk_weights: f32 [num_tokens, num_topk], given by all ranks or by none.
        encoding: "as_given", or a cast to fp8 on the way: "fp8_f32", "fp8_f32_pow2", "fp8_ue8m0" (scales come as int32, four exponents
            each).
        scale_order: "row_major", or "column_major" for scales whose rows are contiguous.
        outputs: names of fields of Dispatched that are wanted besides tokens and scales; default: those that an expert needs.
        out: a Dispatched whose arrays are written to, instead of fresh ones; fields that are None are not written.
        zero_copy: True: out.tokens is window memory on every rank (only to be said where a rank has no rows).
        lane, num_sms, stream: as in tern.h, tern_launch; stream: default torch's current one.

        CapacityExceededError (extent WORST, CPU ranks): the rows that found no room are missing; error.result is the rest.
        """
        args, launch, result, _inputs = self._prepare_dispatch(tokens, **arguments)
        try:
            check(lib.tern_dispatch(self._handle, ctypes.byref(args), launch))
        except CapacityExceededError as error:
            error.result = result
            raise
        return result

    def dispatch_send(self, tokens: Array, **arguments: Any) -> Pending[Dispatched]:
        """The first phase of a dispatch with the same arguments: returns when the data are on their way. WORST, or a routed plan."""
        args, launch, result, inputs = self._prepare_dispatch(tokens, **arguments)
        return self._send(lib.tern_dispatch, args, launch, result, (inputs, tokens))

    def _prepare_dispatch(
        self,
        tokens: Array,
        *,
        topk_idx: Optional[Array] = None,
        device_num_tokens: Optional[Array] = None,
        scales: Optional[Array] = None,
        topk_weights: Optional[Array] = None,
        encoding: Union[_c.Encoding, str] = _c.Encoding.AS_GIVEN,
        scale_order: Union[_c.ScaleOrder, str] = _c.ScaleOrder.ROW_MAJOR,
        outputs: Optional[Iterable[str]] = None,
        out: Optional[Dispatched] = None,
        zero_copy: bool = False,
        lane: int = 0,
        num_sms: int = 0,
        stream: Any = None,
    ) -> tuple[_c.DispatchArgs, Any, Dispatched, list[Any]]:
        arrays = self.exchange._arrays.of(tokens)
        args, inputs = self._dispatch_args, []
        encoding, scale_order = choice(_c.Encoding, encoding), choice(_c.ScaleOrder, scale_order)
        args.routing = None
        if topk_idx is not None:
            inputs += self._set_routing(topk_idx, None, None, device_num_tokens)[1]
            args.routing = ctypes.pointer(self._routing)
        tokens = self._set_tokens(arrays, tokens)
        args.encoding, args.out_scale_order, args.zero_copy = encoding, scale_order, int(zero_copy)
        scales = self._set_scales(arrays, scales)
        args.topk_weights, args.carry_weights = None, int(topk_weights is not None)
        if topk_weights is not None:
            topk_weights = self._weights(arrays, topk_weights, "topk_weights")
            args.topk_weights = arrays.pointer(topk_weights)
        if out is None:
            wanted = _DEFAULT_OUTPUTS[self.layout] if outputs is None else tuple(outputs)
            out = self._make_outputs(arrays, tokens, scales, wanted)
        self._set_outputs(arrays, out)
        inputs += (tokens, scales, topk_weights, out)
        return args, self._launch_on(arrays, lane, num_sms, stream), out, inputs

    def _set_tokens(self, arrays: Arrays, tokens: Any) -> Array:
        args = self._dispatch_args
        tokens = arrays.adopt(tokens, "tokens")
        if len(tokens.shape) != 2 or (self._num_tokens >= 0 and tokens.shape[0] != self._num_tokens):
            raise InvalidArgumentError(f"tokens has shape {list(tokens.shape)}; it must be [{self._num_tokens} tokens as routed, hidden]")
        strides = arrays.strides(tokens)
        if strides[1] != 1 and tokens.shape[1] > 1:
            tokens = arrays.dense(tokens)
            strides = arrays.strides(tokens)
        dtype, unit = element_type(arrays, tokens)
        args.tokens, args.dtype, args.hidden = arrays.pointer(tokens), dtype, tokens.shape[1] * unit
        args.token_stride_bytes = strides[0] * arrays.item_bytes(tokens) if tokens.shape[0] > 1 else 0
        return tokens

    def _set_scales(self, arrays: Arrays, scales: Any) -> Optional[Array]:
        args = self._dispatch_args
        args.scales = None
        args.scale_bytes = args.scale_element_bytes = args.scale_token_stride_bytes = args.scale_element_stride_bytes = 0
        if scales is None:
            return None
        scales = arrays.adopt(scales, "scales")
        if len(scales.shape) != 2:
            raise InvalidArgumentError(f"scales has shape {list(scales.shape)}; it must be [num_tokens, any number]")
        item, strides = arrays.item_bytes(scales), arrays.strides(scales)
        args.scales = arrays.pointer(scales)
        args.scale_bytes, args.scale_element_bytes = scales.shape[1] * item, item
        if scales.shape[0] > 0:
            args.scale_token_stride_bytes = strides[0] * item if scales.shape[0] > 1 else 0
            args.scale_element_stride_bytes = strides[1] * item if scales.shape[1] > 1 else 0
        return scales

    def _row_shape(self) -> tuple[int, ...]:
        if self.layout == _c.Layout.EXPERT_PADDED:
            return (self.num_local_experts, self.exchange.group.num_ranks * self.max_tokens)
        return (self._num_rows,)

    def _make_outputs(self, arrays: Arrays, tokens: Array, scales: Optional[Array], wanted: Sequence[str]) -> Dispatched:
        args = self._dispatch_args
        rows = self._row_shape()
        casts = args.encoding != _c.Encoding.AS_GIVEN
        out = Dispatched(arrays.empty((*rows, tokens.shape[1]), arrays.float8 if casts else tokens.dtype))
        if casts:
            num_scales = -(-tokens.shape[1] // _CHANNELS_PER_SCALE)
            if args.encoding == _c.Encoding.FP8_UE8M0:
                out.scales = self._empty_scales(arrays, rows, -(-num_scales // 4), arrays.int32)
            else:
                out.scales = self._empty_scales(arrays, rows, num_scales, arrays.float32)
        elif scales is not None:
            out.scales = self._empty_scales(arrays, rows, scales.shape[1], scales.dtype)
        by_expert = self.layout != _c.Layout.RANK_MAJOR
        num_local, num_ranks = self.num_local_experts, self.exchange.group.num_ranks
        for name in wanted:
            if name in ("source_token", "source_rank", "row_expert"):
                array = arrays.empty(rows, arrays.int32)
            elif name == "topk_idx":
                array = arrays.empty((*rows, self.num_topk), arrays.int32) if self.num_topk > 0 else None
            elif name == "topk_weights":
                shape = rows if by_expert else (*rows, self.num_topk)
                array = arrays.empty(shape, arrays.float32) if args.carry_weights else None
            elif name == "expert_offsets":
                array = arrays.empty((num_local + 1,), arrays.int64)
            elif name == "expert_counts":
                array = arrays.empty((num_local,), arrays.int32)
            elif name == "rank_counts":
                array = arrays.empty((num_ranks,), arrays.int32)
            elif name == "expert_rank_ranges":
                array = arrays.empty((num_local, num_ranks), arrays.int64)
            else:
                raise InvalidArgumentError(f"outputs names {name!r}, which is no field of Dispatched")
            setattr(out, name, array)
        return out

    def _empty_scales(self, arrays: Arrays, rows: tuple[int, ...], num_scales: int, dtype: Any) -> Array:
        if self._dispatch_args.out_scale_order == _c.ScaleOrder.ROW_MAJOR:
            return arrays.empty((*rows, num_scales), dtype)
        return arrays.transpose(arrays.empty((*rows[:-1], num_scales, rows[-1]), dtype))

    def _set_outputs(self, arrays: Arrays, out: Dispatched) -> None:
        args = self._dispatch_args

        def pointer(array: Optional[Array]) -> Optional[int]:
            return None if array is None else int(arrays.pointer(array))

        args.out_tokens, args.out_scales = pointer(out.tokens), pointer(out.scales)
        args.out_topk_idx, args.out_topk_weights = pointer(out.topk_idx), pointer(out.topk_weights)
        args.out_source_token, args.out_source_rank = pointer(out.source_token), pointer(out.source_rank)
        args.out_row_expert, args.out_expert_offsets = pointer(out.row_expert), pointer(out.expert_offsets)
        args.out_expert_counts, args.out_rank_counts = pointer(out.expert_counts), pointer(out.rank_counts)
        args.out_expert_rank_ranges = pointer(out.expert_rank_ranges)

    # -------------------------------------------------------------------------------------------------------- combine

    def combine(self, rows: Array, **arguments: Any) -> Combined:
        """Brings one result per token back to its owner, the weighted sum of its rows in FP32 in a fixed order. Collective.

        rows: in the plan's layout, as dispatch's tokens came; bf16, fp16 or fp32.
        mode: "hierarchical" or "exact". weighting: "none", "dispatch" (the weights that the last dispatch carried) or "owner" (given
            here as topk_weights f32 [num_tokens, num_topk]; the default if they are given). rank_major is a plain sum.
        row_weights: f32, shaped as dispatch's topk_weights came, are handed back to the owner: Combined.topk_weights.
        bias: one [num_tokens, hidden] or a pair of them, added first.
        out: an array [num_tokens, hidden] to write to. zero_copy, lane, num_sms, stream: as for dispatch.
        """
        args, launch, result, _inputs = self._prepare_combine(rows, **arguments)
        check(lib.tern_combine(self._handle, ctypes.byref(args), launch))
        return result

    def combine_send(self, rows: Array, **arguments: Any) -> Pending[Combined]:
        """The first phase of a combine with the same arguments: returns when the data are on their way."""
        args, launch, result, inputs = self._prepare_combine(rows, **arguments)
        return self._send(lib.tern_combine, args, launch, result, (inputs, rows))

    def _prepare_combine(
        self,
        rows: Array,
        *,
        mode: Union[_c.CombineMode, str] = _c.CombineMode.HIERARCHICAL,
        weighting: Union[_c.Weighting, str, None] = None,
        topk_weights: Optional[Array] = None,
        row_weights: Optional[Array] = None,
        bias: Union[Array, Sequence[Array], None] = None,
        out: Optional[Array] = None,
        zero_copy: bool = False,
        lane: int = 0,
        num_sms: int = 0,
        stream: Any = None,
    ) -> tuple[_c.CombineArgs, Any, Combined, list[Any]]:
        if self._num_tokens < 0:
            raise InvalidStateError("combine: the plan is not routed; route it, or give the dispatch topk_idx")
        arrays = self.exchange._arrays.of(rows)
        args, inputs = self._combine_args, []
        rows = arrays.dense(arrays.adopt(rows, "rows"))
        expected = self._row_shape()
        if tuple(rows.shape[:-1]) not in (expected, (math.prod(expected),)):
            raise InvalidArgumentError(f"rows has shape {list(rows.shape)}; it must be {[*expected, 'hidden']}")
        dtype, unit = element_type(arrays, rows)
        args.rows, args.dtype, args.hidden = arrays.pointer(rows), dtype, rows.shape[-1] * unit
        args.mode, args.zero_copy = choice(_c.CombineMode, mode), int(zero_copy)
        if weighting is None:
            weighting = _c.Weighting.NONE if topk_weights is None else _c.Weighting.OWNER
        args.weighting = choice(_c.Weighting, weighting)
        args.topk_weights = args.row_weights = None
        if topk_weights is not None:
            topk_weights = self._weights(arrays, topk_weights, "topk_weights")
            args.topk_weights = arrays.pointer(topk_weights)
        args.carry_weights = int(row_weights is not None)
        if row_weights is not None:
            row_weights = self._row_weights(arrays, row_weights)
            args.row_weights = arrays.pointer(row_weights)
        shape = (self._num_tokens, rows.shape[-1])
        biases = _biases(arrays, bias, rows, shape)
        for b in range(2):
            args.bias[b] = arrays.pointer(biases[b]) if b < len(biases) else None
        if out is None:
            out = arrays.empty(shape, rows.dtype)
        elif tuple(out.shape) != shape or out.dtype != rows.dtype or arrays.dense(out) is not out and out.size:
            raise InvalidArgumentError(f"out is {out.dtype} of shape {list(out.shape)}; it must be dense, {rows.dtype} of {list(shape)}")
        returned = arrays.empty((self._num_tokens, self.num_topk), arrays.float32) if row_weights is not None else None
        args.out_tokens = arrays.pointer(out)
        args.out_topk_weights = None if returned is None else arrays.pointer(returned)
        inputs += (rows, topk_weights, row_weights, biases)
        return args, self._launch_on(arrays, lane, num_sms, stream), Combined(out, returned), inputs

    def _row_weights(self, arrays: Arrays, weights: Any) -> Array:
        rows = math.prod(self._row_shape())
        size = rows * (self.num_topk if self.layout == _c.Layout.RANK_MAJOR else 1)
        weights = arrays.dense(arrays.adopt(weights, "row_weights"))
        if arrays.dtype_name(weights) != "float32" or math.prod(weights.shape) != size:
            raise InvalidArgumentError(
                f"row_weights is {weights.dtype} of shape {list(weights.shape)}; it must be float32 with {size} elements, as they came"
            )
        return weights

    # --------------------------------------------------------------------------------------------------------- common

    def _weights(self, arrays: Arrays, weights: Any, name: str) -> Array:
        weights = _matrix(arrays, weights, name, self.num_topk)
        if arrays.dtype_name(weights) != "float32" or (self._num_tokens >= 0 and weights.shape[0] != self._num_tokens):
            raise InvalidArgumentError(
                f"{name} is {weights.dtype} of shape {list(weights.shape)}; it must be float32 of {[self._num_tokens, self.num_topk]}"
            )
        return weights

    def _launch_on(self, arrays: Arrays, lane: int, num_sms: int, stream: Any) -> Any:
        launch = self._launch
        if stream is None:
            launch.stream = arrays.current_stream()
        else:
            launch.stream = int(getattr(stream, "cuda_stream", stream))
        launch.lane, launch.num_sms, launch.phase = lane, num_sms, _c.Phase.WHOLE
        return ctypes.byref(launch)

    def _send(self, function: Any, args: Any, _launch: Any, result: Result, inputs: Any) -> Pending[Result]:
        # Copies: the plan's own are filled in anew by whatever it is used for before the receive.
        own_args, launch = type(args).from_buffer_copy(args), _c.Launch.from_buffer_copy(self._launch)
        arrays = self.exchange._arrays.of(result.tokens)  # type: ignore[attr-defined]
        routing = _c.Routing.from_buffer_copy(self._routing)
        if getattr(own_args, "routing", None):
            own_args.routing = ctypes.pointer(routing)
        launch.phase = _c.Phase.SEND
        check(function(self._handle, ctypes.byref(own_args), ctypes.byref(launch)))

        def receive(stream: Any) -> None:
            launch.phase = _c.Phase.RECEIVE
            launch.stream = arrays.current_stream() if stream is None else int(getattr(stream, "cuda_stream", stream))
            check(function(self._handle, ctypes.byref(own_args), ctypes.byref(launch)))

        return Pending(result, receive, inputs)


def _matrix(arrays: Arrays, given: Any, name: str, width: int) -> Array:
    array = arrays.dense(arrays.adopt(given, name))
    if len(array.shape) != 2 or array.shape[1] != width:
        raise InvalidArgumentError(f"{name} has shape {list(array.shape)}; it must be [num_tokens, {width}]")
    return array


def _biases(arrays: Arrays, bias: Any, rows: Array, shape: tuple[int, int]) -> list[Array]:
    given = [] if bias is None else list(bias) if isinstance(bias, (tuple, list)) else [bias]
    if len(given) > 2:
        raise InvalidArgumentError(f"{len(given)} biases are given; there can be two")
    biases = [arrays.dense(arrays.adopt(one, "bias")) for one in given if one is not None]
    for one in biases:
        if tuple(one.shape) != shape or one.dtype != rows.dtype:
            raise InvalidArgumentError(f"bias is {one.dtype} of shape {list(one.shape)}; it must be {rows.dtype} of {list(shape)}")
    return biases


def _listed(pointer: Any, count: int) -> Optional[list[int]]:
    return list(pointer[:count]) if pointer else None
