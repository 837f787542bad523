# SPDX-License-Identifier: Apache-2.0
"""What the operations of a plan return."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any, Callable, Generic, NamedTuple, TypeVar

from . import _c
from ._arrays import Array

Result = TypeVar("Result")


@dataclass(frozen=True)
class PlanInfo:
    """What the host knows of a routed plan: tern.h, tern_plan_info.

    On a GPU with extent WORST the host does not know the counts: they are None, and num_received is -1.
    """

    num_tokens: int
    num_received: int
    num_rows: int
    row_capacity: int
    generation: int
    latency_path: bool
    num_sms: int
    received_per_rank: list[int] | None
    received_per_expert: list[int] | None
    sent_per_rank: list[int] | None
    pair_counts: list[list[int]] | None
    # Several nodes, on CPU ranks: what this rank passes on within its node.
    rail_tokens: list[int] | None  # of the owners in each node
    rail_token_in_rank: bytes | None  # [sum of rail_tokens, ranks of the node] 1: goes there; else 0

    @classmethod
    def of(cls, info: _c.PlanInfo, num_ranks: int, num_nodes: int, num_local_experts: int) -> PlanInfo:
        """The arrays of `info` belong to the plan and change with its next routing, so they are copied."""

        def listed(pointer: Any, count: int) -> list[int] | None:
            return list(pointer[:count]) if pointer else None

        pairs = listed(info.pair_counts, num_ranks * num_ranks)
        rail_tokens = listed(info.rail_tokens, num_nodes)
        return cls(
            num_tokens=info.num_tokens,
            num_received=info.num_received,
            num_rows=info.num_rows,
            row_capacity=info.row_capacity,
            generation=info.generation,
            latency_path=bool(info.latency_path),
            num_sms=info.num_sms,
            received_per_rank=listed(info.received_per_rank, num_ranks),
            received_per_expert=listed(info.received_per_expert, num_local_experts),
            sent_per_rank=listed(info.sent_per_rank, num_ranks),
            pair_counts=None
            if pairs is None
            else [pairs[r * num_ranks : (r + 1) * num_ranks] for r in range(num_ranks)],
            rail_tokens=rail_tokens,
            rail_token_in_rank=None
            if rail_tokens is None
            else ctypes.string_at(info.rail_token_in_rank, sum(rail_tokens) * (num_ranks // num_nodes)),
        )


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
    expert_rank_ranges: i64 [E_l, R], count in the low 32 bits, first row of the expert's group in the high ones. Expert
        layouts.
    """

    tokens: Array
    scales: Array | None = None
    topk_idx: Array | None = None
    topk_weights: Array | None = None
    source_token: Array | None = None
    source_rank: Array | None = None
    row_expert: Array | None = None
    expert_offsets: Array | None = None
    expert_counts: Array | None = None
    rank_counts: Array | None = None
    expert_rank_ranges: Array | None = None


class RoutingCounts(NamedTuple):
    """Of one rank's routing; None: not asked for. A token counts once for each rank or node that it goes to, and each of its entries for
    its expert."""

    tokens_per_rank: Array | None = None  # i32 [num_ranks]
    tokens_per_node: Array | None = None  # i32 [num_nodes]
    tokens_per_expert: Array | None = None  # i32 [num_experts]
    token_in_rank: Array | None = None  # bool [num_tokens, num_ranks]


class Combined(NamedTuple):
    """tokens: [num_tokens, hidden]. topk_weights: f32 [num_tokens, top-k], the row_weights handed back, if any were given."""

    tokens: Array
    topk_weights: Array | None = None


@dataclass
class Pending(Generic[Result]):
    """An operation of which the first phase is done: the data are on their way. `receive` waits for what comes."""

    result: Result
    _receive: Callable[[Any], None]
    _inputs: Any = field(repr=False, default=None)  # stay alive until then

    def receive(self, *, stream: Any = None) -> Result:
        """The result. On GPU ranks this enqueues the waiting on `stream`, or torch's current one. To be called once."""
        self._receive(stream)
        self._inputs = None
        return self.result


@dataclass
class Prepared(Generic[Result]):
    """An operation whose arguments were looked at once, to be run again and again on the same arrays: what is left on the host is the
    C function. `result` is what every run writes to. It keeps its arrays and its plan alive, and is used by the plan's thread."""

    result: Result
    _run: Callable[[Any], None] = field(repr=False)
    _inputs: Any = field(repr=False, default=None)

    def __call__(self, *, stream: Any = None) -> Result:
        """Runs it, as the method of the plan does: collective, on `stream` or torch's current one."""
        self._run(stream)
        return self.result
