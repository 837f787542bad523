# SPDX-License-Identifier: Apache-2.0
"""Host time of a dispatch + combine pair from Python, in eager mode, with one rank, which never waits for another.

    python python/bench/host_overhead.py [--device cuda] [--tokens 1] [--hidden 7168]

Five ways: outputs allocated by the call, outputs given, outputs given and other inputs at every call, both operations prepared, and the two
C functions alone with arguments that are there already, which is what Python comes on top of. Then the low-latency pair of the deep_ep module:
of bf16 rows, with a cast to fp8, and in halves by hooks. On a GPU the time is that of enqueueing: the GPU is waited for between the batches and not within.
On a CPU rank the C functions also do the work, so use few small tokens.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
import types
from typing import Any, Callable

import tern
import torch
from tern._library import lib

CALLS_IN_BATCH = 20


def measure(call: Callable[[], object], num_batches: int, settle: Callable[[], None]) -> tuple[float, float]:
    """Median and p99 over batches of the time of one call, in microseconds."""
    times = []
    for batch in range(-num_batches // 10, num_batches):  # the first tenth is warm-up
        start = time.perf_counter_ns()
        for _ in range(CALLS_IN_BATCH):
            call()
        elapsed = time.perf_counter_ns() - start
        settle()
        if batch >= 0:
            times.append(elapsed / CALLS_IN_BATCH / 1000)
    return statistics.median(times), statistics.quantiles(times, n=100)[98]


def deep_ep_ways(
    given: argparse.Namespace, x: torch.Tensor, idx: torch.Tensor, weights: torch.Tensor
) -> dict[str, Callable[[], None]]:
    os.environ["TERN_DEEP_EP_DEVICE"] = x.device.type
    import deep_ep

    alone = types.SimpleNamespace(Get_rank=lambda: 0, Get_size=lambda: 1, allgather=lambda own: [own])
    shape = (given.tokens, given.hidden, 1, given.experts)
    num_bytes = deep_ep.Buffer.get_low_latency_rdma_size_hint(*shape)
    buffer = deep_ep.Buffer(None, 0, num_bytes, low_latency_mode=True, comm=alone)

    def dispatch(use_fp8: bool = False, hook: bool = False) -> tuple[Any, ...]:
        return buffer.low_latency_dispatch(x, idx, given.tokens, given.experts, use_fp8=use_fp8, return_recv_hook=hook)

    rows = dispatch()[0]

    def pair() -> None:
        arrived = dispatch()
        buffer.low_latency_combine(arrived[0], idx, weights, arrived[2])

    def pair_with_fp8() -> None:
        buffer.low_latency_combine(rows, idx, weights, dispatch(use_fp8=True)[2])

    def pair_by_hooks() -> None:
        arrived = dispatch(hook=True)
        arrived[4]()
        buffer.low_latency_combine(arrived[0], idx, weights, arrived[2], return_recv_hook=True)[2]()

    return {"deep_ep": pair, "deep_ep, fp8": pair_with_fp8, "deep_ep by hooks": pair_by_hooks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--topk", type=int, default=2)
    parser.add_argument("--batches", type=int, default=1000)
    parser.add_argument(
        "--own-stream", action="store_true", help="on a stream of torch's, and not on the default stream"
    )
    given = parser.parse_args()

    group = tern.Group.local(1)[0]
    sizes = {"max_tokens": given.tokens, "max_topk": given.topk, "max_experts": given.experts}
    exchange = tern.Exchange(group, device=given.device, max_row_bytes=2 * given.hidden, **sizes)
    plan = exchange.plan(
        max_tokens=given.tokens, num_experts=given.experts, num_topk=given.topk, layout="expert_padded", extent="worst"
    )
    device = torch.device("cpu" if exchange.cuda_index is None else f"cuda:{exchange.cuda_index}")
    if exchange.is_cuda:
        torch.cuda.set_device(device)
    if given.own_stream:
        torch.cuda.set_stream(torch.cuda.Stream(device))
    x = torch.randn(given.tokens, given.hidden, device=device).to(torch.bfloat16)
    idx = torch.stack([torch.randperm(given.experts)[: given.topk] for _ in range(given.tokens)]).to(device)
    weights = torch.rand(given.tokens, given.topk, device=device)
    arrived = plan.dispatch(x, topk_idx=idx)
    y = plan.combine(arrived.tokens, topk_weights=weights).tokens

    def allocating() -> None:
        plan.combine(plan.dispatch(x, topk_idx=idx).tokens, topk_weights=weights)

    def into_given() -> None:
        plan.dispatch(x, topk_idx=idx, out=arrived)
        plan.combine(arrived.tokens, topk_weights=weights, out=y)

    others = itertools.cycle([[array.clone() for array in (x, idx, weights)] for _ in range(7)])

    def others_into_given() -> None:
        other_x, other_idx, other_weights = next(others)
        plan.dispatch(other_x, topk_idx=other_idx, out=arrived)
        plan.combine(arrived.tokens, topk_weights=other_weights, out=y)

    into_given()
    dispatch_call, combine_call = (
        next(reversed(plan._dispatch_calls.values())),
        next(iter(plan._combine_calls.values())),
    )

    def c_functions() -> None:
        lib.tern_dispatch(plan._handle, dispatch_call.pointer, plan._launch_pointer)
        lib.tern_combine(plan._handle, combine_call.pointer, plan._launch_pointer)

    prepared_dispatch = plan.prepare_dispatch(x, topk_idx=idx, out=arrived)
    prepared_combine = plan.prepare_combine(arrived.tokens, topk_weights=weights, out=y)

    def prepared() -> None:
        prepared_dispatch()
        prepared_combine()

    def settle() -> None:
        if exchange.is_cuda:
            torch.cuda.synchronize(device)

    print(f"dispatch + combine on {device}, {given.tokens} tokens of {given.hidden} bf16, microseconds on the host")
    ways = {
        "C functions": c_functions,
        "prepared": prepared,
        "outputs given": into_given,
        "and other inputs": others_into_given,
        "outputs allocated": allocating,
        **deep_ep_ways(given, x, idx, weights),
    }
    for name, call in ways.items():
        median, p99 = measure(call, given.batches, settle)
        print(f"  {name:18} median {median:6.2f}   p99 {p99:6.2f}")
    assert exchange.state().health == tern.Health.OK


if __name__ == "__main__":
    main()
