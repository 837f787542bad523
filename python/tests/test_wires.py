# SPDX-License-Identifier: Apache-2.0
"""What the rows of a combine are on their way: 10-bit logarithms, and sums in FP32."""

from __future__ import annotations

import pytest
import tern
from ranks import as_threads

torch = pytest.importorskip("torch", reason="torch is not installed")

from test_operations import LAYOUTS, RANKS, batch, exchange_of, plan_of  # noqa: E402


@pytest.mark.parametrize("mode", ["hierarchical", "exact"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_travel_as_logarithms(layout: str, mode: str) -> None:
    def body(group: tern.Group) -> None:
        exchange = exchange_of(group, "cpu")
        plan = plan_of(exchange, layout, "exact")
        b = batch(group.rank, torch.bfloat16)
        plan.route(b.idx)
        arrived = plan.dispatch(b.x)
        weights = None if layout == "rank_major" else b.weights
        plain = plan.combine(arrived.tokens, topk_weights=weights, mode=mode).tokens.double()
        encoded = plan.combine(arrived.tokens, topk_weights=weights, mode=mode, wire="log10bit").tokens.double()
        # All entries of a token have its own row here, so the error of the sum is that of one.
        torch.testing.assert_close(encoded, plain, rtol=0.025, atol=0.001)
        if plain.numel() > 0:
            assert not torch.equal(encoded, plain)
            assert float((encoded - plain).norm() / plain.norm()) < 0.006
        sent = plan.combine_send(arrived.tokens, topk_weights=weights, mode=mode, wire=tern.Wire.LOG10BIT)
        assert torch.equal(sent.receive().tokens.double(), encoded)

    as_threads(RANKS, body)


@pytest.mark.parametrize("ranks_per_node", [0, 1])
def test_sums_travel_in_fp32(ranks_per_node: int) -> None:
    def body(group: tern.Group) -> None:
        exchange = exchange_of(group, "cpu")
        plan = plan_of(exchange, "expert_major", "exact")
        b = batch(group.rank, torch.bfloat16)
        plan.route(b.idx)
        arrived = plan.dispatch(b.x)
        # Entries of a token are the same row here: the sum is that row by the sum of the weights, if nothing is rounded on the way.
        combined = plan.combine(arrived.tokens, topk_weights=b.weights, wire="fp32").tokens
        weights = torch.where(b.idx >= 0, b.weights, 0.0)
        want = sum(
            (b.x.float() * weights[:, k : k + 1] for k in range(weights.shape[1])), torch.zeros_like(b.x.float())
        )
        torch.testing.assert_close(combined.float(), want, rtol=2**-8 * 1.01, atol=0.0)
        sent = plan.combine_send(arrived.tokens, topk_weights=b.weights, wire=tern.Wire.FP32)
        assert torch.equal(sent.receive().tokens, combined)

    as_threads(RANKS, body, ranks_per_node=ranks_per_node)
