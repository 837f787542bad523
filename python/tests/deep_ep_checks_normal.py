# SPDX-License-Identifier: Apache-2.0
"""Normal mode, rank by rank. Run by deep_ep_ranks.py."""

from __future__ import annotations

import os

import torch
from deep_ep import Buffer, Config, EventOverlap
from deep_ep_oracle import FP8, Case, diff, stack

KILLED = ()
TIMEOUT_MS = 20_000


def make_case(ranks, hidden=512, num_topk=4, num_experts=24, seed=1, tokens=(17, 33, 0, 9)):
    return Case(ranks.num_ranks, list(tokens[: ranks.num_ranks]), hidden, num_topk, num_experts, seed)


def send(buffer, case, rank, x=None, **options):
    own = case.all[rank]
    per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(own.topk_idx, case.num_experts)
    return buffer.dispatch(
        own.x if x is None else x,
        topk_idx=own.topk_idx,
        topk_weights=own.topk_weights,
        num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_node,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        **options,
    )


def check_received(case, rank, received, alignment=1):
    recv_x, recv_idx, recv_weights, counts, handle, _ = received
    messages = case.messages(rank)
    assert recv_x.shape == (len(messages), case.hidden) and recv_x.dtype == torch.bfloat16
    assert torch.equal(recv_x, stack([case.all[s].x[t] for s, t in messages], recv_x, (case.hidden,)))
    assert recv_idx.dtype == torch.int64 and recv_weights.dtype == torch.float32
    for row, (s, t) in enumerate(messages):
        idx, weights = case.local_topk(rank, s, t)
        assert torch.equal(recv_idx[row], idx) and torch.equal(recv_weights[row], weights)
    entries = [len(case.entries(rank, local)) for local in range(case.num_local)]
    assert counts == [-(-count // alignment) * alignment for count in entries]
    assert all(type(count) is int for count in counts)
    if case.num_nodes > 1:
        check_handle_between_nodes(case, rank, handle)
        return
    check_handle_in_node(case, rank, handle)


def check_handle_in_node(case, rank, handle):
    """Its six elements, by position, by name, and as a tuple."""
    messages, tokens = case.messages(rank), range(case.num_tokens[rank])
    assert isinstance(handle, tuple) and len(handle) == 6
    matrix, sent, channel, tokens_of_rows, in_rank, head = handle
    names = (
        "rank_prefix_matrix channel_prefix_matrix recv_channel_prefix_matrix recv_src_idx is_token_in_rank send_head"
    )
    for position, name in enumerate(names.split()):
        assert handle[position] is getattr(handle, name) and handle[position - 6] is handle[position]
    assert handle[1:3] == (sent, channel) and handle == handle and hash(handle) == hash(handle)
    goes = [[r in case.ranks_of(rank, t) for r in range(case.num_ranks)] for t in tokens]
    assert in_rank.tolist() == goes and head.tolist() == [[int(one) - 1 for one in row] for row in goes]
    assert sent.tolist() == [[sum(row[r] for row in goes)] for r in range(case.num_ranks)]
    assert channel.tolist() == [[0]] * case.num_ranks
    assert tokens_of_rows[: len(messages)].tolist() == [t for _, t in messages]
    assert matrix.dtype == torch.int32 and matrix.shape == (case.num_ranks, case.num_ranks)
    for i in range(case.num_ranks):
        assert int(matrix[i][rank]) == sum(1 for s, _ in messages if s <= i)


def check_handle_between_nodes(case, rank, handle):
    """Its ten elements, in order. All rows count as one channel."""
    messages, tokens = case.messages(rank), range(case.num_tokens[rank])
    in_rank = [[r in case.ranks_of(rank, t) for r in range(case.num_ranks)] for t in tokens]
    in_node = [[n in case.nodes_of(rank, t) for n in range(case.num_nodes)] for t in tokens]
    until = [sum(1 for s, _ in messages if s <= i) for i in range(case.num_ranks)]
    sources = [[s // case.ranks_per_node, t] for s, t in messages]
    unused = handle[7].shape[0] - len(messages)  # with num_worst_tokens
    # What this rank passes on: of itself and of the rank at its place in every other node.
    own_node, first = rank // case.ranks_per_node, rank // case.ranks_per_node * case.ranks_per_node
    passed = [[], []]  # by node: how many; by token: to which ranks of the node
    for node in range(case.num_nodes):
        rail = node * case.ranks_per_node + rank % case.ranks_per_node
        here = [t for t in range(case.num_tokens[rail]) if own_node in case.nodes_of(rail, t)]
        passed[0].append(len(here))
        passed[1] += [
            [0 if first + i in case.ranks_of(rail, t) else -1 for i in range(case.ranks_per_node)] for t in here
        ]
    if os.environ["TERN_DEEP_EP_DEVICE"] == "cuda":  # the host does not know
        passed = [[0] * case.num_nodes, []]
    assert isinstance(handle, tuple) and len(handle) == 10
    expected = (
        (torch.bool, (len(tokens), case.num_ranks), in_rank),
        (torch.int32, (case.num_nodes, 1), [[sum(row[n] for row in in_node)] for n in range(case.num_nodes)]),
        (torch.int32, (case.num_ranks, 1), [[sum(row[r] for row in in_rank)] for r in range(case.num_ranks)]),
        (torch.int32, (case.num_nodes, 1), [[count] for count in passed[0]]),
        (torch.int32, (case.num_nodes,), [sum(passed[0][: n + 1]) for n in range(case.num_nodes)]),
        (torch.int32, (case.num_ranks, 1), [[first] for first in (0, *until[:-1])]),
        (torch.int32, (case.num_ranks,), until),
        (torch.int32, (len(messages) + unused, 2), sources + [[-1, -1]] * unused),
        (torch.int32, (len(tokens), case.num_nodes), [[0 if there else -1 for there in row] for row in in_node]),
        (torch.int32, (sum(passed[0]), case.ranks_per_node), passed[1]),
    )
    assert handle[7].dtype == torch.uint8 and handle[7].shape[1] == 8
    elements = (*handle[:7], handle[7].view(torch.int32), *handle[8:])
    for position, (element, (dtype, shape, values)) in enumerate(zip(elements, expected)):
        assert element.dtype == dtype and tuple(element.shape) == shape, (position, element)
        assert element.tolist() == values, (position, element, values)
    assert handle[-4] is handle[6]


def copies(case, rank):
    """How many ranks each token of this rank goes to."""
    return torch.tensor([len(case.ranks_of(rank, t)) for t in range(case.num_tokens[rank])]).view(-1, 1)


def expect_sum(case, rank, combined, rows=None):
    """Of the rows as they were sent."""
    want = (case.all[rank].x if rows is None else rows).float() * copies(case, rank)
    assert combined.dtype == torch.bfloat16 and combined.shape == want.shape and diff(combined, want) < 5e-6


def refused(call, word):
    """The text of the refusal."""
    try:
        call()
    except RuntimeError as error:
        assert word in str(error), error
        return str(error)
    raise AssertionError(f"must be refused, with a text that says {word!r}")


def layout(ranks):
    case = make_case(ranks).with_duplicates()
    buffer = ranks.normal()
    own = case.all[ranks.rank]
    per_rank, per_node, per_expert, in_rank, event = buffer.get_dispatch_layout(own.topk_idx, case.num_experts)
    assert isinstance(event, EventOverlap) and event.event is None
    assert per_rank.dtype == per_expert.dtype == torch.int32 and in_rank.dtype == torch.bool
    tokens = range(case.num_tokens[ranks.rank])
    if case.num_nodes == 1:
        assert per_node is None
    else:
        assert per_node.dtype == torch.int32 and per_node.shape == (case.num_nodes,)
        for n in range(case.num_nodes):
            assert int(per_node[n]) == sum(n in case.nodes_of(ranks.rank, t) for t in tokens)
    for r in range(case.num_ranks):
        assert [bool(in_rank[t, r]) for t in tokens] == [r in case.ranks_of(ranks.rank, t) for t in tokens]
        assert int(per_rank[r]) == sum(r in case.ranks_of(ranks.rank, t) for t in tokens)
    assert per_expert.tolist() == [int((own.topk_idx == e).sum()) for e in range(case.num_experts)]
    event = buffer.get_dispatch_layout(own.topk_idx, case.num_experts, Buffer.capture(), True, True)[4]
    assert event.event is not None
    event.current_stream_wait()
    refused(lambda: buffer.get_dispatch_layout(own.topk_idx, 24 + 1), "divisible")


def round_trip(ranks):
    buffer = ranks.normal()
    for seed, alignment in ((1, 1), (2, 128)):
        case = make_case(ranks, seed=seed).with_duplicates()
        received = send(buffer, case, ranks.rank, expert_alignment=alignment)
        check_received(case, ranks.rank, received, alignment)
        assert received[5].event is None
        combined, weights, event = buffer.combine(received[0], received[4], topk_weights=received[2])
        expect_sum(case, ranks.rank, combined)
        own = case.all[ranks.rank]
        assert torch.equal(weights, torch.where(own.topk_idx >= 0, own.topk_weights, 0.0)) and event.event is None


def events_and_streams(ranks):
    case = make_case(ranks)
    buffer = ranks.normal()
    own = case.all[ranks.rank]
    event = buffer.get_dispatch_layout(own.topk_idx, case.num_experts, Buffer.capture(), True, True)[4]
    comm = {"async_finish": True, "allocate_on_comm_stream": True}
    received = send(buffer, case, ranks.rank, previous_event=event, **comm)
    assert received[5].event is not None
    with received[5]:
        pass
    check_received(case, ranks.rank, received)
    combined, _, event = buffer.combine(
        received[0], received[4], previous_event=Buffer.capture(), async_finish=True, config=Config(num_sms=24)
    )
    event.current_stream_wait()
    expect_sum(case, ranks.rank, combined)
    for wrong in ({"async_finish": True}, {"previous_event": Buffer.capture()}, {}):
        refused(lambda w=wrong: send(buffer, case, ranks.rank, allocate_on_comm_stream=True, **w), "previous_event")
    assert buffer.get_comm_stream() is not None


def fp8_and_other_types(ranks):
    case = make_case(ranks)
    buffer = ranks.normal()
    messages = case.messages(ranks.rank)
    count = case.num_tokens[ranks.rank]
    x = case.all[ranks.rank].x

    def scales_of(s, number, dtype):
        return (torch.arange(case.num_tokens[s] * number) * 7 + s * 1000).view(-1, number).to(dtype)

    for number, dtype in ((4, torch.float32), (3, torch.int32), (1, torch.float32)):
        own = scales_of(ranks.rank, number, dtype)
        wide = torch.zeros((count, 2 * number + 1), dtype=dtype)
        wide[:, 0 : 2 * number : 2] = own
        variants = [own, own.t().contiguous().t(), wide[:, 0 : 2 * number : 2]]
        if number == 1:
            variants.append(own.squeeze(1))
        for scales in variants:
            (rows, got), *_, handle, _ = send(buffer, case, ranks.rank, x=(x.to(FP8), scales))
            want = stack([case.all[s].x[t].to(FP8).view(torch.uint8) for s, t in messages], x.view(torch.uint8), (512,))
            assert rows.dtype == FP8 and torch.equal(rows.view(torch.uint8), want)
            want = stack([scales_of(s, number, dtype)[t] for s, t in messages], own, (number,))
            assert got.dtype == dtype and torch.equal(got, want.squeeze(1) if scales.dim() == 1 else want)
            again = buffer.dispatch((x.to(FP8), scales), handle=handle)
            assert again[1:5] == (None,) * 4 and torch.equal(again[0][1], got)
    for dtype in (torch.float32, torch.float16, torch.int8, torch.int64):
        rows = send(buffer, case, ranks.rank, x=x.to(dtype))[0]
        assert rows.dtype == dtype
        assert torch.equal(rows, stack([case.all[s].x[t].to(dtype) for s, t in messages], rows, (512,)))


def strided_tokens(ranks):
    case = make_case(ranks)
    buffer = ranks.normal()
    own = case.all[ranks.rank].x
    wide = torch.zeros((own.shape[0], 1024), dtype=torch.bfloat16)
    wide[:, 256:768] = own
    check_received(case, ranks.rank, send(buffer, case, ranks.rank, x=wide[:, 256:768]))
    received = send(buffer, case, ranks.rank, x=own.t().contiguous().t())
    check_received(case, ranks.rank, received)
    combined, _, _ = buffer.combine(received[0].t().contiguous().t(), received[4])
    expect_sum(case, ranks.rank, combined)


def cached_both_ways(ranks):
    """A training step: the backward of dispatch is a combine with weights, that of combine a dispatch."""
    buffer = ranks.normal()
    case, other = make_case(ranks), make_case(ranks, seed=9)
    received = send(buffer, case, ranks.rank)
    handle = received[4]
    own, grads = case.all[ranks.rank], other.all[ranks.rank]
    buffer.combine(received[0], handle)
    again = buffer.dispatch(grads.x, handle=handle)
    assert again[1:5] == (None,) * 4
    messages = case.messages(ranks.rank)
    assert torch.equal(again[0], stack([other.all[s].x[t] for s, t in messages], again[0], (case.hidden,)))
    grad_x, grad_weights, _ = buffer.combine(again[0], handle, topk_weights=received[2] * 2)
    expect_sum(case, ranks.rank, grad_x, grads.x)
    assert diff(grad_weights, torch.where(own.topk_idx >= 0, own.topk_weights * 2, 0.0)) < 1e-9
    both = {"topk_idx": own.topk_idx, "topk_weights": own.topk_weights}
    refused(lambda: buffer.dispatch(grads.x, handle=handle, **both), "handle")


def many_handles(ranks):
    """One for each layer, all alive, and used backwards."""
    buffer = ranks.normal()
    cases = [make_case(ranks, seed=seed, tokens=(16, 12, 0, 9)) for seed in range(6)]
    for _ in range(3):
        layers = [send(buffer, case, ranks.rank) for case in cases]
        for case, received in reversed(list(zip(cases, layers))):
            check_received(case, ranks.rank, received)
            expect_sum(case, ranks.rank, buffer.combine(received[0], received[4])[0])
        del layers, received
    shelves = buffer._normal._plans._shelves.values()
    assert sum(len(shelf.idle) for shelf in shelves) == len(cases), "plans are used again"


def worst_case_rows(ranks):
    buffer = ranks.normal()
    case = make_case(ranks)
    num_rows = sum(case.num_tokens) + 5
    received = send(buffer, case, ranks.rank, num_worst_tokens=num_rows)
    recv_x, recv_idx, recv_weights, counts, handle, _ = received
    count = len(case.messages(ranks.rank))
    assert recv_x.shape[0] == recv_idx.shape[0] == recv_weights.shape[0] == num_rows and counts == []
    full = [len(case.entries(ranks.rank, local)) for local in range(case.num_local)]
    check_received(case, ranks.rank, (recv_x[:count], recv_idx[:count], recv_weights[:count], full, handle, None))
    assert bool((recv_idx[count:] == -1).all())
    again = buffer.dispatch(case.all[ranks.rank].x, handle=handle)[0]
    assert again.shape[0] == num_rows and torch.equal(again[:count], recv_x[:count])
    combined, weights, _ = buffer.combine(recv_x, handle, topk_weights=recv_weights)
    expect_sum(case, ranks.rank, combined)
    own = case.all[ranks.rank]
    assert torch.equal(weights, torch.where(own.topk_idx >= 0, own.topk_weights, 0.0))


def known_most_tokens(ranks):
    os.environ["TERN_DEEP_EP_MAX_TOKENS"] = "64"
    try:
        worst_case_rows(ranks)
        round_trip(ranks)
    finally:
        del os.environ["TERN_DEEP_EP_MAX_TOKENS"]


def routing_by_ranks(ranks):
    """No top-k: the layout that is given decides."""
    buffer = ranks.normal()
    case = make_case(ranks)
    own = case.all[ranks.rank]
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(own.topk_idx, case.num_experts)
    recv_x, idx, weights, counts, handle, _ = buffer.dispatch(
        own.x, None, per_rank, None, in_rank, per_expert, expert_alignment=8
    )
    assert idx is None and weights is None
    messages = case.messages(ranks.rank)
    assert torch.equal(recv_x, stack([case.all[s].x[t] for s, t in messages], recv_x, (case.hidden,)))
    assert counts == [-(-len(case.entries(ranks.rank, local)) // 8) * 8 for local in range(case.num_local)]
    row_weights = torch.tensor([[s + 1.0, t, 0.5] for s, t in messages]).view(-1, 3)
    combined, summed, _ = buffer.combine(recv_x, handle, topk_weights=row_weights)
    expect_sum(case, ranks.rank, combined)
    sent = torch.tensor([[ranks.rank + 1.0, t, 0.5] for t in range(own.x.shape[0])]).view(-1, 3)
    assert torch.equal(summed, sent * copies(case, ranks.rank))


def biases(ranks):
    buffer = ranks.normal()
    case = make_case(ranks)
    received = send(buffer, case, ranks.rank)
    own = case.all[ranks.rank].x
    first, second = own * 3, own * -5
    total = own.float() * copies(case, ranks.rank)
    for bias, added in ((first, first), ((first, second), first.float() + second), (None, 0)):
        combined, weights, _ = buffer.combine(received[0], received[4], bias=bias)
        assert weights is None
        assert diff(combined, total + added) < 5e-6


def no_tokens_anywhere(ranks):
    buffer = ranks.normal()
    case = make_case(ranks, tokens=(0, 0, 0, 0))
    received = send(buffer, case, ranks.rank)
    check_received(case, ranks.rank, received)
    assert buffer.combine(received[0], received[4])[0].shape == (0, case.hidden)
    nowhere = make_case(ranks)
    for inputs in nowhere.all:
        inputs.topk_idx.fill_(-1)
    received = send(buffer, nowhere, ranks.rank)
    assert received[0].shape == (0, nowhere.hidden)
    combined = buffer.combine(received[0], received[4])[0]
    assert not combined.any() and combined.shape[0] == nowhere.num_tokens[ranks.rank]


def long_topk(ranks):
    buffer = ranks.normal(hidden=64)
    case = make_case(ranks, hidden=64, num_topk=48, num_experts=24)
    received = send(buffer, case, ranks.rank)
    check_received(case, ranks.rank, received)
    expect_sum(case, ranks.rank, buffer.combine(received[0], received[4])[0])


def changing_shapes(ranks):
    """Odd hidden sizes, numbers of tokens, experts and top-k on one buffer."""
    buffer = ranks.normal(hidden=1024)
    shapes = ((8, 1, 12, (1, 0, 0, 2)), (520, 3, 36, (70, 5, 33, 1)), (1000, 8, 12, (0, 64, 2, 3)))
    for hidden, num_topk, num_experts, tokens in shapes:
        case = make_case(ranks, hidden=hidden, num_topk=num_topk, num_experts=num_experts, tokens=tokens)
        received = send(buffer, case, ranks.rank)
        check_received(case, ranks.rank, received)
        expect_sum(case, ranks.rank, buffer.combine(received[0], received[4])[0])


def small_buffers(ranks):
    """The error says how many bytes are enough, and they are."""
    case = make_case(ranks, hidden=16384, tokens=(70, 33, 0, 9))
    refused(lambda: ranks.buffer(1), "num_nvl_bytes is 1")
    small_bytes = ranks.num_ranks << 16
    small = ranks.buffer(small_bytes)

    def round_trip():
        # GPU ranks stage a token once for all ranks that it goes to: a dispatch may fit where its combine does not.
        received = send(small, case, ranks.rank)
        small.combine(received[0], received[4])

    words = refused(round_trip, f"num_nvl_bytes {small_bytes}").split()
    buffer = ranks.buffer(int(words[words.index("enough,") - 2]))
    received = send(buffer, case, ranks.rank)
    check_received(case, ranks.rank, received)
    expect_sum(case, ranks.rank, buffer.combine(received[0], received[4])[0])


def bad_calls(ranks):
    buffer = ranks.normal()
    case = make_case(ranks)
    own = case.all[ranks.rank]
    _, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(own.topk_idx, case.num_experts)
    good = {"topk_idx": own.topk_idx, "topk_weights": own.topk_weights, "num_tokens_per_expert": per_expert}
    none = {"topk_idx": None, "topk_weights": None}
    for change, word in (
        ({"topk_weights": None}, "together"),
        ({"topk_idx": None}, "together"),
        ({"num_tokens_per_expert": None}, "num_tokens_per_expert"),
        ({"topk_idx": own.topk_idx.float()}, "int64"),
        (none, "is_token_in_rank"),
        ({**none, "is_token_in_rank": in_rank, "num_worst_tokens": 8}, "num_worst_tokens"),
        ({**none, "handle": (1, 2, 3)}, "handle"),
    ):
        refused(lambda c=change: buffer.dispatch(own.x, **{**good, **c}), word)
    assert buffer.dispatch(own.x, **good)[0].shape[0] == len(case.messages(ranks.rank))


CHECKS = {
    check.__name__: check
    for check in (
        layout,
        round_trip,
        events_and_streams,
        fp8_and_other_types,
        strided_tokens,
        cached_both_ways,
        many_handles,
        worst_case_rows,
        known_most_tokens,
        routing_by_ranks,
        biases,
        no_tokens_anywhere,
        long_topk,
        changing_shapes,
        small_buffers,
        bad_calls,
    )
}
