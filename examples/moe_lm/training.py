# SPDX-License-Identifier: Apache-2.0
"""One rank's training."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tern
import tern.nn
import torch
from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

from . import text
from .checkpoint import Checkpoints, write_losses
from .launch import INTERRUPTED, StopRequest
from .model import DenseMoE, LanguageModel
from .ranks import Ranks

Tensor = torch.Tensor

MAX_GRADIENT_NORM = 1.0
WARMUP_STEPS = 20


def device_of(args: argparse.Namespace, ranks: Ranks) -> torch.device:
    if args.device == "cuda" or (args.device == "auto" and torch.cuda.device_count() >= ranks.num_ranks):
        device = torch.device("cuda", ranks.local_rank)
        torch.cuda.set_device(device)
        return device
    torch.set_num_threads(args.threads)
    return torch.device("cpu")


def make_model(args: argparse.Namespace, ranks: Ranks, device: torch.device) -> LanguageModel:
    """The same weights on every rank, and the same model whether its experts are spread or not, for one seed."""
    if args.dense:

        def make_moe() -> torch.nn.Module:
            return DenseMoE(args.hidden, args.ffn_hidden, args.experts, args.topk, args.balance_loss)

    else:
        max_tokens = args.batch // ranks.num_ranks * args.context
        group = tern.Group.from_torch() if ranks.num_ranks > 1 else tern.Group.local(1)[0]
        exchange = tern.Exchange(
            group,
            device=device,
            max_tokens=max_tokens,
            max_row_bytes=4 * args.hidden,
            max_topk=args.topk,
            max_experts=args.experts,
        )
        plans = tern.nn.PlanPool(exchange, max_tokens=max_tokens, num_experts=args.experts, num_topk=args.topk)

        def make_moe() -> torch.nn.Module:
            return tern.nn.MoELayer(
                plans, hidden=args.hidden, ffn_hidden=args.ffn_hidden, balance_loss=args.balance_loss
            )

    torch.manual_seed(args.seed)
    return LanguageModel(args.hidden, args.layers, args.heads, args.context, make_moe).to(device)


class Trainer:
    """The global batch of a step is a function of the seed and the step. Each rank has its share of it; the loss is the mean over all.

    In one process without expert parallelism the shares are taken one behind the other (args.shards), and gradients are added up.
    """

    def __init__(self, args: argparse.Namespace, ranks: Ranks) -> None:
        self.args, self.ranks = args, ranks
        self.device = device_of(args, ranks)
        self.text = text.load(args.text or text.default_paths())
        self.model = make_model(args, ranks, self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1)
        self.num_shards = args.shards if args.dense else ranks.num_ranks
        experts = {id(parameter) for _, parameter in tern.nn.expert_parameters(self.model)}
        self.experts = [p for p in self.model.parameters() if id(p) in experts]
        self.shared = [p for p in self.model.parameters() if id(p) not in experts]

    def shares(self, step: int) -> Iterator[Tensor]:
        batch = text.draw(self.text, self.args.batch, self.args.context, self.args.seed * 1_000_003 + step)
        shares = batch.to(self.device).chunk(self.num_shards)
        return iter(shares) if self.args.dense else iter([shares[self.ranks.rank]])

    def step(self, step: int) -> float:
        """Returns this rank's part of the mean loss over the global batch."""
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for share in self.shares(step):
            logits, balance_loss = self.model(share[:, :-1])
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), share[:, 1:].flatten())
            # Divided here, gradients of experts are those of the mean too: they sum over the tokens of all ranks by themselves.
            ((loss + balance_loss) / self.num_shards).backward()
            total += loss.item() / self.num_shards
        self.reduce_gradients()
        self.clip_gradients()
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.lr * min(1.0, (step + 1) / WARMUP_STEPS)
        self.optimizer.step()
        return total

    def reduce_gradients(self) -> None:
        """Gradients of what all ranks have are summed over them, in one piece. Those of experts are whole already."""
        gradients = [p.grad for p in self.shared if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        self.ranks.all_reduce(flat)
        for gradient, summed in zip(gradients, torch.split(flat, [gradient.numel() for gradient in gradients])):
            gradient.copy_(summed.view_as(gradient))

    def clip_gradients(self) -> None:
        """By the norm over the whole model: experts of all ranks, and once what ranks share."""
        of_experts = self.squared_norm(self.experts)
        self.ranks.all_reduce(of_experts)
        norm = (of_experts + self.squared_norm(self.shared)).sqrt()
        factor = (MAX_GRADIENT_NORM / (norm + 1e-6)).clamp(max=1.0)
        for parameter in (*self.experts, *self.shared):
            if parameter.grad is not None:
                parameter.grad.mul_(factor)

    def squared_norm(self, parameters: list[torch.nn.Parameter]) -> Tensor:
        squares = [p.grad.square().sum() for p in parameters if p.grad is not None]
        return torch.stack(squares).sum()

    def state(self, losses: list[float]) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "losses": losses}

    def restore(self, state: dict[str, Any]) -> tuple[int, list[float]]:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        return int(state["step"]), list(state["losses"])


def facts_of(args: argparse.Namespace, ranks: Ranks, trainer: Trainer) -> dict[str, Any]:
    parallel = "one process, no expert parallelism" if args.dense else f"expert parallel on {ranks.num_ranks} ranks"
    return {
        "label": parallel,
        "device": trainer.device.type,
        "seed": args.seed,
        "batch": args.batch,
        "context": args.context,
    }


def train(args: argparse.Namespace, stop: StopRequest) -> int:
    """Returns the exit status. Ends behind the step in which any rank was asked to stop, with a checkpoint."""
    ranks = Ranks(args.timeout, stop)
    trainer = Trainer(args, ranks)
    folder = Path(args.out)
    checkpoints = Checkpoints(folder, ranks.rank, ranks.num_ranks, ranks.barrier)
    first, stopping = 0, False
    losses: list[float] = []
    kept = checkpoints.load() if args.resume else None
    if kept is not None:
        first, losses = trainer.restore(kept)
    interactive = ranks.rank == 0 and sys.stderr.isatty()
    progress = tqdm(range(first, args.steps), initial=first, total=args.steps, disable=not interactive, unit="step")
    for step in progress:
        loss, stopping = ranks.sum_and_agree(trainer.step(step))
        losses.append(loss)
        progress.set_postfix(loss=f"{loss:.4f}")
        if ranks.rank == 0 and not interactive and (step + 1) % args.log_every == 0:
            print(f"step {step + 1} of {args.steps}: loss {loss:.6f}", flush=True)
        if stopping:
            break
        if args.checkpoint_every and (step + 1) % args.checkpoint_every == 0 and step + 1 < args.steps:
            checkpoints.save(step + 1, trainer.state(losses))
    progress.close()
    checkpoints.save(len(losses), trainer.state(losses))
    if ranks.rank == 0:
        write_losses(folder / "losses.json", losses, facts_of(args, ranks, trainer))
        print(
            f"{'stopped' if stopping else 'done'} after {len(losses)} steps; checkpoint and losses are in {folder}",
            flush=True,
        )
    ranks.close()
    return INTERRUPTED if stopping else 0
