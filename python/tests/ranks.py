# SPDX-License-Identifier: Apache-2.0
"""Plays ranks: as threads of this process, or as processes that meet through gloo. Whatever one of them raises is raised here."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any, Callable

import tern

TIMEOUT_MS = 20_000  # of every wait in the library
DEADLINE_S = 150  # of a whole run


def as_threads(num_ranks: int, body: Callable[[tern.Group], Any], device: str = "cpu", **options: Any) -> list[Any]:
    """What `body` returned on each rank. `options` are those of tern.Group.local.

    device: "cuda": torch's current device and stream are the rank's own, or with too few GPUs the stream alone. On one stream
    the operations of two ranks would wait for each other.
    """
    results: list[Any] = [None] * num_ranks
    errors: list[BaseException] = []

    def run(group: tern.Group) -> None:
        try:
            with _own_stream(device, group.rank):
                results[group.rank] = body(group)
        except BaseException as error:  # noqa: BLE001, raised again below
            errors.append(error)

    threads = [
        threading.Thread(target=run, args=(group,), daemon=True)
        for group in tern.Group.local(num_ranks, timeout_ms=TIMEOUT_MS, **options)
    ]
    for thread in threads:
        thread.start()
    end = time.monotonic() + DEADLINE_S
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    if errors:
        # The first cause rather than what it did to the others.
        raise next((e for e in errors if not isinstance(e, (tern.AbortedError, tern.TimeoutError))), errors[0])
    assert not any(thread.is_alive() for thread in threads), f"ranks do not end within {DEADLINE_S} s"
    return results


def _own_stream(device: str, rank: int) -> Any:
    if device != "cuda":
        return contextlib.nullcontext()
    import torch

    return torch.cuda.stream(torch.cuda.Stream(rank % torch.cuda.device_count()))


def as_processes(num_ranks: int, body: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `body(rank, *arguments)` returned on each rank; `body` is a function of a module, and torch.distributed is initialised.

    A rank that dies without a word gives None.
    """
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        processes = [
            context.Process(target=_process, args=(rank, num_ranks, store, results, body, arguments), daemon=True)
            for rank in range(num_ranks)
        ]
        for process in processes:
            process.start()
        found = _collect(processes, results)
        for process in processes:
            process.kill()
            process.join()
    for rank in range(num_ranks):
        if isinstance(found.get(rank), _Raised):
            raise AssertionError(f"rank {rank}: {found[rank].text}")
    return [found.get(rank) for rank in range(num_ranks)]


class _Raised:
    def __init__(self, text: str) -> None:
        self.text = text


def _collect(processes: list[Any], results: Any) -> dict[int, Any]:
    found: dict[int, Any] = {}
    deadline = time.monotonic() + DEADLINE_S
    while len(found) < len(processes):
        try:
            rank, result = results.get(timeout=0.2)
            found[rank] = result
        except queue.Empty:
            if all(rank in found or process.exitcode is not None for rank, process in enumerate(processes)):
                break
            assert time.monotonic() < deadline, f"ranks {sorted(set(range(len(processes))) - set(found))} do not end"
    return found


def _process(
    rank: int, num_ranks: int, store: str, results: Any, body: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    import torch.distributed as dist

    os.environ["TERN_TIMEOUT_MS"] = str(TIMEOUT_MS)
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=num_ranks)
        results.put((rank, body(rank, *arguments)))
    except BaseException:  # noqa: BLE001, reported to the parent
        results.put((rank, _Raised(traceback.format_exc())))
    results.close()
    results.join_thread()
    os._exit(0)  # whatever the other ranks do
