# SPDX-License-Identifier: Apache-2.0
"""What operations are given, and what plans remember of it: arrays that do not fit are refused or copied. One rank."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import tern
from ranks import TIMEOUT_MS

torch = pytest.importorskip("torch", reason="torch is not installed")

TOKENS, HIDDEN, EXPERTS, TOPK = 8, 64, 4, 2
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def plan_of(device: str, **options: Any) -> tern.Plan:
    group = tern.Group.local(1, timeout_ms=TIMEOUT_MS)[0]
    sizes = {"max_tokens": TOKENS * TOPK, "max_row_bytes": 4 * HIDDEN, "max_topk": TOPK, "max_experts": EXPERTS}
    exchange = tern.Exchange(group, device=device, timeout_ms=TIMEOUT_MS, **sizes)
    options = {"layout": "expert_major", "extent": "worst", **options}
    return exchange.plan(max_tokens=TOKENS, num_experts=EXPERTS, num_topk=TOPK, **options)


def batch(device: str, num_tokens: int) -> tuple[Any, Any, Any]:
    """Tokens, experts, weights."""
    seed = torch.Generator().manual_seed(num_tokens)
    idx = torch.rand(num_tokens, EXPERTS, generator=seed).argsort(1)[:, :TOPK].contiguous()
    x, weights = (torch.rand(num_tokens, width, generator=seed) for width in (HIDDEN, TOPK))
    return x.to(device), idx.to(device), weights.to(device)


# ------------------------------------------------------------------------------------------- the number of tokens that were routed


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_only_prepared_has_not_routed(device: str) -> None:
    """Operations by themselves go along what was routed; those that are prepared along what was prepared, or routed since."""
    plan = plan_of(device)
    x, idx, weights = batch(device, TOKENS)
    few, few_idx, few_weights = batch(device, 2)
    arrived = plan.dispatch(x, topk_idx=idx)
    dispatch_few = plan.prepare_dispatch(few, topk_idx=few_idx)
    combine_few = plan.prepare_combine(dispatch_few.result.tokens, topk_weights=few_weights)
    for _ in range(3):  # the short way too
        combined = plan.combine(arrived.tokens, topk_weights=weights).tokens
        assert combined.shape == x.shape
        torch.testing.assert_close(combined, x * weights.sum(1, keepdim=True))
    assert plan.combine_send(arrived.tokens).receive().tokens.shape == x.shape
    assert plan.dispatch(x).tokens.shape == arrived.tokens.shape
    with pytest.raises(tern.InvalidArgumentError, match="2 rows, but 8 were routed"):
        plan.dispatch(few)
    with pytest.raises(tern.InvalidArgumentError, match="topk_weights"):
        plan.combine(arrived.tokens, topk_weights=few_weights)
    with pytest.raises(tern.InvalidStateError, match="prepared for 2 tokens"):
        combine_few()
    dispatch_few()
    torch.testing.assert_close(combine_few().tokens, few * few_weights.sum(1, keepdim=True))
    combined = plan.combine(dispatch_few.result.tokens, topk_weights=few_weights).tokens
    torch.testing.assert_close(combined, few * few_weights.sum(1, keepdim=True))
    pending = plan.dispatch_send(x, topk_idx=idx)
    assert plan.combine(pending.receive().tokens).tokens.shape == x.shape
    assert plan.prepare_combine(arrived.tokens).result.tokens.shape == x.shape


@pytest.mark.parametrize("device", DEVICES)
def test_a_call_that_raises_has_not_routed(device: str) -> None:
    plan = plan_of(device)
    x, idx, _ = batch(device, TOKENS)
    few, few_idx, _ = batch(device, 2)
    for _ in range(3):
        arrived = plan.dispatch(x, topk_idx=idx)
    wrong = [
        lambda: plan.dispatch(x, topk_idx=few_idx),
        lambda: plan.dispatch(few, topk_idx=few_idx, scales=x),
        lambda: plan.dispatch(few, topk_idx=few_idx, lane=7),
        lambda: plan.dispatch_send(few, topk_idx=few_idx, lane=7),
        lambda: plan.prepare_dispatch(few, topk_idx=few_idx, lane=7)(),
        lambda: plan.route(few_idx, lane=7),
        lambda: plan.route(few_idx, device_num_tokens=x),
    ]
    for call in wrong:
        with pytest.raises(tern.InvalidArgumentError):
            call()
        assert plan.combine(arrived.tokens).tokens.shape == x.shape
    exact = plan_of(device, extent="exact")
    exact.route(idx)
    with pytest.raises(tern.InvalidArgumentError, match="extent"):
        exact.dispatch(few, topk_idx=few_idx, out=tern.Dispatched(arrived.tokens))
    assert exact.combine(exact.dispatch(x).tokens).tokens.shape == x.shape


def test_rows_beyond_the_capacity_are_routed_too() -> None:
    plan = plan_of("cpu", layout="rank_major", row_capacity=2)
    x, idx, _ = batch("cpu", TOKENS)
    few, few_idx, _ = batch("cpu", 1)
    plan.dispatch(few, topk_idx=few_idx)
    for _ in range(3):
        with pytest.raises(tern.CapacityExceededError) as caught:
            plan.dispatch(x, topk_idx=idx)
        assert plan.combine(caught.value.result.tokens).tokens.shape == x.shape
        plan.dispatch(few, topk_idx=few_idx)


# --------------------------------------------------------------------------------------------------------------- given outputs


def lying_otherwise(array: Any) -> dict[str, Any]:
    """Arrays that an operation must not take for this one."""
    other = array.double() if array.dtype != torch.float64 else array.float()
    wrong = {
        "fewer rows": array[:-1],
        "more rows": torch.cat([array, array[:1]]),
        "another dtype": other,
        "as wide a dtype": array.view(torch.int32 if array.is_floating_point() else torch.float32)
        if array.element_size() == 4
        else array.view(torch.float64),
        "with gaps": torch.stack([array, array], dim=-1)[..., 0],
        "elsewhere": torch.empty_like(array, device="meta" if array.device.type == "cpu" else "cpu"),
        "no array": [1.0],
    }
    if array.dim() > 1:
        wrong["by columns"] = array.swapaxes(-1, -2).contiguous().swapaxes(-1, -2)
        wrong["flat"] = array.flatten()
    if 1 in array.shape:  # strides say nothing there
        del wrong["with gaps"]
        wrong.pop("by columns", None)
    return wrong


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("extent", ["exact", "worst"])
@pytest.mark.parametrize("layout", ["rank_major", "expert_major", "expert_padded"])
def test_given_outputs_are_as_fresh_ones(layout: str, extent: str, device: str) -> None:
    """On the long way, and where calls before had others that fit."""
    names = {"rank_major": ["topk_idx"], "expert_major": ["row_expert", "expert_offsets", "expert_rank_ranges"]}
    wanted = ["topk_weights", "source_token", "source_rank", "expert_counts", "rank_counts", *names.get(layout, [])]
    x, idx, weights = batch(device, TOKENS)
    fresh_plan, warm_plan = (plan_of(device, layout=layout, extent=extent) for _ in range(2))
    for plan in (fresh_plan, warm_plan):
        plan.route(idx)
    given = {"topk_weights": weights, "scales": x[:, :4], "scale_order": "column_major"}
    out = warm_plan.dispatch(x, outputs=wanted, **given)
    y = torch.empty_like(x)
    for _ in range(3):
        assert warm_plan.dispatch(x, out=out, **given) is out
        warm_plan.combine(out.tokens, out=y)
    for name in ("tokens", "scales", *wanted):
        right = getattr(out, name)
        for kind, wrong in lying_otherwise(right).items():
            if name == "scales" and kind == "by columns":
                wrong = right.contiguous()
            for plan in (fresh_plan, warm_plan):
                with pytest.raises(tern.InvalidArgumentError, match=f"out.{name} is"):
                    plan.dispatch(x, out=tern.Dispatched(**{**vars(out), name: wrong}), **given)
    for wrong in lying_otherwise(y).values():
        with pytest.raises(tern.InvalidArgumentError, match="out is"):
            warm_plan.combine(out.tokens, out=wrong)
    assert warm_plan.dispatch(x, out=tern.Dispatched(out.tokens), **given).scales is None
    assert warm_plan.dispatch(x, out=out, **given) is out


def test_given_numpy_outputs() -> None:
    numpy = pytest.importorskip("numpy")
    plan = plan_of("cpu", extent="exact")
    x, idx, _ = (array.numpy() for array in batch("cpu", TOKENS))
    plan.route(idx)
    out = plan.dispatch(x)
    expected, y = out.tokens.copy(), numpy.empty_like(x)
    for _ in range(3):
        out.tokens[:] = 0
        assert plan.dispatch(x, out=out) is out and numpy.array_equal(out.tokens, expected)
        plan.combine(out.tokens, out=y)
    read_only = out.tokens.copy()
    read_only.flags.writeable = False
    swapped = out.tokens.astype(out.tokens.dtype.newbyteorder())
    for wrong in (out.tokens[1:], out.tokens.astype("f8"), out.tokens[::-1], read_only, swapped, torch.tensor(x)):
        with pytest.raises(tern.InvalidArgumentError, match="out.tokens is"):
            plan.dispatch(x, out=tern.Dispatched(**{**vars(out), "tokens": wrong}))
    with pytest.raises(tern.InvalidArgumentError, match="out.rank_counts is"):
        plan.dispatch(x, out=tern.Dispatched(**{**vars(out), "rank_counts": numpy.zeros(2, "i4")}))
    y.flags.writeable = False
    with pytest.raises(tern.InvalidArgumentError, match="out is"):
        plan.combine(out.tokens, out=y)


# --------------------------------------------------------------------------------------------------------------------- streams


@pytest.mark.parametrize("as_handle", [False, True])
def test_what_a_call_makes_is_made_on_its_stream(as_handle: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: in which stream's context the call is done, with all its arguments."""
    plan = plan_of("cpu")
    x, idx, weights = batch("cpu", TOKENS)
    current, used = [0], []

    class Stream:
        def __init__(self, handle: int) -> None:
            self.cuda_stream = handle

        def __enter__(self) -> None:
            current.append(self.cuda_stream)

        def __exit__(self, *_: Any) -> None:
            current.pop()

    monkeypatch.setattr(
        plan._arrays, "is_elsewhere", lambda stream: getattr(stream, "cuda_stream", stream) != current[-1]
    )
    monkeypatch.setattr(plan._arrays.torch(), "on_stream", lambda s: s if isinstance(s, Stream) else Stream(s))

    def spied(method: Any, *given: Any, **options: Any) -> Any:
        used.append(current[-1])
        return method(*given, **options)

    for name in ("_set_routing", "_prepare_dispatch", "_prepare_combine"):
        monkeypatch.setattr(plan, name, functools.partial(spied, getattr(plan, name)))
    stream: Any = 7 if as_handle else Stream(7)
    plan.route(idx, stream=stream)
    assert used.pop() == 7
    rows = plan.dispatch(x, topk_weights=weights, stream=stream).tokens
    assert plan.dispatch_send(x, topk_idx=idx, outputs=["rank_counts"], stream=stream).receive().rank_counts is not None
    plan.combine_send(rows, mode="exact", stream=stream).receive()
    combined = plan.combine(rows, topk_weights=weights, mode="exact", stream=stream).tokens
    torch.testing.assert_close(combined, x * weights.sum(1, keepdim=True))
    assert set(used) == {7} and current == [0]
    monkeypatch.setattr(plan.exchange._arrays, "of", lambda array: used.append(current[-1]) or plan._arrays.torch())
    used.clear()
    plan.exchange.count_routing(idx, EXPERTS, wanted=["tokens_per_expert"], stream=stream)
    assert used == [7]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("as_handle", [False, True])
def test_outputs_and_copies_belong_to_the_stream(as_handle: bool) -> None:
    """The current stream is late with what it does to memory; a call on another stream must neither wait for it nor read it too early."""
    plan, given = plan_of("cuda"), torch.cuda.Stream()
    x, idx, weights = batch("cuda", TOKENS)
    by_columns = x.t().contiguous().t()
    busy = torch.randn(4096, 4096, device="cuda")
    stream: Any = given.cuda_stream if as_handle else given

    def belongs(*arrays: Any) -> None:
        blocks = {
            block["address"]: segment["stream"]
            for segment in torch.cuda.memory_snapshot()
            for block in segment["blocks"]
            if block["state"] == "active_allocated"
        }
        assert all(
            blocks[array.untyped_storage().data_ptr()] == given.cuda_stream for array in arrays if array is not None
        )

    for _ in range(4):
        torch.cuda.synchronize()
        for _ in range(20):
            busy.matmul(busy)
        arrived = plan.dispatch(by_columns, topk_idx=idx, stream=stream)  # copied
        combined = plan.combine(arrived.tokens, topk_weights=weights, stream=stream).tokens
        given.synchronize()
        torch.testing.assert_close(combined, x * weights.sum(1, keepdim=True))
        pending = plan.dispatch_send(by_columns, topk_idx=idx, stream=stream)
        pending.receive(stream=stream)
        counts = plan.exchange.count_routing(idx, EXPERTS, stream=stream)
        belongs(*vars(arrived).values(), combined, *vars(pending.result).values(), *counts)
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(given):
        y = plan.combine(
            arrived.tokens, topk_weights=weights, stream=0 if as_handle else torch.cuda.default_stream()
        ).tokens
    torch.cuda.synchronize()
    torch.testing.assert_close(y, combined)


# --------------------------------------------------------------------------------------------------------------------- strides


def record_field(array: Any) -> Any:
    """The same values between others, as far apart as is no multiple of an element; not aligned."""
    numpy = pytest.importorskip("numpy")
    records = numpy.zeros(len(array), [("before", "u1"), ("field", array.dtype, array.shape[1:])])
    records["field"] = array
    return records["field"]


NUMPY_WAYS = {
    "record field": record_field,
    "rows from the end": lambda array: array[::-1].copy()[::-1],
    "columns from the end": lambda array: array[:, ::-1].copy()[:, ::-1],
    "every other row": lambda array: array.repeat(2, axis=0)[::2],
    "by columns": lambda array: array.T.copy().T,
}


@pytest.mark.parametrize("way", NUMPY_WAYS)
def test_numpy_arrays_of_any_stride(way: str) -> None:
    plan = plan_of("cpu")
    x, idx, weights = (array.numpy() for array in batch("cpu", TOKENS))
    scales = x[:, :4].copy()
    expected = plan.dispatch(x, topk_idx=idx, scales=scales, topk_weights=weights)
    combined = plan.combine(expected.tokens, topk_weights=weights).tokens
    lying = NUMPY_WAYS[way]
    for _ in range(3):
        there = {"scales": lying(scales), "topk_weights": lying(weights)}
        assert (there["scales"] == scales).all() and there["scales"].strides != scales.strides
        arrived = plan.dispatch(lying(x), topk_idx=lying(idx), **there)
        for name in ("tokens", "scales", "topk_weights"):
            assert (getattr(arrived, name) == getattr(expected, name)).all(), name
        assert (plan.combine(lying(arrived.tokens), topk_weights=lying(weights)).tokens == combined).all()


@pytest.mark.parametrize("kind", ["numpy", *DEVICES])
def test_rows_that_overlap(kind: str) -> None:
    plan = plan_of("cpu" if kind == "numpy" else kind)
    flat, idx = torch.rand(TOKENS + HIDDEN), batch("cpu", TOKENS)[1]
    x, idx = (array.to("cpu" if kind == "numpy" else kind) for array in (flat, idx))
    x = x.as_strided((TOKENS, HIDDEN), (1, 1))
    expected = plan_of(x.device.type).dispatch(x.contiguous(), topk_idx=idx, scales=x[:, :4].contiguous())
    if kind == "numpy":
        x, idx = x.numpy(), idx.numpy()
    for _ in range(3):
        arrived = plan.dispatch(x, topk_idx=idx, scales=x[:, :4])
        assert torch.equal(torch.as_tensor(arrived.tokens), expected.tokens)
        assert torch.equal(torch.as_tensor(arrived.scales), expected.scales)


def test_numpy_arrays_of_another_byte_order() -> None:
    plan = plan_of("cpu")
    x, idx, weights = (array.numpy() for array in batch("cpu", TOKENS))
    for name in ("tokens", "topk_idx", "scales", "topk_weights"):
        given = {"tokens": x, "topk_idx": idx, "scales": x[:, :4], "topk_weights": weights}
        given[name] = given[name].astype(given[name].dtype.newbyteorder())
        with pytest.raises(tern.InvalidArgumentError, match=f"{name} has elements of type '>"):
            plan.dispatch(given.pop("tokens"), **given)
    rows = plan.dispatch(x, topk_idx=idx).tokens
    with pytest.raises(tern.InvalidArgumentError, match="rows has elements of type '>"):
        plan.combine(rows.astype(">f4"))
