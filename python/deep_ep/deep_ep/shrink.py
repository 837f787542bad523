# SPDX-License-Identifier: Apache-2.0
"""Going on when a rank is left out in the middle of things (enable_shrink).

An operation that waits for a missing rank in vain completes without it. The next one starts a generation of those who
are left, in which
plans that were routed before are stale, on all ranks alike. So whatever was under way along such a plan is done once
more: all inputs
are still there.
"""

from __future__ import annotations

import contextlib
from typing import Callable, TypeVar

import tern
import torch

Result = TypeVar("Result")
_COUNT_MASK = (1 << 32) - 1


def persistently(first: Callable[[], Result], again: Callable[[], Result], num_ranks: int) -> Result:
    """`first`, or if its plan is stale `again`, which routes anew, until a generation lives as long as that."""
    with contextlib.suppress(tern.StalePlanError):
        return first()
    for _ in range(num_ranks - 1):
        with contextlib.suppress(tern.StalePlanError):
            return again()
    return again()


def moved_rows(rows: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Expert rows [E_l, R * max, H] where they lie after routing without some of the ranks. before, after: ranges, i64
    [E_l, R]."""
    moved = torch.zeros_like(rows)
    for expert, ranges in enumerate(zip(before.tolist(), after.tolist())):
        for old, new in zip(*ranges):
            count = min(old & _COUNT_MASK, new & _COUNT_MASK)
            moved[expert, new >> 32 : (new >> 32) + count] = rows[expert, old >> 32 : (old >> 32) + count]
    return moved
