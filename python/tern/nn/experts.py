# SPDX-License-Identifier: Apache-2.0
"""A rank's experts: one multi-layer perceptron each, on the rows that dispatch grouped by expert."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

Tensor = torch.Tensor


def grouped_mm(rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """Multiplies each group of rows by its own matrix: out[i] = rows[i] @ weights[e] for offsets[e] <= i < offsets[e + 1].

    rows: [N, K]. weights: [E, K, M] of the same dtype. offsets: i64 [E + 1], ascending. Returns [N, M]; rows behind the last group are
    zeros (by torch._grouped_mm: undefined). Differentiable in rows and weights; a custom op, so that it compiles for any offsets.
    bf16 on GPUs from compute capability 9.0 goes through torch._grouped_mm, where rows of all matrices are multiples of 16 bytes apart;
    everything else through one product per expert, for which the offsets come to the host.
    """
    return torch.ops.tern.grouped_mm(rows, weights, offsets)  # type: ignore[no-any-return]


_KERNEL_ALIGNMENT_BYTES = 16  # torch._grouped_mm refuses others


def _has_kernel(left: Tensor, right: Tensor) -> bool:
    """The result must lie as the kernel wants it too: it makes longer rows where their width does not."""
    return (
        left.is_cuda
        and left.dtype == right.dtype == torch.bfloat16
        and hasattr(torch, "_grouped_mm")
        and torch.cuda.get_device_capability(left.device) >= (9, 0)
        and right.shape[-1] * right.element_size() % _KERNEL_ALIGNMENT_BYTES == 0
        and _lies_for_kernel(left)
        and _lies_for_kernel(right)
    )


def _lies_for_kernel(matrix: Tensor) -> bool:
    """One of the last two dimensions is dense, and all else is at multiples of what the kernel moves at once."""
    *outer, row_stride, column_stride = matrix.stride()
    rows, columns = matrix.shape[-2:]
    if row_stride == 1 and column_stride >= max(rows, 1):
        outer.append(column_stride)
    elif column_stride == 1 and row_stride >= max(columns, 1):
        outer.append(row_stride)
    else:
        return False
    begins = (matrix.data_ptr(), *(stride * matrix.element_size() for stride in outer))
    return all(begin % _KERNEL_ALIGNMENT_BYTES == 0 for begin in begins)


@torch.library.custom_op(
    "tern::grouped_mm", mutates_args=(), schema="(Tensor rows, Tensor weights, Tensor offsets) -> Tensor"
)
def _grouped_mm(rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    if _has_kernel(rows, weights):
        return torch._grouped_mm(rows, weights, offs=offsets[1:].int())
    bounds = offsets.tolist()
    out = rows.new_empty(rows.shape[0], weights.shape[2])
    for expert, (begin, end) in enumerate(zip(bounds, bounds[1:])):
        torch.mm(rows[begin:end], weights[expert], out=out[begin:end])
    out[bounds[-1] :] = 0
    return out


@_grouped_mm.register_fake
def _(rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weights.shape[2])


@torch.library.custom_op(
    "tern::grouped_outer", mutates_args=(), schema="(Tensor left, Tensor right, Tensor offsets) -> Tensor"
)
def _grouped_outer(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    """[E, K, M]: left[group].T @ right[group], what grouped_mm's weights get as their gradient."""
    if _has_kernel(left.transpose(0, 1), right):
        return torch._grouped_mm(left.transpose(0, 1), right, offs=offsets[1:].int())
    bounds = offsets.tolist()
    out = left.new_empty(len(bounds) - 1, left.shape[1], right.shape[1])
    for expert, (begin, end) in enumerate(zip(bounds, bounds[1:])):
        torch.mm(left[begin:end].T, right[begin:end], out=out[expert])
    return out


@_grouped_outer.register_fake
def _(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    return left.new_empty(offsets.shape[0] - 1, left.shape[1], right.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grouped_mm_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    rows, weights, offsets = ctx.saved_tensors
    grad = grad.contiguous()
    grad_rows = grouped_mm(grad, weights.transpose(1, 2), offsets) if ctx.needs_input_grad[0] else None
    grad_weights = torch.ops.tern.grouped_outer(rows, grad, offsets) if ctx.needs_input_grad[1] else None
    return grad_rows, grad_weights, None


def _grouped_outer_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    left, right, offsets = ctx.saved_tensors
    return grouped_mm(right, grad.transpose(1, 2), offsets), grouped_mm(left, grad, offsets), None


_grouped_mm.register_autograd(_grouped_mm_backward, setup_context=_save)
_grouped_outer.register_autograd(_grouped_outer_backward, setup_context=_save)


class GroupedMLP(torch.nn.Module):
    """Experts first_expert, first_expert + 1, ...: act(rows @ w_in[e]) @ w_out[e].

    activation: "swiglu" (silu of one half of w_in's product times the other half: Shazeer 2020, arXiv:2002.05202) or "gelu".
    Initial weights are uniform in +-1/sqrt(inputs), and depend on torch's seed and the expert's number only: the same model, however many
    ranks there are and whatever their devices, if they have the same seed.
    """

    def __init__(
        self,
        hidden: int,
        ffn_hidden: int,
        num_experts: int,
        *,
        first_expert: int = 0,
        num_experts_of_all_ranks: int = 0,
        activation: str = "swiglu",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in ("swiglu", "gelu"):
            raise ValueError(f"activation is {activation!r}; it must be 'swiglu' or 'gelu'")
        self.activation = activation
        self.first_expert = first_expert
        self.num_experts_of_all_ranks = num_experts_of_all_ranks or num_experts
        width = 2 * ffn_hidden if activation == "swiglu" else ffn_hidden
        self.w_in = torch.nn.Parameter(torch.empty(num_experts, hidden, width, device=device, dtype=dtype))
        self.w_out = torch.nn.Parameter(torch.empty(num_experts, ffn_hidden, hidden, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws from torch's generator once for each expert of all ranks, so that ranks stay in step."""
        # On the CPU, whatever torch's default device is: ranks with other devices draw the same.
        seeds = torch.randint(2**62, (self.num_experts_of_all_ranks,), device="cpu").tolist()
        for expert in range(self.w_in.shape[0]):
            generator = torch.Generator("cpu").manual_seed(seeds[self.first_expert + expert])
            for weights in (self.w_in, self.w_out):
                bound = 1 / math.sqrt(weights.shape[1])
                drawn = torch.empty(weights.shape[1:], device="cpu").uniform_(-bound, bound, generator=generator)
                weights[expert].copy_(drawn)

    def forward(self, rows: Tensor, expert_offsets: Tensor) -> Tensor:
        """rows: [N, hidden], grouped by expert; weights are cast to their dtype. expert_offsets: i64 [num_experts + 1]. Returns [N, hidden]."""
        inner = grouped_mm(rows, self.w_in.to(rows.dtype), expert_offsets)
        if self.activation == "swiglu":
            gate, up = inner.chunk(2, dim=-1)
            inner = torch.nn.functional.silu(gate) * up
        else:
            inner = torch.nn.functional.gelu(inner)
        return grouped_mm(inner, self.w_out.to(inner.dtype), expert_offsets)


def expert_parameters(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Names and parameters of the experts in `module`: each rank has its own. Their gradient already sums over all ranks' tokens; what is
    all-reduced between ranks is every other parameter."""
    for prefix, part in module.named_modules():
        if isinstance(part, GroupedMLP):
            for name, parameter in part.named_parameters(recurse=False):
                yield f"{prefix}.{name}" if prefix else name, parameter
