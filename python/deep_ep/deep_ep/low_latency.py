# SPDX-License-Identifier: Apache-2.0
"""Low-latency mode: rows by local expert, as masked GEMMs want them; counts stay on the device; the two halves of an
operation apart.

Results take turns on two lanes, so that two may be alive at a time, also in two threads: the n-th dispatch of every
    rank belongs together.
"""

from __future__ import annotations

import functools
import itertools
import os
import threading
from typing import Any, Callable, NamedTuple, Optional, Set

import tern
import torch
from tern.exchange import Exchange

from . import sizes
from .arguments import Arrived, Cast, Combined, Finish, Hook, Stats, check_batch, check_vector
from .events import EventOverlap
from .handles import LowLatencyHandle, PlanPool, PlanShelf, Shape, new_low_latency_handle, plan_of
from .layout import check_topk_idx
from .nodes import Nodes
from .repeats import CombineChoices, DispatchChoices, Repeats, see_combine
from .shrink import moved_rows, persistently
from .streams import Order

# "hierarchical", "exact", or "auto": exact with a hook where it fits the buffer, else hierarchical.
COMBINE_VARIABLE = "TERN_DEEP_EP_COMBINE"
_NUM_BANKS = 2
_LEAST_HIDDEN = 8  # of bf16 rows


class _Done(NamedTuple):
    """Pending in form only."""

    result: tern.Combined

    def receive(self) -> tern.Combined:
        return self.result


class _SecondHalf:
    """Of an operation whose first half has been sent: done by its hook, or earlier."""

    __slots__ = ("_receive", "is_asked_for")

    def __init__(self, receive: Callable[[], None]) -> None:
        self._receive: Optional[Callable[[], None]] = receive
        self.is_asked_for = False

    def finish(self) -> None:
        receive, self._receive = self._receive, None  # what it refers to may go then
        if receive is not None:
            receive()


class LowLatencyMode:
    """An exchange, plans, and the two zero-copy buffers. Making it is collective."""

    def __init__(
        self, group: tern.Group, streams: Any, device: torch.device, num_bytes: int, timeout_ms: int, *, masks: bool
    ) -> None:
        self._group, self.streams, self._num_bytes, self._masks = group, streams, num_bytes, masks
        self._masks_on_gpu = masks and device.type == "cuda"
        # On one lane a combine finds no room for its weights beside two halves, but on GPUs of one node, where they go with the rows.
        self._open_halves: Optional[list[_SecondHalf]] = (
            [] if masks and not (self._masks_on_gpu and group.num_nodes == 1) else None
        )
        self._nodes = Nodes.of_group(group)
        self._asked_mode = _asked_combine_mode()
        num_lanes = 1 if masks else _NUM_BANKS  # one lane alone goes on without a rank
        least = sizes.least_bytes(group.num_ranks, _NUM_BANKS)
        if num_bytes < least:
            raise tern.OutOfMemoryError(
                f"Buffer: num_rdma_bytes is {num_bytes}; low-latency mode of {group.num_ranks} ranks needs at least "
                f"{least}, and for a given shape what Buffer.get_low_latency_rdma_size_hint says"
            )
        self._shares = sizes.Shares.of_low_latency(num_bytes, self._nodes, num_lanes)
        on_timeout = "mask" if masks else "abort"
        self.exchange = Exchange(
            group,
            device=device,
            timeout_ms=timeout_ms,
            on_timeout=on_timeout,
            mode="latency" if device.type == "cuda" else "auto",
            **self._shares.exchange_options(),
        )
        self.plans = PlanPool(self.exchange)
        bank_bytes = self._shares.window_bytes // _NUM_BANKS
        self._fitting: Set[Shape] = set()
        self._sms_of_lane = streams.num_sms // num_lanes
        self._zero_copy = [self.exchange.empty((bank_bytes,), torch.uint8) for _ in range(_NUM_BANKS)]
        self.zero_copy_begins = [bank.data_ptr() for bank in self._zero_copy]
        self.zero_copy_begin = min(self.zero_copy_begins)
        self.zero_copy_end = max(self.zero_copy_begins) + bank_bytes
        self.lane_locks = [threading.Lock() for _ in range(num_lanes)]
        self._turn_lock = threading.Lock()
        self._turns = itertools.count()
        self._repeats = Repeats()
        self._to_mask: Set[int] = set()
        self._lets_in = False  # with the next dispatch
        self._is_masked_out = False

    def dispatch_again(
        self, choices: tuple[Any, ...], x: torch.Tensor, topk_idx: torch.Tensor
    ) -> Optional[tuple[Any, ...]]:
        """A dispatch that looks like one before, by the short way: the fields of Arrived. None: it takes the long one. choices: the fields of
        DispatchChoices."""
        for repeat in self._repeats.dispatches:
            if repeat.choices == choices and repeat.alike(x, topk_idx):
                if self.streams.is_capturing():
                    return None
                try:
                    return repeat.run(self, x, topk_idx)
                except tern.Error as error:
                    self.explain(error, ("low_latency_dispatch", repeat.shape, 1))
                    raise
        return None

    def see_dispatch(self, choices: tuple[Any, ...], x: torch.Tensor, topk_idx: torch.Tensor, arrived: Arrived) -> None:
        """A dispatch that the long way has done: the next one may be like it."""
        chosen = DispatchChoices(*choices)
        if not (self._masks or chosen.async_finish or chosen.has_stats or self.streams.is_capturing()):
            self._repeats.see_dispatch(self, chosen, x, topk_idx, arrived)

    def dispatch(
        self, x: torch.Tensor, topk_idx: torch.Tensor, shape: Shape, cast: Cast, finish: Finish, stats: Stats
    ) -> Arrived:
        finish.check()
        encoding = cast.encoding
        check_batch(x, topk_idx, shape)
        stats.check(shape.num_experts, self._group.num_ranks)
        self._check_fits(shape)
        bank = self._take_turn()
        lane = bank % len(self.lane_locks)

        def add_stats(arrived: Any) -> Any:
            if stats.received is not None:
                stats.received.add_(arrived.expert_counts)
            return arrived

        with self._one_operation("low_latency_dispatch", lane, shape):
            shelf = self.shelf(lane, shape, topk_idx.shape[1], captured=self.streams.is_capturing())
            lease = self.plans.lease_from(shelf)
            plan, arguments = lease.plan, self.dispatch_arguments(lane, shape, topk_idx, encoding)
            arguments["wait_ns"] = stats.waited
            if finish.return_recv_hook:
                self.streams.follow(lane)
                pending = plan.dispatch_send(x, **arguments)
                arrived: Any = pending.result
                event = EventOverlap()

                def receive() -> None:
                    again = functools.partial(lease.plan.dispatch, x, out=arrived, **arguments)
                    add_stats(self._persistently(pending.receive, again))

                hook = self.hook(lane, receive)
            else:
                inputs = (x, topk_idx, stats.received)
                arrived, event = self._whole(lane, finish, lambda: add_stats(plan.dispatch(x, **arguments)), inputs)
                hook = None
        handle = new_low_latency_handle()
        handle.lease, handle.lane, handle.bank, handle.shape = lease, lane, bank, shape
        handle.source_tokens, handle.layout_ranges = arrived.source_token, arrived.expert_rank_ranges
        rows = (arrived.tokens, arrived.scales) if cast.use_fp8 else arrived.tokens
        return Arrived(rows, arrived.expert_counts, handle, event, hook)

    def dispatch_arguments(self, lane: int, shape: Shape, topk_idx: torch.Tensor, encoding: str) -> dict[str, Any]:
        return {
            "topk_idx": topk_idx,
            "encoding": encoding,
            "scale_order": "column_major",
            "outputs": ("source_token", "expert_counts", "expert_rank_ranges"),
            "lane": lane,
            "num_sms": self._num_sms(shape),
        }

    def combine_again(
        self, choices: tuple[Any, ...], tensors: tuple[torch.Tensor, ...], handle: LowLatencyHandle
    ) -> Optional[tuple[Any, ...]]:
        """As dispatch_again. choices: the fields of CombineChoices; tensors: x, topk_idx, topk_weights, and out if it is given."""
        dispatch = getattr(handle, "repeat", None)
        if dispatch is None or dispatch.exchange is not self.exchange:
            return None
        for repeat in dispatch.combines:
            if repeat.choices == choices and repeat.alike(*tensors):
                if self.streams.is_capturing():
                    return None
                try:
                    combined: Optional[tuple[Any, ...]] = repeat.run(self, tensors, handle)
                    return combined
                except tern.Error as error:
                    self.explain(error, ("low_latency_combine", handle.shape, repeat.rows_per_token))
                    raise
        return None

    def see_combine(
        self,
        choices: tuple[Any, ...],
        tensors: tuple[torch.Tensor, ...],
        handle: LowLatencyHandle,
        combined: Combined,
    ) -> None:
        """A combine that the long way has done."""
        chosen, dispatch = CombineChoices(*choices), handle.repeat
        if dispatch is None or dispatch.exchange is not self.exchange:
            return
        if not (chosen.async_finish or chosen.has_stats or self.streams.is_capturing()):
            see_combine(self, chosen, tensors, handle, combined.tokens)

    def combine(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        handle: LowLatencyHandle,
        finish: Finish,
        *,
        zero_copy: bool,
        use_logfmt: bool,
        out: Optional[torch.Tensor],
        wait_stats: Optional[torch.Tensor],
    ) -> Combined:
        finish.check()
        plan, lane, shape = plan_of(handle), handle.lane, handle.shape
        check_topk_idx(topk_idx)
        if topk_idx.shape != topk_weights.shape or topk_idx.shape[1] != plan.num_topk:
            raise tern.InvalidArgumentError(
                f"low_latency_combine: topk_idx has shape {list(topk_idx.shape)}, topk_weights "
                f"{list(topk_weights.shape)}; "
                f"they must be those of the dispatch, [num_tokens, {plan.num_topk}]"
            )
        check_vector("combine_wait_recv_cost_stats", wait_stats, torch.int64, self._group.num_ranks)
        rows = self._expert_rows(x, handle, zero_copy)
        arguments = self.combine_arguments(handle, topk_weights, finish, use_logfmt)
        arguments["wait_ns"] = wait_stats
        arguments["out"] = out if out is None or out.is_contiguous() else None
        rows_per_token = plan.num_topk if arguments["mode"] == "exact" else 1

        def hand_out(combined: Any, given: Optional[torch.Tensor] = out) -> torch.Tensor:
            tokens: torch.Tensor = combined.tokens
            return tokens if given is None or given is tokens else given.copy_(tokens)

        def again() -> tern.Combined:
            return self._combine_anew(rows, topk_idx, handle, arguments)

        with self._one_operation("low_latency_combine", lane, shape, rows_per_token):
            self._finish_open_halves()
            if finish.return_recv_hook:
                self.streams.follow(lane)
                pending = self._send_combine(lambda: plan.combine_send(rows, **arguments), again)
                given = pending.result.tokens if out is None else out

                def receive() -> None:
                    hand_out(self._persistently(pending.receive, again), given)

                return Combined(given, EventOverlap(), self.hook(lane, receive))

            def first() -> tern.Combined:
                return plan.combine(rows, zero_copy=zero_copy, **arguments)

            inputs = (rows, topk_weights)
            result, event = self._whole(lane, finish, lambda: hand_out(self._persistently(first, again)), inputs)
            return Combined(result, event, None)

    def combine_arguments(
        self, handle: LowLatencyHandle, topk_weights: torch.Tensor, finish: Finish, use_logfmt: bool
    ) -> dict[str, Any]:
        return {
            "topk_weights": topk_weights,
            "mode": self._combine_mode(handle.shape, plan_of(handle).num_topk, finish),
            "wire": "log10bit" if use_logfmt else "as_dtype",
            "lane": handle.lane,
            "num_sms": self._num_sms(handle.shape),
        }

    def next_combine_buffer(self, handle: LowLatencyHandle) -> torch.Tensor:
        plan_of(handle)
        shape = self._rows_shape(handle)
        num_bytes = 2 * shape[0] * shape[1] * shape[2]
        bank: torch.Tensor = self._zero_copy[handle.bank]
        if num_bytes > bank.numel():
            needed = self._needed_bytes(handle.shape)
            raise tern.OutOfMemoryError(
                f"get_next_low_latency_combine_buffer: {list(shape)} in bf16 are {num_bytes} bytes, of which a Buffer "
                f"with num_rdma_bytes "
                f"{self._num_bytes} has {bank.numel()}; make it with {needed}, as get_low_latency_rdma_size_hint says"
            )
        return bank[:num_bytes].view(torch.bfloat16).view(shape)

    # ----------------------------------------------------------------------------------------------------------- masks

    def update_mask(self, rank: int, mask: bool) -> None:
        self._require_masks()
        if not 0 <= rank < self._group.num_ranks or (mask and rank == self._group.rank):
            raise tern.InvalidArgumentError(
                f"rank_to_mask is {rank}; it must be one of the {self._group.num_ranks} ranks, and not this one "
                f"({self._group.rank})"
            )
        with self._turn_lock:
            if mask:
                self._to_mask.add(rank)
            else:
                self._to_mask.discard(rank)
                self._lets_in |= rank in self.exchange.state().masked

    def query_mask(self, mask_status: torch.Tensor) -> None:
        self._require_masks()
        check_vector("mask_status", mask_status, torch.int32, self._group.num_ranks)
        masked = self._to_mask.union(self.exchange.state().masked)
        mask_status.copy_(
            torch.tensor([int(rank in masked) for rank in range(self._group.num_ranks)], dtype=torch.int32)
        )

    def clean_mask(self) -> None:
        self._require_masks()
        with self._turn_lock:
            self._to_mask.clear()
            self._lets_in |= self._is_masked_out or bool(self.exchange.state().masked)

    def _require_masks(self) -> None:
        if not self._masks:
            raise tern.InvalidStateError("the Buffer has no masks; make it with enable_shrink=True")

    # ---------------------------------------------------------------------------------------------------------- common

    def _take_turn(self) -> int:
        """The bank of this dispatch."""
        with self._turn_lock:
            if self._to_mask or self._lets_in:
                self._begin_generation()
            return self.next_bank()

    def _begin_generation(self) -> None:
        """The one in which the masks hold that are wished for, and those are gone that are wished away. If it fails, wishes stay."""
        masked = self.exchange.state().masked
        to_mask = self._to_mask.difference(masked)
        if to_mask or self._lets_in:
            with self.lane_locks[0]:
                try:
                    mask = to_mask if self._is_masked_out else to_mask.union(masked)
                    self.exchange.recover(mask=sorted(mask), readmit=self._lets_in)
                except tern.MaskedOutError:
                    self._is_masked_out = True
                    raise
            self._is_masked_out = False
        self._to_mask.clear()
        self._lets_in = False

    def next_bank(self) -> int:
        return next(self._turns) % _NUM_BANKS

    def _whole(
        self, lane: int, finish: Finish, operation: Callable[[], Any], inputs: tuple[Any, ...]
    ) -> tuple[Any, EventOverlap]:
        """Both halves at once: on the current stream, or with async_finish on the lane's communication stream."""
        if not finish.async_finish:
            self.streams.follow(lane)
            return operation(), EventOverlap()
        with self.streams.run(Order(async_finish=True), lane) as work:
            result = operation()
            work.inputs += inputs
            work.outputs += _tensors(result)
        return result, work.overlap()

    def hook(self, lane: int, receive: Callable[[], None]) -> Hook:
        """Calls `receive`, the second half, on the stream that is current now. What that refers to stays alive until it has run."""
        stream = self.streams.current(lane)

        def receive_there() -> None:
            with self.streams.on(stream):
                self.streams.follow(lane)
                try:
                    receive()
                except tern.MaskedOutError:
                    self._is_masked_out = True
                    raise

        half = _SecondHalf(receive_there)
        if self._open_halves is not None:
            self._open_halves.append(half)

        def run() -> None:
            if half.is_asked_for:
                raise tern.InvalidStateError("the hook has run already")
            half.is_asked_for = True
            with self.lane_locks[lane]:
                half.finish()
                if self._open_halves is not None and half in self._open_halves:
                    self._open_halves.remove(half)

        return run

    def _finish_open_halves(self) -> None:
        while self._open_halves:
            self._open_halves.pop(0).finish()

    # --------------------------------------------------------------------------------------- when a rank is left out

    def _persistently(self, first: Callable[[], Any], again: Callable[[], Any]) -> Any:
        return persistently(first, again, self._group.num_ranks) if self._masks else first()

    def _send_combine(self, send: Callable[[], Any], again: Callable[[], Any]) -> Any:
        """A pending combine; where the plan is stale, one that is done."""
        return self._persistently(send, lambda: _Done(again()))

    def _combine_anew(
        self, rows: torch.Tensor, topk_idx: torch.Tensor, handle: LowLatencyHandle, arguments: dict[str, Any]
    ) -> tern.Combined:
        """Along a new plan for the ranks that are left, where rows have moved."""
        shelf = self.shelf(handle.lane, handle.shape, topk_idx.shape[1], captured=self.streams.is_capturing())
        lease = self.plans.lease_from(shelf)
        narrow = torch.zeros((topk_idx.shape[0], _LEAST_HIDDEN), dtype=torch.bfloat16, device=topk_idx.device)
        arrived = lease.plan.dispatch(narrow, topk_idx=topk_idx, outputs=("expert_rank_ranges",), lane=handle.lane)
        assert arrived.expert_rank_ranges is not None
        moved = moved_rows(rows, handle.layout_ranges, arrived.expert_rank_ranges)
        return lease.plan.combine(moved, **arguments)

    # ---------------------------------------------------------------------------------------------------------- rows

    def _rows_shape(self, handle: LowLatencyHandle) -> tuple[int, int, int]:
        num_ranks = self._group.num_ranks
        return handle.num_experts // num_ranks, num_ranks * handle.num_max_dispatch_tokens_per_rank, handle.hidden

    def _expert_rows(self, x: torch.Tensor, handle: LowLatencyHandle, zero_copy: bool) -> torch.Tensor:
        shape = self._rows_shape(handle)
        if tuple(x.shape) != shape:
            raise tern.InvalidArgumentError(
                f"low_latency_combine: x has shape {list(x.shape)}; it must be {list(shape)}, as dispatched"
            )
        if zero_copy:
            return self.next_combine_buffer(handle)
        if x.dtype != torch.bfloat16:
            raise tern.InvalidArgumentError(f"low_latency_combine: x is {x.dtype}; it must be bfloat16")
        # Ranks agree on whether rows lie in the window by zero_copy alone.
        return x.clone() if x.untyped_storage().data_ptr() in self.zero_copy_begins else x

    def _combine_mode(self, shape: Shape, num_topk: int, finish: Finish) -> str:
        if self._asked_mode != "auto":
            return self._asked_mode
        # exact needs no weights before its rows, and so nothing to wait for while it sends; but it sends a row for each
        # entry. Between nodes a send waits for the node's ranks anyway, and those rows would cross the network.
        # On GPUs with masks every rank has slots of its own for exact rows: too much memory for the hint.
        waits_for_nobody = finish.return_recv_hook and self._nodes.num_nodes == 1 and not self._masks_on_gpu
        return "exact" if waits_for_nobody and self._fits_exact(shape, num_topk) else "hierarchical"

    def _fits_exact(self, shape: Shape, num_topk: int) -> bool:
        rows = sizes.whole_chunks(shape.num_max_tokens) * num_topk
        return self._shares.has_room_for(rows, 2 * shape.hidden, shape.num_experts)

    def _num_sms(self, shape: Shape) -> int:
        """0: a block for each message that may arrive and one more. Lanes may run at the same time, and wait for each other by
        way of other ranks: all their blocks must find room on the GPU."""
        return 0 if shape.num_max_tokens * self._group.num_ranks < self._sms_of_lane else self._sms_of_lane

    def _check_fits(self, shape: Shape) -> None:
        """The same bound on every device. Less may do for a GPU's dispatch, but not for its combine, nor for speed."""
        if shape in self._fitting:
            return
        if self._needed_bytes(shape) > self._num_bytes:
            raise tern.OutOfMemoryError(self._too_small("low_latency_dispatch", shape))
        self._fitting.add(shape)

    def _needed_bytes(self, shape: Shape, rows_per_token: int = 1) -> int:
        return sizes.low_latency_hint(
            shape.num_max_tokens, shape.hidden, self._nodes, shape.num_experts, rows_per_token
        )

    def _too_small(self, operation: str, shape: Shape, rows_per_token: int = 1) -> str:
        return (
            f"{operation}: {shape.num_max_tokens} tokens of each rank, hidden {shape.hidden}, {shape.num_experts} "
            f"experts do not fit a Buffer with num_rdma_bytes {self._num_bytes}; make it with "
            f"{self._needed_bytes(shape, rows_per_token)} (get_low_latency_rdma_size_hint)"
        )

    def shelf(self, lane: int, shape: Shape, num_topk: int, *, captured: bool = False) -> PlanShelf:
        return self.plans.shelf(
            lane,
            captured,
            max_tokens=shape.num_max_tokens,
            num_experts=shape.num_experts,
            num_topk=num_topk,
            layout="expert_padded",
            extent="worst",
        )

    def _one_operation(self, operation: str, lane: int, shape: Shape, rows_per_token: int = 1) -> _OneOperation:
        return _OneOperation(self, self.lane_locks[lane], (operation, shape, rows_per_token))

    def explain(self, error: tern.Error, operation: tuple[str, Shape, int]) -> None:
        """What an operation has met; raises what the caller shall see instead, if anything."""
        if isinstance(error, tern.MaskedOutError):
            self._is_masked_out = True
        elif isinstance(error, tern.OutOfMemoryError):
            raise tern.OutOfMemoryError(f"{self._too_small(*operation)} [{error}]") from error


class _OneOperation:
    """A context in which the lane is this thread's."""

    __slots__ = ("_mode", "_lock", "_operation")

    def __init__(self, mode: LowLatencyMode, lock: threading.Lock, operation: tuple[str, Shape, int]) -> None:
        self._mode, self._lock, self._operation = mode, lock, operation

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, kind: Any, error: Any, _: Any) -> None:
        self._lock.release()
        if isinstance(error, tern.Error):
            self._mode.explain(error, self._operation)


def _asked_combine_mode() -> str:
    asked = os.environ.get(COMBINE_VARIABLE, "auto")
    if asked not in ("auto", "hierarchical", "exact"):
        raise tern.InvalidArgumentError(
            f"{COMBINE_VARIABLE} is {asked!r}; it must be 'auto', 'hierarchical' or 'exact'"
        )
    return asked


def _tensors(result: Any) -> tuple[Any, ...]:
    if isinstance(result, torch.Tensor):
        return (result,)
    return (result.tokens, result.scales, result.source_token, result.expert_counts, result.expert_rank_ranges)
