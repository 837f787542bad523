# SPDX-License-Identifier: Apache-2.0
"""Buffers with enable_shrink, a rank that is killed, and one that is left out by hand. Run by deep_ep_ranks.py."""

from __future__ import annotations

import os
import signal

import torch
from deep_ep.low_latency import Shape
from deep_ep_checks_low_latency import MOST, check_arrived, check_combined, combine, expert_rows, make_case, send
from deep_ep_checks_normal import refused

KILLED = (3,)  # in the check of that name
TIMEOUT_MS = 5000
_state = {}


def masked_ranks(buffer, num_ranks):
    status = torch.full((num_ranks,), 7, dtype=torch.int32)
    buffer.low_latency_query_mask_buffer(status)
    return [rank for rank in range(num_ranks) if status[rank]]


def out_of_reach(case, source, gone):
    """Ranks that get nothing of a rank's tokens: those that are gone, and nodes in which the rank of its rail is gone."""
    size = case.ranks_per_node
    own_node, index = divmod(source, size)
    cut = [node for node in range(case.num_nodes) if node != own_node and node * size + index in gone]
    return [rank for rank in range(case.num_ranks) if rank in gone or rank // size in cut]


def without(case, ranks):
    """What is left of a case when some ranks are gone: their tokens, entries for their experts, and what they would have
    passed on."""
    for rank, inputs in enumerate(case.all):
        if rank in ranks:
            case.num_tokens[rank] = 0
            case.all[rank] = type(inputs)(inputs.x[:0], inputs.topk_idx[:0], inputs.topk_weights[:0])
        else:
            cut = torch.tensor(out_of_reach(case, rank, ranks))
            gone = torch.isin(inputs.topk_idx // case.num_local, cut) & (inputs.topk_idx >= 0)
            inputs.topk_idx = torch.where(gone, -1, inputs.topk_idx)
    return case


def everybody(ranks):
    case = make_case(ranks, tokens=(20, 13, 5, 7))
    buffer = _state["buffer"] = ranks.low_latency(case, MOST, enable_shrink=True)
    for other in ("by hand", "overlapping", "in between", "back", "back from a hook", "masked in between"):
        _state[other] = ranks.low_latency(case, MOST, enable_shrink=True)
    # A result that is alive when the rank goes.
    _state["case"], _state["arrived"] = case, send(_state["in between"], case, ranks.rank, use_fp8=False)
    assert masked_ranks(buffer, ranks.num_ranks) == []
    buffer.low_latency_clean_mask_buffer()
    for kind_options in ({}, {"return_recv_hook": True}):
        arrived = send(buffer, case, ranks.rank, use_fp8=False, **kind_options)
        if arrived[4] is not None:
            arrived[4]()
        check_arrived(case, ranks.rank, arrived)
        combined, _, hook = combine(buffer, case, ranks.rank, expert_rows(case, arrived), arrived, **kind_options)
        if hook is not None:
            hook()
        check_combined(case, ranks.rank, combined)
    refused(lambda: buffer.low_latency_update_mask_buffer(ranks.rank, True), "not this one")
    ranks.barrier()


def overlapping_micro_batches(ranks):
    """A combine is sent while the dispatch of the next batch is under way, and another one."""
    buffer = _state["buffer"]
    cases = [make_case(ranks, seed=seed, tokens=(20, 13, 5, 7)) for seed in (12, 13)]
    with_hook = {"use_fp8": False, "return_recv_hook": True}
    first, second = (send(buffer, case, ranks.rank, **with_hook) for case in cases)
    combined = []
    for case, arrived in zip(cases, (first, second)):
        arrived[4]()
        check_arrived(case, ranks.rank, arrived)
        rows = expert_rows(case, arrived)
        combined.append(combine(buffer, case, ranks.rank, rows, arrived, return_recv_hook=True))
    for case, (out, _, hook) in reversed(list(zip(cases, combined))):
        hook()
        check_combined(case, ranks.rank, out)
        refused(hook, "has run already")
    ranks.barrier()


def left_out_and_let_in(ranks, buffer, seed, learn):
    """The others leave out a rank that lives; when it has learned of that, by learn(case), all let it in again."""
    left_out = 1
    full = make_case(ranks, seed=seed, tokens=(20, 13, 5, 7))
    if ranks.rank == left_out:
        ranks.barrier()
        refused(lambda: learn(full), "go on without rank 1")
    else:
        buffer.low_latency_update_mask_buffer(left_out, True)
        case = without(make_case(ranks, seed=seed, tokens=(20, 13, 5, 7)), (left_out,))
        check_arrived(case, ranks.rank, send(buffer, case, ranks.rank, use_fp8=False))
        assert masked_ranks(buffer, ranks.num_ranks) == [left_out]
        ranks.barrier()
    # Where the exchange says who is masked the rank would come back without; on GPUs it does not.
    assert buffer._low_latency._is_masked_out == (ranks.rank == left_out)
    ranks.barrier()
    buffer.low_latency_clean_mask_buffer()
    for _ in range(2):
        arrived = send(buffer, full, ranks.rank, use_fp8=False)
        check_arrived(full, ranks.rank, arrived)
        check_combined(full, ranks.rank, combine(buffer, full, ranks.rank, expert_rows(full, arrived), arrived)[0])
    assert masked_ranks(buffer, ranks.num_ranks) == []
    ranks.barrier()


def a_rank_comes_back(ranks):
    buffer = _state["back"]
    left_out_and_let_in(ranks, buffer, 9, lambda case: send(buffer, case, ranks.rank, use_fp8=False))


def run_into_it_in_a_hook(buffer, case, rank):
    """What a rank does that has been left out. CPU ranks look before they send, so there the hook is one that dispatches by itself."""
    mode, own = buffer._low_latency, case.all[rank]
    if mode.exchange.is_cuda:
        send(buffer, case, rank, use_fp8=False, return_recv_hook=True)[4]()
        return
    shelf = mode.shelf(0, Shape(MOST, case.hidden, case.num_experts), own.topk_idx.shape[1])
    plan = mode.plans.lease_from(shelf).plan
    mode.hook(0, lambda: plan.dispatch(own.x, topk_idx=own.topk_idx))()


def a_rank_comes_back_from_a_hook(ranks):
    buffer = _state["back from a hook"]
    left_out_and_let_in(ranks, buffer, 10, lambda case: run_into_it_in_a_hook(buffer, case, ranks.rank))


def masked_between_dispatch_and_combine(ranks):
    """A result from before the mask changed is combined behind a dispatch that is from after it."""
    left_out = 1
    buffer = _state["masked in between"]
    full = make_case(ranks, seed=11, tokens=(20, 13, 5, 7))
    arrived = send(buffer, full, ranks.rank, use_fp8=False)
    check_arrived(full, ranks.rank, arrived)
    ranks.barrier()
    if ranks.rank != left_out:
        buffer.low_latency_update_mask_buffer(left_out, True)
        left = without(make_case(ranks, seed=11, tokens=(20, 13, 5, 7)), (left_out,))
        check_arrived(left, ranks.rank, send(buffer, left, ranks.rank, use_fp8=False))
        rows = expert_rows(full, arrived)
        for with_hook in (False, True):
            combined, _, hook = combine(buffer, full, ranks.rank, rows, arrived, return_recv_hook=with_hook)
            if hook is not None:
                hook()
            check_combined(left, ranks.rank, combined)
        assert masked_ranks(buffer, ranks.num_ranks) == [left_out]
    ranks.barrier()


def a_rank_is_killed(ranks):
    if ranks.rank == KILLED[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    buffer = _state["buffer"]
    full = make_case(ranks, tokens=(20, 13, 5, 7))
    arrived = send(buffer, full, ranks.rank, use_fp8=False)  # waits, and goes on
    case = without(make_case(ranks, tokens=(20, 13, 5, 7)), KILLED)
    check_arrived(case, ranks.rank, arrived)
    rows = expert_rows(case, arrived)
    own = full.all[ranks.rank]
    combined = buffer.low_latency_combine(rows, own.topk_idx, own.topk_weights, arrived[2])[0]
    check_combined(case, ranks.rank, combined)
    assert masked_ranks(buffer, ranks.num_ranks) == list(KILLED)


def the_others_go_on(ranks):
    buffer = _state["buffer"]
    for seed in range(3):
        case = without(make_case(ranks, seed=seed, tokens=(20, 13, 5, 7)), KILLED)
        arrived = send(buffer, case, ranks.rank, use_fp8=False, return_recv_hook=True)
        arrived[4]()
        check_arrived(case, ranks.rank, arrived)
        check_combined(case, ranks.rank, combine(buffer, case, ranks.rank, expert_rows(case, arrived), arrived)[0])
    # Who is dead is waited for once more, and stays masked.
    buffer.low_latency_clean_mask_buffer()
    case = without(make_case(ranks, tokens=(20, 13, 5, 7)), KILLED)
    check_arrived(case, ranks.rank, send(buffer, case, ranks.rank, use_fp8=False))
    assert masked_ranks(buffer, ranks.num_ranks) == list(KILLED)
    refused(lambda: buffer.low_latency_query_mask_buffer(torch.zeros(3)), "mask_status")


def left_out_by_hand(ranks):
    """No wait: the survivors say who is gone before they notice."""
    buffer = _state["by hand"]
    buffer.low_latency_update_mask_buffer(KILLED[0], True)
    assert masked_ranks(buffer, ranks.num_ranks) == list(KILLED)
    buffer.low_latency_update_mask_buffer(KILLED[0], False)
    assert masked_ranks(buffer, ranks.num_ranks) == []
    buffer.low_latency_update_mask_buffer(KILLED[0], True)
    case = without(make_case(ranks, seed=5, tokens=(20, 13, 5, 7)), KILLED)
    arrived = send(buffer, case, ranks.rank, use_fp8=False)
    check_arrived(case, ranks.rank, arrived)
    check_combined(case, ranks.rank, combine(buffer, case, ranks.rank, expert_rows(case, arrived), arrived)[0])
    assert masked_ranks(buffer, ranks.num_ranks) == list(KILLED)


def overlapping_results(ranks):
    """Two micro-batches are under way when the rank is missed."""
    buffer = _state["overlapping"]
    with_hook = {"use_fp8": False, "return_recv_hook": True}
    full = [make_case(ranks, seed=seed, tokens=(20, 13, 5, 7)) for seed in (6, 7)]
    results = [send(buffer, case, ranks.rank, **with_hook) for case in full]
    for arrived in results:
        arrived[4]()
    cases = [without(make_case(ranks, seed=seed, tokens=(20, 13, 5, 7)), KILLED) for seed in (6, 7)]
    combined = []
    for case, arrived, given in zip(cases, results, full):
        check_arrived(case, ranks.rank, arrived)
        combined.append(combine(buffer, given, ranks.rank, expert_rows(case, arrived), arrived, return_recv_hook=True))
    for case, (out, _, hook) in zip(cases, combined):
        hook()
        check_combined(case, ranks.rank, out)
    assert masked_ranks(buffer, ranks.num_ranks) == list(KILLED)


def between_dispatch_and_combine(ranks):
    """Experts have worked on rows of a rank that is gone: the others' results come back, its experts' shares are missing."""
    buffer, case, arrived = _state["in between"], _state["case"], _state["arrived"]
    rows = expert_rows(case, arrived)
    left = without(make_case(ranks, tokens=(20, 13, 5, 7)), KILLED)
    for with_hook in (False, True):
        combined, _, hook = combine(buffer, case, ranks.rank, rows, arrived, return_recv_hook=with_hook)
        if hook is not None:
            hook()
        check_combined(left, ranks.rank, combined)


CHECKS = {
    check.__name__: check
    for check in (
        everybody,
        overlapping_micro_batches,
        a_rank_comes_back,
        a_rank_comes_back_from_a_hook,
        masked_between_dispatch_and_combine,
        a_rank_is_killed,
        the_others_go_on,
        left_out_by_hand,
        overlapping_results,
        between_dispatch_and_combine,
    )
}
