# SPDX-License-Identifier: Apache-2.0
"""Dispatch and combine in every layout, against plain torch; on CPU ranks as threads, and on GPUs where there are some."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from typing import Any

import pytest
import tern
from ranks import TIMEOUT_MS, as_threads

torch = pytest.importorskip("torch", reason="torch is not installed")

RANKS, TOKENS, HIDDEN, EXPERTS, TOPK = 3, 14, 160, 6, 3
LOCAL = EXPERTS // RANKS
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        # Ranks that share a GPU wait for each other there, and torch for both of them when it loads a kernel meanwhile.
        marks=pytest.mark.skipif(torch.cuda.device_count() < RANKS, reason=f"there are fewer GPUs than {RANKS} ranks"),
    ),
]
LAYOUTS = ["rank_major", "expert_major", "expert_padded"]
EXTENTS = ["exact", "worst"]


@dataclass
class Batch:
    """What one rank brings: the same on every rank that asks."""

    x: Any
    idx: Any
    weights: Any


def batch(rank: int, dtype: Any = torch.float32) -> Batch:
    seed = torch.Generator().manual_seed(100 + rank)
    num_tokens = 0 if rank == 1 else TOKENS - rank  # one rank has none
    idx = torch.randint(-1, EXPERTS, (num_tokens, TOPK), generator=seed)
    return Batch(
        torch.randn(num_tokens, HIDDEN, generator=seed).to(dtype), idx, torch.rand(num_tokens, TOPK, generator=seed)
    )


def entries_of(rank: int) -> list[tuple[int, int, int, int]]:
    """(local expert, source rank, source token, k) of every entry that arrives, in the order of the expert layouts."""
    found = []
    for source in range(RANKS):
        idx = batch(source).idx
        for token, k in itertools.product(range(idx.shape[0]), range(TOPK)):
            if idx[token, k] >= 0 and idx[token, k] // LOCAL == rank:
                found.append((int(idx[token, k]) % LOCAL, source, token, k))
    return sorted(found)


def messages_of(rank: int) -> list[tuple[int, int]]:
    return sorted({(source, token) for _, source, token, _ in entries_of(rank)})


def exchange_of(group: tern.Group, device: str, **options: Any) -> tern.Exchange:
    if device == "cuda":
        device = f"cuda:{group.rank % torch.cuda.device_count()}"
    options = {
        "max_tokens": TOKENS * TOPK,
        "max_row_bytes": 4 * HIDDEN,
        "max_topk": TOPK,
        "max_experts": EXPERTS,
        **options,
    }
    return tern.Exchange(group, device=device, timeout_ms=TIMEOUT_MS, **options)


def plan_of(exchange: tern.Exchange, layout: str, extent: str, **options: Any) -> tern.Plan:
    return exchange.plan(max_tokens=TOKENS, num_experts=EXPERTS, num_topk=TOPK, layout=layout, extent=extent, **options)


def on(exchange: tern.Exchange, array: Any) -> Any:
    return array.to(f"cuda:{exchange.cuda_index}") if exchange.is_cuda else array


def expected_rows(rank: int, layout: str, values: list[Any]) -> tuple[Any, list[tuple[int, int, int, int]]]:
    """The rows that arrive, [rows, H], and the entry of each; in expert_padded without the padding."""
    if layout == "rank_major":
        rows = [values[source][token] for source, token in messages_of(rank)]
        return (torch.stack(rows) if rows else values[0][:0]), []
    entries = entries_of(rank)
    rows = [values[source][token] for _, source, token, _ in entries]
    return (torch.stack(rows) if rows else values[0][:0]), entries


def dense_rows(plan: tern.Plan, arrived: tern.Dispatched, array: Any) -> Any:
    """The rows without padding."""
    if plan.layout == tern.Layout.EXPERT_PADDED:
        return torch.cat([array[e, : int(arrived.expert_counts[e])] for e in range(LOCAL)])
    if plan.layout == tern.Layout.EXPERT_MAJOR:
        starts, counts = arrived.expert_offsets.tolist(), arrived.expert_counts.tolist()
        return torch.cat([array[starts[e] : starts[e] + counts[e]] for e in range(LOCAL)])
    return array[: int(arrived.rank_counts.sum())]


def combined_reference(rank: int, layout: str, weighted: bool) -> Any:
    """float64: tokens come back once for each rank (rank_major) or entry, weighted or not."""
    b = batch(rank)
    factor = torch.zeros(b.x.shape[0], dtype=torch.float64)
    for token in range(b.x.shape[0]):
        row = b.idx[token]
        if layout == "rank_major":
            factor[token] = len({int(e) // LOCAL for e in row if e >= 0})
        else:
            factor[token] = sum((float(b.weights[token, k]) if weighted else 1.0) for k in range(TOPK) if row[k] >= 0)
    return b.x.double() * factor[:, None]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("extent", EXTENTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip(layout: str, extent: str, device: str) -> None:
    def body(group: tern.Group) -> None:
        exchange = exchange_of(group, device)
        plan = plan_of(exchange, layout, extent, expert_alignment=4)
        b = batch(group.rank)
        x, idx, weights = on(exchange, b.x), on(exchange, b.idx), on(exchange, b.weights)
        info = plan.route(idx)
        assert (info is not None) == (extent == "exact")
        names = ["expert_counts", "rank_counts", "source_token", "source_rank", "topk_weights"]
        names += ["topk_idx"] if layout == "rank_major" else ["row_expert", "expert_rank_ranges"]
        names += ["expert_offsets"] if layout == "expert_major" else []
        arrived = plan.dispatch(x, topk_weights=weights, outputs=names)
        rows, entries = expected_rows(group.rank, layout, [batch(r).x for r in range(RANKS)])
        assert torch.equal(dense_rows(plan, arrived, arrived.tokens).cpu(), rows)
        counts = [sum(1 for entry in entries_of(group.rank) if entry[0] == e) for e in range(LOCAL)]
        assert arrived.expert_counts.tolist() == counts
        sources = [sum(1 for source, _ in messages_of(group.rank) if source == r) for r in range(RANKS)]
        assert arrived.rank_counts.tolist() == sources
        if entries:
            found = torch.stack(
                [
                    dense_rows(plan, arrived, array).cpu()
                    for array in (arrived.row_expert, arrived.source_rank, arrived.source_token)
                ],
                dim=1,
            )
            assert found.tolist() == [list(entry[:3]) for entry in entries]
            weights_of = torch.stack([batch(source).weights[token, k] for _, source, token, k in entries])
            assert torch.equal(dense_rows(plan, arrived, arrived.topk_weights).cpu(), weights_of)
        if info is not None:
            assert info.received_per_expert == counts and info.received_per_rank == sources
            assert info.num_tokens == x.shape[0] and info.pair_counts is not None
            assert [pairs[group.rank] for pairs in info.pair_counts] == sources
        weighted = layout != "rank_major"
        y = plan.combine(arrived.tokens, weighting="dispatch" if weighted else "none", row_weights=arrived.topk_weights)
        reference = combined_reference(group.rank, layout, weighted)
        torch.testing.assert_close(y.tokens.cpu().double(), reference, rtol=1e-6, atol=1e-6)
        assert torch.equal(y.topk_weights.cpu(), torch.where(b.idx >= 0, b.weights, torch.zeros(())))

    as_threads(RANKS, body)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_routing_within_the_dispatch_and_phases(layout: str, device: str) -> None:
    def body(group: tern.Group) -> None:
        exchange = exchange_of(group, device)
        plan = plan_of(exchange, layout, "worst")
        b = batch(group.rank)
        x, idx, weights = on(exchange, b.x), on(exchange, b.idx), on(exchange, b.weights)
        names = ["expert_counts", "rank_counts"] + (["expert_offsets"] if layout == "expert_major" else [])
        whole = plan.dispatch(x, topk_idx=idx, outputs=names)
        pending = plan.dispatch_send(x, topk_idx=idx, outputs=names)
        arrived = pending.receive()
        rows, _ = expected_rows(group.rank, layout, [batch(r).x for r in range(RANKS)])
        assert torch.equal(dense_rows(plan, whole, whole.tokens).cpu(), rows)
        assert torch.equal(dense_rows(plan, arrived, arrived.tokens).cpu(), rows)
        owner = None if layout == "rank_major" else weights
        y = plan.combine(arrived.tokens, topk_weights=owner)
        sent = plan.combine_send(arrived.tokens, topk_weights=owner, mode="exact")
        exact = sent.receive()
        reference = combined_reference(group.rank, layout, owner is not None)
        for found in (y, exact):
            torch.testing.assert_close(found.tokens.cpu().double(), reference, rtol=1e-6, atol=1e-6)

    as_threads(RANKS, body)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_prepared_operations_see_what_their_arrays_hold_by_then(layout: str, device: str) -> None:
    def body(group: tern.Group) -> None:
        exchange = exchange_of(group, device)
        plan = plan_of(exchange, layout, "worst")
        b = batch(group.rank)
        x, idx, weights = on(exchange, b.x), on(exchange, b.idx), on(exchange, b.weights)
        names = ["expert_counts", "rank_counts"] + (["expert_offsets"] if layout == "expert_major" else [])
        dispatch = plan.prepare_dispatch(x, topk_idx=idx, outputs=names)
        plan.dispatch(torch.zeros_like(x), topk_idx=idx)  # what comes between leaves it alone
        arrived = dispatch.result
        weighted = layout != "rank_major"
        combine = plan.prepare_combine(arrived.tokens, topk_weights=weights if weighted else None)
        for factor in (1.0, 2.0):
            x.copy_(factor * b.x)
            assert dispatch() is arrived
            rows, _ = expected_rows(group.rank, layout, [factor * batch(r).x for r in range(RANKS)])
            assert torch.equal(dense_rows(plan, arrived, arrived.tokens).cpu(), rows)
            y = combine()
            reference = factor * combined_reference(group.rank, layout, weighted)
            torch.testing.assert_close(y.tokens.cpu().double(), reference, rtol=1e-6, atol=1e-6)
        plan.dispatch(x[:0], topk_idx=idx[:0])
        if x.shape[0] > 0:
            with pytest.raises(tern.InvalidStateError, match="prepare it anew"):
                combine()
            with pytest.raises(tern.InvalidArgumentError, match="would be copied"):
                plan.prepare_dispatch(x, topk_idx=idx.T.contiguous().T)

    as_threads(RANKS, body)


@pytest.mark.parametrize("device", DEVICES)
def test_tokens_of_any_stride(device: str) -> None:
    """Rows that are apart, columns that are apart, and one row said several times."""

    def body(group: tern.Group) -> None:
        exchange = exchange_of(group, device)
        plan = plan_of(exchange, "expert_major", "exact")
        b = [batch(r) for r in range(RANKS)]
        plan.route(on(exchange, b[group.rank].idx))
        ways = [
            lambda x: torch.cat([x, x], dim=1)[:, :HIDDEN],
            lambda x: x.T.contiguous().T,
            lambda x: x.mean(0, keepdim=True).expand(x.shape[0], HIDDEN),
        ]
        for way in ways:
            scales = [way(one.x)[:, :8] for one in b]
            arrived = plan.dispatch(on(exchange, way(b[group.rank].x)), scales=on(exchange, scales[group.rank]))
            rows, _ = expected_rows(group.rank, "expert_major", [way(one.x) for one in b])
            assert torch.equal(arrived.tokens.cpu(), rows)
            assert torch.equal(arrived.scales.cpu(), expected_rows(group.rank, "expert_major", scales)[0])

    as_threads(RANKS, body)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("order", ["row_major", "column_major"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scales_travel(layout: str, order: str, device: str) -> None:
    def body(group: tern.Group) -> None:
        exchange = exchange_of(group, device)
        plan = plan_of(exchange, layout, "exact")
        for dtype in (torch.float32, torch.int32, torch.uint8):
            scales = [(torch.arange(batch(r).x.shape[0] * 8).reshape(-1, 8) + 100 * r).to(dtype) for r in range(RANKS)]
            x = [batch(r).x.to(torch.float8_e4m3fn) for r in range(RANKS)]
            own = on(exchange, scales[group.rank].T.contiguous()).T  # elements far apart
            plan.route(on(exchange, batch(group.rank).idx))
            names = ["expert_counts", "rank_counts"] + (["expert_offsets"] if layout == "expert_major" else [])
            arrived = plan.dispatch(on(exchange, x[group.rank]), scales=own, scale_order=order, outputs=names)
            assert arrived.scales.dtype == dtype and arrived.scales.shape[:-1] == arrived.tokens.shape[:-1]
            if order == "column_major" and arrived.scales.shape[-2] > 1:
                assert arrived.scales.stride(-2) == 1
            expected, _ = expected_rows(group.rank, layout, scales)
            assert torch.equal(dense_rows(plan, arrived, arrived.scales).cpu(), expected)
            rows, _ = expected_rows(group.rank, layout, [one.view(torch.uint8) for one in x])
            assert torch.equal(dense_rows(plan, arrived, arrived.tokens).view(torch.uint8).cpu(), rows)

    as_threads(RANKS, body)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("encoding", ["fp8_f32", "fp8_f32_pow2", "fp8_ue8m0"])
def test_casts(encoding: str, device: str) -> None:
    """The definitions of tern.h, in torch."""

    num_blocks = -(-HIDDEN // 128)

    def cast(x: Any) -> tuple[Any, Any]:
        padded = torch.nn.functional.pad(x.float(), (0, num_blocks * 128 - HIDDEN))
        blocks = padded.reshape(x.shape[0], num_blocks, 128)
        amax = blocks.abs().amax(-1).clamp(min=1e-4)
        scale = amax * torch.tensor(1.0 / 448.0)
        factor = torch.tensor(448.0) / amax
        if encoding != "fp8_f32":
            scale = torch.exp2(torch.ceil(torch.log2(scale.double()))).float()
            factor = 1.0 / scale
        values = (blocks * factor[..., None]).clamp(-448, 448).reshape(x.shape[0], num_blocks * 128)[:, :HIDDEN]
        if encoding == "fp8_ue8m0":
            exponents = (scale.view(torch.int32) >> 23).to(torch.uint8)
            scale = torch.nn.functional.pad(exponents, (0, -exponents.shape[1] % 4)).view(torch.int32)
        return values.to(torch.float8_e4m3fn).view(torch.uint8), scale

    def body(group: tern.Group) -> None:
        exchange = exchange_of(group, device)
        plan = plan_of(exchange, "expert_major", "exact")
        plan.route(on(exchange, batch(group.rank).idx))
        x = [batch(r, torch.bfloat16).x for r in range(RANKS)]
        arrived = plan.dispatch(on(exchange, x[group.rank]), encoding=encoding)
        assert arrived.tokens.dtype == torch.float8_e4m3fn
        casts = [cast(one) for one in x]
        rows, _ = expected_rows(group.rank, "expert_major", [values for values, _ in casts])
        scales, _ = expected_rows(group.rank, "expert_major", [scale for _, scale in casts])
        assert torch.equal(arrived.scales.cpu(), scales)
        assert torch.equal(arrived.tokens.view(torch.uint8).cpu(), rows)

    as_threads(RANKS, body)


@pytest.mark.parametrize("device", DEVICES)
def test_masks_route_too(device: str) -> None:
    def body(group: tern.Group) -> None:
        exchange = exchange_of(group, device)
        plan = exchange.plan(max_tokens=TOKENS, num_experts=EXPERTS, num_topk=0)
        masks, counts = [], []
        for r in range(RANKS):
            seed = torch.Generator().manual_seed(r)
            masks.append(torch.rand(batch(r).x.shape[0], RANKS, generator=seed) < 0.5)
            counts.append(torch.arange(EXPERTS, dtype=torch.int32) + 10 * r)
        info = plan.route(
            token_in_rank=on(exchange, masks[group.rank]), tokens_per_expert=on(exchange, counts[group.rank])
        )
        assert info is not None
        assert info.received_per_expert == [
            int(sum(counts[r][group.rank * LOCAL + e] for r in range(RANKS))) for e in range(LOCAL)
        ]
        arrived = plan.dispatch(on(exchange, batch(group.rank).x), outputs=["source_rank"])
        rows = torch.cat([batch(r).x[masks[r][:, group.rank]] for r in range(RANKS)])
        assert torch.equal(arrived.tokens.cpu(), rows)
        assert arrived.topk_idx is None and arrived.topk_weights is None

    as_threads(RANKS, body)


@pytest.mark.parametrize("device", DEVICES)
def test_window_arrays_and_given_outputs(device: str) -> None:
    """Zero copy, and outputs that are the caller's; window memory goes back with the last array on it."""

    def body(group: tern.Group) -> None:
        window_bytes = 1 << 20
        exchange = exchange_of(group, device, window_bytes=window_bytes)
        plan = plan_of(exchange, "rank_major", "worst")
        b = batch(group.rank)
        rows = exchange.empty((plan.row_capacity, HIDDEN), torch.float32)
        x = exchange.empty(tuple(b.x.shape), torch.float32) if b.x.numel() else on(exchange, b.x)
        x.copy_(b.x)
        out = tern.Dispatched(rows, rank_counts=on(exchange, torch.zeros(RANKS, dtype=torch.int32)))
        assert plan.dispatch(x, topk_idx=on(exchange, b.idx), out=out) is out
        expected, _ = expected_rows(group.rank, "rank_major", [batch(r).x for r in range(RANKS)])
        assert torch.equal(rows[: len(expected)].cpu(), expected)
        out.rank_counts.fill_(-1)
        fresh = plan.dispatch(x, topk_idx=on(exchange, b.idx))  # of the same kind: writes to its own outputs alone
        assert torch.equal(fresh.tokens[: len(expected)].cpu(), expected)
        assert out.rank_counts.tolist() == [-1] * RANKS
        y = on(exchange, torch.empty(b.x.shape))
        assert plan.combine(rows, out=y).tokens is y
        torch.testing.assert_close(y.cpu().double(), combined_reference(group.rank, "rank_major", False))
        if exchange.is_cuda:
            torch.cuda.synchronize(exchange.cuda_index)
        part = rows[3:5]
        del rows, out, x
        with pytest.raises(tern.OutOfMemoryError):  # `part` holds its array
            exchange.empty((window_bytes - 256,), torch.uint8)
        del part
        assert exchange.empty((window_bytes,), torch.uint8).numel() == window_bytes

    as_threads(RANKS, body)


def test_waits_for_each_rank_are_counted() -> None:
    late, late_s = 2, 0.2

    def body(group: tern.Group) -> None:
        exchange = exchange_of(group, "cpu")
        plan = plan_of(exchange, "expert_padded", "worst")
        b = batch(group.rank)
        wait_ns = torch.zeros(RANKS, dtype=torch.int64)
        plan.dispatch(b.x, topk_idx=b.idx, wait_ns=wait_ns)
        before = wait_ns.clone()
        if group.rank == late:
            time.sleep(late_s)
        arrived = plan.dispatch(b.x, topk_idx=b.idx, wait_ns=wait_ns)
        waited = (wait_ns - before).tolist()
        assert min(waited) >= 0 and waited[group.rank] == 0
        plan.combine(arrived.tokens, wait_ns=wait_ns)
        pending = plan.combine_send(arrived.tokens, wait_ns=wait_ns)
        pending.receive()
        assert int(wait_ns.sum()) <= exchange.metrics()["wait_ns"]
        if group.rank != late:
            assert waited[late] > 0
        for wrong in (wait_ns.int(), wait_ns[:1], torch.zeros(2 * RANKS, dtype=torch.int64)[::2]):
            with pytest.raises(tern.InvalidArgumentError, match="wait_ns"):
                plan.combine(arrived.tokens, wait_ns=wrong)

    as_threads(RANKS, body)


def test_bias_starts_the_sum() -> None:
    def body(group: tern.Group) -> None:
        exchange = exchange_of(group, "cpu")
        plan = plan_of(exchange, "expert_major", "exact")
        b = batch(group.rank)
        plan.route(b.idx)
        arrived = plan.dispatch(b.x)
        first, second = torch.ones_like(b.x), torch.full_like(b.x, 2.0)
        plain = plan.combine(arrived.tokens).tokens
        torch.testing.assert_close(plan.combine(arrived.tokens, bias=first).tokens, plain + 1)
        torch.testing.assert_close(plan.combine(arrived.tokens, bias=(first, second)).tokens, plain + 3)

    as_threads(RANKS, body)


@pytest.mark.parametrize("kind", ["numpy", "dlpack"])
def test_other_arrays(kind: str) -> None:
    """NumPy arrays give NumPy arrays; anything with __dlpack__ is taken as a torch tensor where torch is loaded."""
    numpy = pytest.importorskip("numpy")

    class Foreign:
        def __init__(self, array: Any) -> None:
            self.array = array

        def __dlpack__(self, **options: Any) -> Any:
            return self.array.__dlpack__(**options)

        def __dlpack_device__(self) -> Any:
            return self.array.__dlpack_device__()

    make = (lambda t: t.numpy()) if kind == "numpy" else (lambda t: Foreign(t))

    def body(group: tern.Group) -> None:
        exchange = exchange_of(group, "cpu", window_bytes=1 << 20)
        plan = plan_of(exchange, "expert_major", "exact")
        b = batch(group.rank)
        plan.route(make(b.idx))
        arrived = plan.dispatch(make(b.x), topk_weights=make(b.weights))
        assert type(arrived.tokens) is (numpy.ndarray if kind == "numpy" else torch.Tensor)
        rows, _ = expected_rows(group.rank, "expert_major", [batch(r).x for r in range(RANKS)])
        assert numpy.array_equal(numpy.asarray(arrived.tokens), rows.numpy())
        y = plan.combine(arrived.tokens, weighting="dispatch").tokens
        numpy.testing.assert_allclose(y, combined_reference(group.rank, "expert_major", True), rtol=1e-5, atol=1e-5)
        window = exchange.empty((4, 8), numpy.float32)
        assert window.shape == (4, 8) and window.dtype == numpy.float32

    as_threads(RANKS, body)


@pytest.mark.parametrize("device", DEVICES)
def test_capacity_exceeded_says_so_and_leaves_the_rest(device: str) -> None:
    def body(group: tern.Group) -> None:
        exchange = exchange_of(group, device)
        plan = plan_of(exchange, "rank_major", "worst", row_capacity=2)
        b = batch(group.rank)
        try:
            arrived = plan.dispatch(on(exchange, b.x), topk_idx=on(exchange, b.idx))
        except tern.CapacityExceededError as error:
            arrived = error.result
        if exchange.is_cuda:
            torch.cuda.synchronize(exchange.cuda_index)
            failure = exchange.state().failure
            assert failure is not None and failure.status == tern.Status.CAPACITY_EXCEEDED
        rows, _ = expected_rows(group.rank, "rank_major", [batch(r).x for r in range(RANKS)])
        assert len(rows) > 2
        assert torch.equal(arrived.tokens.cpu(), rows[:2])

    as_threads(RANKS, body)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("index_type", [torch.int64, torch.int32])
def test_count_routing(device, index_type):
    def run(group):
        idx = batch(group.rank).idx
        exchange = exchange_of(group, device)
        there = idx.to(index_type).to("cpu" if device == "cpu" else f"cuda:{exchange.cuda_index}")
        counts = exchange.count_routing(there, EXPERTS)
        goes = [{int(e) // LOCAL for e in row if e >= 0} for row in idx]
        assert counts.token_in_rank.dtype == torch.bool
        assert counts.token_in_rank.tolist() == [[r in ranks for r in range(RANKS)] for ranks in goes]
        assert counts.tokens_per_rank.tolist() == [sum(r in ranks for ranks in goes) for r in range(RANKS)]
        assert counts.tokens_per_node.tolist() == [sum(len(ranks) > 0 for ranks in goes)]
        assert counts.tokens_per_expert.tolist() == [int((idx == e).sum()) for e in range(EXPERTS)]
        some = exchange.count_routing(there, EXPERTS, wanted=["tokens_per_rank"])
        assert torch.equal(some.tokens_per_rank, counts.tokens_per_rank) and some.token_in_rank is None
        with pytest.raises(tern.InvalidArgumentError, match="must be"):
            exchange.count_routing(there, EXPERTS + 1)  # not divisible by the ranks
        with pytest.raises(tern.InvalidArgumentError, match="num_topk"):
            exchange.count_routing(there.flatten(), EXPERTS)

    as_threads(RANKS, run)
