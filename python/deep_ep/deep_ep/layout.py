# SPDX-License-Identifier: Apache-2.0
"""Counts of a routing, by torch: nothing leaves the rank, and on a GPU the host waits for nothing. T tokens, K top-k, R
ranks, E experts."""

from __future__ import annotations

from typing import NamedTuple

import tern
import torch


class DispatchLayout(NamedTuple):
    num_tokens_per_rank: torch.Tensor  # i32 [R]
    num_tokens_per_expert: torch.Tensor  # i32 [E], entries: a duplicate counts again
    is_token_in_rank: torch.Tensor  # bool [T, R]


def check_topk_idx(topk_idx: torch.Tensor) -> None:
    if topk_idx.dim() != 2 or topk_idx.dtype not in (torch.int64, torch.int32):
        raise tern.InvalidArgumentError(
            f"topk_idx is {topk_idx.dtype} of shape {list(topk_idx.shape)}; it must be int64 of [num_tokens, "
            f"num_topk], -1 where there is none"
        )


def is_token_in_rank(topk_idx: torch.Tensor, num_experts: int, num_ranks: int) -> torch.Tensor:
    ranks = torch.div(_experts(topk_idx, num_experts), num_experts // num_ranks, rounding_mode="floor")
    flags = torch.zeros((topk_idx.shape[0], num_ranks + 1), dtype=torch.bool, device=topk_idx.device)
    flags.scatter_(1, ranks, True)
    return flags[:, :num_ranks].contiguous()


def num_tokens_per_node(in_rank: torch.Tensor, num_nodes: int) -> torch.Tensor:
    """i32 [nodes]: a token counts once for each node that has one of its ranks."""
    return is_token_in_node(in_rank, num_nodes).sum(dim=0, dtype=torch.int32)


def is_token_in_node(in_rank: torch.Tensor, num_nodes: int) -> torch.Tensor:
    """[T, nodes]"""
    return in_rank.reshape(in_rank.shape[0], num_nodes, in_rank.shape[1] // num_nodes).any(dim=2)


def dispatch_layout(topk_idx: torch.Tensor, num_experts: int, num_ranks: int) -> DispatchLayout:
    check_topk_idx(topk_idx)
    if num_experts <= 0 or num_experts % num_ranks != 0:
        raise tern.InvalidArgumentError(
            f"num_experts is {num_experts}; it must be positive and divisible by the {num_ranks} ranks"
        )
    in_rank = is_token_in_rank(topk_idx, num_experts, num_ranks)
    per_expert = torch.zeros(num_experts + 1, dtype=torch.int32, device=topk_idx.device)
    experts = _experts(topk_idx, num_experts).flatten()
    per_expert.scatter_add_(0, experts, torch.ones_like(experts, dtype=torch.int32))
    return DispatchLayout(in_rank.sum(dim=0, dtype=torch.int32), per_expert[:num_experts].contiguous(), in_rank)


def _experts(topk_idx: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Expert numbers, num_experts where there is none."""
    return torch.where((topk_idx >= 0) & (topk_idx < num_experts), topk_idx, num_experts).to(torch.int64)
