# SPDX-License-Identifier: Apache-2.0
"""What a rank shares with the others besides tokens: sums, barriers, and when to stop."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from .launch import STORE, StopRequest, are_started


class Ranks:
    """This rank and what it shares with the others. Without a launcher: one rank, and no torch.distributed."""

    def __init__(self, timeout_s: int, stop: StopRequest) -> None:
        self.rank, self.num_ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self._stop = stop
        if are_started():
            # Loaded later, as by an optimizer, it has the process group in default arguments: destroy_process_group() would not
            # end gloo's threads, and one of them could meet the ending interpreter.
            import torch.distributed.nn  # noqa: F401

            store = os.environ.get(STORE)
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                init_method=f"file://{store}" if store else "env://",
                rank=self.rank,
                world_size=self.num_ranks,
                timeout=timedelta(seconds=timeout_s),
            )

    def all_reduce(self, values: torch.Tensor) -> None:
        """Sums over all ranks, in place."""
        if are_started():
            dist.all_reduce(values)

    def sum_and_agree(self, loss: float) -> tuple[float, bool]:
        """The sum of `loss` over all ranks, and whether any of them is asked to stop: the same answer on all."""
        both = torch.tensor([loss, float(self._stop.is_there())], dtype=torch.float64)
        self.all_reduce(both)
        return float(both[0]), bool(both[1] > 0)

    def barrier(self) -> None:
        if are_started():
            # Not dist.barrier, which on a GPU machine may wait through NCCL.
            dist.all_reduce(torch.zeros(1))

    def close(self) -> None:
        if are_started():
            dist.destroy_process_group()
