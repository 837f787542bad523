# SPDX-License-Identifier: Apache-2.0
"""Where one batch's tokens go, and the operations along it: route, dispatch, combine."""

from __future__ import annotations

import ctypes
import weakref
from typing import Any, Sequence

from . import _c
from ._arrays import Array, Arrays, raw_stream
from ._calls import CombineCall, CombineKind, DispatchCall, DispatchKind, Shape
from ._library import lib, tern_combine, tern_dispatch
from ._prepared import prepared, refuse_copies, sent
from ._repeats import RepeatedCombine, RepeatedDispatch, Repeats
from .addressed import Structs
from .errors import HAS_ROUTED, InvalidArgumentError, InvalidStateError, check
from .exchange import Exchange, choice
from .results import Combined, Dispatched, Pending, PlanInfo, Prepared


class Plan:
    """Room for the routing of one batch, made once and used again; operations along it allocate nothing but their outputs.

    max_tokens: the most tokens that any rank routes, equal on all ranks.
    num_experts: divisible by the ranks; expert e lives on rank e // (num_experts // num_ranks).
    num_topk: 1..64, or 0 to route by token_in_rank (rank_major).
    layout: "rank_major", "expert_major" or "expert_padded". extent: "exact" or "worst".
    expert_alignment: expert_major groups start at multiples of it.
    zero_padding: dispatch writes zeros into padding rows.
    row_capacity: rows of the outputs with extent "worst"; 0: what can arrive at most.

    Collective operations come in the same order on every rank. A plan belongs to one lane, and so to one thread, at a time. On GPU
    ranks operations run on torch's current stream, or the one given as `stream` (a torch.cuda.Stream, or its handle), to which what they make
    belongs too; lane and num_sms: tern.h, tern_launch.
    """

    def __init__(
        self,
        exchange: Exchange,
        *,
        max_tokens: int,
        num_experts: int,
        num_topk: int,
        layout: _c.Layout | str = _c.Layout.RANK_MAJOR,
        extent: _c.Extent | str = _c.Extent.EXACT,
        expert_alignment: int = 1,
        zero_padding: bool = False,
        row_capacity: int = 0,
    ) -> None:
        self.exchange, self._arrays = exchange, exchange._arrays
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
        self._native = exchange._native  # lives as long as the plan
        self._handle = ctypes.c_void_p()
        check(lib.tern_plan_create(self._native.handle, ctypes.byref(options), ctypes.byref(self._handle)))
        weakref.finalize(self, lib.tern_plan_destroy, self._handle)
        self._pointer = ctypes.c_void_p.from_param(self._handle.value)  # as ctypes passes it on without a look
        capacity = ctypes.c_int64()
        check(lib.tern_plan_get_row_capacity(self._handle, ctypes.byref(capacity)))
        self.row_capacity = capacity.value
        self._shape = Shape(self.layout, exchange.group.num_ranks, self.num_local_experts, max_tokens, num_topk)
        self._num_tokens = -1  # as C has routed them; -1: not yet
        self._next_tokens = (
            -1
        )  # as what is prepared now will meet them: of the last routing, or of one that is prepared
        self._num_rows = self.row_capacity  # of the outputs; extent EXACT: of the last routing
        # Structs that calls fill in anew: a plan is used by one thread at a time.
        self._routing, self._launch = _c.Routing(), _c.Launch()
        self._routing_pointer, self._launch_pointer = ctypes.pointer(self._routing), ctypes.byref(self._launch)
        self._dispatch_calls: dict[Any, DispatchCall] = {}
        self._combine_calls: dict[Any, CombineCall] = {}
        filled_in = self._launch, self._routing
        self._dispatches, self._combines = Repeats(RepeatedDispatch, *filled_in), Repeats(RepeatedCombine, *filled_in)

    # ---------------------------------------------------------------------------------------------------------- route

    def route(
        self,
        topk_idx: Array | None = None,
        *,
        token_in_rank: Array | None = None,
        tokens_per_expert: Array | None = None,
        device_num_tokens: Array | None = None,
        lane: int = 0,
        num_sms: int = 0,
        stream: Any = None,
    ) -> PlanInfo | None:
        """Exchanges counts; then every rank knows where each row goes. Collective.

        topk_idx: int64 or int32 [num_tokens, num_topk] global experts, -1: none. Or token_in_rank: bool or uint8 [num_tokens,
        num_ranks], with tokens_per_expert i32 [num_experts] if the counts of experts matter. device_num_tokens: i32 [1] on the GPU,
        the number of tokens at the time the operation runs, for graphs.
        Returns the counts with extent EXACT (on a GPU it waits for them, without the GIL); None with WORST: ask `info`.
        """
        if stream is not None and self._arrays.is_elsewhere(stream):
            return self._arrays.call_on_stream(Plan.route, locals())
        arrays, _inputs = self._set_routing(topk_idx, token_in_rank, tokens_per_expert, device_num_tokens)
        self._set_launch(arrays, lane, num_sms, stream)
        info = None if self.extent == _c.Extent.WORST else _c.PlanInfo()
        told = None if info is None else ctypes.byref(info)
        check(lib.tern_plan_route(self._handle, self._routing_pointer, self._launch_pointer, told))
        self._num_tokens = self._next_tokens = self._routing.num_tokens
        if info is None:
            return None
        self._num_rows = info.num_rows
        return self._told(info)

    def info(self) -> PlanInfo:
        """What the host knows of the last routing."""
        info = _c.PlanInfo()
        check(lib.tern_plan_get_info(self._handle, ctypes.byref(info)))
        return self._told(info)

    def _told(self, info: _c.PlanInfo) -> PlanInfo:
        return PlanInfo.of(info, self._shape.num_ranks, self.exchange.group.num_nodes, self.num_local_experts)

    def _set_routing(
        self, topk_idx: Any, token_in_rank: Any, tokens_per_expert: Any, device_num_tokens: Any
    ) -> tuple[Arrays, list[Array]]:
        """Returns the kind of arrays, and those that must live until the call."""
        routing = self._routing
        by_mask = token_in_rank is not None
        given = token_in_rank if by_mask else topk_idx
        if given is None:
            raise InvalidArgumentError("route: give topk_idx or token_in_rank")
        arrays = self._arrays.of(given)
        if by_mask:
            main, num_tokens = arrays.matrix(given, "token_in_rank", self._shape.num_ranks)
            if arrays.dtype_bytes(main.dtype) != 1:
                raise InvalidArgumentError(f"token_in_rank is {main.dtype}; it must be bool or uint8")
            routing.topk_idx, routing.token_in_rank = None, arrays.pointer(main)
        else:
            main, num_tokens = arrays.matrix(given, "topk_idx", self.num_topk)
            routing.topk_idx, routing.token_in_rank = arrays.pointer(main), None
            routing.topk_idx_type = arrays.index_type(main)
        routing.num_tokens = num_tokens
        inputs = [main]
        routing.tokens_per_expert = routing.device_num_tokens = None
        if tokens_per_expert is not None:
            inputs.append(arrays.int32_vector(tokens_per_expert, "tokens_per_expert", self.num_experts))
            routing.tokens_per_expert = arrays.pointer(inputs[-1])
        if device_num_tokens is not None:
            inputs.append(arrays.int32_vector(device_num_tokens, "device_num_tokens", 1))
            routing.device_num_tokens = arrays.pointer(inputs[-1])
        return arrays, inputs

    # ------------------------------------------------------------------------------------------------------- dispatch

    def dispatch(
        self,
        tokens: Array,
        *,
        topk_idx: Array | None = None,
        device_num_tokens: Array | None = None,
        scales: Array | None = None,
        topk_weights: Array | None = None,
        encoding: _c.Encoding | str = _c.Encoding.AS_GIVEN,
        scale_order: _c.ScaleOrder | str = _c.ScaleOrder.ROW_MAJOR,
        outputs: Sequence[str] | None = None,
        out: Dispatched | None = None,
        zero_copy: bool = False,
        wait_ns: Array | None = None,
        lane: int = 0,
        num_sms: int = 0,
        stream: Any = None,
    ) -> Dispatched:
        """Sends this rank's tokens to the ranks of their experts, and receives what the others send. Collective.

        tokens: [num_tokens, hidden] bf16, fp16, fp32, fp8, or any other type as bytes. A row is a multiple of 16 bytes. Dense rows that are
            apart are read where they are (on GPUs they begin at multiples of 16 bytes, others are refused); else tokens are copied.
        topk_idx: routes the plan in the same operation (extent WORST), with device_num_tokens as in `route`.
        scales: [num_tokens, any number], travel with the tokens; copied if a stride is 0 or negative, else read where they are.
        topk_weights: f32 [num_tokens, num_topk], given by all ranks or by none.
        encoding: "as_given", or a cast to fp8 on the way: "fp8_f32", "fp8_f32_pow2", "fp8_ue8m0" (scales come as int32, four
            exponents each).
        scale_order: "row_major", or "column_major": the scales that arrive lie in memory as [scales, rows].
        outputs: names of fields of Dispatched that are wanted besides tokens and scales; default: those that an expert needs.
        out: a Dispatched whose arrays are written to, instead of fresh ones: of the shapes, dtypes and strides that those would have.
            Fields that are None are not written.
        zero_copy: True where a rank has no rows while on all others out.tokens is window memory (CPU ranks).
        wait_ns: i64 [num_ranks], dense: nanoseconds waited for each rank are added to it; tern.h, tern_dispatch_args.

        CapacityExceededError (extent WORST, CPU ranks): rows that found no room are missing; error.result is the rest.
        """
        if stream is not None and self._arrays.is_elsewhere(stream):
            return self._arrays.call_on_stream(Plan.dispatch, locals())
        wanted = outputs if outputs is None else tuple(outputs)
        if topk_idx is None:
            routed, given = (self._num_tokens, self._num_rows), [tokens]
        else:
            routed, given = None, [tokens, topk_idx]
        no_scales, no_weights = scales is None, topk_weights is None
        if not (no_scales and no_weights):
            given += [array for array in (scales, topk_weights) if array is not None]
        choices = (no_scales, no_weights, out is None, routed, zero_copy, encoding, scale_order, wanted, lane, num_sms)
        repeats = device_num_tokens is None and wait_ns is None
        if repeats:
            for repeat in self._dispatches.kept:
                if repeat.choices == choices:
                    repeated = repeat.run(self, given, (tokens, topk_idx, scales, topk_weights), out, stream)
                    if repeated is not None:
                        return repeated
        call, result, inputs = self._prepare_dispatch(
            tokens,
            topk_idx,
            device_num_tokens,
            scales,
            topk_weights,
            encoding,
            scale_order,
            outputs,
            out,
            zero_copy,
            wait_ns,
        )
        self._set_launch(call.arrays, lane, num_sms, stream)
        status = tern_dispatch(self._pointer, call.pointer, self._launch_pointer)
        if topk_idx is not None and status in HAS_ROUTED:
            self._num_tokens = self._next_tokens = self._routing.num_tokens
        if status != 0:
            check(status, result)
        if repeats:
            self._dispatches.see(call, choices, given, inputs, out)
        return result

    def dispatch_send(
        self, tokens: Array, *, lane: int = 0, num_sms: int = 0, stream: Any = None, **arguments: Any
    ) -> Pending[Dispatched]:
        """The first phase of a dispatch with the same arguments: returns when the data are on their way. The plan is routed, or its
        extent is WORST. At most two sends of a lane may be under way, with nothing else of the lane between them."""
        if stream is not None and self._arrays.is_elsewhere(stream):
            return self._arrays.call_on_stream(Plan.dispatch_send, locals())
        call, result, inputs = self._prepare_dispatch(tokens, **arguments)
        self._set_launch(call.arrays, lane, num_sms, stream)
        return sent(self, tern_dispatch, call, result, inputs)

    def prepare_dispatch(
        self, tokens: Array, *, lane: int = 0, num_sms: int = 0, **arguments: Any
    ) -> Prepared[Dispatched]:
        """A dispatch with the same arguments, not run yet: to be called again and again for what the same arrays hold by then. With
        topk_idx, or along a routing as for prepare_combine. Outputs that are not given are made here, once. Arrays whose strides
        make the other methods copy them are refused."""
        call, result, inputs = self._prepare_dispatch(tokens, along=self._next_tokens, **arguments)
        self._set_launch(call.arrays, lane, num_sms, None)
        given = [tokens, *(arguments.get(name) for name in ("topk_idx", "device_num_tokens", "scales", "topk_weights"))]
        args, routing = call.args, self._routing
        used = (args.tokens, routing.topk_idx, routing.device_num_tokens, args.scales, args.topk_weights)
        refuse_copies(call.arrays, given, used)
        if args.routing:
            self._next_tokens = routing.num_tokens
        return prepared(self, tern_dispatch, call, result, inputs)

    def _prepare_dispatch(
        self,
        tokens: Any,
        topk_idx: Any = None,
        device_num_tokens: Any = None,
        scales: Any = None,
        topk_weights: Any = None,
        encoding: Any = _c.Encoding.AS_GIVEN,
        scale_order: Any = _c.ScaleOrder.ROW_MAJOR,
        outputs: Sequence[str] | None = None,
        out: Dispatched | None = None,
        zero_copy: bool = False,
        wait_ns: Array | None = None,
        along: int | None = None,
    ) -> tuple[DispatchCall, Dispatched, Any]:
        """along: the tokens of the routing that this is prepared for, unless it has topk_idx; None: those of the last one."""
        arrays = self._arrays.of(tokens)
        routed, inputs = self._num_tokens if along is None else along, []
        if topk_idx is not None:
            inputs = self._set_routing(topk_idx, None, None, device_num_tokens)[1]
            routed = self._routing.num_tokens
        tokens, (num_tokens, hidden), stride = arrays.rows(tokens, "tokens")
        if num_tokens != routed and routed >= 0:
            raise InvalidArgumentError(f"tokens has {num_tokens} rows, but {routed} were routed")
        scale_dtype, num_scales = None, 0
        if scales is not None:
            scales = arrays.strided(scales, "scales")
            if len(scales.shape) != 2 or scales.shape[0] != num_tokens:
                raise InvalidArgumentError(
                    f"scales has shape {list(scales.shape)}; it must be [{num_tokens}, any number]"
                )
            scale_dtype, num_scales = scales.dtype, scales.shape[1]
        wanted = None if outputs is None else tuple(outputs)
        carries, given = topk_weights is not None, out is not None
        key = (tokens.dtype, hidden, encoding, scale_order, scale_dtype, num_scales, carries, given, wanted)
        call = self._dispatch_calls.get(key)
        if call is None:
            chosen = key[:2] + (choice(_c.Encoding, encoding), choice(_c.ScaleOrder, scale_order)) + key[4:]
            call = self._dispatch_calls[key] = DispatchCall(arrays, self._shape, DispatchKind(*chosen))
        args = call.args
        args.routing = None if topk_idx is None else self._routing_pointer
        args.tokens = arrays.pointer(tokens)
        args.token_stride_bytes = stride * call.token_item
        args.zero_copy = zero_copy
        args.wait_ns = None if wait_ns is None else self._wait_ns(arrays, wait_ns)
        if scales is not None:
            args.scales = arrays.pointer(scales)
            item, strides = call.args.scale_element_bytes, arrays.strides(scales)
            args.scale_token_stride_bytes = strides[0] * item if scales.shape[0] > 1 else 0
            args.scale_element_stride_bytes = strides[1] * item if scales.shape[1] > 1 and scales.shape[0] > 0 else 0
        if topk_weights is not None:
            topk_weights = self._weights(arrays, topk_weights, num_tokens)
            args.topk_weights = arrays.pointer(topk_weights)
        if self._num_rows < 0:
            raise InvalidStateError("dispatch: the plan is not routed; route it first")
        if out is None:
            out = call.make_outputs(self._num_rows)
        else:
            call.use_outputs(out, self._num_rows)
        return call, out, (tokens, scales, topk_weights, wait_ns, *inputs)

    # -------------------------------------------------------------------------------------------------------- combine

    def combine(
        self,
        rows: Array,
        *,
        mode: _c.CombineMode | str = _c.CombineMode.HIERARCHICAL,
        weighting: _c.Weighting | str | None = None,
        topk_weights: Array | None = None,
        row_weights: Array | None = None,
        bias: Array | Sequence[Array] | None = None,
        out: Array | None = None,
        zero_copy: bool = False,
        wire: _c.Wire | str = _c.Wire.AS_DTYPE,
        wait_ns: Array | None = None,
        lane: int = 0,
        num_sms: int = 0,
        stream: Any = None,
    ) -> Combined:
        """Brings one result per token back to its owner: the sum of its rows, in FP32 and in a fixed order. Collective.

        rows: in the plan's layout, as dispatch's tokens came; bf16, fp16 or fp32.
        mode: "hierarchical" or "exact".
        weighting: "none", "dispatch" (the weights that the last dispatch carried) or "owner" (topk_weights, f32 [num_tokens,
            num_topk], given here; the default if they are). rank_major is a plain sum.
        row_weights: f32, shaped as dispatch's topk_weights came, go back to the owner: Combined.topk_weights.
        bias: one [num_tokens, hidden] or a pair of them, added first.
        out: a dense array [num_tokens, hidden] of rows' dtype to write to.
        zero_copy: True where a rank has no rows while on all others `rows` is window memory (CPU ranks).
        wire: "as_dtype"; "fp32": sums travel unrounded; or "log10bit": rows travel as 10-bit logarithms, two thirds of
            bf16, with an error of at most 1.6 %, 0.4 % as a rule.
        wait_ns: i64 [num_ranks], dense: nanoseconds waited for each rank are added to it.
        """
        if stream is not None and self._arrays.is_elsewhere(stream):
            return self._arrays.call_on_stream(Plan.combine, locals())
        weighted, num_tokens, num_rows = topk_weights is not None, self._num_tokens, self._num_rows
        choices = (weighted, out is None, zero_copy, mode, weighting, wire, lane, num_sms, num_tokens, num_rows)
        given = [rows, topk_weights] if weighted else [rows]
        if out is not None:
            given.append(out)
        repeats = row_weights is None and bias is None and wait_ns is None
        if repeats:
            for repeat in self._combines.kept:
                if repeat.choices == choices and repeat.alike(*given):
                    return repeat.run(self, (rows, topk_weights, out), stream)
        call, result, inputs = self._prepare_combine(
            rows, mode, weighting, topk_weights, row_weights, bias, out, zero_copy, wire, wait_ns
        )
        self._set_launch(call.arrays, lane, num_sms, stream)
        status = tern_combine(self._pointer, call.pointer, self._launch_pointer)
        if status != 0:
            check(status)
        if repeats:
            self._combines.see(call, choices, given, (*inputs, out))
        return result

    def combine_send(
        self, rows: Array, *, lane: int = 0, num_sms: int = 0, stream: Any = None, **arguments: Any
    ) -> Pending[Combined]:
        """The first phase of a combine with the same arguments: returns when the data are on their way."""
        if stream is not None and self._arrays.is_elsewhere(stream):
            return self._arrays.call_on_stream(Plan.combine_send, locals())
        call, result, inputs = self._prepare_combine(rows, **arguments)
        self._set_launch(call.arrays, lane, num_sms, stream)
        return sent(self, tern_combine, call, result, inputs)

    def prepare_combine(self, rows: Array, *, lane: int = 0, num_sms: int = 0, **arguments: Any) -> Prepared[Combined]:
        """A combine with the same arguments, not run yet, as prepare_dispatch: along a routing of as many tokens and rows as the last one had,
        or as a dispatch that was prepared behind it will have."""
        call, result, inputs = self._prepare_combine(rows, along=self._next_tokens, **arguments)
        self._set_launch(call.arrays, lane, num_sms, None)
        bias, args = arguments.get("bias"), call.args
        given = [rows, arguments.get("topk_weights"), arguments.get("row_weights")]
        given += bias if isinstance(bias, (tuple, list)) else [bias]
        refuse_copies(call.arrays, given, (args.rows, args.topk_weights, args.row_weights, *args.bias))
        return prepared(self, tern_combine, call, result, inputs)

    def _prepare_combine(
        self,
        rows: Any,
        mode: Any = _c.CombineMode.HIERARCHICAL,
        weighting: Any = None,
        topk_weights: Any = None,
        row_weights: Any = None,
        bias: Any = None,
        out: Array | None = None,
        zero_copy: bool = False,
        wire: Any = _c.Wire.AS_DTYPE,
        wait_ns: Array | None = None,
        along: int | None = None,
    ) -> tuple[CombineCall, Combined, Any]:
        num_tokens = self._num_tokens if along is None else along
        if num_tokens < 0 or self._num_rows < 0:
            raise InvalidStateError("combine: the plan is not routed; route it, or give the dispatch topk_idx")
        arrays = self._arrays.of(rows)
        pointer = arrays.pointer
        rows = arrays.dense(arrays.adopt(rows, "rows"))
        shape, dtype = rows.shape, rows.dtype
        hidden = shape[-1]
        if weighting is None:
            weighting = _c.Weighting.NONE if topk_weights is None else _c.Weighting.OWNER
        key = (dtype, hidden, mode, weighting, wire, row_weights is not None)
        call = self._combine_calls.get(key)
        if call is None:
            choices = choice(_c.CombineMode, mode), choice(_c.Weighting, weighting), choice(_c.Wire, wire)
            kind = CombineKind(*key[:2], *choices, key[5])
            call = self._combine_calls[key] = CombineCall(arrays, self._shape, kind)
        call.check_rows(shape, self._num_rows)
        args = call.args
        args.rows, args.zero_copy = pointer(rows), zero_copy
        args.wait_ns = None if wait_ns is None else self._wait_ns(arrays, wait_ns)
        weights_at = row_weights_at = handed_back_at = 0
        biases_at = (0, 0)
        if topk_weights is not None:
            topk_weights = self._weights(arrays, topk_weights, num_tokens)
            weights_at = pointer(topk_weights)
        if bias is not None:
            bias = call.biases(bias, (num_tokens, hidden))
            biases_at = (*map(pointer, bias), 0, 0)[:2]
        handed_back = None
        if row_weights is not None:
            row_weights = call.row_weights(row_weights, self._num_rows)
            handed_back = arrays.empty((num_tokens, self.num_topk), arrays.float32)
            row_weights_at, handed_back_at = pointer(row_weights), pointer(handed_back)
        out = call.make_result(num_tokens) if out is None else call.use_result(out, num_tokens)
        call.set_addresses((weights_at, row_weights_at, *biases_at, pointer(out), handed_back_at))
        return call, Combined(out, handed_back), (rows, topk_weights, row_weights, bias, wait_ns)

    # --------------------------------------------------------------------------------------------------------- common

    def _weights(self, arrays: Arrays, given: Any, num_tokens: int) -> Array:
        weights, num_weighted = arrays.matrix(given, "topk_weights", self.num_topk)
        if weights.dtype != arrays.float32 or num_weighted != num_tokens:
            raise InvalidArgumentError(
                f"topk_weights is {weights.dtype} of shape {list(weights.shape)}; "
                f"it must be float32 of {[num_tokens, self.num_topk]}"
            )
        return weights

    def _wait_ns(self, arrays: Arrays, given: Any) -> int:
        """The address of the caller's own array, which is added to."""
        adopted = arrays.adopt(given, "wait_ns")
        if (
            adopted.dtype != arrays.int64
            or tuple(adopted.shape) != (self._shape.num_ranks,)
            or not arrays.is_dense(adopted)
        ):
            raise InvalidArgumentError(
                f"wait_ns is {adopted.dtype} of shape {list(adopted.shape)}; it must be dense, int64 of "
                f"[{self._shape.num_ranks}]"
            )
        address: int = arrays.pointer(adopted)
        return address

    def _set_launch(self, arrays: Arrays, lane: int, num_sms: int, stream: Any) -> None:
        launch = self._launch
        launch.stream = arrays.current_stream() if stream is None else raw_stream(stream)
        launch.lane, launch.num_sms = lane, num_sms

    def _structs(self, call: DispatchCall | CombineCall, phase: _c.Phase = _c.Phase.WHOLE) -> Structs:
        return Structs(call.args, self._launch, self._routing, phase)
