# SPDX-License-Identifier: Apache-2.0
"""Normal mode: rows by source rank and token, one for each token and rank; combine is their plain sum."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import Any, Iterator, NamedTuple, Optional, Union

import tern
import torch
from tern.exchange import Exchange

from . import layout, sizes
from .events import EventOverlap
from .handles import Handle, NormalHandle, PlanLease, PlanPool, handle_between_nodes, plan_of
from .nodes import Nodes
from .streams import NORMAL_LANE, Order

Rows = Union[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]

# The most tokens that any rank dispatches at once, if that is known: ranks need not tell each other then.
MAX_TOKENS_VARIABLE = "TERN_DEEP_EP_MAX_TOKENS"
_ROW_ALIGNMENT_BYTES = 16


@dataclass(frozen=True)
class Batch:
    """Where the tokens of a dispatch without a handle go. `dispatch` of Buffer says what the fields are."""

    topk_idx: Optional[torch.Tensor]
    topk_weights: Optional[torch.Tensor]
    is_token_in_rank: Optional[torch.Tensor]
    num_tokens_per_expert: Optional[torch.Tensor]
    expert_alignment: int
    num_worst_tokens: int
    num_tokens_per_rdma_rank: Optional[torch.Tensor] = None  # only looked at for mistakes

    def check(self, num_nodes: int) -> None:
        if (self.topk_idx is None) != (self.topk_weights is None):
            raise tern.InvalidArgumentError("dispatch: topk_idx and topk_weights come together; one of them is None")
        if self.num_tokens_per_expert is None:
            raise tern.InvalidArgumentError(
                "dispatch: num_tokens_per_expert is None; without a handle it says how many experts there are"
            )
        if self.topk_idx is not None:
            layout.check_topk_idx(self.topk_idx)
        elif self.is_token_in_rank is None:
            raise tern.InvalidArgumentError(
                "dispatch: give a handle, or topk_idx and topk_weights, or is_token_in_rank"
            )
        elif self.num_worst_tokens > 0:
            raise tern.InvalidArgumentError("dispatch: num_worst_tokens needs topk_idx and topk_weights")
        if self.expert_alignment < 1 or self.num_worst_tokens < 0:
            raise tern.InvalidArgumentError(
                f"dispatch: expert_alignment is {self.expert_alignment}, num_worst_tokens {self.num_worst_tokens}; "
                "they must be at least 1 and 0"
            )
        per_node = self.num_tokens_per_rdma_rank
        if num_nodes > 1 and per_node is not None and tuple(per_node.shape) != (num_nodes,):
            raise tern.InvalidArgumentError(
                f"dispatch: num_tokens_per_rdma_rank has shape {list(per_node.shape)}; there are {num_nodes} nodes, and "
                f"it must be what get_dispatch_layout returns"
            )

    @property
    def num_topk(self) -> int:
        return 0 if self.topk_idx is None else self.topk_idx.shape[1]

    @property
    def num_experts(self) -> int:
        assert self.num_tokens_per_expert is not None
        return self.num_tokens_per_expert.shape[0]


class Received(NamedTuple):
    x: Rows
    topk_idx: Optional[torch.Tensor]
    topk_weights: Optional[torch.Tensor]
    num_tokens_per_expert: Optional[list[int]]
    handle: Optional[Handle]
    event: EventOverlap


class NormalMode:
    """An exchange, and plans for its batches. Making it is collective.

    num_network_bytes: for what crosses the network; 0: that is in num_bytes too.
    """

    def __init__(
        self,
        group: tern.Group,
        streams: Any,
        device: torch.device,
        num_bytes: int,
        timeout_ms: int,
        *,
        num_network_bytes: int = 0,
    ) -> None:
        self._nodes, self._rank = Nodes.of_group(group), group.rank
        self._num_bytes = num_bytes
        self._num_network_bytes = num_network_bytes if self._nodes.num_nodes > 1 else 0
        least = sizes.least_bytes(group.num_ranks, 1)
        for name, given, hint in (
            ("num_nvl_bytes", num_bytes, "get_nvl_buffer_size_hint"),
            ("num_rdma_bytes", self._num_network_bytes or least, "get_rdma_buffer_size_hint"),
        ):
            if given < least:
                raise tern.OutOfMemoryError(
                    f"Buffer: {name} is {given}; {group.num_ranks} ranks need at least {least}, and Config.{hint} says "
                    f"with how many they are fast"
                )
        self._streams, self._device = streams, device
        self._most_tokens = _most_tokens()  # 0: not known
        shares = sizes.Shares.of_normal(num_bytes, self._num_network_bytes, self._nodes, device.type == "cuda")
        self.exchange = Exchange(group, device=device, timeout_ms=timeout_ms, **shares.exchange_options())
        self._plans = PlanPool(self.exchange)
        self._told = _NumTokens(self.exchange, device)

    def dispatch(self, x: Rows, batch: Batch, order: Order, num_sms: int) -> Received:
        batch.check(self._nodes.num_nodes)
        tokens, scales = _parts(x)
        with self._streams.run(order, NORMAL_LANE) as work:
            work.inputs += [
                tokens,
                scales,
                batch.topk_idx,
                batch.topk_weights,
                batch.is_token_in_rank,
                batch.num_tokens_per_expert,
            ]
            route = self._route_exact if batch.num_worst_tokens == 0 else self._lease_worst
            lease, routing, info = route(tokens, batch, num_sms)
            outputs = ["topk_idx", "topk_weights", "source_token", "rank_counts"]
            if self._nodes.num_nodes > 1:
                outputs.append("source_rank")
            with self._explains_memory("dispatch", lease.plan, tokens.shape[1] * tokens.element_size()):
                arrived = lease.plan.dispatch(
                    _aligned(tokens),
                    scales=scales,
                    topk_weights=batch.topk_weights,
                    outputs=outputs,
                    num_sms=num_sms,
                    **routing,
                )
            handle = self._handle(lease, batch, arrived)
            topk_idx = None if arrived.topk_idx is None else arrived.topk_idx.to(torch.int64)
            received = _joined(x, arrived)
            work.outputs += [*_parts(received), topk_idx, arrived.topk_weights, *handle.sources]
        counts: list[int] = []
        if info is not None:
            alignment = batch.expert_alignment
            counts = [-(-count // alignment) * alignment for count in info.received_per_expert or []]
        return Received(received, topk_idx, arrived.topk_weights, counts, handle, work.overlap())

    def dispatch_again(self, x: Rows, handle: tuple[Any, ...], order: Order, num_sms: int) -> Received:
        """Along the routing of an earlier dispatch."""
        plan = plan_of(handle)
        tokens, scales = _parts(x)
        with self._streams.run(order, NORMAL_LANE) as work:
            work.inputs += [tokens, scales]
            with self._explains_memory("dispatch", plan, tokens.shape[1] * tokens.element_size()):
                arrived = plan.dispatch(_aligned(tokens), scales=scales, outputs=(), num_sms=num_sms)
            received = _joined(x, arrived)
            work.outputs += _parts(received)
        return Received(received, None, None, None, None, work.overlap())

    def combine(
        self,
        x: torch.Tensor,
        handle: tuple[Any, ...],
        topk_weights: Optional[torch.Tensor],
        bias: Any,
        order: Order,
        num_sms: int,
    ) -> tuple[torch.Tensor, Optional[torch.Tensor], EventOverlap]:
        plan = plan_of(handle)
        biases = list(bias) if isinstance(bias, (tuple, list)) else [bias]
        with self._streams.run(order, NORMAL_LANE) as work:
            work.inputs += [x, topk_weights, *biases]
            rides = topk_weights is not None and topk_weights.dim() == 2 and topk_weights.shape[1] == plan.num_topk
            with self._explains_memory("combine", plan, x.shape[-1] * x.element_size()):
                combined = plan.combine(
                    _aligned(x), row_weights=topk_weights if rides else None, bias=biases, num_sms=num_sms
                )
            weights = combined.topk_weights
            if topk_weights is not None and not rides:
                weights = _sum_weights(plan, topk_weights, num_sms)
            work.outputs += [combined.tokens, weights]
        return combined.tokens, weights, work.overlap()

    def _route_exact(
        self, tokens: torch.Tensor, batch: Batch, num_sms: int
    ) -> tuple[PlanLease, Any, Optional[tern.PlanInfo]]:
        """The host learns how many rows come."""
        if self._streams.is_capturing():
            raise tern.InvalidStateError(
                "dispatch: the host must wait for the number of rows, which a CUDA graph cannot capture; give "
                "num_worst_tokens or a handle"
            )
        lease = self._lease(batch, max_tokens=self._most_tokens or _rounded(self._told.most(tokens.shape[0])))
        if batch.topk_idx is not None:
            info = lease.plan.route(batch.topk_idx, num_sms=num_sms)
        else:
            counts = batch.num_tokens_per_expert
            assert counts is not None
            info = lease.plan.route(
                token_in_rank=batch.is_token_in_rank, tokens_per_expert=counts.to(torch.int32), num_sms=num_sms
            )
        return lease, {}, info

    def _lease_worst(
        self, tokens: torch.Tensor, batch: Batch, num_sms: int
    ) -> tuple[PlanLease, Any, Optional[tern.PlanInfo]]:
        """Counts stay on the device; the dispatch routes."""
        # Ranks cannot ask each other how many tokens they have without the host; that many is enough unless rows are
        # dropped.
        max_tokens = self._most_tokens or batch.num_worst_tokens
        if tokens.shape[0] > max_tokens:
            raise tern.InvalidArgumentError(
                f"dispatch: {tokens.shape[0]} tokens with num_worst_tokens {batch.num_worst_tokens}; "
                f"set {MAX_TOKENS_VARIABLE} to the most tokens that any rank dispatches, on every rank"
            )
        lease = self._lease(batch, max_tokens=max_tokens, extent="worst", row_capacity=batch.num_worst_tokens)
        return lease, {"topk_idx": batch.topk_idx}, None

    def _lease(self, batch: Batch, **options: Any) -> PlanLease:
        max_tokens = options["max_tokens"]
        try:
            return self._plans.lease(
                0, self._streams.is_capturing(), num_experts=batch.num_experts, num_topk=batch.num_topk, **options
            )
        except tern.OutOfMemoryError as error:
            needed = sizes.normal_bytes(1, max_tokens, 1, batch.num_topk, batch.num_experts, self._nodes)
            raise self._too_small(
                "dispatch", f"{max_tokens} tokens with top-{batch.num_topk}", needed, error
            ) from error

    def _handle(self, lease: PlanLease, batch: Batch, arrived: tern.Dispatched) -> Handle:
        in_rank: Any = batch.is_token_in_rank
        if in_rank is None:
            assert batch.topk_idx is not None
            in_rank = self.exchange.count_routing(
                batch.topk_idx, batch.num_experts, wanted=["token_in_rank"]
            ).token_in_rank
        if self._nodes.num_nodes > 1:
            return handle_between_nodes(lease, in_rank, arrived, self._nodes)
        handle = NormalHandle(lease, in_rank, arrived, self._rank)
        if self._streams.is_capturing():
            tuple(handle)  # so that replays write the elements too
        return handle

    @contextlib.contextmanager
    def _explains_memory(self, operation: str, plan: tern.Plan, row_bytes: int) -> Iterator[None]:
        try:
            yield
        except tern.OutOfMemoryError as error:
            needed = sizes.normal_bytes(1, plan.max_tokens, row_bytes, plan.num_topk, plan.num_experts, self._nodes)
            raise self._too_small(operation, f"rows of {row_bytes} bytes", needed, error) from error

    def _too_small(self, operation: str, what: str, needed: int, error: tern.OutOfMemoryError) -> tern.OutOfMemoryError:
        has, enough = f"num_nvl_bytes {self._num_bytes}", f"{needed} are"
        if self._num_network_bytes > 0:
            has += f" and num_rdma_bytes {self._num_network_bytes}"
            enough = f"of each {needed} are"
        elif self._nodes.num_nodes > 1:
            enough = f"{2 * needed} are"  # a half of them for the network
        return tern.OutOfMemoryError(
            f"{operation}: {what} do not fit a Buffer with {has}; {enough} enough, and Config says with how many it is "
            f"fast: get_nvl_buffer_size_hint, between nodes get_rdma_buffer_size_hint too [{error}]"
        )


class _NumTokens:
    """Ranks tell each other how many tokens they have, as a plan has room for the same number on all of them.

    It is a route of no tokens at all: with num_ranks^2 "experts", expert (to * num_ranks + from) counts the tokens of
        rank `from`.
    """

    def __init__(self, exchange: Exchange, device: torch.device) -> None:
        self._num_ranks, self._rank = exchange.group.num_ranks, exchange.group.rank
        self._plan = exchange.plan(max_tokens=1, num_experts=self._num_ranks**2, num_topk=0)
        self._none = torch.empty((0, self._num_ranks), dtype=torch.bool, device=device)
        self._counts = torch.zeros((self._num_ranks, self._num_ranks), dtype=torch.int32, device=device)
        self._num_counted = 0

    def most(self, num_tokens: int) -> int:
        if self._num_ranks == 1:
            return num_tokens
        if num_tokens != self._num_counted:
            self._counts[:, self._rank] = self._num_counted = num_tokens
        info = self._plan.route(token_in_rank=self._none, tokens_per_expert=self._counts)
        assert info is not None and info.received_per_expert is not None
        return max(info.received_per_expert)


def _most_tokens() -> int:
    text = os.environ.get(MAX_TOKENS_VARIABLE, "0")
    if not text.isdecimal():
        raise tern.InvalidArgumentError(f"{MAX_TOKENS_VARIABLE} is {text!r}; it must be a whole number of at least 0")
    return int(text)


def _rounded(num_tokens: int) -> int:
    """Up to one of four steps in each power of two, so that batches of similar sizes share their plans."""
    step = max(16, 1 << max(0, num_tokens.bit_length() - 3))
    return max(1, -(-num_tokens // step)) * step


def _parts(x: Rows) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
    """Tokens, and scales as a matrix."""
    if not isinstance(x, (tuple, list)):
        tokens, scales = x, None
    else:
        tokens, scales = x
        scales = scales.unsqueeze(1) if scales.dim() == 1 else scales
    if tokens.dim() != 2:
        raise tern.InvalidArgumentError(f"x has shape {list(tokens.shape)}; it must be [num_tokens, hidden]")
    return tokens, scales


def _joined(x: Rows, arrived: Any) -> Rows:
    """What arrived, as x was given."""
    if not isinstance(x, (tuple, list)):
        return arrived.tokens  # type: ignore[no-any-return]
    return arrived.tokens, arrived.scales.squeeze(1) if x[1].dim() == 1 else arrived.scales


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """GPU ranks move 16 bytes at a time."""
    if not x.is_cuda or (x.data_ptr() | x.stride(0) * x.element_size()) % _ROW_ALIGNMENT_BYTES == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _sum_weights(plan: tern.Plan, topk_weights: torch.Tensor, num_sms: int) -> torch.Tensor:
    """Weights of another width than the plan's travel as rows, padded to 16 bytes."""
    if topk_weights.dim() != 2 or topk_weights.dtype != torch.float32:
        raise tern.InvalidArgumentError(
            f"combine: topk_weights is {topk_weights.dtype} of shape {list(topk_weights.shape)}; it must be float32 of "
            f"[rows, num_topk]"
        )
    width = topk_weights.shape[1]
    rows = torch.nn.functional.pad(topk_weights, (0, -width % 4))
    return plan.combine(rows, num_sms=num_sms).tokens[:, :width].contiguous()  # type: ignore[no-any-return]
