# SPDX-License-Identifier: Apache-2.0
"""Route, dispatch and combine as custom ops of torch, with shapes for tracing and formulas for autograd."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .. import _c
from ..results import Dispatched
from .plans import PlanPool, Routing, leased, pool_of

Tensor = torch.Tensor


class Arrived(NamedTuple):
    """What moe_dispatch brought. N rows, E_l local experts.

    rows: [N, hidden]; rows that nothing arrived for (padding, and with extent "worst" those behind) are zeros.
    row_weights: f32 [N]; rank_major [N, top-k], 0 where an entry is not of this rank. Empty if no weights were given.
    row_expert: i32 [N], local experts, -1 in padding. expert_major; empty otherwise.
    topk_idx: i32 [N, top-k], local experts, -1 where an entry is not of this rank. rank_major; empty otherwise.
    expert_offsets: i64 [E_l + 1], first row of each expert's group. expert_major; empty otherwise.
    expert_counts: i32 [E_l], entries of each expert.
    """

    rows: Tensor
    row_weights: Tensor
    row_expert: Tensor
    topk_idx: Tensor
    expert_offsets: Tensor
    expert_counts: Tensor


def moe_dispatch(tokens: Tensor, routing: Routing, weights: Tensor | None = None) -> Arrived:
    """Sends tokens to the ranks of their experts. Collective, and so is its backward. Differentiable in tokens and weights.

    tokens: [num_tokens, hidden] bf16, fp16 or fp32, a row is a multiple of 16 bytes. weights: [num_tokens, top-k], travel as f32; given
    by all ranks or by none. Multiply the experts' results by Arrived.row_weights: so the weights get their gradient.
    """
    if weights is not None:
        weights = weights.float()
    num_rows = routing.rows.shape[0]
    return Arrived(*torch.ops.tern.dispatch(tokens, weights, routing.plan, routing.pool, num_rows, True))


def moe_combine(rows: Tensor, routing: Routing) -> Tensor:
    """Brings rows, laid out as Arrived.rows, back to their tokens' owners: [num_tokens, hidden], the plain sum of each token's rows.

    Collective, and so is its backward. Differentiable in rows. bf16, fp16 or fp32.
    """
    tokens, _ = torch.ops.tern.combine(rows, None, routing.plan, routing.pool, routing.num_tokens)
    return tokens  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------------------------------------------- route


@torch.library.custom_op("tern::route", mutates_args=(), schema="(Tensor topk_idx, SymInt pool) -> (Tensor, Tensor)")
def _route(topk_idx: Tensor, pool: int) -> tuple[Tensor, Tensor]:
    plan, num_rows = pool_of(pool).lease(topk_idx)
    return plan, torch.empty((num_rows, 0), dtype=torch.uint8, device="cpu")


@_route.register_fake
def _(topk_idx: Tensor, pool: int) -> tuple[Tensor, Tensor]:
    plans = pool_of(int(pool))
    exact = plans.extent == _c.Extent.EXACT
    num_rows = torch.library.get_ctx().new_dynamic_size() if exact else plans.row_capacity
    rows = torch.empty((num_rows, 0), dtype=torch.uint8, device="cpu")
    return torch.empty(1, dtype=torch.int64, device="cpu"), rows


# ---------------------------------------------------------------------------------------------------------------- dispatch


def _make_outputs(tokens: Tensor, weighted: bool, plans: PlanPool, num_rows: int, details: bool) -> list[Tensor]:
    """Arrays for Arrived, in its order; those that are not wanted are empty."""
    expert_major = plans.layout == _c.Layout.EXPERT_MAJOR
    make = tokens.new_zeros if plans.has_padding else tokens.new_empty
    make_rows = tokens.new_zeros if plans.extent == _c.Extent.WORST else tokens.new_empty

    def ints(wanted: bool, shape: tuple[int, ...], dtype: torch.dtype = torch.int32) -> Tensor:
        return tokens.new_empty(shape if wanted and details else (0,), dtype=dtype)

    weight_shape = (num_rows,) if expert_major else (num_rows, plans.num_topk)
    return [
        make_rows((num_rows, tokens.shape[1])),
        make(weight_shape if weighted else (0,), dtype=torch.float32),
        ints(expert_major, (num_rows,)),
        ints(not expert_major, (num_rows, plans.num_topk)),
        ints(expert_major, (plans.num_local_experts + 1,), torch.int64),
        ints(True, (plans.num_local_experts,)),
    ]


@torch.library.custom_op(
    "tern::dispatch",
    mutates_args=(),
    schema="(Tensor tokens, Tensor? weights, Tensor plan, SymInt pool, SymInt num_rows, bool details)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _dispatch(
    tokens: Tensor, weights: Tensor | None, plan: Tensor, pool: int, num_rows: int, details: bool
) -> tuple[Tensor, ...]:
    plans = pool_of(pool)
    rows, row_weights, row_expert, topk_idx, expert_offsets, expert_counts = outputs = _make_outputs(
        tokens, weights is not None, plans, num_rows, details
    )
    expert_major = plans.layout == _c.Layout.EXPERT_MAJOR
    out = Dispatched(
        rows,
        topk_weights=None if weights is None else row_weights,
        row_expert=row_expert if details and expert_major else None,
        topk_idx=topk_idx if details and not expert_major else None,
        expert_offsets=expert_offsets if details and expert_major else None,
        expert_counts=expert_counts if details else None,
    )
    # A gradient may be an expanded tensor, whose rows are all the same memory: the library wants rows that lie apart.
    leased(plan).dispatch(tokens.contiguous(), topk_weights=weights, out=out, lane=plans.lane)
    return tuple(outputs)


@_dispatch.register_fake
def _(
    tokens: Tensor, weights: Tensor | None, plan: Tensor, pool: int, num_rows: int, details: bool
) -> tuple[Tensor, ...]:
    return tuple(_make_outputs(tokens, weights is not None, pool_of(int(pool)), num_rows, details))


def _dispatch_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tokens, weights, plan, ctx.pool, _, details = inputs
    ctx.num_tokens, ctx.weighted = tokens.shape[0], weights is not None
    ctx.masked = ctx.weighted and details and pool_of(int(ctx.pool)).layout == _c.Layout.RANK_MAJOR
    ctx.save_for_backward(plan, *([output[3]] if ctx.masked else []))


def _dispatch_backward(ctx: Any, grad_rows: Tensor, grad_row_weights: Tensor, *_: Tensor) -> tuple[Any, ...]:
    plan, *topk_idx = ctx.saved_tensors
    if ctx.masked:
        # Entries of other ranks are constant zeros here: nothing of them goes back.
        grad_row_weights = torch.where(topk_idx[0] >= 0, grad_row_weights, 0.0)
    grad_tokens, grad_weights = torch.ops.tern.combine(
        grad_rows, grad_row_weights if ctx.weighted else None, plan, ctx.pool, ctx.num_tokens
    )
    return grad_tokens, grad_weights if ctx.weighted else None, None, None, None, None


_dispatch.register_autograd(_dispatch_backward, setup_context=_dispatch_context)


# ----------------------------------------------------------------------------------------------------------------- combine


@torch.library.custom_op(
    "tern::combine",
    mutates_args=(),
    schema="(Tensor rows, Tensor? row_weights, Tensor plan, SymInt pool, SymInt num_tokens) -> (Tensor, Tensor)",
)
def _combine(
    rows: Tensor, row_weights: Tensor | None, plan: Tensor, pool: int, num_tokens: int
) -> tuple[Tensor, Tensor]:
    plans = pool_of(pool)
    done = leased(plan).combine(rows, mode=plans.combine_mode, row_weights=row_weights, lane=plans.lane)
    weights = rows.new_empty(0, dtype=torch.float32) if done.topk_weights is None else done.topk_weights
    return done.tokens, weights


@_combine.register_fake
def _(rows: Tensor, row_weights: Tensor | None, plan: Tensor, pool: int, num_tokens: int) -> tuple[Tensor, Tensor]:
    shape = (0,) if row_weights is None else (num_tokens, pool_of(int(pool)).num_topk)
    return rows.new_empty((num_tokens, rows.shape[1])), rows.new_empty(shape, dtype=torch.float32)


def _combine_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    rows, row_weights, plan, ctx.pool, _ = inputs
    ctx.num_rows, ctx.weighted = rows.shape[0], row_weights is not None
    ctx.save_for_backward(plan)


def _combine_backward(ctx: Any, grad_tokens: Tensor, grad_weights: Tensor) -> tuple[Any, ...]:
    (plan,) = ctx.saved_tensors
    grad_rows, grad_row_weights, *_ = torch.ops.tern.dispatch(
        grad_tokens, grad_weights if ctx.weighted else None, plan, ctx.pool, ctx.num_rows, False
    )
    return grad_rows, grad_row_weights if ctx.weighted else None, None, None, None


_combine.register_autograd(_combine_backward, setup_context=_combine_context)
