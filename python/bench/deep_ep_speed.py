# SPDX-License-Identifier: Apache-2.0
"""What a caller of the `deep_ep` module waits for, on GPUs or on CPU ranks; every module with that interface can be measured.

    torchrun --nproc_per_node 4 python/bench/deep_ep_speed.py [--tokens 4096] [--low-latency-tokens 128] [--num-sms 24]

Times are in microseconds: of each iteration that of the slowest rank, then median and p99. On GPUs they are between events on
the caller's stream, so what keeps the host busy counts where the GPU runs dry; "graph" is the mean of a CUDA graph of CHAIN
operations in a row. All rows are random, and what comes back is checked: rows bit for bit, sums within the tolerances that
callers of deep_ep have.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from dataclasses import dataclass
from typing import Any, Callable

import deep_ep
import torch
import torch.distributed as dist

CHAIN = 20
WARM_UP = 5
FP8 = torch.float8_e4m3fn


@dataclass
class Run:
    """One rank's view of the measurement."""

    args: argparse.Namespace
    rank: int
    num_ranks: int
    device: torch.device

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def measure(self, name: str, call: Callable[[], object], *, per_call: int = 1) -> None:
        """Calls follow each other, so ranks are no further apart than the operation itself leaves them."""
        dist.barrier()
        marks = [self._mark()]
        for _ in range(WARM_UP + self.args.iters):
            call()
            marks.append(self._mark())
        times = self._between(marks)[WARM_UP:]
        everyone: list[list[float]] = [[] for _ in range(self.num_ranks)]
        dist.all_gather_object(everyone, times)
        slowest = [max(of_ranks) / per_call for of_ranks in zip(*everyone)]
        self.report(name, statistics.median(slowest), statistics.quantiles(slowest, n=100)[98])

    def report(self, name: str, median: float, p99: float) -> None:
        if self.rank == 0:
            print(f"  {name:58} {median:9.1f} {p99:9.1f}", flush=True)

    def title(self, text: str) -> None:
        if self.rank == 0:
            print(f"{text:60} {'median':>9} {'p99':>9}", flush=True)

    def _mark(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, marks: list[Any]) -> list[float]:
        if not self.on_gpu:
            return [(end - begin) * 1e6 for begin, end in zip(marks, marks[1:])]
        marks[-1].synchronize()
        return [begin.elapsed_time(end) * 1e3 for begin, end in zip(marks, marks[1:])]

    def measure_in_graph(self, name: str, call: Callable[[], object]) -> None:
        if not self.on_gpu:
            return
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(CHAIN):
                call()
        self.measure(f"{name}, graph", graph.replay, per_call=CHAIN)

    def everyones(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        mine = tensor.cpu().contiguous()
        parts = [torch.empty_like(mine) for _ in range(self.num_ranks)]
        dist.all_gather(parts, mine)
        return parts


def differ(x: torch.Tensor, y: torch.Tensor) -> float:
    """The measure that callers of deep_ep hold its sums to."""
    x, y = x.double() + 1, y.double() + 1
    return float(1 - 2 * (x * y).sum() / (x * x + y * y).sum())


def cast_to_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    groups = x.float().view(x.shape[0], -1, 128)
    most = groups.abs().amax(dim=2, keepdim=True).clamp(1e-4)
    return (groups * (448 / most)).view(x.shape).to(FP8), (most / 448).squeeze(2)


def routing(run: Run, num_tokens: int, num_experts: int) -> torch.Tensor:
    scores = torch.rand((num_tokens, num_experts), generator=torch.Generator().manual_seed(run.rank + 1))
    return scores.topk(run.args.topk, dim=1).indices.to(run.device)


def bits(rows: torch.Tensor) -> torch.Tensor:
    return rows.view(torch.uint8)


def rows_for(run: Run, x: torch.Tensor, is_token_in_rank: torch.Tensor) -> torch.Tensor:
    """The rows, as bytes, that this rank must have: by source rank, then source token."""
    masks = run.everyones(is_token_in_rank)
    return torch.cat([rows[mask[:, run.rank]] for rows, mask in zip(run.everyones(bits(x)), masks)])


def require_close(run: Run, what: str, sums: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    if not differ(sums, expected) < tolerance:
        raise AssertionError(f"rank {run.rank}: {what} differs by {differ(sums, expected):.2e}")


class NormalMode:
    def __init__(self, run: Run) -> None:
        args = run.args
        self._run, self._args = run, args
        self._buffer = deep_ep.Buffer(dist.group.WORLD, args.buffer_mb << 20, 0)
        self._config = deep_ep.Config(num_sms=args.num_sms)
        self._topk_idx = routing(run, args.tokens, args.experts)
        self._weights = torch.ones(self._topk_idx.shape, device=run.device)
        self._is_token_in_rank = self._buffer.get_dispatch_layout(self._topk_idx, args.experts)[3]

    def _dispatch_anew(self, rows: Any, num_worst_tokens: int = 0) -> tuple:
        per_rank, _, per_expert, in_rank, _ = self._buffer.get_dispatch_layout(self._topk_idx, self._args.experts)
        return self._buffer.dispatch(
            rows,
            num_tokens_per_rank=per_rank,
            num_tokens_per_expert=per_expert,
            is_token_in_rank=in_rank,
            topk_idx=self._topk_idx,
            topk_weights=self._weights,
            num_worst_tokens=num_worst_tokens,
            config=self._config,
        )

    def measure_dispatch(self, name: str, rows: Any) -> None:
        run, worst = self._run, self._args.tokens * self._run.num_ranks
        received, _, _, _, handle, _ = self._dispatch_anew(rows)
        for arrived, sent in zip(received, rows) if isinstance(rows, tuple) else [(received, rows)]:
            if not torch.equal(bits(arrived.contiguous()).cpu(), rows_for(run, sent, self._is_token_in_rank)):
                raise AssertionError(f"rank {run.rank}: rows of the {name} dispatch are not those that were sent")
        run.measure(
            f"{name} dispatch along a handle", lambda: self._buffer.dispatch(rows, handle=handle, config=self._config)
        )
        run.measure(f"{name} layout and dispatch, counts to the host", lambda: self._dispatch_anew(rows))
        run.measure(f"{name} layout and dispatch, num_worst_tokens", lambda: self._dispatch_anew(rows, worst))

    def measure_combine(self, x: torch.Tensor) -> None:
        received, _, _, _, handle, _ = self._dispatch_anew(x)
        combined, _, _ = self._buffer.combine(received, handle, config=self._config)
        require_close(self._run, "combine", combined, x.float() * self._is_token_in_rank.sum(dim=1, keepdim=True), 5e-6)
        self._run.measure("bf16 combine", lambda: self._buffer.combine(received, handle, config=self._config))


def normal_mode(run: Run) -> None:
    x = torch.randn((run.args.tokens, run.args.hidden), device=run.device).to(torch.bfloat16)
    mode = NormalMode(run)
    run.title(f"normal mode, {run.args.tokens} tokens, {run.args.num_sms} SMs")
    mode.measure_dispatch("fp8", cast_to_fp8(x))
    mode.measure_dispatch("bf16", x)
    mode.measure_combine(x)


def low_latency_mode(run: Run, num_tokens: int) -> None:
    args, most = run.args, run.args.low_latency_tokens[-1]
    shape = (most, args.hidden, run.num_ranks, args.low_latency_experts)
    num_bytes = deep_ep.Buffer.get_low_latency_rdma_size_hint(*shape)
    buffer = deep_ep.Buffer(dist.group.WORLD, 0, num_bytes, low_latency_mode=True)
    x = torch.randn((num_tokens, args.hidden), device=run.device).to(torch.bfloat16)
    topk_idx = routing(run, num_tokens, args.low_latency_experts)
    weights = torch.rand(topk_idx.shape, device=run.device)

    def dispatch(use_fp8: bool, hook: bool = False) -> tuple:
        return buffer.low_latency_dispatch(
            x, topk_idx, most, args.low_latency_experts, use_fp8=use_fp8, return_recv_hook=hook
        )

    def combine(rows: torch.Tensor, handle: Any) -> torch.Tensor:
        return buffer.low_latency_combine(rows, topk_idx, weights, handle)[0]

    expected = x.float() * weights.sum(dim=1, keepdim=True)
    received, _, handle, _, _ = dispatch(False)
    require_close(run, "combine", combine(received, handle), expected, 1e-5)
    (rows, scales), _, fp8_handle, _, _ = dispatch(True)
    decoded = rows.float().unflatten(2, (-1, 128)) * scales.unsqueeze(3)
    require_close(run, "combine behind fp8", combine(decoded.flatten(2).to(torch.bfloat16), fp8_handle), expected, 9e-4)

    def pair() -> None:
        rows, _, of_rows, _, _ = dispatch(False)
        combine(rows, of_rows)

    run.title(f"low-latency mode, {num_tokens} tokens")
    for name, call in (
        ("fp8-casting dispatch", lambda: dispatch(True)),
        ("bf16 dispatch", lambda: dispatch(False)),
        ("bf16 dispatch and combine", pair),
    ):
        run.measure(name, call)
        run.measure_in_graph(name, call)
    received, _, handle, _, _ = dispatch(False)
    run.measure("bf16 combine", lambda: combine(received, handle))
    run.measure_in_graph("bf16 combine", lambda: combine(received, handle))

    def with_hooks() -> None:
        dispatch(True, hook=True)[4]()

    run.measure_in_graph("fp8-casting dispatch, sent and then received by its hook", with_hooks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="of normal mode, a rank; 0 leaves it out")
    parser.add_argument("--low-latency-tokens", type=int, nargs="*", default=[1, 8, 32, 128], help="ascending")
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--low-latency-experts", type=int, default=288)
    parser.add_argument("--num-sms", type=int, default=24)
    parser.add_argument("--buffer-mb", type=int, default=1024, help="num_nvl_bytes of normal mode")
    parser.add_argument("--iters", type=int, default=50)
    args = parser.parse_args()

    dist.init_process_group("gloo")
    rank, on_gpu = dist.get_rank(), torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    run = Run(args, rank, dist.get_world_size(), device)
    if rank == 0:
        print(
            f"deep_ep {deep_ep.__version__} on {run.num_ranks} ranks, {device.type}, hidden {args.hidden}, microseconds"
        )
    if args.tokens:
        normal_mode(run)
    for num_tokens in args.low_latency_tokens:
        low_latency_mode(run, num_tokens)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
