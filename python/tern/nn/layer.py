# SPDX-License-Identifier: Apache-2.0
"""A Mixture-of-Experts layer: router, dispatch, this rank's experts, combine."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .. import _c
from ..errors import UnsupportedError
from .experts import GroupedMLP
from .ops import moe_combine, moe_dispatch
from .plans import PlanPool

Tensor = torch.Tensor


class Routed(NamedTuple):
    """topk_idx: i64 [..., top-k]. topk_weights: f32 [..., top-k], sum to 1. probabilities: f32 [..., num_experts]."""

    topk_idx: Tensor
    topk_weights: Tensor
    probabilities: Tensor


class MoEOutput(NamedTuple):
    """output: as the input. balance_loss: f32 scalar, already multiplied by its coefficient; 0 without one."""

    output: Tensor
    balance_loss: Tensor


class Router(torch.nn.Module):
    """Chooses each token's experts: the top-k of a linear map in FP32, also under autocast, weighted by the softmax over those k. Its
    parameters are to be equal on all ranks."""

    def __init__(
        self, hidden: int, num_experts: int, num_topk: int, *, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.num_topk = num_topk
        self.linear = torch.nn.Linear(hidden, num_experts, bias=False, device=device, dtype=dtype)

    def forward(self, tokens: Tensor) -> Routed:
        with torch.autocast("cpu" if tokens.is_meta else tokens.device.type, enabled=False):
            logits = torch.nn.functional.linear(tokens.float(), self.linear.weight.float())
            chosen, topk_idx = logits.topk(self.num_topk, dim=-1)
            return Routed(topk_idx, chosen.softmax(dim=-1), logits.softmax(dim=-1))


def load_balancing_loss(probabilities: Tensor, topk_idx: Tensor) -> Tensor:
    """E * sum over experts of f_e * P_e, which is 1 where tokens spread evenly; the mean over leading dimensions.

    f_e: the share of entries that go to expert e; P_e: the mean probability of e. Source: Fedus, Zoph and Shazeer 2021, "Switch
    Transformers", arXiv:2101.03961, equations 4 to 6, with the entries of all k in f as in Lepikhin et al. 2020, "GShard",
    arXiv:2006.16668. probabilities: [..., tokens, E]. topk_idx: [..., tokens, k].
    """
    num_experts = probabilities.shape[-1]
    entries = torch.nn.functional.one_hot(topk_idx, num_experts).to(probabilities.dtype)
    # A rank without tokens has a loss of 0 rather than 0 / 0.
    num_tokens = max(probabilities.shape[-2], 1)
    share = entries.sum(dim=(-3, -2)) / (num_tokens * topk_idx.shape[-1])
    mean_probability = probabilities.sum(dim=-2) / num_tokens
    return num_experts * (share * mean_probability).sum(dim=-1).mean()


class MoELayer(torch.nn.Module):
    """A Mixture-of-Experts layer whose experts are spread over the ranks of the pool's exchange; no token is dropped.

        plans = PlanPool(exchange, max_tokens=4096, num_experts=64, num_topk=2)   # one for all layers
        layer = MoELayer(plans, hidden=1024, ffn_hidden=2048, balance_loss=0.01)
        y, balance_loss = layer(x)                                                # collective

    x: [..., hidden], on this rank; any number of tokens up to max_tokens, none too. Parameters: router (equal on all ranks: all-reduce
    its gradients) and experts (this rank's; see expert_parameters). Expert e of all lives on rank e // (num_experts // num_ranks).
    """

    def __init__(
        self,
        plans: PlanPool,
        *,
        hidden: int,
        ffn_hidden: int,
        activation: str = "swiglu",
        balance_loss: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if plans.layout != _c.Layout.EXPERT_MAJOR:
            raise UnsupportedError(
                f"MoELayer works on expert_major rows, but the pool's layout is {plans.layout.name.lower()}"
            )
        self.plans = plans
        self.balance_loss = balance_loss
        self.router = Router(hidden, plans.num_experts, plans.num_topk, device=device, dtype=dtype)
        self.experts = GroupedMLP(
            hidden,
            ffn_hidden,
            plans.num_local_experts,
            first_expert=plans.first_local_expert,
            num_experts_of_all_ranks=plans.num_experts,
            activation=activation,
            device=device,
            dtype=dtype,
        )

    def forward(self, x: Tensor) -> MoEOutput:
        tokens = x.reshape(-1, x.shape[-1])
        routed = self.router(tokens)
        routing = self.plans.route(routed.topk_idx)
        arrived = moe_dispatch(tokens, routing, routed.topk_weights)
        rows = self.experts(arrived.rows, arrived.expert_offsets)
        weighted = (rows * arrived.row_weights[:, None]).to(rows.dtype)
        output = moe_combine(weighted, routing).reshape(x.shape)
        if self.balance_loss == 0:
            return MoEOutput(output, routed.probabilities.new_zeros(()))
        return MoEOutput(output, self.balance_loss * load_balancing_loss(routed.probabilities, routed.topk_idx))
