# SPDX-License-Identifier: Apache-2.0
"""Low-latency calls that look like one before take a short way, rank by rank: with other data, and in any order of kinds, what comes is what
the oracle says. Run by deep_ep_ranks.py."""

from __future__ import annotations

import collections
import contextlib
import random

import torch
from deep_ep import repeats
from deep_ep_checks_low_latency import (
    KINDS,
    MOST,
    check_arrived,
    check_combined,
    combine,
    expert_rows,
    in_two_threads,
    make_case,
    send,
)

KILLED = ()
TIMEOUT_MS = 20_000


@contextlib.contextmanager
def counted():
    """How often the short way was taken, by class."""
    taken = collections.Counter()
    ways = {kind: kind.run for kind in (repeats.DispatchRepeat, repeats.CombineRepeat)}

    def counting(kind):
        def run(*args):
            result = ways[kind](*args)
            taken[kind.__name__] += result is not None
            return result

        return run

    for kind in ways:
        kind.run = counting(kind)
    try:
        yield taken
    finally:
        for kind, way in ways.items():
            kind.run = way


def finished(results):
    """The first element, once it holds."""
    *_, event, hook = results
    if hook is not None:
        hook()
    event.current_stream_wait()
    return results[0]


def round_trip(buffer, rank, case, choice):
    kind, finish = choice["kind"], choice["finish"]
    stats = torch.zeros(case.num_local, dtype=torch.int32) if choice["stats"] else None
    arrived = send(buffer, case, rank, cumulative_local_expert_recv_stats=stats, **KINDS[kind], **finish)
    finished(arrived)
    check_arrived(case, rank, arrived, kind)
    if stats is not None:
        assert torch.equal(stats.cpu(), arrived[1].cpu())
    rows = expert_rows(case, arrived, kind)
    own, out = case.all[rank], None
    if choice["out"] is not None:
        out = torch.zeros((own.x.shape[0], choice["out"] * case.hidden), dtype=torch.bfloat16)[:, : case.hidden]
    if choice["zero_copy"]:
        rows = buffer.get_next_low_latency_combine_buffer(arrived[2]).copy_(rows)
    options = {"use_logfmt": choice["use_logfmt"], "zero_copy": choice["zero_copy"], "out": out}
    combined = finished(combine(buffer, case, rank, rows, arrived, **options, **choice["finish_combine"]))
    check_combined(case, rank, combined if out is None else out, 1e-5 if kind is None else 9e-4)
    assert out is None or combined.data_ptr() == out.data_ptr()


def any_dispatch(chosen, *, repeats):
    finish = [{}, {"return_recv_hook": True}] + ([] if repeats else [{"async_finish": True}])
    return {
        "kind": chosen.choice([*KINDS]),
        "finish": chosen.choice(finish),
        "stats": not repeats and chosen.random() < 0.5,
        "hidden": chosen.choice([512, 1152]),
        "num_topk": chosen.choice([2, 4]),
        "num_experts": chosen.choice([4, 12]),
        "tokens": chosen.choice([(20, 13, 0, 7), (0, 20, 4, 7), (5, 5, 5, 5)]),
    }


def any_combine(chosen, *, repeats):
    way = chosen.choice(["plain", "plain", "zero_copy", "use_logfmt"])
    finish = [{}, {"return_recv_hook": True}] + ([] if repeats else [{"async_finish": True}])
    return {
        "finish_combine": chosen.choice(finish),
        "zero_copy": way == "zero_copy",
        "use_logfmt": way == "use_logfmt",
        "out": chosen.choice([None, 1] if repeats else [None, 1, 2]),
    }


def kinds_in_any_order(ranks):
    """Some come several times in a row, others in turn, more of them than are kept; each call has data of its own."""
    buffer, chosen = ranks.low_latency(make_case(ranks, hidden=1152), MOST), random.Random(5)
    usual = [[make(chosen, repeats=True) for _ in range(3)] for make in (any_dispatch, any_combine)]
    choices = [usual[0][0], usual[1][0]]
    with counted() as taken:
        for step in range(100):
            for which, make in enumerate((any_dispatch, any_combine)):
                if chosen.random() < 0.4:
                    other = chosen.random() < 0.3
                    choices[which] = make(chosen, repeats=False) if other else chosen.choice(usual[which])
            choice = {**choices[0], **choices[1]}
            shape = {name: choice[name] for name in ("hidden", "num_topk", "num_experts", "tokens")}
            round_trip(buffer, ranks.rank, make_case(ranks, seed=step, **shape), choice)
    assert taken["DispatchRepeat"] > 30 and taken["CombineRepeat"] > 20, taken


def results_alive(ranks):
    """Two micro-batches of one kind, whose sends and receives overlap, and whose results are not each other's."""
    first_case, hook = make_case(ranks, seed=31), {"return_recv_hook": True}
    buffer = ranks.low_latency(first_case, MOST)
    with counted() as taken:
        for step in range(8):
            cases = [make_case(ranks, seed=31 + 2 * step + me) for me in range(2)]
            arrived = [send(buffer, case, ranks.rank, use_fp8=False, **hook) for case in cases]
            order = (0, 1) if step % 2 else (1, 0)
            for me in order:
                arrived[me][4]()
            combined = []
            for case, one in zip(cases, arrived):
                check_arrived(case, ranks.rank, one)
                combined.append(combine(buffer, case, ranks.rank, expert_rows(case, one), one, **hook))
            for me in order:
                combined[me][2]()
            for case, (tokens, _, _), one in zip(cases, combined, arrived):
                check_combined(case, ranks.rank, tokens)
                check_arrived(case, ranks.rank, one)
    assert taken["DispatchRepeat"] == 14 and taken["CombineRepeat"] == 13, taken


def two_threads(ranks):
    """On one buffer, with calls of one kind, by hooks and in one piece."""
    size = make_case(ranks)
    buffer, steps = ranks.low_latency(size, MOST), [0, 0]

    def step(me, turn):
        steps[me] += 1
        case = make_case(ranks, seed=50 * me + steps[me])
        hook = {"return_recv_hook": steps[me] % 3 == 0}
        with turn():
            arrived = send(buffer, case, ranks.rank, use_fp8=False, **hook)
        finished(arrived)
        check_arrived(case, ranks.rank, arrived)
        combined = combine(buffer, case, ranks.rank, expert_rows(case, arrived), arrived, **hook)
        check_combined(case, ranks.rank, finished(combined))

    with counted() as taken:
        in_two_threads(ranks, step, num_steps=12)
    assert taken["DispatchRepeat"] >= 16 and taken["CombineRepeat"] >= 12, taken


CHECKS = {check.__name__: check for check in (kinds_in_any_order, results_alive, two_threads)}
