# SPDX-License-Identifier: Apache-2.0
"""Low-latency calls that look like one before take a short way, on one rank: whatever changes between two calls, a buffer that has seen nothing
says the same. deep_ep_checks_repeats.py has several ranks."""

from __future__ import annotations

import contextlib
import gc
import types
import weakref
from typing import Any, Callable

import pytest
import tern
from tern import _arrays
from test_repeats import CHANGES, WAYS, outcome

torch = pytest.importorskip("torch", reason="deep_ep needs torch")
deep_ep = pytest.importorskip("deep_ep", reason="deep_ep is not installed")

from deep_ep import repeats  # noqa: E402, needs torch

TOKENS, MOST, HIDDEN, EXPERTS, TOPK = 6, 8, 512, 4, 2
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
HOOKS = [pytest.param(False, id="whole"), pytest.param(True, id="by hook")]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TERN_DEEP_EP_DEVICE", request.param)
    return request.param


def new_buffer(**options: Any) -> Any:
    alone = types.SimpleNamespace(Get_rank=lambda: 0, Get_size=lambda: 1, allgather=lambda own: [own])
    size = deep_ep.Buffer.get_low_latency_rdma_size_hint(2 * MOST, 2 * HIDDEN, 1, 2 * EXPERTS)
    return deep_ep.Buffer(None, 0, 4 * size, low_latency_mode=True, comm=alone, **options)


def batch(device: str, num_tokens: int = TOKENS, seed: int = 0) -> dict[str, Any]:
    numbers = torch.Generator().manual_seed(seed)
    idx = torch.rand(num_tokens, EXPERTS, generator=numbers).argsort(1)[:, :TOPK].contiguous()
    x = torch.randn(num_tokens, HIDDEN, generator=numbers).to(torch.bfloat16)
    weights = torch.rand(num_tokens, TOPK, generator=numbers)
    return {"x": x.to(device), "topk_idx": idx.to(device), "topk_weights": weights.to(device)}


def dispatch(buffer: Any, x: Any, topk_idx: Any, **options: Any) -> Any:
    """What holds by now."""
    options = {"num_max_dispatch_tokens_per_rank": MOST, "num_experts": EXPERTS, "use_fp8": False, **options}
    options = {name: value for name, value in options.items() if name != "topk_weights"}
    arrived = buffer.low_latency_dispatch(x, topk_idx, **options)
    return finished(arrived)


def combine(buffer: Any, rows: Any, handle: Any, topk_idx: Any, topk_weights: Any, **options: Any) -> Any:
    combined = buffer.low_latency_combine(rows, topk_idx, topk_weights, handle, **options)
    return finished(combined)


def finished(results: Any) -> Any:
    event, hook = results[-2:]
    if hook is not None:
        hook()
    event.current_stream_wait()
    return results


def what_came(arrived: Any) -> tuple[Any, ...]:
    """Counts, source tokens and ranges, and the rows that were sent: what lies behind is not written."""
    rows, counts, handle = arrived[:3]
    used = torch.arange(handle[0].shape[1], device=counts.device) < counts.unsqueeze(1)
    parts = rows if isinstance(rows, tuple) else (rows,)
    return (*(part[used] for part in parts), counts, handle[0], handle[1], *map(torch.tensor, handle[2:]))


def expected_rows(given: dict[str, Any]) -> Any:
    x, idx = given["x"], given["topk_idx"]
    return torch.cat([x[(idx == expert).any(dim=1)] for expert in range(EXPERTS)])


def refuse_the_short_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: Any) -> None:
        raise AssertionError("it took the short way")

    monkeypatch.setattr(repeats.DispatchRepeat, "run", run)
    monkeypatch.setattr(repeats.CombineRepeat, "run", run)


def refuse_the_long_way(monkeypatch: pytest.MonkeyPatch, buffer: Any) -> None:
    def long_way(*_: Any, **__: Any) -> None:
        raise AssertionError("it took the long way")

    monkeypatch.setattr(buffer._low_latency, "dispatch", long_way)
    monkeypatch.setattr(buffer._low_latency, "combine", long_way)


def warmed(given: dict[str, Any], **options: Any) -> tuple[Any, Any]:
    """A buffer that knows this pair of calls, and what came last. options: of both."""
    buffer = new_buffer()
    for _ in range(4):
        arrived = dispatch(buffer, **given, **options)
        combine(buffer, arrived[0], arrived[2], given["topk_idx"], given["topk_weights"], **options)
    return buffer, arrived


@pytest.mark.parametrize("by_torch", WAYS)
@pytest.mark.parametrize("hook", HOOKS)
def test_same_looks_take_the_short_way(
    device: str, hook: bool, by_torch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With other data; and results are tensors of their own, as are elements of handles."""
    if not by_torch:
        monkeypatch.setattr(_arrays, "tensor_guards", lambda _: None)
        monkeypatch.setattr(_arrays, "strided_maker", lambda *_: None)
    options = {"return_recv_hook": hook}
    buffer, _ = warmed(batch(device), **options)
    refuse_the_long_way(monkeypatch, buffer)
    given = [batch(device, seed=seed) for seed in range(5)]
    arrived = [dispatch(buffer, **one, **options) for one in given]
    combined = [
        combine(buffer, came[0], came[2], one["topk_idx"], one["topk_weights"], **options)
        for came, one in zip(arrived, given)
    ]
    for came, result, one in zip(arrived, combined, given):
        rows, counts, handle, event, _ = came
        assert isinstance(came, tuple) and event.event is None and len(came) == 5
        assert torch.equal(what_came(came)[0], expected_rows(one))
        assert counts.tolist() == [int((one["topk_idx"] == expert).sum()) for expert in range(EXPERTS)]
        assert handle[2:] == (MOST, HIDDEN, EXPERTS) and len(handle) == 5
        assert handle[0] is handle[0] and handle[0].dtype == torch.int32 and handle[1].dtype == torch.int64
        first, second, *shape = handle
        assert first is handle[0] and second is handle[1] and shape == [MOST, HIDDEN, EXPERTS]
        sums = one["topk_weights"].sum(1, keepdim=True)
        torch.testing.assert_close(result[0].float(), one["x"].float() * sums, rtol=2e-2, atol=1e-2)
    memory = [tensor.untyped_storage().data_ptr() for came in arrived for tensor in (came[0], came[1], came[2][0])]
    assert len({*memory, *(result[0].data_ptr() for result in combined)}) == 4 * len(given)


OF_DISPATCH: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "fewer tokens": lambda a: {"x": a["x"][1:], "topk_idx": a["topk_idx"][1:]},
    "no tokens": lambda a: {"x": a["x"][:0], "topk_idx": a["topk_idx"][:0]},
    "fewer rows than entries": lambda a: {"x": a["x"][1:]},
    "other hidden": lambda a: {"x": a["x"][:, :256].contiguous()},
    "rows with gaps": lambda a: {"x": torch.cat([a["x"], a["x"]], dim=1)[:, :HIDDEN]},
    "rows by columns": lambda a: {"x": a["x"].t().contiguous().t()},
    "one row for all": lambda a: {"x": a["x"][:1].expand(a["x"].shape)},
    "float rows": lambda a: {"x": a["x"].float()},
    "half rows": lambda a: {"x": a["x"].half()},
    "int32 entries": lambda a: {"topk_idx": a["topk_idx"].int()},
    "int16 entries": lambda a: {"topk_idx": a["topk_idx"].short()},
    "one entry": lambda a: {"topk_idx": a["topk_idx"][:, :1].contiguous()},
    "entries with gaps": lambda a: {"topk_idx": torch.cat([a["topk_idx"]] * 2, dim=1)[:, :TOPK]},
    "entries as a vector": lambda a: {"topk_idx": a["topk_idx"][:, 0]},
    "more tokens of each rank": lambda _: {"num_max_dispatch_tokens_per_rank": MOST + 1},
    "too few tokens of each rank": lambda _: {"num_max_dispatch_tokens_per_rank": TOKENS - 1},
    "more experts": lambda _: {"num_experts": 2 * EXPERTS},
    "too many tokens for the buffer": lambda _: {"num_max_dispatch_tokens_per_rank": 1 << 16},
    "fp8": lambda _: {"use_fp8": True},
    "fp8, scales rounded": lambda _: {"use_fp8": True, "round_scale": True},
    "fp8, exponents": lambda _: {"use_fp8": True, "round_scale": True, "use_ue8m0": True},
    "exponents not rounded": lambda _: {"use_fp8": True, "use_ue8m0": True},
    "async_finish": lambda _: {"async_finish": True},
    "a hook": lambda _: {"return_recv_hook": True},
    "both": lambda _: {"async_finish": True, "return_recv_hook": True},
    "statistics": lambda a: {"cumulative_local_expert_recv_stats": torch.zeros(EXPERTS).int().to(a["x"].device)},
    "statistics of another shape": lambda a: {"cumulative_local_expert_recv_stats": torch.zeros(1).int()},
    "waiting": lambda a: {"dispatch_wait_recv_cost_stats": torch.zeros(1).long().to(a["x"].device)},
}


@pytest.mark.parametrize("change", OF_DISPATCH)
def test_a_dispatch_that_differs(device: str, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = batch(device)
    buffer, _ = warmed(given)
    other = {**given, **OF_DISPATCH[change](given)}
    expected = outcome(lambda: what_came(dispatch(new_buffer(), **other)))
    with monkeypatch.context() as patch:
        refuse_the_short_way(patch)
        assert outcome(lambda: what_came(dispatch(buffer, **other))) == expected
    for _ in range(3):  # by then it is one that comes again, or the same error
        assert outcome(lambda: what_came(dispatch(buffer, **other))) == expected
        assert torch.equal(what_came(dispatch(buffer, **given))[0], expected_rows(given))


OF_COMBINE: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "fewer rows": lambda a: {"rows": a["rows"][:, 1:]},
    "rows as a matrix": lambda a: {"rows": a["rows"].view(-1, HIDDEN)},
    "float rows": lambda a: {"rows": a["rows"].float()},
    "rows by columns": lambda a: {"rows": a["rows"].transpose(1, 2).contiguous().transpose(1, 2)},
    "fewer tokens": lambda a: {name: a[name][1:] for name in ("topk_idx", "topk_weights")},
    "fewer weights": lambda a: {"topk_weights": a["topk_weights"][1:]},
    "fewer entries": lambda a: {"topk_idx": a["topk_idx"][1:]},
    "one entry": lambda a: {name: a[name][:, :1].contiguous() for name in ("topk_idx", "topk_weights")},
    "int32 entries": lambda a: {"topk_idx": a["topk_idx"].int()},
    "int16 entries": lambda a: {"topk_idx": a["topk_idx"].short()},
    "double weights": lambda a: {"topk_weights": a["topk_weights"].double()},
    "weights with gaps": lambda a: {"topk_weights": torch.cat([a["topk_weights"]] * 2, dim=1)[:, :TOPK]},
    "use_logfmt": lambda _: {"use_logfmt": True},
    "zero_copy": lambda _: {"zero_copy": True},
    "zero_copy and use_logfmt": lambda _: {"zero_copy": True, "use_logfmt": True},
    "async_finish": lambda _: {"async_finish": True},
    "a hook": lambda _: {"return_recv_hook": True},
    "both": lambda _: {"async_finish": True, "return_recv_hook": True},
    "out": lambda a: {"out": torch.empty_like(a["x"])},
    "out with gaps": lambda a: {"out": torch.cat([a["x"], a["x"]], dim=1)[:, :HIDDEN]},
    "out that is too short": lambda a: {"out": a["x"][1:].clone()},
    "out of floats": lambda a: {"out": a["x"].float()},
    "waiting": lambda a: {"combine_wait_recv_cost_stats": torch.zeros(1).long().to(a["x"].device)},
    "waiting of another dtype": lambda a: {"combine_wait_recv_cost_stats": torch.zeros(1).int()},
    "a copy of the handle": lambda a: {"handle": tuple(a["handle"])},
}


@pytest.mark.parametrize("change", OF_COMBINE)
def test_a_combine_that_differs(device: str, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = batch(device)
    buffer, _ = warmed(given)

    def combined(buffer: Any, change: str | None, **options: Any) -> Any:
        rows, _, handle, _, _ = dispatch(buffer, **given)
        buffer.get_next_low_latency_combine_buffer(handle).copy_(rows)
        whole = {**given, "rows": rows, "handle": handle}
        other = {**whole, **({} if change is None else OF_COMBINE[change](whole))}
        del other["x"]
        return outcome(lambda: combine(buffer, **other)[0])

    expected, usual = combined(new_buffer(), change), combined(new_buffer(), None)
    with monkeypatch.context() as patch:
        patch.setattr(repeats.CombineRepeat, "run", lambda *_: pytest.fail("it took the short way"))
        assert combined(buffer, change) == expected
    for _ in range(3):
        assert combined(buffer, change) == expected
        assert combined(buffer, None) == usual


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_tensor_that_is_another_by_now(device: str, change: str, hook: bool) -> None:
    """The same object, changed in place behind calls that it was good for."""
    options = {"return_recv_hook": hook}

    def dispatched(buffer: Any, x: Any, topk_idx: Any, **_: Any) -> Any:
        return what_came(dispatch(buffer, x, topk_idx, **options))

    def combined(buffer: Any, rows: Any, out: Any, topk_idx: Any, topk_weights: Any, **_: Any) -> Any:
        handle = dispatch(buffer, **batch(device), **options)[2]
        return combine(buffer, rows, handle, topk_idx, topk_weights, out=out, **options)[0]

    def check(name: str, operation: Callable[..., Any]) -> None:
        tensors = batch(device)
        tensors["out"] = torch.empty_like(tensors["x"])
        tensors["rows"] = dispatch(new_buffer(), **batch(device))[0].nan_to_num_(0.0)
        buffer = new_buffer()
        for _ in range(5):
            operation(buffer, **tensors)
        with contextlib.suppress(RuntimeError):  # of torch's: some changes are none of three dimensions
            CHANGES[change](tensors[name])
        for _ in range(3):
            expected = outcome(lambda: operation(new_buffer(), **tensors))
            assert outcome(lambda: operation(buffer, **tensors)) == expected, name

    for name in ("x", "topk_idx"):
        check(name, dispatched)
    for name in ("rows", "topk_idx", "topk_weights", "out"):
        check(name, combined)


def test_rows_in_the_window_count_only_with_zero_copy(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether they lie there is what ranks agree on by zero_copy alone: they are copied."""
    given = batch(device)
    buffer, _ = warmed(given)
    routing = given["topk_idx"], given["topk_weights"]
    for _ in range(3):
        rows, _, handle, _, _ = dispatch(buffer, **given)
        usual = combine(buffer, rows, handle, *routing)[0]
        window = buffer.get_next_low_latency_combine_buffer(handle).copy_(rows)
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "clone", lambda *_: pytest.fail("a copy"))
            with pytest.raises(pytest.fail.Exception, match="a copy"):
                combine(buffer, window, handle, *routing)
        assert torch.equal(combine(buffer, window, handle, *routing)[0], usual)
        shape_only = torch.empty((), dtype=torch.bfloat16, device=device).expand(rows.shape)
        assert torch.equal(combine(buffer, shape_only, handle, *routing, zero_copy=True)[0], usual)


def test_errors_behind_short_calls(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = batch(device)
    buffer, (rows, _, handle, _, _) = warmed(given, return_recv_hook=True)
    other, _ = warmed(given)
    routing = given["topk_idx"], given["topk_weights"]
    hook = buffer.low_latency_combine(rows, *routing, handle, return_recv_hook=True)[2]
    hook()
    with pytest.raises(tern.InvalidStateError, match="has run already"):
        hook()
    assert handle.repeat is not None
    with monkeypatch.context() as patch:  # a handle of another buffer is none of the short way's business
        patch.setattr(repeats.CombineRepeat, "run", lambda *_: pytest.fail("it took the short way"))
        outcome(lambda: combine(other, rows, handle, *routing, return_recv_hook=True)[0])

    def fails(*_: Any) -> int:
        return int(tern.Status.OUT_OF_MEMORY)

    with monkeypatch.context() as patch:
        patch.setattr(repeats.addressed.AddressedDispatch, "run", fails)
        with pytest.raises(tern.OutOfMemoryError, match="low_latency_dispatch: 8 tokens of each rank.*make it with"):
            dispatch(buffer, **given, return_recv_hook=True)
    with monkeypatch.context() as patch:
        patch.setattr(repeats.addressed.AddressedCombine, "run", fails)
        with pytest.raises(tern.OutOfMemoryError, match="low_latency_combine: 8 tokens of each rank.*make it with"):
            combine(buffer, rows, handle, *routing, return_recv_hook=True)
    assert not any(lock.locked() for lock in buffer._low_latency.lane_locks)
    assert torch.equal(what_came(dispatch(buffer, **given, return_recv_hook=True))[0], expected_rows(given))


def test_a_destroyed_buffer_refuses(device: str) -> None:
    given = batch(device)
    buffer = new_buffer(explicitly_destroy=True)
    for _ in range(4):
        rows, _, handle, _, _ = dispatch(buffer, **given)
    buffer.destroy()
    with pytest.raises(tern.InvalidStateError, match="destroyed"):
        dispatch(buffer, **given)
    with pytest.raises(tern.InvalidStateError, match="destroyed"):
        combine(buffer, rows, handle, given["topk_idx"], given["topk_weights"])


@pytest.mark.parametrize("hook", HOOKS)
def test_plans_are_used_again_and_no_tensor_is_kept(device: str, hook: bool) -> None:
    given = batch(device)
    options = {"return_recv_hook": hook}
    buffer, arrived = warmed(given, **options)
    alive = [dispatch(buffer, **given, **options) for _ in range(3)]
    plans = {id(one[2].lease.plan) for one in (arrived, *alive)}
    assert len(plans) == 4, "a plan of a handle that lives is nobody else's"
    del arrived, alive
    assert id(dispatch(buffer, **given, **options)[2].lease.plan) in plans
    came = dispatch(buffer, **given, **options)
    combined = combine(buffer, came[0], came[2], given["topk_idx"], given["topk_weights"], **options)
    came[2][0]
    tensors = [*given.values(), came[0], came[1], came[2][0], came[2][1], combined[0]]
    references = [weakref.ref(tensor) for tensor in tensors]
    handle, exchange = came[2], weakref.ref(buffer._low_latency.exchange)
    first, second = handle[0].clone(), handle[1].clone()
    del tensors, given, came, combined
    if device == "cuda":
        torch.cuda.synchronize()
    gc.collect()
    assert [reference() is None for reference in references] == [True] * 5 + [False] * 2 + [True]
    gc.disable()
    try:
        del buffer
        assert torch.equal(handle[0], first) and torch.equal(handle[1], second) and exchange() is not None
        del handle
        assert exchange() is None, "the memory goes with the last handle, at once"
    finally:
        gc.enable()


def test_a_handle_may_be_collected_in_a_cycle(device: str) -> None:
    given, buffer = batch(device), new_buffer()
    for _ in range(3):
        owner = types.SimpleNamespace(arrived=dispatch(buffer, **given))
        owner.itself = owner
        del owner
        gc.collect()
        arrived = dispatch(buffer, **given)
        combine(buffer, arrived[0], arrived[2], given["topk_idx"], given["topk_weights"])
        assert torch.equal(what_came(arrived)[0], expected_rows(given))


def test_what_a_hook_needs_lives_until_it_has_run(device: str) -> None:
    buffer, _ = warmed(batch(device), return_recv_hook=True)

    def check(hook: Any, plan: Any, idle: Any, needed: list[Any]) -> None:
        """Of an operation whose tensors and handle nobody else holds."""
        references = [*map(weakref.ref, needed)]
        needed.clear()
        assert plan not in idle and all(reference() is not None for reference in references)
        hook()
        assert plan in idle and not any(reference() is not None for reference in references)

    def sent(needed: list[Any], **given: Any) -> tuple[Any, Any, Any]:
        arrived = buffer.low_latency_dispatch(
            given["x"], given["topk_idx"], MOST, EXPERTS, use_fp8=False, return_recv_hook=True
        )
        needed += [given["x"], given["topk_idx"], arrived[0], arrived[1]]
        return arrived[4], arrived[2].lease.plan, arrived[2].lease._idle

    def sent_back(needed: list[Any], **given: Any) -> tuple[Any, Any, Any]:
        rows, _, handle, _, _ = dispatch(buffer, **given, return_recv_hook=True)
        out = torch.empty_like(given["x"])
        combined = buffer.low_latency_combine(
            rows, given["topk_idx"], given["topk_weights"], handle, return_recv_hook=True, out=out
        )
        needed += [rows, given["topk_weights"], out]
        return combined[2], handle.lease.plan, handle.lease._idle

    for operation in (sent, sent_back, sent, sent_back):
        needed: list[Any] = []
        check(*operation(needed, **batch(device)), needed)


def test_what_is_captured_takes_the_long_way(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Along plans that no call outside of graphs uses; deep_ep_checks_graphs.py captures."""
    given = batch(device)
    buffer, before = warmed(given)
    with monkeypatch.context() as patch:
        refuse_the_short_way(patch)
        patch.setattr(buffer._low_latency.streams, "is_capturing", lambda: True)
        captured = []
        for _ in range(4):
            captured.append(dispatch(buffer, **given))
            combine(buffer, captured[-1][0], captured[-1][2], given["topk_idx"], given["topk_weights"])
    plans = {id(one[2].lease.plan) for one in captured}
    refuse_the_long_way(monkeypatch, buffer)
    del captured, before
    for _ in range(4):
        assert id(dispatch(buffer, **given)[2].lease.plan) not in plans


def test_what_is_wished_of_masks_outlives_a_recovery_that_fails(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given, buffer = batch(device), new_buffer(enable_shrink=True)
    mode, asked = buffer._low_latency, []

    def recover(**how: Any) -> None:
        asked.append(how)
        if len(asked) < 3:
            raise (tern.TimeoutError, tern.MaskedOutError)[len(asked) - 1]("no")

    monkeypatch.setattr(type(mode.exchange), "recover", lambda exchange, **how: recover(**how))
    mode._is_masked_out = True
    buffer.low_latency_clean_mask_buffer()
    for error in (tern.TimeoutError, tern.MaskedOutError):
        mode._is_masked_out = False
        with pytest.raises(error):
            dispatch(buffer, **given)
        assert mode._is_masked_out == (error is tern.MaskedOutError)
    for _ in range(2):
        dispatch(buffer, **given)
    assert asked == [{"mask": [], "readmit": True}] * 3 and not mode._is_masked_out


def test_with_masks_nothing_is_short(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_the_short_way(monkeypatch)
    given, buffer = batch(device), new_buffer(enable_shrink=True)
    for _ in range(5):
        arrived = dispatch(buffer, **given)
        combine(buffer, arrived[0], arrived[2], given["topk_idx"], given["topk_weights"])
    assert torch.equal(what_came(arrived)[0], expected_rows(given))
