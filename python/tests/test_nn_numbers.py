# SPDX-License-Identifier: Apache-2.0
"""What tern.nn computes with, by itself: under autocast, on default devices, and by which kernel."""

from __future__ import annotations

from typing import Any

import pytest
import tern

torch: Any = pytest.importorskip("torch", reason="torch is not installed")

from tern import nn  # noqa: E402, needs torch

TOKENS, HIDDEN, FFN, EXPERTS, TOPK = 12, 32, 24, 6, 2
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=on_gpu)]


def layer_of(device: str, dtype: Any = None, **options: Any) -> nn.MoELayer:
    sizes = {"max_tokens": TOKENS, "max_row_bytes": 4 * HIDDEN, "max_topk": TOPK, "max_experts": EXPERTS}
    exchange = tern.Exchange(tern.Group.local(1)[0], device=device, **sizes)
    plans = nn.PlanPool(exchange, max_tokens=TOKENS, num_experts=EXPERTS, num_topk=TOPK)
    torch.manual_seed(3)
    return nn.MoELayer(plans, hidden=HIDDEN, ffn_hidden=FFN, balance_loss=0.1, device=device, dtype=dtype, **options)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("device", DEVICES)
def test_autocast(device: str, activation: str) -> None:
    """Experts are chosen and weighted as without; what comes in bf16, as behind a linear layer, is worked on in bf16."""
    layer = layer_of(device, activation=activation)
    x = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1)).to(device)
    routed, expected = layer.router(x), layer(x)
    narrow = x.bfloat16().requires_grad_()
    plain = layer.router(narrow)
    with torch.autocast(device, torch.bfloat16):
        assert all(torch.equal(one, other) for one, other in zip(layer.router(x), routed))
        same, cast = layer(x), layer(narrow)
        assert all(torch.equal(one, other) for one, other in zip(layer.router(narrow), plain))
        assert layer.router(narrow).probabilities.dtype == torch.float32
    torch.testing.assert_close(same.output, expected.output, atol=2e-2, rtol=2e-2)
    assert cast.output.dtype == torch.bfloat16 and cast.balance_loss.dtype == torch.float32
    torch.testing.assert_close(cast.output.float(), expected.output, atol=4e-2, rtol=4e-2)
    (cast.output.float().sum() + cast.balance_loss).backward()
    for parameter in layer.parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32


@pytest.mark.parametrize("default", ["meta", pytest.param("cuda", marks=on_gpu)])
def test_default_devices(default: str) -> None:
    """Whatever torch's default device is, equal seeds make equal weights."""

    def experts(**options: Any) -> nn.GroupedMLP:
        torch.manual_seed(5)
        return nn.GroupedMLP(HIDDEN, FFN, 2, first_expert=2, num_experts_of_all_ranks=EXPERTS, **options)

    expected = experts()
    with torch.device(default):
        assert experts().w_in.device.type == default
        there = experts(device="cpu") if default == "meta" else experts()
    again = experts()
    for name in ("w_in", "w_out"):
        for other in (there, again):
            assert torch.equal(getattr(expected, name), getattr(other, name).cpu())


@on_gpu
@pytest.mark.parametrize("width", [8, 12, 100])
@pytest.mark.parametrize("inner", [8, 12, 100])
@pytest.mark.parametrize("gap", [0, 1, 8])
def test_grouped_mm_of_any_width(inner: int, width: int, gap: int) -> None:
    """In bf16, where torch._grouped_mm takes what lies at multiples of 16 bytes only. Small whole numbers, so that sums are exact."""
    seed = torch.Generator().manual_seed(0)

    def whole_numbers(*shape: int) -> Any:
        drawn = torch.randint(-2, 3, (*shape[:-1], shape[-1] + gap), generator=seed).to("cuda", torch.bfloat16)
        return drawn[..., gap:].detach().requires_grad_()

    rows, weights = whole_numbers(10, inner), whole_numbers(3, inner, width)
    offsets = torch.tensor([0, 4, 4, 10], device="cuda")
    y: Any = nn.grouped_mm(rows, weights, offsets)
    grad = torch.randint(-2, 3, y.shape, generator=seed).to("cuda", torch.bfloat16)
    found = [y, *torch.autograd.grad(y, (rows, weights), grad)]
    group_of = torch.tensor([0] * 4 + [2] * 6, device="cuda")
    wide = [one.detach().float().requires_grad_() for one in (rows, weights)]
    expected = torch.einsum("nk,nkm->nm", wide[0], wide[1][group_of])
    for one, other in zip(found, [expected, *torch.autograd.grad(expected, wide, grad.float())]):
        assert torch.equal(one, other.to(torch.bfloat16))


def test_what_the_kernel_takes() -> None:
    """Without a GPU: what torch._grouped_mm says of strides and addresses."""
    from tern.nn.experts import _lies_for_kernel

    matrix = torch.empty(16, 64, dtype=torch.bfloat16)
    weights = torch.empty(3, 16, 64, dtype=torch.bfloat16)
    for taken in (matrix, matrix.t(), matrix[:, :12], matrix[:, 8:16], matrix[::2], weights, weights.transpose(1, 2)):
        assert _lies_for_kernel(taken)
    odd = torch.empty(16, 12, dtype=torch.bfloat16)
    for refused in (odd, odd.t(), matrix[:, 1:], matrix[:, ::2], matrix[:1].expand(4, 64), weights[:, :, 4:]):
        assert not _lies_for_kernel(refused)
