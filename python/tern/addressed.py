# SPDX-License-Identifier: Apache-2.0
"""Operations by address: C calls of which everything is there but the addresses of the arrays.

    dispatch = addressed_dispatch(plan, tokens, topk_idx=topk_idx, out=arrived, lane=1)  # looks at the call; runs nothing
    status = dispatch.run(plan, inputs, outputs, stream)                                 # that of the C function: errors.check

For those who look at arrays themselves: _repeats.py, and modules on top of Tern. Nothing is checked: what is at other addresses has the
shapes, strides and dtypes of the arrays that the operation was made of. It runs along any plan of the same options, is used by one thread
at a time, and keeps no array alive.
"""

from __future__ import annotations

import ctypes
import functools
from typing import TYPE_CHECKING, Any, Callable, Sequence

from . import _c
from ._arrays import Array
from ._arrays import ArrayKind as ArrayKind
from ._calls import OUT_ADDRESSES, OUT_OFFSET
from ._library import tern_combine, tern_dispatch
from ._prepared import refuse_copies
from .errors import HAS_ROUTED

if TYPE_CHECKING:
    from .exchange import Exchange
    from .plan import Plan


# Positions of fields among the words of their structs: setting one so takes a third of the time.
_TOKENS, _SCALES = _c.DispatchArgs.tokens.offset // 8, _c.DispatchArgs.scales.offset // 8
_DISPATCHED_WEIGHTS, _TOPK_IDX = _c.DispatchArgs.topk_weights.offset // 8, _c.Routing.topk_idx.offset // 8
_ROWS, _OUT = _c.CombineArgs.rows.offset // 8, _c.CombineArgs.out_tokens.offset // 8
_COMBINED_WEIGHTS = _c.CombineArgs.topk_weights.offset // 8


def words(struct: Any) -> memoryview:
    """Its memory as 64-bit numbers."""
    return memoryview(struct).cast("B").cast("Q")


class Structs:
    """Copies of what describes an operation: those of its plan are filled in anew by whatever the plan is used for next."""

    def __init__(self, args: Any, launch: _c.Launch, routing: _c.Routing, phase: _c.Phase = _c.Phase.WHOLE) -> None:
        self.args, self.launch = type(args).from_buffer_copy(args), _c.Launch.from_buffer_copy(launch)
        self.launch.phase = phase
        self.routes = isinstance(args, _c.DispatchArgs) and bool(args.routing)
        self.routing = _c.Routing.from_buffer_copy(routing)
        if self.routes:
            self.args.routing = ctypes.pointer(self.routing)
        # As ctypes passes them on without a look.
        self.pointers = ctypes.byref(self.args), ctypes.byref(self.launch)


class AddressedDispatch:
    def __init__(self, structs: Structs) -> None:
        self._launch, self._stream = structs.launch, structs.launch.stream or 0
        self._args_pointer, self._launch_pointer = structs.pointers
        self._routes = structs.routes and structs.launch.phase != _c.Phase.RECEIVE
        self._num_tokens = structs.routing.num_tokens
        self._args, self._routing = words(structs.args), words(structs.routing)
        self._set_outputs = functools.partial(OUT_ADDRESSES.pack_into, structs.args, OUT_OFFSET)
        self._inputs: Any = None  # addresses that are set
        self._outputs: Any = None

    def run(self, plan: Plan, inputs: tuple[int, int, int, int], outputs: tuple[int, ...], stream: int) -> int:
        """inputs: tokens, topk_idx, scales, topk_weights. outputs: in the order of Dispatched's fields. 0: there is none."""
        if inputs != self._inputs:
            self._inputs, args = inputs, self._args
            args[_TOKENS], self._routing[_TOPK_IDX], args[_SCALES], args[_DISPATCHED_WEIGHTS] = inputs
        if outputs != self._outputs:
            self._outputs = outputs
            self._set_outputs(*outputs)
        if stream != self._stream:
            self._launch.stream = self._stream = stream
        status: int = tern_dispatch(plan._pointer, self._args_pointer, self._launch_pointer)
        if self._routes and status in HAS_ROUTED:
            plan._num_tokens = plan._next_tokens = self._num_tokens
        return status


class AddressedCombine:
    def __init__(self, structs: Structs) -> None:
        self._launch, self._stream = structs.launch, structs.launch.stream or 0
        self._args_pointer, self._launch_pointer = structs.pointers
        self._args = words(structs.args)
        self._addresses: Any = None  # that are set

    def run(self, plan: Plan, addresses: tuple[int, int, int], stream: int) -> int:
        """addresses: rows, topk_weights, out; 0: there is none."""
        if addresses != self._addresses:
            self._addresses, args = addresses, self._args
            args[_ROWS], args[_COMBINED_WEIGHTS], args[_OUT] = addresses
        if stream != self._stream:
            self._launch.stream = self._stream = stream
        status: int = tern_combine(plan._pointer, self._args_pointer, self._launch_pointer)
        return status


def addressed_dispatch(
    plan: Plan, tokens: Array, *, phase: _c.Phase = _c.Phase.WHOLE, lane: int = 0, num_sms: int = 0, **arguments: Any
) -> AddressedDispatch:
    """Of the arguments of Plan.dispatch. Arrays whose strides make that copy them are refused."""
    call, _, _ = plan._prepare_dispatch(tokens, along=plan._next_tokens, **arguments)
    given = [tokens, *(arguments.get(name) for name in ("topk_idx", "scales", "topk_weights"))]
    args = call.args
    refuse_copies(call.arrays, given, (args.tokens, plan._routing.topk_idx, args.scales, args.topk_weights))
    plan._set_launch(call.arrays, lane, num_sms, None)
    if args.routing:
        plan._next_tokens = plan._routing.num_tokens
    return AddressedDispatch(plan._structs(call, phase))


def addressed_combine(
    plan: Plan, rows: Array, *, phase: _c.Phase = _c.Phase.WHOLE, lane: int = 0, num_sms: int = 0, **arguments: Any
) -> AddressedCombine:
    """Of the arguments of Plan.combine. Arrays whose strides make that copy them are refused."""
    call, _, _ = plan._prepare_combine(rows, along=plan._next_tokens, **arguments)
    refuse_copies(call.arrays, [rows, arguments.get("topk_weights")], (call.args.rows, call.args.topk_weights))
    plan._set_launch(call.arrays, lane, num_sms, None)
    return AddressedCombine(plan._structs(call, phase))


def alike(exchange: Exchange, tensors: Sequence[Array]) -> Callable[..., bool]:
    """Tells of other torch tensors whether they are like these: shapes, strides, dtypes and devices. It keeps none of them."""
    check: Callable[..., bool] = exchange._arrays.torch().alike(tensors)
    return check


def maker(exchange: Exchange, kinds: Sequence[ArrayKind | None]) -> Callable[[], list[Array]]:
    """Makes a torch tensor of each kind, and None for None, on the exchange's device and the current stream."""
    make: Callable[[], list[Array]] = exchange._arrays.torch().patterns(kinds)
    return make
