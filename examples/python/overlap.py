# SPDX-License-Identifier: Apache-2.0
"""Hides communication behind compute: two micro-batches, and operations in two phases.

A phase "send" puts the data on their way and returns; nothing of Tern runs until "receive", which waits for what has not come yet. So
while one micro-batch is on its way, the experts work on the other:

    micro-batch 0   send  | ......... | receive  experts  send | ......... | receive
    micro-batch 1         | send .... |          (under way)   | receive  experts ...

python examples/python/overlap.py              4 ranks as threads; prints what it took, one after the other and overlapped
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import tern
import torch

EXPERTS, TOPK = 8, 2


class Layer:
    """A rank's experts, and a plan for each of the two micro-batches: both are under way at once."""

    def __init__(self, group: tern.Group, tokens: int, hidden: int) -> None:
        # Two sends on one lane before the first receive are allowed, with nothing else of the lane between them.
        exchange = tern.Exchange(
            group, device="cpu", max_tokens=tokens, max_row_bytes=4 * hidden, max_topk=TOPK, max_experts=EXPERTS
        )
        self.plans = [
            exchange.plan(max_tokens=tokens, num_experts=EXPERTS, num_topk=TOPK, layout="expert_major")
            for _ in range(2)
        ]
        seed = torch.Generator().manual_seed(group.rank)
        self.w = torch.randn(self.plans[0].num_local_experts, hidden, hidden, generator=seed) / hidden**0.5

    def experts(self, arrived: tern.Dispatched) -> torch.Tensor:
        assert arrived.expert_offsets is not None  # expert_major brings them
        bounds = arrived.expert_offsets.tolist()
        rows = torch.empty_like(arrived.tokens)
        for expert, (begin, end) in enumerate(zip(bounds, bounds[1:])):
            torch.mm(arrived.tokens[begin:end], self.w[expert], out=rows[begin:end])
        return rows

    def route(self, topk_idx: list[torch.Tensor]) -> None:
        for plan, idx in zip(self.plans, topk_idx):
            plan.route(idx)

    def one_after_the_other(self, x: list[torch.Tensor], weights: list[torch.Tensor]) -> list[torch.Tensor]:
        results = []
        for plan, tokens, own in zip(self.plans, x, weights):
            arrived = plan.dispatch(tokens, topk_weights=own)
            results.append(plan.combine(self.experts(arrived), weighting="dispatch").tokens)
        return results

    def overlapped(self, x: list[torch.Tensor], weights: list[torch.Tensor]) -> list[torch.Tensor]:
        first, second = self.plans
        # Both micro-batches set off. While the experts work on the first, the second arrives.
        coming = [plan.dispatch_send(tokens, topk_weights=own) for plan, tokens, own in zip(self.plans, x, weights)]
        rows = self.experts(coming[0].receive())
        arrived = coming[1].receive()
        # The first one's results travel while the experts work on the second.
        going = first.combine_send(rows, weighting="dispatch")
        rows = self.experts(arrived)
        results = [going.receive().tokens]
        results.append(second.combine(rows, weighting="dispatch").tokens)
        return results


def run_rank(group: tern.Group, args: argparse.Namespace, together: threading.Barrier) -> dict[str, float]:
    layer = Layer(group, args.tokens, args.hidden)
    seed = torch.Generator().manual_seed(100 + group.rank)
    x = [torch.randn(args.tokens, args.hidden, generator=seed) for _ in range(2)]
    idx = [torch.rand(args.tokens, EXPERTS, generator=seed).topk(TOPK).indices for _ in range(2)]
    weights = [torch.rand(args.tokens, TOPK, generator=seed) for _ in range(2)]
    layer.route(idx)
    times: dict[str, float] = {}
    results: list[Any] = []
    for name, run in (("one after the other", layer.one_after_the_other), ("overlapped", layer.overlapped)):
        run(x, weights)  # once to warm up
        together.wait(timeout=60)
        begin = time.perf_counter()
        for _ in range(args.repeat):
            found = run(x, weights)
        times[name] = (time.perf_counter() - begin) / args.repeat
        results.append(found)
    assert all(torch.equal(one, other) for one, other in zip(*results)), "both ways give the same bits"
    return times


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512, help="of a micro-batch on each rank")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(1)  # ranks are threads, and share the cores
    together = threading.Barrier(args.ranks)
    with ThreadPoolExecutor(args.ranks) as ranks:
        found = list(ranks.map(lambda group: run_rank(group, args, together), tern.Group.local(args.ranks)))
    for name in found[0]:
        print(f"{name}: {1e3 * max(times[name] for times in found):.2f} ms for two micro-batches, equal results")
    print(
        "What is gained is the time of the copies, where they run beside the experts: on GPUs, or with cores to spare."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
