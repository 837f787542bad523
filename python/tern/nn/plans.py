# SPDX-License-Identifier: Apache-2.0
"""Plans that live as long as autograd needs them.

Custom ops take tensors and numbers only. So a routed plan travels as a tensor of one element, the number of a lease; the memory of that
tensor is an object that tells when its last user (a graph of autograd, a compiled graph, a checkpoint) has let go of it, and then the plan
is free for the next batch.
"""

from __future__ import annotations

import ctypes
import itertools
import weakref
from collections import deque
from typing import Any, NamedTuple

import torch

from .. import _c
from ..errors import InvalidStateError, UnsupportedError
from ..exchange import Exchange, choice
from ..plan import Plan


class Routing(NamedTuple):
    """Where one batch goes: what PlanPool.route returns. It holds a plan of the pool while any of it is in use."""

    plan: torch.Tensor  # i64 [1] on the CPU, the lease
    rows: torch.Tensor  # [num_rows, 0]: no memory; its shape is how many rows arrive
    num_tokens: int
    pool: int


class PlanPool:
    """Plans with equal options: as many as there are batches under way, each with its memory. Making one is local.

    max_tokens: the most tokens that any rank routes, equal on all ranks. num_experts: divisible by the ranks. num_topk: 1..64.
    layout: "expert_major" or "rank_major". extent: "exact", or "worst": outputs have row_capacity rows (0: what can arrive at most), and
        those that nothing arrived for are zeros. expert_alignment: each expert's group starts at a multiple of it; padding is zeros.
    combine_mode: "hierarchical" or "exact"; lane: of all operations. One thread at a time uses a lane.
    """

    def __init__(
        self,
        exchange: Exchange,
        *,
        max_tokens: int,
        num_experts: int,
        num_topk: int,
        layout: _c.Layout | str = _c.Layout.EXPERT_MAJOR,
        extent: _c.Extent | str = _c.Extent.EXACT,
        expert_alignment: int = 1,
        row_capacity: int = 0,
        combine_mode: _c.CombineMode | str = _c.CombineMode.HIERARCHICAL,
        lane: int = 0,
    ) -> None:
        self.exchange = exchange
        self.layout, self.extent = choice(_c.Layout, layout), choice(_c.Extent, extent)
        if self.layout == _c.Layout.EXPERT_PADDED:
            raise UnsupportedError(
                "tern.nn knows the layouts 'expert_major' and 'rank_major'; with tern.Plan there is 'expert_padded' too"
            )
        self.max_tokens, self.num_experts, self.num_topk = max_tokens, num_experts, num_topk
        self.num_ranks = exchange.group.num_ranks
        self.num_local_experts = num_experts // self.num_ranks
        self.first_local_expert = exchange.group.rank * self.num_local_experts
        self.combine_mode, self.lane = choice(_c.CombineMode, combine_mode), lane
        # Rows of the outputs that nothing arrives for would otherwise be whatever the memory held, and poison gradients.
        self.has_padding = self.extent == _c.Extent.WORST or expert_alignment > 1
        self._options: dict[str, Any] = {
            "max_tokens": max_tokens,
            "num_experts": num_experts,
            "num_topk": num_topk,
            "layout": self.layout,
            "extent": self.extent,
            "expert_alignment": expert_alignment,
            "zero_padding": expert_alignment > 1,
            "row_capacity": row_capacity,
        }
        first = exchange.plan(**self._options)
        self.row_capacity = first.row_capacity
        self._free: deque[Plan] = deque([first])
        self.id = next(_pool_ids)
        _pools[self.id] = self

    def __deepcopy__(self, _memo: Any) -> PlanPool:
        return self  # copies of a module use the same pool

    def route(self, topk_idx: torch.Tensor) -> Routing:
        """Exchanges counts for topk_idx, int64 or int32 [num_tokens, num_topk] global experts, -1: none. Collective."""
        plan, rows = torch.ops.tern.route(topk_idx, self.id)
        return Routing(plan, rows, topk_idx.shape[0], self.id)

    def lease(self, topk_idx: torch.Tensor) -> tuple[torch.Tensor, int]:
        """A plan routed by topk_idx, as the number that `leased` knows it by, and its rows."""
        try:
            plan = self._free.popleft()
        except IndexError:
            plan = self.exchange.plan(**self._options)
        try:
            info = plan.route(topk_idx.contiguous(), lane=self.lane)
        except BaseException:
            self._free.append(plan)
            raise
        lease = next(_lease_ids)
        _leases[lease] = (self, plan)
        memory = _LeaseMemory(lease)
        weakref.finalize(memory, _give_back, lease).atexit = False
        num_rows = plan.row_capacity if info is None else info.num_rows
        return torch.frombuffer(memory, dtype=torch.int64), num_rows


class _LeaseMemory(ctypes.c_int64 * 1):  # type: ignore[misc]
    """The memory of a lease's tensor."""


_pools: weakref.WeakValueDictionary[int, PlanPool] = weakref.WeakValueDictionary()
_pool_ids = itertools.count(1)
_leases: dict[int, tuple[PlanPool, Plan]] = {}  # a lease keeps its pool, so that a backward may outlive whoever made it
_lease_ids = itertools.count(1)


def pool_of(pool: int) -> PlanPool:
    found = _pools.get(pool)
    if found is None:
        raise InvalidStateError("the PlanPool of this operation is gone; keep it as long as it is used to route")
    return found


def leased(plan: torch.Tensor) -> Plan:
    """The plan that a lease's tensor stands for."""
    lease = int(plan.item())
    found = _leases.get(lease)
    if found is None:
        raise InvalidStateError(
            f"the plan of routing {lease} went back to its pool: its tensor was copied and dropped. "
            "Keep Routing.plan itself where saved tensors are moved (torch.autograd.graph.save_on_cpu with pin_memory copies them)"
        )
    return found[1]


def _give_back(lease: int) -> None:
    # Runs wherever the last tensor is dropped, also inside of the garbage collector: so there is no lock here.
    pool, plan = _leases.pop(lease)
    pool._free.append(plan)
