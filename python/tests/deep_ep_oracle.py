# SPDX-License-Identifier: Apache-2.0
"""What deep_ep must return, by plain torch loops over the inputs of all ranks. Every rank makes everybody's inputs from a seed."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

FP8 = torch.float8_e4m3fn


@dataclass
class Inputs:
    """Of one rank."""

    x: torch.Tensor
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor


@dataclass
class Case:
    num_ranks: int
    num_tokens: list[int]  # of each rank
    hidden: int
    num_topk: int
    num_experts: int
    seed: int = 1

    def __post_init__(self):
        self.all = [self._inputs(rank) for rank in range(self.num_ranks)]

    @property
    def num_local(self):
        return self.num_experts // self.num_ranks

    @property
    def ranks_per_node(self):
        return int(os.environ.get("TERN_RANKS_PER_NODE") or 0) or self.num_ranks

    @property
    def num_nodes(self):
        return -(-self.num_ranks // self.ranks_per_node)

    def _inputs(self, rank):
        g = torch.Generator().manual_seed(1000 * self.seed + rank)
        count = self.num_tokens[rank]
        x = torch.randn((count, self.hidden), generator=g).to(torch.bfloat16)
        if self.num_topk <= self.num_experts:
            idx = torch.rand((count, self.num_experts), generator=g).argsort(dim=1)[:, : self.num_topk].clone()
        else:
            idx = torch.randint(0, self.num_experts, (count, self.num_topk), generator=g)
        idx[torch.rand(idx.shape, generator=g) < 0.1] = -1
        return Inputs(x, idx, torch.rand((count, self.num_topk), generator=g))

    def with_duplicates(self):
        for inputs in self.all:
            inputs.topk_idx[::3, 1] = inputs.topk_idx[::3, 0]
        return self

    def ranks_of(self, source, token):
        return sorted({int(e) // self.num_local for e in self.all[source].topk_idx[token] if e >= 0})

    def nodes_of(self, source, token):
        return sorted({rank // self.ranks_per_node for rank in self.ranks_of(source, token)})

    def messages(self, rank):
        """(source, token) of the rows that arrive at `rank` in normal mode."""
        return [(s, t) for s in range(self.num_ranks) for t in range(self.num_tokens[s]) if rank in self.ranks_of(s, t)]

    def entries(self, rank, local):
        """(source, token) of the rows of a local expert in low-latency mode; duplicates come twice."""
        expert = rank * self.num_local + local
        found = []
        for s in range(self.num_ranks):
            found += [(s, int(t)) for t, _ in (self.all[s].topk_idx == expert).nonzero()]
        return found

    def local_topk(self, rank, source, token):
        """Local experts and weights of one row as `rank` gets them."""
        inputs = self.all[source]
        idx = inputs.topk_idx[token]
        mine = (idx >= 0) & (idx // self.num_local == rank)
        return torch.where(mine, idx - rank * self.num_local, -1), torch.where(mine, inputs.topk_weights[token], 0.0)


def stack(rows, like, shape):
    return torch.stack(rows) if rows else like.new_empty((0, *shape))


def diff(x, y):
    x, y = x.double() + 1, y.double() + 1
    denominator = (x * x + y * y).sum()
    return 0.0 if denominator == 0 else float(1 - 2 * (x * y).sum() / denominator)


def cast(x, kind):
    """fp8 values and scales [T, H / 128] (ue8m0: exponents, uint8), by the formulas."""
    blocks = x.float().view(x.shape[0], x.shape[1] // 128, 128)
    amax = blocks.abs().amax(dim=2).clamp(min=1e-4)
    scale = amax * torch.tensor(1.0 / 448.0, dtype=torch.float32)
    exponent = torch.ceil(torch.log2(scale.double()))
    if kind == "f32":
        values = blocks * (torch.tensor(448.0) / amax).unsqueeze(2)
    else:
        scale = torch.pow(2.0, exponent).float()
        values = blocks / scale.unsqueeze(2)
    values = values.clamp(-448, 448).view(x.shape).to(FP8)
    return values, (exponent + 127).to(torch.uint8) if kind == "ue8m0" else scale


def uncast(values, scales):
    """bf16 rows from fp8 and f32 scales [..., H / 128]."""
    blocks = values.float().view(*values.shape[:-1], values.shape[-1] // 128, 128)
    return (blocks * scales.unsqueeze(-1)).view(values.shape).to(torch.bfloat16)
