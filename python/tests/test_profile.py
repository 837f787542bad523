# SPDX-License-Identifier: Apache-2.0
"""Timelines: what tern.profile records, the files it writes, and how they go together. Ranks are threads of this process."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any, Callable, Optional

import pytest
import tern
from ranks import TIMEOUT_MS, as_threads

np = pytest.importorskip("numpy", reason="rows are NumPy arrays here")

NUM_TOKENS, HIDDEN = 5, 32
ROW_BYTES = HIDDEN * 4


def on_ranks(num_ranks: int, body: Callable[[int, tern.Exchange], Any], timeout_ms: int = TIMEOUT_MS) -> list[Any]:
    """Runs body(rank, exchange) on a thread for each rank, and returns what it returned by rank."""

    def run(group: tern.Group) -> Any:
        exchange = tern.Exchange(group, device="cpu", max_tokens=NUM_TOKENS, timeout_ms=timeout_ms)
        return body(group.rank, exchange)

    return as_threads(num_ranks, run)


def make_plan(exchange: tern.Exchange) -> tern.Plan:
    num_ranks = exchange.group.num_ranks
    return exchange.plan(max_tokens=NUM_TOKENS, num_experts=num_ranks, num_topk=num_ranks)


def round_trip(plan: tern.Plan) -> None:
    """Every token goes to every rank."""
    num_ranks = plan.exchange.group.num_ranks
    plan.route(np.tile(np.arange(num_ranks, dtype=np.int64), (NUM_TOKENS, 1)))
    arrived = plan.dispatch(np.ones((NUM_TOKENS, HIDDEN), dtype=np.float32))
    plan.combine(arrived.tokens)


def record(exchange: tern.Exchange, path: Optional[Path] = None) -> tern.Profile:
    plan = make_plan(exchange)
    with tern.profile(exchange, path) as timeline:
        round_trip(plan)
    return timeline


def of_kind(timeline: tern.Profile, kind: tern.SpanKind) -> list[tern.Span]:
    return [span for span in timeline.spans if span.kind == kind]


def read_events(path: Path, phase: str) -> list[dict[str, Any]]:
    return [event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == phase]


def test_spans_of_a_round_trip() -> None:
    before = time.monotonic_ns()
    timelines = on_ranks(3, lambda rank, exchange: (record(exchange), exchange.metrics()))
    after = time.monotonic_ns()
    for rank, (timeline, metrics) in enumerate(timelines):
        assert timeline.rank == rank and timeline.path is None and timeline.num_dropped == 0
        assert [s.name for s in of_kind(timeline, tern.SpanKind.OPERATION)] == ["route", "dispatch", "combine"]
        assert all(before <= s.begin_ns <= s.end_ns <= after for s in timeline.spans)
        sends = of_kind(timeline, tern.SpanKind.SEND)
        assert sum(s.bytes for s in sends) == metrics["sent_bytes"] + metrics["sent_local_bytes"]
        assert [s.operation for s in sends] == [tern.Operation.ROUTE, tern.Operation.DISPATCH, tern.Operation.COMBINE]
        names = {s.name for s in timeline.spans}
        assert {"plan", "send", "reduce", "fill in"} | {f"receive from rank {r}" for r in range(3)} <= names
        assert [s.bytes for s in of_kind(timeline, tern.SpanKind.REDUCE)] == [3 * NUM_TOKENS * ROW_BYTES]
        assert len(of_kind(timeline, tern.SpanKind.WAIT)) == metrics["waits"]
        assert set(timeline.wait_us()) <= {0, 1, 2} - {rank}


def test_names() -> None:
    def span(kind: tern.SpanKind, **fields: Any) -> tern.Span:
        facts: dict[str, Any] = {
            "operation": tern.Operation.DISPATCH,
            "phase": tern.Phase.WHOLE,
            "lane": 0,
            "peer": None,
            "awaited": tern.Awaited.NOTHING,
            "status": tern.Status.OK,
            "epoch": 0,
            "bytes": 0,
            "begin_ns": 1000,
            "end_ns": 3500,
        }
        return tern.Span(kind=kind, **{**facts, **fields})

    assert span(tern.SpanKind.OPERATION, phase=tern.Phase.SEND).name == "dispatch (send)"
    wait = tern.SpanKind.WAIT
    assert span(wait, peer=2, awaited=tern.Awaited.MESSAGES).name == "wait for rank 2"
    assert span(wait, peer=2, awaited=tern.Awaited.ADDRESS).name == "wait for rank 2's rows"
    assert span(wait, peer=2, awaited=tern.Awaited.CONSUMED).name == "wait for rank 2 to take what it was sent"
    assert span(wait, peer=0, awaited=tern.Awaited.OWN_GPU).name == "wait for the GPU"
    assert span(wait).duration_us == 2.5


def test_files_of_all_ranks_go_together(tmp_path: Path) -> None:
    timelines = on_ranks(3, lambda rank, exchange: record(exchange, tmp_path / "trace_{rank}.json"))
    paths = [tmp_path / f"trace_{rank}.json" for rank in range(3)]
    assert [timeline.path for timeline in timelines] == paths
    for rank, (path, timeline) in enumerate(zip(paths, timelines)):
        events = read_events(path, "X")
        assert len(events) == len(timeline.spans)
        assert {event["pid"] for event in events} == {rank} and {event["tid"] for event in events} == {0}
        # The order of the spans' beginnings, and each where the clock says, in microseconds.
        for event, span in zip(events, sorted(timeline.spans, key=lambda s: (s.begin_ns, -s.end_ns))):
            assert event["name"] == span.name
            assert event["ts"] * 1e3 == pytest.approx(span.begin_ns, abs=1)
            assert event["dur"] * 1e3 == pytest.approx(span.end_ns - span.begin_ns, abs=1)
        names = {event["name"]: event["args"] for event in read_events(path, "M")}
        assert names["process_name"] == {"name": f"rank {rank}"} and names["thread_name"] == {"name": "lane 0"}

    merged = tmp_path / "all.json"
    tern.merge_traces(paths, merged)
    events = read_events(merged, "X")
    assert len(events) == sum(len(timeline.spans) for timeline in timelines)
    assert {event["pid"] for event in events} == {0, 1, 2}
    awaited = [e for e in events if e["cat"] == "wait" and e["args"]["awaited"] == "messages"]
    starts, ends = read_events(merged, "s"), read_events(merged, "f")
    assert [e["id"] for e in starts] == [e["id"] for e in ends] == list(range(len(awaited)))
    for wait, start, end in zip(awaited, starts, ends):
        assert (start["pid"], end["pid"]) == (wait["args"]["peer"], wait["pid"])
        assert start["ts"] <= end["ts"]
        assert wait["ts"] <= end["ts"] <= wait["ts"] + wait["dur"]
        sends = [e for e in events if e["cat"] == "send" and (e["pid"], e["ts"]) == (start["pid"], start["ts"])]
        assert len(sends) == 1 and sends[0]["args"]["epoch"] == wait["args"]["epoch"]


def test_a_rank_makes_one_file_of_a_merge(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    on_ranks(1, lambda rank, exchange: record(exchange, path))
    with pytest.raises(tern.InvalidArgumentError, match="both of rank 0"):
        tern.merge_traces([path, path], tmp_path / "all.json")
    assert not (tmp_path / "all.json").exists()


def test_ranks_do_not_write_into_one_file(tmp_path: Path) -> None:
    on_ranks(2, lambda rank, exchange: record(exchange, tmp_path / "trace.json"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trace.0.json", "trace.1.json"]


def test_who_was_late() -> None:
    exchanges: dict[int, tern.Exchange] = {}
    all_made = threading.Barrier(2)

    def body(rank: int, exchange: tern.Exchange) -> tern.Profile:
        exchanges[rank] = exchange
        plan = make_plan(exchange)
        all_made.wait(60)
        with tern.profile(exchange) as timeline:
            # Ends at the latest with rank 0's deadline, after which this rank fails too.
            while rank == 1 and exchanges[0].metrics()["waits"] == 0:
                time.sleep(0)
            round_trip(plan)
        return timeline

    waiting, late = on_ranks(2, body)
    first = of_kind(waiting, tern.SpanKind.WAIT)[0]
    assert first.name == "wait for rank 1" and first.operation == tern.Operation.ROUTE
    send = of_kind(late, tern.SpanKind.SEND)[0]
    assert first.begin_ns <= send.begin_ns <= first.end_ns
    assert waiting.wait_us()[1] >= first.duration_us


def test_what_was_recorded_is_written_when_an_operation_fails(tmp_path: Path) -> None:
    def body(rank: int, exchange: tern.Exchange) -> None:
        if rank == 1:
            return
        with pytest.raises(tern.TimeoutError):
            record(exchange, tmp_path / "trace_{rank}.json")

    on_ranks(2, body, timeout_ms=2000)  # of the creation too
    events = read_events(tmp_path / "trace_0.json", "X")
    assert [(e["name"], e["args"].get("status")) for e in events if e["cat"] in ("operation", "wait")] == [
        ("route", "TIMEOUT"),
        ("wait for rank 1", "TIMEOUT"),
    ]
    merged = tmp_path / "all.json"
    tern.merge_traces([tmp_path / "trace_0.json"], merged)
    assert read_events(merged, "s") == [], "nobody sent what was waited for"


def test_nothing_is_recorded_outside_of_a_block() -> None:
    def body(rank: int, exchange: tern.Exchange) -> None:
        plan = make_plan(exchange)
        with tern.profile(exchange) as empty:
            pass
        assert empty.spans == []
        round_trip(plan)
        with tern.profile(exchange) as timeline:
            round_trip(plan)
        assert len(of_kind(timeline, tern.SpanKind.OPERATION)) == 3

    on_ranks(1, body)


def test_what_finds_no_room_is_counted(tmp_path: Path) -> None:
    def body(rank: int, exchange: tern.Exchange) -> None:
        plan = make_plan(exchange)
        with tern.profile(exchange, tmp_path / "trace.json", capacity=2) as timeline:
            round_trip(plan)
        assert len(timeline.spans) == 2 and timeline.num_dropped > 0
        assert json.loads((tmp_path / "trace.json").read_text())["otherData"]["num_dropped"] == timeline.num_dropped
        with pytest.raises(tern.InvalidArgumentError, match="-1 spans"), tern.profile(exchange, capacity=-1):
            pass

    on_ranks(1, body)


def test_gpu_ranks_record_their_calls() -> None:
    torch = pytest.importorskip("torch", reason="there is no torch here")
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU here")
    exchange = tern.Exchange(tern.Group.local(1)[0], device="cuda:0", max_tokens=NUM_TOKENS)
    plan = make_plan(exchange)
    with tern.profile(exchange) as timeline:
        plan.route(torch.zeros((NUM_TOKENS, 1), dtype=torch.int64, device="cuda:0"))
        arrived = plan.dispatch(torch.ones((NUM_TOKENS, HIDDEN), device="cuda:0"))
        plan.combine(arrived.tokens)
    torch.cuda.synchronize()
    assert [s.name for s in timeline.spans] == ["wait for the GPU", "route", "dispatch", "combine"]
