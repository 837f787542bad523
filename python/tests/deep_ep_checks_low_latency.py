# SPDX-License-Identifier: Apache-2.0
"""Low-latency mode, rank by rank. Run by deep_ep_ranks.py."""

from __future__ import annotations

import contextlib
import os
import threading

import torch
from deep_ep import Buffer
from deep_ep.low_latency import Finish, Shape
from deep_ep_checks_normal import refused
from deep_ep_oracle import FP8, Case, cast, diff, uncast

KILLED = ()
TIMEOUT_MS = 20_000
MOST = 20  # num_max_dispatch_tokens_per_rank


def make_case(ranks, hidden=512, num_topk=4, num_experts=12, seed=1, tokens=(20, 13, 0, 7)):
    return Case(ranks.num_ranks, list(tokens[: ranks.num_ranks]), hidden, num_topk, num_experts, seed)


def send(buffer, case, rank, seed_rows=None, **options):
    own = case.all[rank]
    return buffer.low_latency_dispatch(own.x, own.topk_idx, MOST, case.num_experts, **options)


def float_scales(scales, kind, num_blocks):
    """f32 [E_l, R * max, H / 128] of what came."""
    if kind != "ue8m0":
        return scales
    exponents = scales.clone(memory_format=torch.contiguous_format).view(torch.uint8)[..., :num_blocks]
    return torch.pow(2.0, exponents.double() - 127).float()


def check_arrived(case, rank, arrived, kind=None):
    recv_x, counts, handle, _, _ = arrived
    rows_of_expert = case.num_ranks * MOST
    shape = (case.num_local, rows_of_expert, case.hidden)
    assert counts.dtype == torch.int32 and counts.shape == (case.num_local,)
    assert len(handle) == 5 and handle[2:] == (MOST, case.hidden, case.num_experts)
    assert handle[0].dtype == torch.int32 and handle[0].shape == shape[:2]
    assert handle[1].dtype == torch.int64 and handle[1].shape == (case.num_local, case.num_ranks)
    if kind is not None:
        recv_x, scales = recv_x
        per_scale = 512 if kind == "ue8m0" else 128
        assert scales.dtype == (torch.int32 if kind == "ue8m0" else torch.float32)
        assert scales.shape == (*shape[:2], -(-case.hidden // per_scale)) and scales.stride()[1] == 1
        expected = [cast(case.all[s].x, kind) for s in range(case.num_ranks)]
    assert recv_x.shape == shape and recv_x.dtype == (torch.bfloat16 if kind is None else FP8)
    for local in range(case.num_local):
        entries = case.entries(rank, local)
        assert int(counts[local]) == len(entries)
        assert handle[0][local, : len(entries)].tolist() == [t for _, t in entries]
        for s in range(case.num_ranks):
            first = sum(1 for source, _ in entries if source < s)
            count = sum(1 for source, _ in entries if source == s)
            assert int(handle[1][local, s]) == first << 32 | count
        for row, (s, t) in enumerate(entries):
            if kind is None:
                assert torch.equal(recv_x[local, row], case.all[s].x[t])
                continue
            values, want = expected[s]
            assert torch.equal(recv_x[local, row].view(torch.uint8), values[t].view(torch.uint8))
            if kind == "ue8m0":
                got = scales[local, row].clone(memory_format=torch.contiguous_format).view(torch.uint8)
                assert torch.equal(got[: want.shape[1]], want[t]) and not got[want.shape[1] :].any()
            else:
                assert torch.equal(scales[local, row], want[t])


def expert_rows(case, arrived, kind=None):
    """What experts that change nothing return: bf16 rows, NaN where there is nothing to read."""
    recv_x, counts, _, _, _ = arrived
    if kind is not None:
        recv_x = uncast(recv_x[0], float_scales(recv_x[1], kind, case.hidden // 128))
    rows = recv_x.clone()
    for local in range(case.num_local):
        rows[local, int(counts[local]) :] = float("nan")
    return rows


def check_combined(case, rank, combined, tolerance=1e-5):
    own = case.all[rank]
    weights = torch.where(own.topk_idx >= 0, own.topk_weights, 0.0).sum(dim=1, keepdim=True)
    assert combined.dtype == torch.bfloat16 and combined.shape == own.x.shape
    error = diff(combined, own.x.float() * weights)
    assert error < tolerance, error


def combine(buffer, case, rank, rows, arrived, **options):
    own = case.all[rank]
    return buffer.low_latency_combine(rows, own.topk_idx, own.topk_weights, arrived[2], **options)


KINDS = {
    None: {"use_fp8": False},
    "f32": {},
    "pow2": {"round_scale": True},
    "ue8m0": {"round_scale": True, "use_ue8m0": True},
}


def encodings(ranks):
    for hidden in (512, 1152):
        case = make_case(ranks, hidden=hidden, seed=hidden)
        buffer = ranks.low_latency(case, MOST)
        for kind, options in KINDS.items():
            tolerance = 1e-5 if kind is None else 9e-4
            arrived = send(buffer, case, ranks.rank, **options)
            assert arrived[3].event is None and arrived[4] is None
            check_arrived(case, ranks.rank, arrived, kind)
            rows = expert_rows(case, arrived, kind)
            combined, event, hook = combine(buffer, case, ranks.rank, rows, arrived)
            assert event.event is None and hook is None
            check_combined(case, ranks.rank, combined, tolerance)
            combined = combine(buffer, case, ranks.rank, rows, arrived, use_logfmt=True)[0]
            check_combined(case, ranks.rank, combined, tolerance)


def hooks(ranks):
    case = make_case(ranks, seed=3)
    size = Buffer.get_low_latency_rdma_size_hint(MOST, case.hidden, ranks.num_ranks, case.num_experts)
    try:
        for knob in ("auto", "exact", "hierarchical"):
            os.environ["TERN_DEEP_EP_COMBINE"] = knob
            buffer = ranks.buffer(0, 4 * size, low_latency_mode=True)
            for kind in (None, "f32"):
                arrived = send(buffer, case, ranks.rank, return_recv_hook=True, **KINDS[kind])
                assert arrived[3].event is None
                arrived[4]()
                check_arrived(case, ranks.rank, arrived, kind)
                rows = expert_rows(case, arrived, kind)
                combined, event, hook = combine(buffer, case, ranks.rank, rows, arrived, return_recv_hook=True)
                assert event.event is None
                del arrived
                hook()
                check_combined(case, ranks.rank, combined, 1e-5 if kind is None else 9e-4)
            arrived = send(buffer, case, ranks.rank, use_fp8=False)
            check_combined(case, ranks.rank, combine(buffer, case, ranks.rank, expert_rows(case, arrived), arrived)[0])
        os.environ["TERN_DEEP_EP_COMBINE"] = "sometimes"
        refused(lambda: ranks.low_latency(case, MOST), "sometimes")
    finally:
        del os.environ["TERN_DEEP_EP_COMBINE"]


def modes_agree_with_the_buffer(ranks):
    """With a buffer for which exact rows do not fit, hooks take the other way."""
    case = make_case(ranks, num_topk=12, seed=8)
    size = Buffer.get_low_latency_rdma_size_hint(MOST, case.hidden, ranks.num_ranks, case.num_experts)
    modes = set()
    for num_bytes in (size, size * 16):
        buffer = ranks.buffer(0, num_bytes, low_latency_mode=True)
        arrived = send(buffer, case, ranks.rank, use_fp8=False, return_recv_hook=True)
        arrived[4]()
        mode = buffer._low_latency
        modes.add(mode._combine_mode(Shape(*arrived[2][2:]), 12, Finish(False, True)))
        combined, _, hook = combine(
            buffer, case, ranks.rank, expert_rows(case, arrived), arrived, return_recv_hook=True
        )
        hook()
        check_combined(case, ranks.rank, combined)
    assert modes == {"hierarchical", "exact"}


def async_finish(ranks):
    case = make_case(ranks, seed=4)
    buffer = ranks.low_latency(case, MOST)
    arrived = send(buffer, case, ranks.rank, async_finish=True)
    assert arrived[3].event is not None and arrived[4] is None
    arrived[3].current_stream_wait()
    check_arrived(case, ranks.rank, arrived, "f32")
    combined, event, _ = combine(
        buffer, case, ranks.rank, expert_rows(case, arrived, "f32"), arrived, async_finish=True
    )
    with event:
        pass
    check_combined(case, ranks.rank, combined, 9e-4)


def out_of_any_strides(ranks):
    case = make_case(ranks, seed=5)
    buffer = ranks.low_latency(case, MOST)
    own = case.all[ranks.rank]
    for with_hook in (False, True):
        arrived = send(buffer, case, ranks.rank, use_fp8=False)
        wide = torch.zeros((own.x.shape[0], 2 * case.hidden), dtype=torch.bfloat16)
        out = wide[:, : case.hidden]
        rows = expert_rows(case, arrived)
        combined, _, hook = combine(buffer, case, ranks.rank, rows, arrived, out=out, return_recv_hook=with_hook)
        if hook is not None:
            hook()
        check_combined(case, ranks.rank, out)
        assert combined.data_ptr() == out.data_ptr() and not wide[:, case.hidden :].any()


def zero_copy(ranks):
    case = make_case(ranks, seed=6)
    buffer = ranks.low_latency(case, MOST)
    for with_hook in (False, True):
        for _ in range(3):
            arrived = send(buffer, case, ranks.rank, use_fp8=False)
            rows = buffer.get_next_low_latency_combine_buffer(arrived[2])
            assert rows.dtype == torch.bfloat16
            assert rows.shape == (case.num_local, case.num_ranks * MOST, case.hidden)
            rows.copy_(expert_rows(case, arrived))
            shape_only = torch.empty((), dtype=torch.bfloat16).expand(rows.shape)
            combined, _, hook = combine(
                buffer, case, ranks.rank, shape_only, arrived, zero_copy=True, return_recv_hook=with_hook
            )
            if hook is not None:
                hook()
            check_combined(case, ranks.rank, combined)
    # On some ranks the rows happen to lie there: without zero_copy that means nothing.
    arrived = send(buffer, case, ranks.rank, use_fp8=False)
    rows = expert_rows(case, arrived)
    if ranks.rank == 0:
        rows = buffer.get_next_low_latency_combine_buffer(arrived[2]).copy_(rows)
    check_combined(case, ranks.rank, combine(buffer, case, ranks.rank, rows, arrived)[0])
    refused(lambda: combine(buffer, case, ranks.rank, rows, arrived, zero_copy=True, use_logfmt=True), "exclude")


def two_results_alive(ranks):
    """Two micro-batches, whose sends and receives overlap in all ways."""
    cases = [make_case(ranks, seed=seed) for seed in (11, 12)]
    buffer = ranks.low_latency(cases[0], MOST)
    with_hook = {"return_recv_hook": True}
    for _ in range(3):
        first = send(buffer, cases[0], ranks.rank, use_fp8=False, **with_hook)
        second = send(buffer, cases[1], ranks.rank, **with_hook)
        first[4]()
        check_arrived(cases[0], ranks.rank, first)
        first_out, _, first_hook = combine(
            buffer, cases[0], ranks.rank, expert_rows(cases[0], first), first, **with_hook
        )
        second[4]()
        check_arrived(cases[1], ranks.rank, second, "f32")
        check_arrived(cases[0], ranks.rank, first)
        rows = expert_rows(cases[1], second, "f32")
        second_out, _, second_hook = combine(buffer, cases[1], ranks.rank, rows, second, **with_hook)
        second_hook()
        first_hook()
        check_combined(cases[0], ranks.rank, first_out)
        check_combined(cases[1], ranks.rank, second_out, 9e-4)


def in_two_threads(ranks, step, num_steps=4):
    """step(me, turn) on one buffer, as frameworks do: dispatch A, dispatch B, each within its turn(), then each its own way, on a
    stream of its own."""
    may_dispatch = [threading.Semaphore(1), threading.Semaphore(0)]
    own_streams = [ranks.own_stream() for _ in range(2)]
    errors = []

    def work(me):
        @contextlib.contextmanager
        def turn():
            assert may_dispatch[me].acquire(timeout=30)
            yield
            may_dispatch[1 - me].release()

        try:
            with own_streams[me]:
                for _ in range(num_steps):
                    step(me, turn)
        except BaseException as error:  # noqa: BLE001, raised again below
            errors.append(error)

    threads = [threading.Thread(target=work, args=(me,)) for me in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def two_threads(ranks):
    """A micro-batch each, received by hooks."""
    cases = [make_case(ranks, seed=seed) for seed in (21, 22)]
    buffer = ranks.low_latency(cases[0], MOST)

    def step(me, turn):
        with turn():
            arrived = send(buffer, cases[me], ranks.rank, use_fp8=False, return_recv_hook=True)
        arrived[4]()
        check_arrived(cases[me], ranks.rank, arrived)
        combined, _, hook = combine(
            buffer,
            cases[me],
            ranks.rank,
            expert_rows(cases[me], arrived),
            arrived,
            return_recv_hook=True,
            out=torch.empty_like(cases[me].all[ranks.rank].x),
        )
        hook()
        check_combined(cases[me], ranks.rank, combined)

    in_two_threads(ranks, step)


def two_threads_of_many_tokens(ranks):
    """Whole operations, each of which would take every SM of a GPU."""
    most = 300
    cases = [make_case(ranks, hidden=128, seed=seed, tokens=(most, 150, 0, most)) for seed in (23, 24)]
    buffer = ranks.low_latency(cases[0], most)

    def step(me, turn):
        own = cases[me].all[ranks.rank]
        for asynchronous in (False, True):
            with turn():
                rows, _, handle, event, _ = buffer.low_latency_dispatch(
                    own.x, own.topk_idx, most, cases[me].num_experts, use_fp8=False, async_finish=asynchronous
                )
            event.current_stream_wait()
            combined, event, _ = buffer.low_latency_combine(
                rows, own.topk_idx, own.topk_weights, handle, async_finish=asynchronous
            )
            event.current_stream_wait()
            check_combined(cases[me], ranks.rank, combined, 2e-5)

    in_two_threads(ranks, step)


def stats(ranks):
    case = make_case(ranks, seed=7)
    buffer = ranks.low_latency(case, MOST)
    received = torch.full((case.num_local,), 100, dtype=torch.int32)
    waited = torch.zeros(case.num_ranks, dtype=torch.int64)
    counts = torch.tensor([len(case.entries(ranks.rank, local)) for local in range(case.num_local)])
    options = {"cumulative_local_expert_recv_stats": received, "dispatch_wait_recv_cost_stats": waited}
    send(buffer, case, ranks.rank, **options)
    assert torch.equal(received, 100 + counts.int())
    arrived = send(buffer, case, ranks.rank, return_recv_hook=True, use_fp8=False, **options)
    arrived[4]()
    assert torch.equal(received, 100 + 2 * counts.int()) and bool((waited >= 0).all())
    combined = combine(
        buffer, case, ranks.rank, expert_rows(case, arrived), arrived, combine_wait_recv_cost_stats=waited
    )[0]
    check_combined(case, ranks.rank, combined)
    refused(lambda: send(buffer, case, ranks.rank, dispatch_wait_recv_cost_stats=waited.int()), "int64")


def duplicates_and_nothing(ranks):
    case = make_case(ranks, seed=8, tokens=(5, 4, 0, 3)).with_duplicates()
    buffer = ranks.low_latency(case, MOST)
    arrived = send(buffer, case, ranks.rank, use_fp8=False)
    check_arrived(case, ranks.rank, arrived)
    check_combined(case, ranks.rank, combine(buffer, case, ranks.rank, expert_rows(case, arrived), arrived)[0])
    for inputs in case.all:
        inputs.topk_idx.fill_(-1)
    arrived = send(buffer, case, ranks.rank)
    check_arrived(case, ranks.rank, arrived, "f32")
    combined = combine(buffer, case, ranks.rank, expert_rows(case, arrived, "f32"), arrived)[0]
    assert not combined.any()


def hinted_sizes_suffice(ranks):
    """For sends with hooks, whole operations and zero-copy, of any shape."""
    for most, hidden, num_experts, num_topk in ((1, 16, 12, 1), (300, 128, 24, 2), (3, 7168, 12, 8), (65, 256, 96, 40)):
        case = make_case(
            ranks, hidden=hidden, num_experts=num_experts, num_topk=num_topk, tokens=(most, most // 2, 0, most)
        )
        buffer = ranks.low_latency(case, most)
        own = case.all[ranks.rank]
        for options in ({}, {"return_recv_hook": True}):
            recv_x, counts, handle, _, hook = buffer.low_latency_dispatch(
                own.x, own.topk_idx, most, num_experts, use_fp8=False, **options
            )
            if hook is not None:
                hook()
            rows = buffer.get_next_low_latency_combine_buffer(handle).copy_(recv_x)
            for zero in (False, True):
                x = rows if zero else recv_x
                combined, _, hook = buffer.low_latency_combine(
                    x, own.topk_idx, own.topk_weights, handle, zero_copy=zero, **options
                )
                if hook is not None:
                    hook()
                check_combined(case, ranks.rank, combined, 2e-5)


def small_buffers(ranks):
    """The error says how many bytes are enough, and they are."""
    case = make_case(ranks, hidden=4096)
    refused(lambda: ranks.buffer(0, 4096, low_latency_mode=True), "num_rdma_bytes is 4096")
    small = ranks.buffer(0, 1 << 20, low_latency_mode=True)
    for options in ({}, {"return_recv_hook": True}):
        text = refused(lambda o=options: send(small, case, ranks.rank, **o), "num_rdma_bytes 1048576")
    buffer = ranks.buffer(0, int(text.split("make it with ")[1].split()[0]), low_latency_mode=True)
    arrived = send(buffer, case, ranks.rank, return_recv_hook=True)
    arrived[4]()
    check_arrived(case, ranks.rank, arrived, "f32")


def bad_calls(ranks):
    case = make_case(ranks)
    buffer = ranks.low_latency(case, MOST)
    own = case.all[ranks.rank]
    for options, word in (
        ({"async_finish": True, "return_recv_hook": True}, "exclude"),
        ({"use_ue8m0": True}, "round_scale"),
    ):
        refused(lambda o=options: send(buffer, case, ranks.rank, **o), word)
    refused(lambda: buffer.low_latency_dispatch(own.x, own.topk_idx[:, 0], MOST, 12), "topk_idx")
    refused(
        lambda: buffer.low_latency_dispatch(torch.zeros((21, 512), dtype=torch.bfloat16), own.topk_idx, MOST, 12),
        "num_tokens",
    )
    arrived = send(buffer, case, ranks.rank, use_fp8=False)
    rows = expert_rows(case, arrived)
    refused(lambda: combine(buffer, case, ranks.rank, rows[:, 1:], arrived), "shape")
    refused(lambda: combine(buffer, case, ranks.rank, rows.float(), arrived), "bfloat16")
    refused(
        lambda: buffer.low_latency_query_mask_buffer(torch.zeros(case.num_ranks, dtype=torch.int32)), "enable_shrink"
    )
    refused(lambda: buffer.dispatch(own.x, arrived[2]), "num_nvl_bytes")
    check_combined(case, ranks.rank, combine(buffer, case, ranks.rank, rows, arrived)[0])


CHECKS = {
    check.__name__: check
    for check in (
        encodings,
        hooks,
        modes_agree_with_the_buffer,
        async_finish,
        out_of_any_strides,
        zero_copy,
        two_results_alive,
        two_threads,
        two_threads_of_many_tokens,
        stats,
        duplicates_and_nothing,
        hinted_sizes_suffice,
        small_buffers,
        bad_calls,
    )
}
