# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are there whole or not at all, and the record of losses."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, Callable

import torch


class Checkpoints:
    """A folder for each step that was kept, with one file for each rank; the file `latest` names the one that is whole.

    `barrier` waits for all ranks.
    """

    def __init__(self, folder: Path, rank: int, num_ranks: int, barrier: Callable[[], None]) -> None:
        self.folder, self.rank, self.num_ranks, self.barrier = folder, rank, num_ranks, barrier
        folder.mkdir(parents=True, exist_ok=True)

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Collective. `latest` moves on when every rank's file is on the disk; then older ones go."""
        folder = self.folder / f"step-{step:06d}"
        folder.mkdir(exist_ok=True)
        path = folder / f"rank-{self.rank}.pt"
        with open(path.with_suffix(".partial"), "wb") as file:
            torch.save({"step": step, "num_ranks": self.num_ranks, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, path)
        self.barrier()
        if self.rank == 0:
            write_whole(self.folder / "latest", folder.name)
            for other in self.folder.glob("step-*"):
                if other != folder:
                    shutil.rmtree(other)
        self.barrier()

    def load(self) -> dict[str, Any] | None:
        """This rank's part of the latest checkpoint; None if there is none."""
        latest = self.folder / "latest"
        if not latest.exists():
            return None
        path = self.folder / latest.read_text() / f"rank-{self.rank}.pt"
        if not path.exists():
            raise SystemExit(
                f"{path.parent} has nothing for rank {self.rank}: resume with as many ranks as it was written with"
            )
        state: dict[str, Any] = torch.load(path, weights_only=True)
        if state["num_ranks"] != self.num_ranks:
            raise SystemExit(f"{path.parent} was written by {state['num_ranks']} ranks, but there are {self.num_ranks}")
        return state


def write_whole(path: Path, text: str) -> None:
    """Whoever reads the file sees the old text or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def write_losses(path: Path, losses: list[float], facts: dict[str, Any]) -> None:
    write_whole(path, json.dumps({**facts, "losses": losses}, indent=1) + "\n")
