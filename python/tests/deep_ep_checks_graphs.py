# SPDX-License-Identifier: Apache-2.0
"""What only GPU ranks have: CUDA graphs, and streams that run apart. Run by deep_ep_ranks.py, on tensors of the GPU."""

from __future__ import annotations

import torch
from deep_ep import Buffer
from deep_ep_checks_low_latency import MOST, check_combined
from deep_ep_checks_low_latency import make_case as make_low_latency_case
from deep_ep_checks_normal import expect_sum, make_case

KILLED = ()
TIMEOUT_MS = 20_000


def on_gpu(case, rank):
    own = case.all[rank]
    return own.x.cuda(), own.topk_idx.cuda(), own.topk_weights.cuda()


def replayed(ranks, step, inputs, cases, check):
    """Captures `step` behind runs to warm up, by which its calls look like ones before, and replays it with the inputs of each case."""
    for _ in range(4):
        step()
    torch.cuda.synchronize()
    ranks.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for case in cases:
        for tensor, new in zip(inputs, on_gpu(case, ranks.rank)):
            tensor.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        check(case, ranks.rank, out.cpu())


def low_latency_graph(ranks):
    cases = [make_low_latency_case(ranks, seed=seed) for seed in range(4)]
    buffer = ranks.low_latency(cases[0], MOST)._buffer
    x, idx, weights = inputs = on_gpu(cases[0], ranks.rank)

    def step():
        rows, _, handle, _, hook = buffer.low_latency_dispatch(
            x, idx, MOST, cases[0].num_experts, use_fp8=False, return_recv_hook=True
        )
        hook()
        combined, _, hook = buffer.low_latency_combine(rows, idx, weights, handle, return_recv_hook=True)
        hook()
        return combined

    replayed(ranks, step, inputs, cases, check_combined)


def normal_graph(ranks):
    cases = [make_case(ranks, seed=seed) for seed in range(4)]
    buffer = ranks.normal()._buffer
    x, idx, weights = inputs = on_gpu(cases[0], ranks.rank)

    def step():
        per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, cases[0].num_experts)
        rows, _, _, _, handle, _ = buffer.dispatch(
            x,
            num_tokens_per_rank=per_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=idx,
            topk_weights=weights,
            num_worst_tokens=sum(cases[0].num_tokens),
        )
        return buffer.combine(rows, handle)[0]

    replayed(ranks, step, inputs, cases, expect_sum)


def streams_apart(ranks):
    """Events alone order what the caller's streams do and what the buffer does."""
    case = make_case(ranks, hidden=2048)
    buffer = ranks.normal(hidden=2048)._buffer
    comm = {"async_finish": True, "allocate_on_comm_stream": True}
    side = torch.cuda.Stream()
    for _ in range(8):
        x, idx, weights = on_gpu(case, ranks.rank)
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            late = torch.zeros_like(x)
            torch.cuda._sleep(2_000_000)
            late.copy_(x)
            del x
            ready = Buffer.capture()
        per_rank, _, per_expert, in_rank, event = buffer.get_dispatch_layout(
            idx, case.num_experts, previous_event=ready, **comm
        )
        routed = {"num_tokens_per_rank": per_rank, "is_token_in_rank": in_rank, "num_tokens_per_expert": per_expert}
        rows, _, _, _, handle, event = buffer.dispatch(
            late, topk_idx=idx, topk_weights=weights, previous_event=event, **routed, **comm
        )
        del late, idx, weights
        combined, _, event = buffer.combine(rows, handle, previous_event=event, **comm)
        del rows, handle
        event.current_stream_wait()
        expect_sum(case, ranks.rank, combined.cpu())


def streams_in_turn(ranks):
    """Low-latency calls that look like ones before, on one stream and then on another: each is behind what its own stream does, and a hook runs
    on the stream of its call."""
    case = make_low_latency_case(ranks)
    buffer = ranks.low_latency(case, MOST)._buffer
    x, idx, weights = on_gpu(case, ranks.rank)
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    for step in range(16):
        own, other = streams if step // 4 % 2 else reversed(streams)
        with torch.cuda.stream(own):
            late = torch.zeros_like(x)
            torch.cuda._sleep(2_000_000)
            late.copy_(x)
            rows, _, handle, _, hook = buffer.low_latency_dispatch(
                late, idx, MOST, case.num_experts, use_fp8=False, return_recv_hook=step % 2 == 1
            )
            del late
            if hook is not None:
                with torch.cuda.stream(other):
                    hook()
            combined, _, _ = buffer.low_latency_combine(rows, idx, weights, handle)
            check_combined(case, ranks.rank, combined.cpu())


CHECKS = {check.__name__: check for check in (low_latency_graph, normal_graph, streams_apart, streams_in_turn)}
