# SPDX-License-Identifier: Apache-2.0
"""How ranks meet: threads, torch.distributed, MPI-like communicators, launchers; and what happens when one fails."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import tern
from ranks import TIMEOUT_MS, as_processes, as_threads

torch = pytest.importorskip("torch", reason="torch is not installed")

EXPERTS, TOPK, TOKENS, HIDDEN = 8, 2, 6, 32


def small_exchange(group: tern.Group, **options: Any) -> tern.Exchange:
    options = {"device": "cpu", "timeout_ms": TIMEOUT_MS, **options}
    return tern.Exchange(
        group, max_tokens=TOKENS, max_row_bytes=4 * HIDDEN, max_topk=TOPK, max_experts=EXPERTS, **options
    )


def small_plan(exchange: tern.Exchange, **options: Any) -> tern.Plan:
    return exchange.plan(max_tokens=TOKENS, num_experts=EXPERTS, num_topk=TOPK, **options)


def round_trip(exchange: tern.Exchange) -> Any:
    """Every token to the experts 0 and 7, back doubled (once where both are on one rank), over what it was."""
    plan = small_plan(exchange)
    x = torch.arange(TOKENS * HIDDEN, dtype=torch.float32).reshape(TOKENS, HIDDEN) + 1
    plan.route(torch.tensor([[0, EXPERTS - 1]] * TOKENS))
    y = plan.combine(plan.dispatch(x).tokens).tokens
    return (y / x).mean().item()


def with_torch(rank: int) -> Any:
    group = tern.Group.from_torch()
    assert (group.rank, group.num_ranks) == (rank, 3)
    halves = torch.distributed.new_group([0, 2])
    factors = [round_trip(small_exchange(group))] if EXPERTS % 3 == 0 else []
    if rank != 1:
        half = tern.Group.from_torch(halves, name="halves")
        assert half.num_ranks == 2
        factors.append(round_trip(small_exchange(half)))
    return factors


def test_declared_nodes() -> None:
    """Two nodes of two ranks on this host, which meet over libfabric."""
    groups = tern.Group.local(4, ranks_per_node=2)
    assert [(g.node, g.num_nodes, g.rank_in_node, g.ranks_in_node) for g in groups] == [
        (0, 2, 0, 2),
        (0, 2, 1, 2),
        (1, 2, 0, 2),
        (1, 2, 1, 2),
    ]
    try:
        factors = as_threads(4, lambda group: round_trip(small_exchange(group)), ranks_per_node=2)
    except tern.UnsupportedError as error:
        pytest.skip(f"no network between nodes: {error}")
    assert factors == [2.0] * 4


def test_from_torch() -> None:
    assert as_processes(3, with_torch) == [[2.0], [], [2.0]]


def whose_process_group_goes(_rank: int) -> tuple[float, str]:
    group = tern.Group.from_torch()
    exchange = small_exchange(group)
    gone = weakref.ref(torch.distributed.group.WORLD)
    torch.distributed.destroy_process_group()
    assert gone() is None, "its threads run on"
    with pytest.raises(tern.InvalidStateError) as raised:
        small_exchange(group)
    return round_trip(exchange), str(raised.value)


def test_process_group_may_be_destroyed() -> None:
    assert (
        as_processes(2, whose_process_group_goes)
        == [(2.0, "the ProcessGroup has been destroyed: make exchanges before that")] * 2
    )


class Communicator:
    """mpi4py's interface, among threads."""

    def __init__(self, rank: int, board: list[Any], barrier: threading.Barrier) -> None:
        self._rank, self._board, self._barrier = rank, board, barrier

    def Get_rank(self) -> int:  # noqa: N802, MPI's name
        return self._rank

    def Get_size(self) -> int:  # noqa: N802
        return len(self._board)

    def allgather(self, own: bytes) -> list[bytes]:
        self._board[self._rank] = own
        self._barrier.wait(TIMEOUT_MS / 1000)
        gathered = list(self._board)
        self._barrier.wait(TIMEOUT_MS / 1000)
        return gathered


def test_from_mpi() -> None:
    board: list[Any] = [None] * 2
    barrier = threading.Barrier(2)
    factors: list[Any] = [None] * 2

    def run(rank: int) -> None:
        group = tern.Group.from_mpi(Communicator(rank, board, barrier), name=f"mpi-{os.getpid()}")
        factors[rank] = round_trip(small_exchange(group))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert factors == [2.0, 2.0]


def test_from_env_alone() -> None:
    program = (
        "import tern; g = tern.Group.from_env(); print(g.rank, g.num_ranks);"
        "e = tern.Exchange(g, device='cpu'); print(e.state().health.name)"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert result.stdout.split() == ["0", "1", "OK"]


def test_from_env_under_torchrun(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import pathlib, tern\n"
        "g = tern.Group.from_env()\n"
        "e = tern.Exchange(g, device='cpu')\n"
        "(pathlib.Path(__file__).parent / f'rank{g.rank}').write_text(f'{g.num_ranks} {e.state().health.name}')\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(program)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert [(tmp_path / f"rank{rank}").read_text() for rank in range(2)] == ["2 OK", "2 OK"]


def test_an_allgather_that_raises_is_what_the_caller_sees() -> None:
    def broken(_: bytes) -> list[bytes]:
        raise KeyError("the store is gone")

    with pytest.raises(KeyError, match="the store is gone"):
        tern.Group.from_allgather(0, 2, broken)
    with pytest.raises(tern.Error, match="2 of .* bytes were expected"):
        tern.Group.from_allgather(0, 2, lambda own: [own])


def test_errors_are_classes_with_the_librarys_text() -> None:
    group = tern.Group.local(1)[0]
    exchange = small_exchange(group)
    with pytest.raises(tern.InvalidArgumentError, match="num_experts is 0") as raised:
        exchange.plan(max_tokens=1, num_experts=0, num_topk=1)
    assert raised.value.status == tern.Status.INVALID_ARGUMENT
    assert isinstance(raised.value, (RuntimeError, ValueError))
    with pytest.raises(tern.InvalidArgumentError, match="'diagonal' is no Layout.*'rank_major'"):
        small_plan(exchange, layout="diagonal")
    with pytest.raises(tern.InvalidStateError):
        small_plan(exchange).combine(torch.zeros(0, HIDDEN))
    plan = small_plan(exchange)
    with pytest.raises(tern.InvalidArgumentError, match="int64 or int32"):
        plan.route(torch.zeros(2, TOPK))
    with pytest.raises(tern.InvalidArgumentError, match=r"\[num_tokens, 2\]"):
        plan.route(torch.zeros(2, 5, dtype=torch.int64))
    plan.route(torch.zeros(2, TOPK, dtype=torch.int64))
    with pytest.raises(tern.InvalidArgumentError, match="3 rows, but 2 were routed"):
        plan.dispatch(torch.zeros(3, HIDDEN))
    with pytest.raises(tern.InvalidArgumentError, match="no field of Dispatched"):
        plan.dispatch(torch.zeros(2, HIDDEN), outputs=["speed"])
    assert {c.status for c in tern.Error.__subclasses__()} == set(tern.Status) - {tern.Status.OK}


def test_a_rank_that_never_comes_is_named() -> None:
    def body(group: tern.Group) -> None:
        exchange = small_exchange(group, timeout_ms=4000)  # of its creation too
        plan = small_plan(exchange)
        if group.rank == 1:
            return
        idx = torch.zeros(2, TOPK, dtype=torch.int64)
        with pytest.raises(TimeoutError, match="rank 1"):
            plan.route(idx)
        assert exchange.state().health == tern.Health.FAILED
        failure = exchange.state().failure
        assert failure is not None and failure.awaited == 1 and failure.operation == tern.Operation.ROUTE

    as_threads(2, body)


def dies_or_goes_on(rank: int) -> Any:
    exchange = small_exchange(tern.Group.from_torch(), timeout_ms=4000)
    stale, plan = small_plan(exchange), small_plan(exchange)
    idx = torch.tensor([[0, EXPERTS - 1]] * TOKENS)
    stale.route(idx)
    if rank == 1:
        os._exit(1)
    with pytest.raises(tern.Error) as raised:
        plan.route(idx)
    exchange.recover(allow_mask=True, timeout_ms=6000)
    state = exchange.state()
    with pytest.raises(tern.StalePlanError):
        stale.dispatch(torch.ones(TOKENS, HIDDEN))
    return type(raised.value).__name__, state.masked, state.generation, state.health.name, round_trip(exchange)


def test_a_killed_rank_is_left_behind() -> None:
    found = as_processes(4, dies_or_goes_on)
    assert found[1] is None
    for rank in (0, 2, 3):
        assert found[rank] in [(name, [1], 1, "DEGRADED", 2.0) for name in ("TimeoutError", "AbortedError")]


def test_other_threads_run_while_one_waits() -> None:
    """Calls into the library release the GIL: a Python thread that counts goes on while a rank waits for another."""

    def body(group: tern.Group) -> None:
        exchange = small_exchange(group)
        plan = small_plan(exchange)
        waiting = threading.Event()
        counted = [0]
        if group.rank == 0:
            thread = threading.Thread(
                target=lambda: (waiting.set(), plan.route(torch.zeros(1, TOPK, dtype=torch.int64)))
            )
            thread.start()
            waiting.wait()
            while counted[0] < 1000:  # would never be reached if the waiting thread held the GIL
                counted[0] += 1
            barrier.wait()
            thread.join()
        else:
            barrier.wait()
            plan.route(torch.zeros(1, TOPK, dtype=torch.int64))

    barrier = threading.Barrier(2)
    as_threads(2, body)


def test_objects_may_be_dropped_in_any_order() -> None:
    group = tern.Group.local(1)[0]
    exchange = small_exchange(group, window_bytes=1 << 16)
    native = weakref.ref(exchange._native)
    plan, array = small_plan(exchange), exchange.empty((4,), torch.float32)
    exchange.destroy()
    with pytest.raises(tern.InvalidArgumentError):
        exchange.state()
    del exchange, group
    gc.collect()
    assert native() is not None
    array.fill_(1.0)
    del plan
    gc.collect()
    assert native() is not None
    del array
    gc.collect()
    assert native() is None


def test_memory_is_told_before_it_is_taken() -> None:
    group = tern.Group.local(1)[0]
    info = tern.Exchange.query_memory(group, device="cpu", max_tokens=128, max_row_bytes=14336, window_bytes=1 << 20)
    assert info.total_bytes == info.control_bytes + info.staging_bytes + info.window_bytes
    assert info.window_bytes == 1 << 20


def test_metrics_count() -> None:
    def body(group: tern.Group) -> dict[str, int]:
        exchange = small_exchange(group)
        round_trip(exchange)
        return exchange.metrics()

    for metrics in as_threads(2, body):
        assert (metrics["num_routes"], metrics["num_dispatches"], metrics["num_combines"]) == (1, 1, 1)
        assert metrics["sent_bytes"] > 0


def test_import_needs_neither_torch_nor_numpy() -> None:
    program = "import sys, tern; print('torch' in sys.modules or 'numpy' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.strip() == "False"


def test_a_missing_library_says_what_to_do() -> None:
    environment = {**os.environ, "TERN_LIBRARY": "/nowhere/libtern.so.0"}
    started = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", "import tern"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode != 0 and "set TERN_LIBRARY" in result.stderr, time.monotonic() - started
