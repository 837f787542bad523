# SPDX-License-Identifier: Apache-2.0
"""Ranks as processes, on GPUs where there is one for each, else on the CPU.

torchrun --nproc-per-node 4 examples/python/hello_torchrun.py
"""

from __future__ import annotations

import os
import sys

import tern
import torch
import torch.distributed as dist

TOKENS, HIDDEN, EXPERTS_PER_RANK, TOPK = 16, 256, 2, 2


def run_rank(device: torch.device) -> bool:
    group = tern.Group.from_torch()
    num_experts = EXPERTS_PER_RANK * group.num_ranks
    exchange = tern.Exchange(
        group, device=device, max_tokens=TOKENS, max_row_bytes=2 * HIDDEN, max_topk=TOPK, max_experts=num_experts
    )
    plan = exchange.plan(max_tokens=TOKENS, num_experts=num_experts, num_topk=TOPK, layout="expert_major")

    tokens = torch.full((TOKENS, HIDDEN), 1.0 + group.rank, dtype=torch.bfloat16, device=device)
    gate = torch.randn(TOKENS, num_experts, device=device).softmax(dim=-1)
    weights, experts = gate.topk(TOPK, dim=-1)
    weights = torch.full_like(weights, 1 / TOPK)

    plan.route(experts)
    arrived = plan.dispatch(tokens, topk_weights=weights)
    rows = 2 * arrived.tokens
    results = plan.combine(rows, weighting="dispatch").tokens

    print(f"{group}: {len(rows)} rows on {device}; sent {tokens[0, 0]:g}, got {results[0, 0]:g}\n", end="", flush=True)
    return bool((results == 2 * tokens).all())


def main() -> int:
    if "RANK" not in os.environ:
        print("start it with torchrun: torchrun --nproc-per-node 4 examples/python/hello_torchrun.py", file=sys.stderr)
        return 2
    local_rank, num_local = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    on_gpus = torch.cuda.device_count() >= num_local
    device = torch.device("cuda", local_rank) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo")
    right = run_rank(device)
    dist.destroy_process_group()
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
