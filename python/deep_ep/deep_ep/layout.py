# SPDX-License-Identifier: Apache-2.0
"""Counts of a routing: nothing leaves the rank, and on a GPU the host waits for nothing."""

from __future__ import annotations

import tern
import torch


def check_topk_idx(topk_idx: torch.Tensor) -> None:
    if topk_idx.dim() != 2 or topk_idx.dtype not in (torch.int64, torch.int32):
        raise tern.InvalidArgumentError(
            f"topk_idx is {topk_idx.dtype} of shape {list(topk_idx.shape)}; it must be int64 of [num_tokens, "
            f"num_topk], -1 where there is none"
        )


def dispatch_layout(exchange: tern.Exchange, topk_idx: torch.Tensor, num_experts: int) -> tern.RoutingCounts:
    """tokens_per_node: None inside one node."""
    check_topk_idx(topk_idx)
    if num_experts <= 0 or num_experts % exchange.group.num_ranks != 0:
        raise tern.InvalidArgumentError(
            f"num_experts is {num_experts}; it must be positive and divisible by the {exchange.group.num_ranks} ranks"
        )
    wanted = ["tokens_per_rank", "tokens_per_expert", "token_in_rank"]
    if exchange.group.num_nodes > 1:
        wanted.append("tokens_per_node")
    return exchange.count_routing(topk_idx, num_experts, wanted=wanted)


def is_token_in_node(in_rank: torch.Tensor, num_nodes: int) -> torch.Tensor:
    """bool [T, nodes] of bool [T, R]."""
    return in_rank.reshape(in_rank.shape[0], num_nodes, in_rank.shape[1] // num_nodes).any(dim=2)
