# SPDX-License-Identifier: Apache-2.0
"""What the calls of low-latency mode are given and return, and the checks of it that need nothing else."""

from __future__ import annotations

from typing import Any, Callable, NamedTuple, Optional

import tern
import torch

from .events import EventOverlap
from .handles import LowLatencyHandle, Shape
from .layout import check_topk_idx

Hook = Callable[[], None]

_CASTS = {(False, False): "fp8_f32", (True, False): "fp8_f32_pow2", (True, True): "fp8_ue8m0"}


class Finish(NamedTuple):
    """When the caller wants an operation to be done."""

    async_finish: bool
    return_recv_hook: bool

    def check(self) -> None:
        if self.async_finish and self.return_recv_hook:
            raise tern.InvalidArgumentError("async_finish and return_recv_hook exclude each other; both are set")


class Cast(NamedTuple):
    """What is done to rows on the way."""

    use_fp8: bool
    round_scale: bool
    use_ue8m0: bool

    @property
    def encoding(self) -> str:
        if not self.use_fp8:
            return "as_given"
        if (self.round_scale, self.use_ue8m0) not in _CASTS:
            raise tern.InvalidArgumentError("use_ue8m0 needs round_scale: UE8M0 scales are powers of two")
        return _CASTS[self.round_scale, self.use_ue8m0]


class Stats(NamedTuple):
    """What a dispatch adds to."""

    received: Optional[torch.Tensor]  # i32 [E_l]: cumulative_local_expert_recv_stats
    waited: Optional[torch.Tensor]  # i64 [R]: dispatch_wait_recv_cost_stats

    def check(self, num_experts: int, num_ranks: int) -> None:
        check_vector("cumulative_local_expert_recv_stats", self.received, torch.int32, num_experts // num_ranks)
        check_vector("dispatch_wait_recv_cost_stats", self.waited, torch.int64, num_ranks)


class Arrived(NamedTuple):
    rows: Any  # bf16, or (fp8, scales)
    expert_counts: Any
    handle: LowLatencyHandle
    event: EventOverlap
    hook: Optional[Hook]


class Combined(NamedTuple):
    tokens: torch.Tensor
    event: EventOverlap
    hook: Optional[Hook]


def check_batch(x: torch.Tensor, topk_idx: torch.Tensor, shape: Shape) -> None:
    check_topk_idx(topk_idx)
    if x.dim() != 2 or x.shape[0] != topk_idx.shape[0] or x.shape[0] > shape.num_max_tokens:
        raise tern.InvalidArgumentError(
            f"low_latency_dispatch: x has shape {list(x.shape)}, topk_idx {list(topk_idx.shape)}; they must be "
            f"[num_tokens, hidden] and "
            f"[num_tokens, num_topk] with at most num_max_dispatch_tokens_per_rank = {shape.num_max_tokens} tokens"
        )


def check_vector(name: str, tensor: Optional[torch.Tensor], dtype: torch.dtype, size: int) -> None:
    if tensor is not None and (tensor.dtype != dtype or tuple(tensor.shape) != (size,)):
        raise tern.InvalidArgumentError(
            f"{name} is {tensor.dtype} of shape {list(tensor.shape)}; it must be {dtype} of [{size}]"
        )
