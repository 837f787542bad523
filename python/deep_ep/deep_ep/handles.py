# SPDX-License-Identifier: Apache-2.0
"""What a dispatch hands out for the combine, and for further dispatches along the same routing.

Handles are tuples, of which callers read a few elements by position. What counts is the plan that they carry beside: a
handle has to come back as the object that it was. Its plan is free for other batches once the handle is dropped.
"""

from __future__ import annotations

import collections
import contextlib
import functools
from typing import Any, Callable, Deque, Iterator, NamedTuple, Optional, Union

import tern
import torch

from . import layout
from .nodes import Nodes

_MOST_IDLE_PLANS = 32
_ALIGNMENT_BYTES = 16


class PlanLease:
    """A plan that nobody else uses while this object lives."""

    __slots__ = ("plan", "_idle")

    def __init__(self, plan: tern.Plan, idle: Deque[tern.Plan]) -> None:
        self.plan, self._idle = plan, idle

    def __del__(self) -> None:
        """Wherever the last reference is dropped, in any thread: it must do nothing but append."""
        self._idle.append(self.plan)


class PlanShelf:
    """The idle plans of one lane and one set of options."""

    __slots__ = ("idle", "captured", "options", "uncaptured")

    def __init__(self, captured: bool, options: dict[str, Any], uncaptured: Optional[PlanShelf]) -> None:
        self.idle: Deque[tern.Plan] = collections.deque()
        self.captured, self.options, self.uncaptured = captured, options, uncaptured


class PlanPool:
    """Plans of one exchange. Making one allocates memory, so plans are used again by batches of the same shape.

    Lanes have plans of their own, since their operations are not ordered. So have captured graphs: they may share
    plans among each other, as they are replayed one after the other, but not with operations outside of graphs. Those
    plans live as long as the pool.
    """

    def __init__(self, exchange: tern.Exchange) -> None:
        self._exchange = exchange
        self._shelves: dict[tuple[Any, ...], PlanShelf] = {}
        # All of them. A plan that only its lease held would end first where both are collected in a cycle, and come back as one that has ended.
        self._plans: set[tern.Plan] = set()

    def lease(self, lane: int, captured: bool, **options: Any) -> PlanLease:
        return self.lease_from(self.shelf(lane, captured, **options))

    def shelf(self, lane: int, captured: bool, **options: Any) -> PlanShelf:
        key = (captured, lane, *options.items())
        shelf = self._shelves.get(key)
        if shelf is None:
            uncaptured = self.shelf(lane, False, **options) if captured else None
            shelf = self._shelves.setdefault(key, PlanShelf(captured, options, uncaptured))
        return shelf

    def lease_from(self, shelf: PlanShelf) -> PlanLease:
        idle = shelf.idle
        try:
            plan = idle.pop()
        except IndexError:  # other threads may take the last one at any time
            plan = self._another(shelf)
        return PlanLease(plan, idle)

    def _another(self, shelf: PlanShelf) -> tern.Plan:
        if shelf.uncaptured is not None:
            with contextlib.suppress(IndexError):
                # The step that ran before to warm up has left its plan.
                return shelf.uncaptured.idle.pop()
        self._trim()
        plan = self._exchange.plan(**shelf.options)
        self._plans.add(plan)
        return plan

    def _trim(self) -> None:
        """Shapes come and go; what nobody uses is given back before more memory is taken."""
        evictable = [shelf.idle for shelf in list(self._shelves.values()) if not shelf.captured]
        if sum(len(plans) for plans in evictable) >= _MOST_IDLE_PLANS:
            for plans in evictable:
                with contextlib.suppress(IndexError):
                    while True:
                        self._plans.discard(plans.pop())


class _MadeWhenLookedAt(tuple):  # type: ignore[type-arg]
    """Elements are attributes, of which the tuple has the names. Few callers look at any, so they are made then, on the stream that is current
    then."""

    def __getitem__(self, position: Any) -> Any:
        if isinstance(position, slice):
            return tuple(self)[position]
        return getattr(self, super().__getitem__(position))

    def __iter__(self) -> Iterator[Any]:
        return (getattr(self, name) for name in super().__iter__())

    __eq__, __hash__ = object.__eq__, object.__hash__


# In the matrices of channels all rows count as one channel.


class NormalHandle(_MadeWhenLookedAt):
    """Of a dispatch in normal mode inside one node."""

    def __new__(cls, lease: PlanLease, in_rank: torch.Tensor, arrived: tern.Dispatched, rank: int) -> NormalHandle:
        """in_rank: bool [T, R]"""
        names = "rank_prefix_matrix", "channel_prefix_matrix", "recv_channel_prefix_matrix"
        handle = super().__new__(cls, (*names, "recv_src_idx", "is_token_in_rank", "send_head"))
        handle.lease, handle._rank = lease, rank
        handle.recv_src_idx, handle._rank_counts, handle.is_token_in_rank = (
            arrived.source_token,
            arrived.rank_counts,
            in_rank,
        )
        return handle

    lease: PlanLease
    _rank: int
    _rank_counts: Any
    recv_src_idx: Any  # i32 [N]: source token of each row
    is_token_in_rank: torch.Tensor  # bool [T, R]

    @functools.cached_property
    def rank_prefix_matrix(self) -> torch.Tensor:
        """i32 [R, R]: [i][own rank] rows received from ranks 0..i; other columns are 0"""
        num_ranks = self.is_token_in_rank.shape[1]
        prefix = torch.zeros((num_ranks, num_ranks), dtype=torch.int32, device=self.is_token_in_rank.device)
        prefix[:, self._rank] = self._rank_counts.cumsum(0, dtype=torch.int32)
        return prefix

    @functools.cached_property
    def channel_prefix_matrix(self) -> torch.Tensor:
        """i32 [R, 1]: rows sent to each rank"""
        return self.is_token_in_rank.sum(dim=0, dtype=torch.int32).unsqueeze(1)

    @functools.cached_property
    def recv_channel_prefix_matrix(self) -> torch.Tensor:
        """i32 [R, 1]: zeros, where the channel of each rank begins"""
        return torch.zeros((self.is_token_in_rank.shape[1], 1), dtype=torch.int32, device=self.is_token_in_rank.device)

    @functools.cached_property
    def send_head(self) -> torch.Tensor:
        """i32 [T, R]: -1 where the token does not go to the rank"""
        return self.is_token_in_rank.to(torch.int32) - 1

    @property
    def sources(self) -> tuple[Any, ...]:
        """The tensors that there are from the start."""
        return self.recv_src_idx, self._rank_counts, self.is_token_in_rank


class _InternodeFields(NamedTuple):
    is_token_in_rank: torch.Tensor  # bool [T, R]
    rdma_channel_prefix_matrix: torch.Tensor  # i32 [nodes, 1]: tokens sent to each node
    gbl_channel_prefix_matrix: torch.Tensor  # i32 [R, 1]: rows sent to each rank
    # Of the tokens that this rank passes on within its node, M of them: its own, and those of the same place in other nodes.
    # The hosts of GPU ranks do not know them: they are 0 there, and M too.
    recv_rdma_channel_prefix_matrix: torch.Tensor  # i32 [nodes, 1]: from each node
    recv_rdma_rank_prefix_sum: torch.Tensor  # i32 [nodes]: from nodes 0..i
    recv_gbl_channel_prefix_matrix: torch.Tensor  # i32 [R, 1]: the first row from each rank
    recv_gbl_rank_prefix_sum: torch.Tensor  # i32 [R]: rows received from ranks 0..i
    recv_src_meta: torch.Tensor  # u8 [N, 8]: two i32, the node and the token that a row comes from; -1 in unused rows
    send_rdma_head: torch.Tensor  # i32 [T, nodes]: -1 where the token does not go to the node
    send_nvl_head: (
        torch.Tensor
    )  # i32 [M, ranks of a node]: by node, then by token; -1 where the token does not go to the rank


class InternodeHandle(_InternodeFields):
    """Of a dispatch in normal mode between nodes."""

    lease: PlanLease

    @property
    def sources(self) -> tuple[torch.Tensor, ...]:
        return tuple(self)


Handle = Union[NormalHandle, InternodeHandle]


class Shape(NamedTuple):
    """What ranks agree on in a low-latency dispatch."""

    num_max_tokens: int  # of each rank
    hidden: int
    num_experts: int


class Tables(NamedTuple):
    """What a low-latency dispatch says of its rows, in one tensor: an allocation takes as long as much of the call."""

    num_local_experts: int
    num_ranks: int
    num_max_tokens: int  # of each rank

    @property
    def ranges_bytes(self) -> int:
        return 8 * self.num_local_experts * self.num_ranks

    @property
    def sources_bytes(self) -> int:
        return 4 * self.num_local_experts * self.num_ranks * self.num_max_tokens

    @property
    def sources_begin(self) -> int:
        return -(-self.ranges_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES

    @property
    def num_bytes(self) -> int:
        return self.sources_begin + self.sources_bytes

    def ranges(self, memory: torch.Tensor) -> torch.Tensor:
        return memory[: self.ranges_bytes].view(torch.int64).view(self.num_local_experts, self.num_ranks)

    def sources(self, memory: torch.Tensor) -> torch.Tensor:
        flat = memory[self.sources_begin :].view(torch.int32)
        return flat.view(self.num_local_experts, self.num_ranks * self.num_max_tokens)


class LowLatencyHandle(_MadeWhenLookedAt):
    """Of a low-latency dispatch. It also knows its lane, which of the two zero-copy buffers is its own, and of which repeat it
    came, if of any.

    Elements: source_tokens i32 [E_l, R * max], the source token of each row; layout_ranges i64 [E_l, R], count in the low 32 bits, first
    row in the high ones; num_max_dispatch_tokens_per_rank, hidden, num_experts.
    """

    lease: PlanLease
    lane: int
    bank: int
    shape: Shape
    repeat: Any = None  # a DispatchRepeat
    memory: torch.Tensor  # u8: what repeat.tables is the layout of

    @functools.cached_property
    def source_tokens(self) -> torch.Tensor:
        return self.repeat.tables.sources(self.memory)  # type: ignore[no-any-return]

    @functools.cached_property
    def layout_ranges(self) -> torch.Tensor:
        return self.repeat.tables.ranges(self.memory)  # type: ignore[no-any-return]

    @property
    def num_max_dispatch_tokens_per_rank(self) -> int:
        return self.shape.num_max_tokens

    @property
    def hidden(self) -> int:
        return self.shape.hidden

    @property
    def num_experts(self) -> int:
        return self.shape.num_experts


# A LowLatencyHandle without its attributes.
new_low_latency_handle: Callable[[], LowLatencyHandle] = functools.partial(
    tuple.__new__,
    LowLatencyHandle,
    ("source_tokens", "layout_ranges", "num_max_dispatch_tokens_per_rank", "hidden", "num_experts"),
)


def handle_between_nodes(lease: PlanLease, in_rank: torch.Tensor, arrived: Any, nodes: Nodes) -> InternodeHandle:
    in_node = layout.is_token_in_node(in_rank, nodes.num_nodes)
    received = arrived.rank_counts.cumsum(0, dtype=torch.int32)
    source_node = torch.div(arrived.source_rank, nodes.ranks_per_node, rounding_mode="floor")
    passed_on, passed_to = _passed_on(lease.plan.info(), nodes, in_rank.device)
    handle = InternodeHandle(
        is_token_in_rank=in_rank,
        rdma_channel_prefix_matrix=in_node.sum(dim=0, dtype=torch.int32).unsqueeze(1),
        gbl_channel_prefix_matrix=in_rank.sum(dim=0, dtype=torch.int32).unsqueeze(1),
        recv_rdma_channel_prefix_matrix=passed_on.unsqueeze(1),
        recv_rdma_rank_prefix_sum=passed_on.cumsum(0, dtype=torch.int32),
        recv_gbl_channel_prefix_matrix=(received - arrived.rank_counts).unsqueeze(1),
        recv_gbl_rank_prefix_sum=received,
        recv_src_meta=torch.stack((source_node, arrived.source_token), dim=1).view(torch.uint8),
        send_rdma_head=in_node.to(torch.int32) - 1,
        send_nvl_head=passed_to - 1,
    )
    handle.lease = lease
    return handle


def _passed_on(info: tern.PlanInfo, nodes: Nodes, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """i32 [nodes]: tokens from each node; i32 [M, ranks of a node]: 1 where one goes to the rank."""
    if info.rail_tokens is None or not info.rail_token_in_rank:  # nothing is copied: a graph may be captured here
        counts = torch.zeros(nodes.num_nodes, dtype=torch.int32, device=device)
        return counts, counts.new_zeros((0, nodes.ranks_per_node))
    in_rank = torch.frombuffer(bytearray(info.rail_token_in_rank), dtype=torch.uint8)
    counts = torch.tensor(info.rail_tokens, dtype=torch.int32, device=device)
    return counts, in_rank.to(device, torch.int32).view(-1, nodes.ranks_per_node)


def plan_of(handle: tuple[Any, ...]) -> tern.Plan:
    lease = getattr(handle, "lease", None)
    if lease is None:
        raise tern.InvalidArgumentError(
            f"the handle is a {type(handle).__name__} without a plan; give the object that the dispatch returned, not "
            f"a copy of its elements"
        )
    plan: tern.Plan = lease.plan
    return plan
