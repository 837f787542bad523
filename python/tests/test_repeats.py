# SPDX-License-Identifier: Apache-2.0
"""Calls that look like the ones before take a short way: whatever changes between them, a plan that has seen nothing says the same."""

from __future__ import annotations

import gc
import random
import weakref
from dataclasses import fields
from typing import Any, Callable

import pytest
import tern
from ranks import TIMEOUT_MS

torch = pytest.importorskip("torch", reason="torch is not installed")
numpy = pytest.importorskip("numpy")

TOKENS, HIDDEN, EXPERTS, TOPK = 6, 64, 4, 2
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
WAYS = [pytest.param(True, id="guards"), pytest.param(False, id="python")]


def exchange_of(device: str, by_torch: bool = True) -> tern.Exchange:
    """One rank. by_torch: with what torch.compile uses, else with what replaces it."""
    group = tern.Group.local(1, timeout_ms=TIMEOUT_MS)[0]
    sizes = {"max_tokens": TOKENS * TOPK, "max_row_bytes": 4 * HIDDEN, "max_topk": TOPK, "max_experts": EXPERTS}
    exchange = tern.Exchange(group, device=device, timeout_ms=TIMEOUT_MS, **sizes)
    arrays = exchange._arrays.torch()
    if by_torch:
        assert arrays._guards is not None and arrays._empty_strided is not None, "this torch is not as known"
    else:
        arrays._guards = arrays._empty_strided = None
    return exchange


def plan_of(exchange: tern.Exchange, **options: Any) -> tern.Plan:
    options = {"layout": "expert_padded", "extent": "worst", "zero_padding": True, **options}
    return exchange.plan(max_tokens=TOKENS, num_experts=EXPERTS, num_topk=TOPK, **options)


def batch(device: str, num_tokens: int = TOKENS, seed: int = 0) -> tuple[Any, Any, Any]:
    """Tokens, experts, weights."""
    random_numbers = torch.Generator().manual_seed(seed)
    idx = torch.rand(num_tokens, EXPERTS, generator=random_numbers).argsort(1)[:, :TOPK].contiguous()
    x = torch.randn(num_tokens, HIDDEN, generator=random_numbers)
    weights = torch.rand(num_tokens, TOPK, generator=random_numbers)
    return x.to(device), idx.to(device), weights.to(device)


def came(arrived: tern.Dispatched) -> tuple[Any, ...]:
    """Of a plan that is rank_major: what lies behind the rows that came is not written."""
    assert arrived.rank_counts is not None
    of_rows = (arrived.tokens, arrived.scales, arrived.topk_idx, arrived.topk_weights)
    count = int(arrived.rank_counts[0])
    return (*(None if array is None else array[:count] for array in of_rows), arrived.expert_counts)


def values(array: Any) -> Any:
    """By bytes, shape and type; of a result, of all its fields."""
    if array is None:
        return None
    if isinstance(array, tern.Dispatched):
        return [(field.name, values(getattr(array, field.name))) for field in fields(array)]
    if isinstance(array, tuple):
        return [values(one) for one in array]
    if isinstance(array, numpy.ndarray):
        return str(array.dtype), array.shape, array.tobytes()
    return str(array.dtype), tuple(array.shape), array.cpu().contiguous().view(torch.uint8).numpy().tobytes()


def outcome(call: Callable[[], Any]) -> Any:
    """What it returns, or raises."""
    try:
        return values(call())
    except (tern.Error, TypeError, ValueError, RuntimeError) as error:
        return type(error), str(error)


def takes_the_short_way(plan: tern.Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def long_way(*_: Any, **__: Any) -> None:
        raise AssertionError("a call was looked at as a whole")

    monkeypatch.setattr(plan, "_prepare_dispatch", long_way)
    monkeypatch.setattr(plan, "_prepare_combine", long_way)


@pytest.mark.parametrize("by_torch", WAYS)
@pytest.mark.parametrize("device", DEVICES)
def test_same_looks_take_the_short_way(device: str, by_torch: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other arrays too, if they look the same; and results are arrays of their own."""
    exchange = exchange_of(device, by_torch)
    plan = plan_of(exchange)
    given = [batch(device, seed=seed) for seed in range(6)]
    expected = [values(plan_of(exchange).dispatch(x, topk_idx=idx)) for x, idx, _ in given]
    y = torch.empty(TOKENS, HIDDEN, device=device)
    arrived: list[tern.Dispatched] = []
    combined = []
    for number, (x, idx, weights) in enumerate(given):
        if number == 2:
            takes_the_short_way(plan, monkeypatch)
        arrived.append(plan.dispatch(x, topk_idx=idx))
        combined.append(plan.combine(arrived[-1].tokens, topk_weights=weights))
    for result, combination, (x, _, weights), wanted in zip(arrived, combined, given, expected):
        assert values(result) == wanted
        torch.testing.assert_close(combination.tokens, x * weights.sum(1, keepdim=True))
        assert isinstance(combination, tern.Combined) and combination.topk_weights is None
    monkeypatch.undo()
    for number, (x, idx, weights) in enumerate(given):
        if number == 2:
            takes_the_short_way(plan, monkeypatch)
        assert plan.dispatch(x, topk_idx=idx, out=arrived[0]) is arrived[0]
        assert values(arrived[0]) == expected[number]
        assert plan.combine(arrived[0].tokens, topk_weights=weights, out=y).tokens is y
        torch.testing.assert_close(y, x * weights.sum(1, keepdim=True))


def test_calls_that_differ_in_anything_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    exchange = exchange_of("cpu")
    plan = plan_of(exchange)
    x, idx, weights = batch("cpu")
    for _ in range(3):
        rows = plan.dispatch(x, topk_idx=idx).tokens
        plan.combine(rows)
    takes_the_short_way(plan, monkeypatch)
    plan.combine(plan.dispatch(x, topk_idx=idx).tokens)
    one = torch.zeros(1, dtype=torch.int64)
    for other in (
        {"topk_idx": None},
        {"device_num_tokens": one.int()},
        {"scales": x[:, :4]},
        {"topk_weights": weights},
        {"encoding": "fp8_f32"},
        {"scale_order": "column_major"},
        {"outputs": ("rank_counts",)},
        {"out": tern.Dispatched(rows)},
        {"zero_copy": True},
        {"wait_ns": one},
        {"lane": 1},
        {"num_sms": 1},
    ):
        with pytest.raises(AssertionError, match="as a whole"):
            plan.dispatch(x, **{"topk_idx": idx, **other})
    for other in (
        {"mode": "exact"},
        {"weighting": "dispatch"},
        {"topk_weights": weights},
        {"row_weights": torch.rand(rows.shape[:2])},
        {"bias": x},
        {"out": torch.empty_like(x)},
        {"zero_copy": True},
        {"wire": "fp32"},
        {"wait_ns": one},
        {"lane": 1},
        {"num_sms": 1},
    ):
        with pytest.raises(AssertionError, match="as a whole"):
            plan.combine(rows, **other)


def wider(array: Any) -> Any:
    return torch.cat([array, array], dim=1)[:, : array.shape[1]]


CHANGES: dict[str, Callable[[Any], Any]] = {
    "set_ to other memory": lambda a: a.set_(a.flip(0)),
    "data with other memory": lambda a: setattr(a, "data", a.flip(0)),
    "resize_ to fewer rows": lambda a: a.resize_(a.shape[0] - 1, a.shape[1]),
    "resize_ to fewer columns": lambda a: a.resize_(a.shape[0], a.shape[1] // 2),
    "t_": lambda a: a.t_(),
    "squeezed": lambda a: a.unsqueeze_(0),
    "data of more bytes": lambda a: setattr(a, "data", a.to(torch.float64 if a.is_floating_point() else torch.int32)),
    "data of other bits": lambda a: setattr(a, "data", a.view(torch.int32 if a.is_floating_point() else torch.float64)),
    "data with gaps": lambda a: setattr(a, "data", wider(a)),
    "data by columns": lambda a: setattr(a, "data", a.t().contiguous().t()),
    "one row for all": lambda a: setattr(a, "data", a[:1].expand(a.shape)),
}


@pytest.mark.parametrize("by_torch", WAYS)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("change", CHANGES)
def test_a_tensor_that_is_another_by_now(change: str, device: str, by_torch: bool) -> None:
    exchange = exchange_of(device, by_torch)

    def check(name: str, operation: Callable[..., Any], plan: Callable[[], tern.Plan]) -> None:
        """operation: of a plan and arrays by name, of which `name` changes."""
        x, idx, weights = batch(device)
        arrays = {"x": x, "idx": idx, "weights": weights, "scales": x[:, :4].contiguous(), "y": torch.empty_like(x)}
        arrays["rows"] = routed().dispatch(x).tokens.view(-1, HIDDEN)
        warm = plan()
        for _ in range(3):
            operation(warm, **arrays)
        CHANGES[change](arrays[name])
        for _ in range(3):
            assert outcome(lambda: operation(warm, **arrays)) == outcome(lambda: operation(plan(), **arrays)), name

    def fresh() -> tern.Plan:
        return plan_of(exchange, layout="rank_major", zero_padding=False)

    def routed() -> tern.Plan:
        plan = plan_of(exchange)
        x, idx, _ = batch(device)
        plan.route(idx)
        plan.dispatch(x)
        return plan

    def dispatch(plan: tern.Plan, x: Any, idx: Any, weights: Any, scales: Any, **_: Any) -> Any:
        names = ("rank_counts", "topk_idx", "topk_weights", "expert_counts")
        return came(plan.dispatch(x, topk_idx=idx, topk_weights=weights, scales=scales, outputs=names))

    def dispatch_alone(plan: tern.Plan, x: Any, **_: Any) -> Any:
        return plan.dispatch(x)

    def combine(plan: tern.Plan, rows: Any, weights: Any, y: Any, **_: Any) -> Any:
        return plan.combine(rows, topk_weights=weights, out=y)

    for name in ("x", "idx", "weights", "scales"):
        check(name, dispatch, fresh)
    check("x", dispatch_alone, routed)
    for name in ("rows", "weights", "y"):
        check(name, combine, routed)


@pytest.mark.parametrize("device", DEVICES)
def test_given_outputs_that_are_others_by_now(device: str) -> None:
    exchange = exchange_of(device)
    x, idx, weights = batch(device)
    plan = plan_of(exchange)
    out = plan.dispatch(x, topk_idx=idx, topk_weights=weights)
    expected = values(out)
    for _ in range(3):
        plan.dispatch(x, topk_idx=idx, topk_weights=weights, out=out)
    assert out.expert_counts is not None and out.topk_weights is not None
    counts, out.expert_counts = out.expert_counts.fill_(-1), torch.empty_like(out.expert_counts)
    out.tokens.set_(torch.empty_like(out.tokens))
    plan.dispatch(x, topk_idx=idx, topk_weights=weights, out=out)
    assert values(out) == expected and counts.tolist() == [-1] * EXPERTS
    left_out, out.topk_weights = out.topk_weights.fill_(-1), None
    out.rank_counts = torch.empty(1, dtype=torch.int32, device=device)
    plan.dispatch(x, topk_idx=idx, topk_weights=weights, out=out)
    assert bool((left_out == -1).all()) and out.rank_counts.tolist() == [TOKENS]
    with pytest.raises(tern.InvalidArgumentError, match="out is"):
        y = torch.empty_like(x)
        for _ in range(3):
            plan.combine(out.tokens, topk_weights=weights, out=y)
        plan.combine(out.tokens, topk_weights=weights, out=y[1:])


@pytest.mark.parametrize("kind", [*DEVICES, "numpy"])
def test_calls_of_many_kinds_in_any_order(kind: str) -> None:
    """Against a plan of its own for each call."""
    device = "cpu" if kind == "numpy" else kind
    exchange = exchange_of(device)

    def fresh() -> tern.Plan:
        return plan_of(exchange, layout="rank_major", zero_padding=False)

    plan, chosen = fresh(), random.Random(1)
    converted = (lambda a: a.numpy()) if kind == "numpy" else (lambda a: a)
    batches = {n: [converted(a) for a in batch(device, n, seed=n)] for n in (0, 1, TOKENS - 1, TOKENS)}

    def in_turn(plan: tern.Plan, n: int, options: dict[str, Any], wire: Any) -> Any:
        x, idx, weights = batches[n]
        arrays = {"scales": x[:, :4]} if options.pop("scaled") else {}
        arrays.update({"topk_weights": weights} if options.pop("carried") else {})
        if options.pop("routed_before"):
            plan.route(idx)
        else:
            arrays["topk_idx"] = idx
        arrived = plan.dispatch(x, **arrays, **options)
        rows = arrived.tokens if options["encoding"] == "as_given" else plan.dispatch(x, topk_idx=idx).tokens
        return came(arrived), plan.combine(rows, wire=wire)

    options: dict[str, Any] = {}
    for step in range(150):
        if step % 4 == 0 or chosen.random() < 0.3:
            encoding = chosen.choice(["as_given", tern.Encoding.FP8_F32] if kind != "numpy" else ["as_given"])
            options = {
                "encoding": encoding,
                "outputs": chosen.choice([["expert_counts", "rank_counts"], ("rank_counts", "topk_weights")]),
                "scaled": encoding == "as_given" and chosen.random() < 0.3,
                "carried": chosen.random() < 0.5,
                "routed_before": chosen.random() < 0.3,
            }
            n, wire = chosen.choice([*batches]), chosen.choice(["as_dtype", tern.Wire.FP32])
        found = values(in_turn(plan, n, dict(options), wire))
        assert found == values(in_turn(fresh(), n, dict(options), wire)), (step, n, options)


def test_another_routing_counts_at_once() -> None:
    exchange = exchange_of("cpu")
    plan = plan_of(exchange, layout="expert_major", extent="exact", zero_padding=False)
    for seed in range(4):
        x, idx, _ = batch("cpu", seed=seed)
        plan.route(idx)
        for _ in range(3):
            arrived = plan.dispatch(x)
            torch.testing.assert_close(plan.combine(arrived.tokens).tokens, TOPK * x)
    plan.route(idx[:3])
    with pytest.raises(tern.InvalidArgumentError, match="6 rows, but 3 were routed"):
        plan.dispatch(x)
    with pytest.raises(tern.InvalidArgumentError, match="rows has shape"):
        plan.combine(arrived.tokens)
    assert plan.dispatch(x[:3]).tokens.shape[0] == 3 * TOPK


def test_errors_come_with_what_arrived(monkeypatch: pytest.MonkeyPatch) -> None:
    exchange = exchange_of("cpu")
    plan = plan_of(exchange, layout="rank_major", row_capacity=2, zero_padding=False)
    x, idx, _ = batch("cpu")
    none = torch.full_like(idx, -1)
    for _ in range(3):
        plan.dispatch(x, topk_idx=none)
    takes_the_short_way(plan, monkeypatch)
    with pytest.raises(tern.CapacityExceededError) as caught:
        plan.dispatch(x, topk_idx=idx)
    assert torch.equal(caught.value.result.tokens, x[:2])


@pytest.mark.parametrize("device", DEVICES)
def test_no_array_is_kept_alive(device: str) -> None:
    exchange = exchange_of(device)
    plan = plan_of(exchange)
    x, idx, weights = batch(device)
    y = torch.empty_like(x)
    for _ in range(3):
        arrived = plan.dispatch(x, topk_idx=idx)
        plan.dispatch(x, topk_idx=idx, out=arrived)
        plan.combine(arrived.tokens, topk_weights=weights, out=y)
    alive = [weakref.ref(array) for array in (x, idx, weights, y, arrived, arrived.tokens)]
    del x, idx, weights, y, arrived
    gc.collect()
    assert [reference() for reference in alive] == [None] * len(alive)
    plan_alive = weakref.ref(plan)
    del plan
    assert plan_alive() is None  # at once: a plan is in no cycle


@pytest.mark.parametrize("device", DEVICES[1:])
def test_streams_may_change_between_calls(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call is behind the work of its own stream: what writes the tokens there takes long."""
    exchange = exchange_of(device)
    plan = plan_of(exchange)
    x, idx, weights = batch(device)
    out, y = plan.dispatch(x, topk_idx=idx), torch.empty_like(x)
    busy = torch.randn(2048, 2048, device=device)

    def call(factor: float, **stream: Any) -> None:
        for _ in range(10):
            busy.matmul(busy)
        x.copy_(factor * batch(device)[0])
        plan.dispatch(x, topk_idx=idx, out=out, **stream)
        plan.combine(out.tokens, topk_weights=weights, out=y, **stream)

    call(0.0), call(0.0)
    takes_the_short_way(plan, monkeypatch)
    reference = batch(device)[0] * weights.sum(1, keepdim=True)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    for factor, stream in enumerate([*streams, *streams], start=1):
        with torch.cuda.stream(stream):
            call(float(factor))
            torch.testing.assert_close(y, factor * reference)
        stream.synchronize()
    with torch.cuda.stream(streams[0]):
        call(7.0, stream=streams[0])
        torch.testing.assert_close(y, 7 * reference)
        call(8.0, stream=streams[0].cuda_stream)
        torch.testing.assert_close(y, 8 * reference)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are fewer than two GPUs")
def test_outputs_are_on_the_exchange_whatever_device_is_current() -> None:
    exchange = exchange_of("cuda:1")
    plan = plan_of(exchange)
    x, idx, weights = batch("cuda:1")
    for current in (1, 1, 1, 0, 0, 1):
        with torch.cuda.device(current):
            arrived = plan.dispatch(x, topk_idx=idx)
            y = plan.combine(arrived.tokens, topk_weights=weights)
        torch.cuda.synchronize(1)
        assert arrived.tokens.get_device() == y.tokens.get_device() == 1
        torch.testing.assert_close(y.tokens, x * weights.sum(1, keepdim=True))
    with pytest.raises(tern.InvalidArgumentError, match="is on cuda:0"):
        plan.dispatch(x.to("cuda:0"), topk_idx=idx)
