# SPDX-License-Identifier: Apache-2.0
"""A byte-level transformer whose feed-forward layers are mixtures of experts: spread over ranks by tern.nn, or whole in one process."""

from __future__ import annotations

from typing import Callable

import tern.nn
import torch
from torch.nn import functional

Tensor = torch.Tensor
MakeMoE = Callable[[], torch.nn.Module]  # of x [batch, context, hidden]; gives (output, balance loss)

VOCABULARY = 256


class DenseMoE(torch.nn.Module):
    """tern.nn.MoELayer's computation with all experts here and no exchange: what the spread model is compared with."""

    def __init__(self, hidden: int, ffn_hidden: int, num_experts: int, num_topk: int, balance_loss: float) -> None:
        super().__init__()
        self.balance_loss = balance_loss
        # In this order, as in MoELayer: the same seed gives the same weights.
        self.router = tern.nn.Router(hidden, num_experts, num_topk)
        self.experts = tern.nn.GroupedMLP(hidden, ffn_hidden, num_experts)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = x.reshape(-1, x.shape[-1])
        routed = self.router(tokens)
        # Entries sorted by expert, tokens in order: what dispatch would bring.
        experts, order = routed.topk_idx.flatten().sort(stable=True)
        source = order // routed.topk_idx.shape[1]
        counts = torch.bincount(experts, minlength=self.experts.w_in.shape[0])
        offsets = functional.pad(counts.cumsum(0), (1, 0))
        rows = self.experts(tokens[source], offsets) * routed.topk_weights.flatten()[order, None]
        output = torch.zeros_like(tokens).index_add(0, source, rows)
        loss = tern.nn.load_balancing_loss(routed.probabilities, routed.topk_idx)
        return output.reshape(x.shape), self.balance_loss * loss


class Attention(torch.nn.Module):
    def __init__(self, hidden: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = torch.nn.Linear(hidden, 3 * hidden, bias=False)
        self.out = torch.nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, context, hidden = x.shape
        heads = self.qkv(x).reshape(batch, context, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        output: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, context, hidden))
        return output


class Block(torch.nn.Module):
    def __init__(self, hidden: int, num_heads: int, make_moe: MakeMoE) -> None:
        super().__init__()
        self.attention_norm, self.moe_norm = torch.nn.LayerNorm(hidden), torch.nn.LayerNorm(hidden)
        self.attention = Attention(hidden, num_heads)
        self.moe = make_moe()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.attention(self.attention_norm(x))
        output, balance_loss = self.moe(self.moe_norm(x))
        return x + output, balance_loss


class LanguageModel(torch.nn.Module):
    """Bytes [batch, context] to logits of the next byte, and the sum of the layers' balance losses."""

    def __init__(self, hidden: int, num_layers: int, num_heads: int, max_context: int, make_moe: MakeMoE) -> None:
        super().__init__()
        self.bytes = torch.nn.Embedding(VOCABULARY, hidden)
        self.positions = torch.nn.Embedding(max_context, hidden)
        for table in (self.bytes, self.positions):
            torch.nn.init.normal_(table.weight, std=0.02)  # as in GPT-2
        self.blocks = torch.nn.ModuleList(Block(hidden, num_heads, make_moe) for _ in range(num_layers))
        self.norm = torch.nn.LayerNorm(hidden)
        self.logits = torch.nn.Linear(hidden, VOCABULARY, bias=False)

    def forward(self, given: Tensor) -> tuple[Tensor, Tensor]:
        x = self.bytes(given) + self.positions.weight[: given.shape[1]]
        balance_loss = x.new_zeros(())
        for block in self.blocks:
            x, loss = block(x)
            balance_loss = balance_loss + loss
        return self.logits(self.norm(x)), balance_loss
