# SPDX-License-Identifier: Apache-2.0
"""What operations are given, and what plans remember of it: arrays that do not fit are refused or copied. One rank."""

from __future__ import annotations

from typing import Any

import pytest
import tern
from ranks import TIMEOUT_MS

torch = pytest.importorskip("torch", reason="torch is not installed")

TOKENS, HIDDEN, EXPERTS, TOPK = 8, 64, 4, 2
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def plan_of(device: str, **options: Any) -> tern.Plan:
    group = tern.Group.local(1, timeout_ms=TIMEOUT_MS)[0]
    sizes = {"max_tokens": TOKENS * TOPK, "max_row_bytes": 4 * HIDDEN, "max_topk": TOPK, "max_experts": EXPERTS}
    exchange = tern.Exchange(group, device=device, timeout_ms=TIMEOUT_MS, **sizes)
    options = {"layout": "expert_major", "extent": "worst", **options}
    return exchange.plan(max_tokens=TOKENS, num_experts=EXPERTS, num_topk=TOPK, **options)


def batch(device: str, num_tokens: int) -> tuple[Any, Any, Any]:
    """Tokens, experts, weights."""
    seed = torch.Generator().manual_seed(num_tokens)
    idx = torch.rand(num_tokens, EXPERTS, generator=seed).argsort(1)[:, :TOPK].contiguous()
    x, weights = (torch.rand(num_tokens, width, generator=seed) for width in (HIDDEN, TOPK))
    return x.to(device), idx.to(device), weights.to(device)


# ------------------------------------------------------------------------------------------- the number of tokens that were routed


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_only_prepared_has_not_routed(device: str) -> None:
    """Operations by themselves go along what was routed; those that are prepared along what was prepared, or routed since."""
    plan = plan_of(device)
    x, idx, weights = batch(device, TOKENS)
    few, few_idx, few_weights = batch(device, 2)
    arrived = plan.dispatch(x, topk_idx=idx)
    dispatch_few = plan.prepare_dispatch(few, topk_idx=few_idx)
    combine_few = plan.prepare_combine(dispatch_few.result.tokens, topk_weights=few_weights)
    for _ in range(3):  # the short way too
        combined = plan.combine(arrived.tokens, topk_weights=weights).tokens
        assert combined.shape == x.shape
        torch.testing.assert_close(combined, x * weights.sum(1, keepdim=True))
    assert plan.combine_send(arrived.tokens).receive().tokens.shape == x.shape
    assert plan.dispatch(x).tokens.shape == arrived.tokens.shape
    with pytest.raises(tern.InvalidArgumentError, match="2 rows, but 8 were routed"):
        plan.dispatch(few)
    with pytest.raises(tern.InvalidArgumentError, match="topk_weights"):
        plan.combine(arrived.tokens, topk_weights=few_weights)
    with pytest.raises(tern.InvalidStateError, match="prepared for 2 tokens"):
        combine_few()
    dispatch_few()
    torch.testing.assert_close(combine_few().tokens, few * few_weights.sum(1, keepdim=True))
    combined = plan.combine(dispatch_few.result.tokens, topk_weights=few_weights).tokens
    torch.testing.assert_close(combined, few * few_weights.sum(1, keepdim=True))
    pending = plan.dispatch_send(x, topk_idx=idx)
    assert plan.combine(pending.receive().tokens).tokens.shape == x.shape
    assert plan.prepare_combine(arrived.tokens).result.tokens.shape == x.shape


@pytest.mark.parametrize("device", DEVICES)
def test_a_call_that_raises_has_not_routed(device: str) -> None:
    plan = plan_of(device)
    x, idx, _ = batch(device, TOKENS)
    few, few_idx, _ = batch(device, 2)
    for _ in range(3):
        arrived = plan.dispatch(x, topk_idx=idx)
    wrong = [
        lambda: plan.dispatch(x, topk_idx=few_idx),
        lambda: plan.dispatch(few, topk_idx=few_idx, scales=x),
        lambda: plan.dispatch(few, topk_idx=few_idx, lane=7),
        lambda: plan.dispatch_send(few, topk_idx=few_idx, lane=7),
        lambda: plan.prepare_dispatch(few, topk_idx=few_idx, lane=7)(),
        lambda: plan.route(few_idx, lane=7),
        lambda: plan.route(few_idx, device_num_tokens=x),
    ]
    for call in wrong:
        with pytest.raises(tern.InvalidArgumentError):
            call()
        assert plan.combine(arrived.tokens).tokens.shape == x.shape
    exact = plan_of(device, extent="exact")
    exact.route(idx)
    with pytest.raises(tern.InvalidArgumentError, match="extent"):
        exact.dispatch(few, topk_idx=few_idx, out=tern.Dispatched(arrived.tokens))
    assert exact.combine(exact.dispatch(x).tokens).tokens.shape == x.shape


def test_rows_beyond_the_capacity_are_routed_too() -> None:
    plan = plan_of("cpu", layout="rank_major", row_capacity=2)
    x, idx, _ = batch("cpu", TOKENS)
    few, few_idx, _ = batch("cpu", 1)
    plan.dispatch(few, topk_idx=few_idx)
    for _ in range(3):
        with pytest.raises(tern.CapacityExceededError) as caught:
            plan.dispatch(x, topk_idx=idx)
        assert plan.combine(caught.value.result.tokens).tokens.shape == x.shape
        plan.dispatch(few, topk_idx=few_idx)
