# SPDX-License-Identifier: Apache-2.0
"""Ranks on several nodes, which are declared on one host (TERN_RANKS_PER_NODE). Run by deep_ep_ranks.py.

Much of it is what the other checks do inside one node: deep_ep_oracle.Case knows how many nodes there are.
"""

from __future__ import annotations

import os
from unittest import mock

import deep_ep_checks_low_latency as low_latency
import deep_ep_checks_normal as normal
import deep_ep_checks_rules as rules
import tern
import torch
from deep_ep import Buffer, Config
from deep_ep_checks_normal import check_received, expect_sum, make_case, refused, send
from deep_ep_oracle import diff

KILLED = ()
TIMEOUT_MS = 20_000
KNOB = "TERN_DEEP_EP_COMBINE"


def scaled(rows, which):
    """What the experts of a rank, or one expert, make of rows: other bits from each, so that the order of sums shows."""
    return (rows.float() * (1.0 + 0.37 * which)).to(torch.bfloat16)


def sum_of_nodes(case, rank, parts, biases=()):
    """bf16 [T, H], bit by bit: the sums of the nodes, each rounded, in ascending order after the biases.

    parts(token, rank): f32 [H], what a rank sends for a token of this one.
    """
    own = case.all[rank].x
    combined = torch.zeros_like(own)
    for token in range(own.shape[0]):
        total = torch.zeros(case.hidden)
        for bias in biases:
            total += bias[token].float()
        for node in case.nodes_of(rank, token):
            of_node = torch.zeros(case.hidden)
            for r in case.ranks_of(rank, token):
                if r // case.ranks_per_node == node:
                    of_node += parts(token, r)
            total += of_node.to(torch.bfloat16).float()
        combined[token] = total.to(torch.bfloat16)
    return combined


def sums_in_two_levels(ranks):
    """Nodes one after the other, behind the biases; with the weights, and the same along a cached handle."""
    buffer = ranks.normal()
    case = make_case(ranks)
    own = case.all[ranks.rank]
    first, second = own.x * 3, own.x * -5
    received = send(buffer, case, ranks.rank)
    again = buffer.dispatch(own.x, handle=received[4])[0]
    assert torch.equal(again, received[0])

    def parts(token, r):
        return scaled(own.x[token], r).float()

    for bias, biases in ((None, ()), (first, (first,)), ((first, second), (first, second))):
        want = sum_of_nodes(case, ranks.rank, parts, biases)
        for rows in (received[0], again):
            rows = scaled(rows, ranks.rank)
            combined, weights, _ = buffer.combine(rows, received[4], topk_weights=received[2], bias=bias)
            assert torch.equal(combined, want)
            assert torch.equal(weights, torch.where(own.topk_idx >= 0, own.topk_weights, 0.0))


def as_frameworks_call(ranks):
    """Everything by position or by keyword, with the recommended configurations, and prefix sums by handle[-4]."""
    config = Buffer.get_dispatch_config(ranks.num_ranks)
    hidden_bytes = 1024
    buffer = ranks.on_device(
        Buffer(
            ranks.group,
            config.get_nvl_buffer_size_hint(hidden_bytes, ranks.num_ranks),
            config.get_rdma_buffer_size_hint(hidden_bytes, ranks.num_ranks),
            False,
            12,
        )
    )
    case = make_case(ranks)
    own = case.all[ranks.rank]
    layout = buffer.get_dispatch_layout(own.topk_idx, case.num_experts, None, True, False)
    per_rank, per_node, per_expert, in_rank, event = layout
    assert per_node.shape == (case.num_nodes,) and event.event is not None
    order = (config, event, True, True)
    received = buffer.dispatch(
        own.x, None, per_rank, per_node, in_rank, per_expert, own.topk_idx, own.topk_weights, 1, 0, *order
    )
    received[5].current_stream_wait()
    check_received(case, ranks.rank, received)
    until = received[4][-4].tolist()
    for source, (begin, end) in enumerate(zip([0, *until], until)):
        tokens = [t for t in range(case.num_tokens[source]) if ranks.rank in case.ranks_of(source, t)]
        assert torch.equal(received[0][begin:end], case.all[source].x[tokens])
    combined, weights, event = buffer.combine(
        received[0], received[4], received[2], None, Buffer.get_combine_config(ranks.num_ranks), Buffer.capture(), True
    )
    event.current_stream_wait()
    expect_sum(case, ranks.rank, combined)
    assert weights.shape == own.topk_weights.shape


def mistakes(ranks):
    buffer = ranks.normal()
    case = make_case(ranks)
    own = case.all[ranks.rank]
    per_rank, per_node, per_expert, _, _ = buffer.get_dispatch_layout(own.topk_idx, case.num_experts)
    good = {"topk_idx": own.topk_idx, "topk_weights": own.topk_weights, "num_tokens_per_expert": per_expert}
    wrong = torch.cat([per_node, per_node])
    refused(lambda: buffer.dispatch(own.x, num_tokens_per_rdma_rank=wrong, **good), "num_tokens_per_rdma_rank")
    received = buffer.dispatch(own.x, num_tokens_per_rdma_rank=per_node, **good)
    check_received(case, ranks.rank, received)
    refused(lambda: buffer.combine(received[0], tuple(received[4])), "without a plan")
    refused(lambda: buffer.dispatch(own.x, handle=tuple(received[4])), "without a plan")
    refused(lambda: buffer.dispatch(own.x, handle=received[4], topk_idx=own.topk_idx), "handle")
    expect_sum(case, ranks.rank, buffer.combine(received[0], received[4])[0])


def bytes_for_the_network(ranks):
    """In num_rdma_bytes; or in num_nvl_bytes, where there are none or low-latency mode has them. Too few are an error
    that says how many are enough, and they are."""
    config, case = Config(), make_case(ranks, hidden=16384, tokens=(70, 33, 0, 9))
    nvl = config.get_nvl_buffer_size_hint(2 * case.hidden, ranks.num_ranks)
    assert config.get_rdma_buffer_size_hint(2 * case.hidden, ranks.num_ranks) > 0
    refused(lambda: ranks.buffer(nvl, 1), "num_rdma_bytes is 1;")
    small_bytes = ranks.num_ranks << 16
    for rdma_bytes, name in ((small_bytes, f"num_rdma_bytes {small_bytes}"), (0, "num_nvl_bytes")):
        small = ranks.buffer(small_bytes, rdma_bytes)
        try:
            send(small, case, ranks.rank)
        except tern.OutOfMemoryError as error:
            text = str(error)
        assert f"num_nvl_bytes {small_bytes}" in text and name in text, text
        words = text.split()
        enough = int(words[words.index("enough,") - 2])
        buffer = ranks.buffer(enough, enough if rdma_bytes > 0 else 0)
        received = send(buffer, case, ranks.rank)
        check_received(case, ranks.rank, received)
        expect_sum(case, ranks.rank, buffer.combine(received[0], received[4])[0])


def network_memory(ranks):
    """What is taken, for the network too, stays within the bytes that were given."""
    made = []

    def recorded(group, **options):
        made.append((group, options))
        return tern.Exchange(group, **options)

    nvl, rdma = Config().get_nvl_buffer_size_hint(1024, ranks.num_ranks), 64 << 20
    with mock.patch("deep_ep.normal.Exchange", recorded), mock.patch("deep_ep.low_latency.Exchange", recorded):
        for given, options in (((nvl, rdma), {}), ((nvl, rdma), {"low_latency_mode": True}), ((nvl, 0), {})):
            made.clear()
            ranks.buffer(*given, **options)
            assert len(made) == 1 + bool(options)
            taken = 0
            for group, wanted in made:
                sizes = {name: wanted[name] for name in wanted if name not in ("device", "timeout_ms")}
                memory = tern.Exchange.query_memory(group, device="cpu", **sizes)
                assert memory.staging_bytes > sizes["staging_bytes"], "nothing for the network"
                taken += memory.staging_bytes + memory.window_bytes
            assert taken <= sum(given)


def low_latency_sums(ranks):
    """By rank, by node, then over nodes; or with TERN_DEEP_EP_COMBINE=exact entry by entry. A hook changes nothing."""
    case = low_latency.make_case(ranks, seed=31)
    own = case.all[ranks.rank]
    size = Buffer.get_low_latency_rdma_size_hint(low_latency.MOST, case.hidden, ranks.num_ranks, case.num_experts)

    def total(token, r=None):
        """Of the entries of rank r, or of all of them, by ascending k."""
        found = torch.zeros(case.hidden)
        for expert, weight in zip(own.topk_idx[token].tolist(), own.topk_weights[token]):
            if expert >= 0 and r in (None, expert // case.num_local):
                found += weight * scaled(own.x[token], expert % case.num_local).float()
        return found

    by_node = sum_of_nodes(case, ranks.rank, lambda token, r: total(token, r).to(torch.bfloat16).float())
    by_entry = torch.zeros_like(own.x)
    for token in range(own.x.shape[0]):
        by_entry[token] = total(token).to(torch.bfloat16)
    try:
        for knob, want in (("auto", by_node), ("exact", by_entry)):
            os.environ[KNOB] = knob
            buffer = ranks.buffer(0, 4 * size, low_latency_mode=True)
            for with_hook in (False, True):
                arrived = low_latency.send(buffer, case, ranks.rank, use_fp8=False, return_recv_hook=with_hook)
                if with_hook:
                    arrived[4]()
                low_latency.check_arrived(case, ranks.rank, arrived)
                rows = torch.stack([scaled(arrived[0][e], e) for e in range(case.num_local)])
                options = {"return_recv_hook": with_hook}
                combined, _, hook = low_latency.combine(buffer, case, ranks.rank, rows, arrived, **options)
                if with_hook:
                    hook()
                assert torch.equal(combined, want), (knob, diff(combined, want))
    finally:
        del os.environ[KNOB]


OWN = (
    sums_in_two_levels,
    as_frameworks_call,
    mistakes,
    bytes_for_the_network,
    network_memory,
    low_latency_sums,
)
OF_OTHERS = {
    normal: (
        "layout",
        "round_trip",
        "events_and_streams",
        "fp8_and_other_types",
        "cached_both_ways",
        "worst_case_rows",
        "known_most_tokens",
        "routing_by_ranks",
        "biases",
        "no_tokens_anywhere",
        "changing_shapes",
    ),
    low_latency: (
        "encodings",
        "hooks",
        "async_finish",
        "zero_copy",
        "two_results_alive",
        "two_threads",
        "stats",
        "duplicates_and_nothing",
        "hinted_sizes_suffice",
        "small_buffers",
    ),
    rules: ("one_buffer_for_both_modes", "destroy", "by_communicator"),
}


def checks():
    for check in OWN:
        yield check.__name__, check
    for module, names in OF_OTHERS.items():
        part = module.__name__.replace("deep_ep_checks_", "")
        for name in names:
            yield f"{part}_{name}", module.CHECKS[name]


CHECKS = dict(checks())
