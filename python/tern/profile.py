# SPDX-License-Identifier: Apache-2.0
"""A timeline of an exchange, as a Chrome trace: open it at https://ui.perfetto.dev or chrome://tracing.

    with tern.profile(exchange, "trace_{rank}.json") as timeline:
        ...                                              # operations
    print(timeline.wait_us())                            # {2: 1873.2}: who kept this rank waiting
    tern.merge_traces(glob("trace_*.json"), "all.json")  # by one of the ranks, when all have ended: all ranks side by side

Each rank is a process of the trace, each lane a thread of it. Within a call (route, dispatch, combine) lie planning, sending, waiting for
some rank, receiving and reducing.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterable, Optional, Union

from . import _c
from ._library import lib
from .errors import InvalidArgumentError, check
from .exchange import Exchange

PathLike = Union[str, "os.PathLike[str]"]

_AWAITED = {
    _c.Awaited.ADDRESS: "'s rows",
    _c.Awaited.CONSUMED: " to take what it was sent",
}


@dataclass(frozen=True)
class Span:
    """Something that a rank did, from begin_ns to end_ns of the host's monotonic clock (time.monotonic_ns); tern.h, tern_span."""

    kind: _c.SpanKind
    operation: _c.Operation
    phase: _c.Phase  # of OPERATION
    lane: int
    peer: Optional[int]  # WAIT: the rank waited for; RECEIVE: the sender
    awaited: _c.Awaited  # of WAIT
    status: _c.Status  # OPERATION, WAIT: how it ended
    epoch: int  # of SEND, WAIT, RECEIVE, REDUCE
    bytes: int  # SEND: to all ranks; RECEIVE: from the peer; REDUCE: of the rows that were summed
    begin_ns: int
    end_ns: int

    @property
    def duration_us(self) -> float:
        return (self.end_ns - self.begin_ns) / 1e3

    @property
    def name(self) -> str:
        """As people read it: "wait for rank 2"."""
        if self.kind == _c.SpanKind.OPERATION:
            phase = "" if self.phase == _c.Phase.WHOLE else f" ({self.phase.name.lower()})"
            return self.operation.name.lower() + phase
        if self.kind == _c.SpanKind.WAIT:
            whom = "the GPU" if self.awaited == _c.Awaited.OWN_GPU else f"rank {self.peer}"
            return f"wait for {whom}{_AWAITED.get(self.awaited, '')}"
        if self.kind == _c.SpanKind.RECEIVE:
            return "fill in" if self.peer is None else f"receive from rank {self.peer}"
        return self.kind.name.lower()


class Profile:
    """A recording: a context manager, made by `profile`. What it holds is there once its block has ended, also by an exception."""

    def __init__(self, exchange: Exchange, path: Optional[PathLike], capacity: int) -> None:
        self.rank = exchange.group.rank
        self.path = None if path is None else _path_of_rank(path, self.rank, exchange.group.num_ranks)
        self.spans: list[Span] = []  # lane after lane, in each in the order in which they ended
        self.num_dropped = 0  # spans that found no room: give a larger capacity
        self._native = exchange._native
        self._capacity = capacity

    def __enter__(self) -> Profile:
        check(lib.tern_trace_start(self._native.handle, self._capacity))
        return self

    def __exit__(self, *_: Any) -> None:
        check(lib.tern_trace_stop(self._native.handle))
        self._read()
        if self.path is not None:
            self.write(self.path)

    def wait_us(self) -> dict[int, float]:
        """How long this rank waited for each other one, longest first; a wait for its own GPU counts as one for itself."""
        waited: dict[int, float] = defaultdict(float)
        for span in self.spans:
            if span.kind == _c.SpanKind.WAIT and span.peer is not None:
                waited[span.peer] += span.duration_us
        return dict(sorted(waited.items(), key=lambda item: -item[1]))

    def trace_events(self) -> list[dict[str, Any]]:
        """The events of this rank's Chrome trace."""
        events = [
            _name_event("process_name", self.rank, 0, f"rank {self.rank}"),
            {"ph": "M", "name": "process_sort_index", "pid": self.rank, "tid": 0, "args": {"sort_index": self.rank}},
        ]
        for lane in sorted({span.lane for span in self.spans}):
            events.append(_name_event("thread_name", self.rank, lane, f"lane {lane}"))
        # Of spans that begin together the longest comes first: it holds the others.
        for span in sorted(self.spans, key=lambda s: (s.begin_ns, -s.end_ns)):
            events.append(_span_event(self.rank, span))
        return events

    def write(self, path: PathLike) -> None:
        _write_trace(path, self.trace_events(), {"num_dropped": self.num_dropped})

    def _read(self) -> None:
        num_spans, num_dropped = ctypes.c_int64(), ctypes.c_int64()
        check(lib.tern_trace_read(self._native.handle, None, 0, ctypes.byref(num_spans), None))
        found = (_c.Span * num_spans.value)()
        check(
            lib.tern_trace_read(
                self._native.handle, found, num_spans.value, ctypes.byref(num_spans), ctypes.byref(num_dropped)
            )
        )
        self.spans = [_span(span) for span in found]
        self.num_dropped = num_dropped.value


def profile(exchange: Exchange, path: Optional[PathLike] = None, *, capacity: int = 0) -> Profile:
    """Records what this rank does with the exchange inside of a with block, and writes it to `path` at its end.

    path: "{rank}" in it stands for the rank's number; without it, where there are several ranks, the number goes before the suffix:
        trace.json becomes trace.0.json. None: nothing is written; look at the spans of the object that the block gets.
    capacity: spans that each lane has room for, 0: 65536, of 64 bytes each. Later ones are dropped, and counted in num_dropped.

    Not collective: every rank that is to be seen does it. No operation of the exchange may be running on this rank when the block begins;
    one recording at a time. GPU ranks record their calls, which enqueue, and what the host waits for; use Nsight Systems to see what runs
    on the GPU.
    """
    return Profile(exchange, path, capacity)


def merge_traces(paths: Iterable[PathLike], out: PathLike) -> None:
    """Puts the traces of several ranks of one host, whose clock they share, into one file.

    An arrow leads from what a rank sent to the end of each wait for it. Raises InvalidArgumentError where two files are of the same rank.
    """
    events: list[dict[str, Any]] = []
    num_dropped = 0
    file_of_rank: dict[int, PathLike] = {}
    for path in paths:
        trace = json.loads(Path(path).read_text())
        for rank in sorted({event["pid"] for event in trace["traceEvents"]}):
            if rank in file_of_rank:
                raise InvalidArgumentError(
                    f"merge_traces: {file_of_rank[rank]} and {path} are both of rank {rank}; give one for each rank"
                )
            file_of_rank[rank] = path
        events += trace["traceEvents"]
        num_dropped += trace["otherData"]["num_dropped"]
    _write_trace(out, events + _arrows(events), {"num_dropped": num_dropped})


def _path_of_rank(path: PathLike, rank: int, num_ranks: int) -> Path:
    text = os.fspath(path)
    if "{rank}" in text:
        return Path(text.replace("{rank}", str(rank)))
    whole = Path(text)
    return whole.with_name(f"{whole.stem}.{rank}{whole.suffix}") if num_ranks > 1 else whole


def _span(span: _c.Span) -> Span:
    return Span(
        kind=_c.SpanKind(span.kind),
        operation=_c.Operation(span.operation),
        phase=_c.Phase(span.phase),
        lane=span.lane,
        peer=span.peer if span.peer >= 0 else None,
        awaited=_c.Awaited(span.awaited),
        status=_c.Status(span.status),
        epoch=span.epoch,
        bytes=span.bytes,
        begin_ns=span.begin_ns,
        end_ns=span.end_ns,
    )


def _name_event(what: str, rank: int, lane: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": rank, "tid": lane, "args": {"name": name}}


def _span_event(rank: int, span: Span) -> dict[str, Any]:
    args: dict[str, Any] = {"operation": span.operation.name.lower()}
    if span.epoch > 0:
        args["epoch"] = span.epoch
    if span.peer is not None:
        args["peer"] = span.peer
    if span.kind in (_c.SpanKind.SEND, _c.SpanKind.RECEIVE, _c.SpanKind.REDUCE):
        args["bytes"] = span.bytes
    if span.kind == _c.SpanKind.WAIT:
        args["awaited"] = span.awaited.name.lower()
    if span.status != _c.Status.OK:
        args["status"] = span.status.name
    return {
        "ph": "X",
        "name": span.name,
        "cat": span.kind.name.lower(),
        "pid": rank,
        "tid": span.lane,
        "ts": span.begin_ns / 1e3,
        "dur": span.duration_us,
        "args": args,
    }


def _arrows(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """From the beginning of each SEND to the end of a WAIT for its messages."""
    sends: dict[tuple[int, int, int], list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "send":
            sends[event["pid"], event["tid"], event["args"]["epoch"]].append(event)
    arrows: list[dict[str, Any]] = []
    for wait in events:
        if wait.get("cat") != "wait" or wait["args"]["awaited"] != "messages" or "status" in wait["args"]:
            continue
        end = wait["ts"] + wait["dur"]
        # Epochs start again with each generation: it was the last one that had begun by then.
        candidates = [s for s in sends[wait["args"]["peer"], wait["tid"], wait["args"]["epoch"]] if s["ts"] <= end]
        if not candidates:
            continue
        send = max(candidates, key=lambda event: float(event["ts"]))
        arrow = {"name": "message", "cat": "message", "id": len(arrows) // 2}
        arrows.append({**arrow, "ph": "s", "pid": send["pid"], "tid": send["tid"], "ts": send["ts"]})
        # Just before the end, so that it still belongs to the wait.
        at = max(send["ts"], end - min(wait["dur"], 0.001))
        arrows.append({**arrow, "ph": "f", "bp": "e", "pid": wait["pid"], "tid": wait["tid"], "ts": at})
    return arrows


def _write_trace(path: PathLike, events: list[dict[str, Any]], other: dict[str, Any]) -> None:
    trace = {"traceEvents": events, "displayTimeUnit": "ns", "otherData": other}
    Path(path).write_text(json.dumps(trace))
