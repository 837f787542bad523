# SPDX-License-Identifier: Apache-2.0
"""Low-latency operations that come again: a call that looks like one before takes a short way.

A repeat is what the long way (low_latency.py) has found out about a kind of call: the choices, what its tensors look like, how outputs are
made, and for each lane the plans and the C calls. A further call compares all choices and tensors, makes its outputs, sets addresses, and is
in C. Nothing is taken on trust: a tensor's memory and shape can change without its identity. Any difference leads to the long way, which has
all checks; so do masks, async_finish, statistics, and what is captured in a graph. No tensor is kept alive.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Optional, Union

import tern
import torch
from tern import addressed
from tern.errors import check
from tern.exchange import Exchange

from .arguments import Arrived, Cast, Finish
from .events import EventOverlap
from .handles import LowLatencyHandle, PlanLease, PlanShelf, Tables, new_low_latency_handle

if TYPE_CHECKING:
    from .low_latency import LowLatencyMode

NUM_KEPT = 4  # dispatches, and combines behind each of them


class DispatchChoices(NamedTuple):
    """All that a dispatch is given besides its tensors."""

    num_max_tokens: int
    num_experts: int
    use_fp8: bool
    round_scale: bool
    use_ue8m0: bool
    async_finish: bool
    return_recv_hook: bool
    has_stats: bool


class CombineChoices(NamedTuple):
    use_logfmt: bool
    zero_copy: bool
    async_finish: bool
    return_recv_hook: bool
    has_out: bool
    has_stats: bool


class DispatchCalls(NamedTuple):
    """Of one lane."""

    shelf: PlanShelf
    first: addressed.AddressedDispatch  # the whole operation, or what sends
    second: Optional[addressed.AddressedDispatch] = None  # what receives, in the hook


class CombineCalls(NamedTuple):
    """Of one lane."""

    first: addressed.AddressedCombine
    second: Optional[addressed.AddressedCombine] = None


class DispatchRepeat:
    def __init__(
        self,
        choices: DispatchChoices,
        exchange: Exchange,
        tensors: tuple[torch.Tensor, ...],
        arrived: Arrived,
        calls: list[DispatchCalls],
    ) -> None:
        """tensors: x, topk_idx."""
        handle, counts = arrived.handle, arrived.expert_counts
        rows, scales = arrived.rows if choices.use_fp8 else (arrived.rows, None)
        self.choices, self.exchange, self.shape = choices, exchange, handle.shape
        self.alike = addressed.alike(exchange, tensors)
        self.tables = Tables(counts.shape[0], handle.layout_ranges.shape[1], handle.shape.num_max_tokens)
        self.combines: tuple[CombineRepeat, ...] = ()
        memory = addressed.ArrayKind((self.tables.num_bytes,), torch.uint8)
        kinds = [_kind(rows), None if scales is None else _kind(scales, transposed=True), _kind(counts), memory]
        self._make = addressed.maker(exchange, kinds)
        self._calls, self._sources_begin = calls, self.tables.sources_begin

    def run(self, mode: LowLatencyMode, x: torch.Tensor, topk_idx: torch.Tensor) -> tuple[Any, ...]:
        """The fields of Arrived. Of tensors that are alike, outside of captures."""
        lane = mode.next_bank()  # each bank has a lane of its own
        shelf, first, second = self._calls[lane]
        with mode.lane_locks[lane]:
            stream = mode.streams.enter(lane)
            lease = mode.plans.lease_from(shelf)
            tokens, scales, counts, memory = made = self._make()
            ranges_at = memory.data_ptr()
            inputs = (x.data_ptr(), topk_idx.data_ptr(), 0, 0)
            scales_at = 0 if scales is None else scales.data_ptr()
            sources_at, counts_at = ranges_at + self._sources_begin, counts.data_ptr()
            outputs = (tokens.data_ptr(), scales_at, 0, 0, sources_at, 0, 0, 0, counts_at, 0, ranges_at)
            status = first.run(lease.plan, inputs, outputs, stream)
            if status != 0:
                check(status)
        hook = None
        if second is not None:
            kept = x, topk_idx, made
            hook = mode.hook(lane, partial(_receive, mode.streams, second, lease, (inputs, outputs), kept))
        handle = new_low_latency_handle()
        handle.lease, handle.lane, handle.bank, handle.shape = lease, lane, lane, self.shape
        handle.repeat, handle.memory = self, memory
        return tokens if scales is None else (tokens, scales), counts, handle, EventOverlap(), hook


class CombineRepeat:
    def __init__(
        self,
        choices: CombineChoices,
        exchange: Exchange,
        tensors: tuple[torch.Tensor, ...],
        combined: torch.Tensor,
        calls: list[CombineCalls],
        rows_per_token: int,
    ) -> None:
        """tensors: x, topk_idx, topk_weights, and out if it is given."""
        self.choices, self.rows_per_token = choices, rows_per_token
        self.alike = addressed.alike(exchange, tensors)
        self._make, self._calls = addressed.maker(exchange, [_kind(combined)]), calls

    def run(
        self, mode: LowLatencyMode, tensors: tuple[torch.Tensor, ...], handle: LowLatencyHandle
    ) -> Optional[tuple[Any, ...]]:
        """The fields of Combined. Of tensors that are alike, outside of captures. None: rows are where only zero_copy may read them."""
        rows_at, weights_at = tensors[0].data_ptr(), tensors[2].data_ptr()
        if self.choices.zero_copy:
            rows_at = mode.zero_copy_begins[handle.bank]
        elif mode.zero_copy_begin <= rows_at < mode.zero_copy_end:
            return None
        lane, lease = handle.lane, handle.lease
        first, second = self._calls[lane]
        with mode.lane_locks[lane]:
            stream = mode.streams.enter(lane)
            out = tensors[3] if len(tensors) == 4 else self._make()[0]
            addresses = (rows_at, weights_at, out.data_ptr())
            status = first.run(lease.plan, addresses, stream)
            if status != 0:
                check(status)
        hook = None
        if second is not None:
            kept = tensors, out
            hook = mode.hook(lane, partial(_receive, mode.streams, second, lease, (addresses,), kept))
        return out, EventOverlap(), hook


def _receive(streams: Any, half: Any, lease: PlanLease, addresses: tuple[Any, ...], tensors: Any) -> None:
    """The second half of an operation. tensors: stay alive until then."""
    check(half.run(lease.plan, *addresses, streams.current_handle()))


class Repeats:
    """The last dispatches of a buffer. One is made when a call comes a second time: it takes as long to make as a call."""

    def __init__(self) -> None:
        # Tuples that are replaced as a whole: two threads may be here.
        self.dispatches: tuple[DispatchRepeat, ...] = ()
        self._seen: tuple[Any, ...] = ()

    def see_dispatch(
        self, mode: LowLatencyMode, choices: DispatchChoices, x: torch.Tensor, topk_idx: torch.Tensor, arrived: Arrived
    ) -> None:
        """A dispatch that the long way has done, and that a repeat may do unless it copies a tensor."""
        if x.stride(1) != 1 or x.stride(0) < x.shape[1] or not topk_idx.is_contiguous():
            return
        seen = (choices, _look(x), _look(topk_idx))
        if seen not in self._seen:
            self._seen = (seen, *self._seen[: NUM_KEPT - 1])
            return
        self._seen = tuple(one for one in self._seen if one != seen)
        repeat = _dispatch_repeat(mode, choices, x, topk_idx, arrived)
        self.dispatches = (repeat, *self.dispatches[: NUM_KEPT - 1])


def _dispatch_repeat(
    mode: LowLatencyMode, choices: DispatchChoices, x: torch.Tensor, topk_idx: torch.Tensor, arrived: Arrived
) -> DispatchRepeat:
    handle = arrived.handle
    plan, shape = handle.lease.plan, handle.shape
    rows, scales = arrived.rows if choices.use_fp8 else (arrived.rows, None)
    out = tern.Dispatched(
        rows,
        scales,
        source_token=handle.source_tokens,
        expert_counts=arrived.expert_counts,
        expert_rank_ranges=handle.layout_ranges,
    )
    encoding = Cast(choices.use_fp8, choices.round_scale, choices.use_ue8m0).encoding
    calls = []
    for lane in range(len(mode.lane_locks)):
        arguments = mode.dispatch_arguments(lane, shape, topk_idx, encoding)
        phases = _phases(choices)
        halves = [addressed.addressed_dispatch(plan, x, out=out, phase=phase, **arguments) for phase in phases]
        calls.append(DispatchCalls(mode.shelf(lane, shape, plan.num_topk), *halves))
    return DispatchRepeat(choices, mode.exchange, (x, topk_idx), arrived, calls)


def see_combine(
    mode: LowLatencyMode,
    choices: CombineChoices,
    tensors: tuple[torch.Tensor, ...],
    handle: LowLatencyHandle,
    combined: torch.Tensor,
) -> None:
    """A combine that the long way has done, and that a repeat may do unless it copies a tensor; behind a dispatch by a repeat. tensors: as
    CombineRepeat's."""
    dispatch: DispatchRepeat = handle.repeat
    rows = mode.next_combine_buffer(handle) if choices.zero_copy else tensors[0]
    if not (rows.is_contiguous() and tensors[2].is_contiguous() and combined.is_contiguous()):
        return
    if any(repeat.choices == choices and repeat.alike(*tensors) for repeat in dispatch.combines):
        return  # it was not the repeat's to do
    finish = Finish(choices.async_finish, choices.return_recv_hook)
    arguments = mode.combine_arguments(handle, tensors[2], finish, choices.use_logfmt)
    arguments["out"] = combined
    if not choices.return_recv_hook:
        arguments["zero_copy"] = choices.zero_copy
    calls = []
    for lane in range(len(mode.lane_locks)):
        arguments["lane"] = lane
        phases, plan = _phases(choices), handle.lease.plan
        halves = [addressed.addressed_combine(plan, rows, phase=phase, **arguments) for phase in phases]
        calls.append(CombineCalls(*halves))
    rows_per_token = plan.num_topk if arguments["mode"] == "exact" else 1
    repeat = CombineRepeat(choices, mode.exchange, tensors, combined, calls, rows_per_token)
    dispatch.combines = (repeat, *dispatch.combines[: NUM_KEPT - 1])


def _phases(choices: Union[DispatchChoices, CombineChoices]) -> tuple[tern.Phase, ...]:
    return (tern.Phase.SEND, tern.Phase.RECEIVE) if choices.return_recv_hook else (tern.Phase.WHOLE,)


def _look(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype


def _kind(tensor: torch.Tensor, transposed: bool = False) -> addressed.ArrayKind:
    return addressed.ArrayKind(tuple(tensor.shape), tensor.dtype, transposed)
