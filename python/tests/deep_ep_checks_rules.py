# SPDX-License-Identifier: Apache-2.0
"""Making, dropping and destroying buffers, and what belongs to no mode. Run by deep_ep_ranks.py."""

from __future__ import annotations

import gc
import weakref

import deep_ep_checks_low_latency as low_latency
import deep_ep_checks_normal as normal
import torch
import torch.distributed as dist
from deep_ep import Buffer, Config, EventHandle, EventOverlap

KILLED = ()
TIMEOUT_MS = 20_000


def sizes(ranks, case):
    nvl = Config().get_nvl_buffer_size_hint(2 * case.hidden, ranks.num_ranks)
    return nvl, Buffer.get_low_latency_rdma_size_hint(low_latency.MOST, case.hidden, ranks.num_ranks, case.num_experts)


def normal_trip(buffer, ranks, seed=1):
    case = normal.make_case(ranks, seed=seed)
    received = normal.send(buffer, case, ranks.rank)
    normal.check_received(case, ranks.rank, received)
    normal.expect_sum(case, ranks.rank, buffer.combine(received[0], received[4])[0])


def low_latency_trip(buffer, ranks, seed=1):
    case = low_latency.make_case(ranks, seed=seed)
    arrived = low_latency.send(buffer, case, ranks.rank, return_recv_hook=True)
    arrived[4]()
    low_latency.check_arrived(case, ranks.rank, arrived, "f32")
    rows = low_latency.expert_rows(case, arrived, "f32")
    low_latency.check_combined(case, ranks.rank, low_latency.combine(buffer, case, ranks.rank, rows, arrived)[0], 9e-4)


def attributes(ranks):
    buffer = Buffer(ranks.group, 8 << 20, 0)
    assert (buffer.group, buffer.rank, buffer.group_size) == (ranks.group, ranks.rank, ranks.num_ranks)
    assert (buffer.num_nvl_bytes, buffer.num_rdma_bytes) == (8 << 20, 0)
    assert not buffer.low_latency_mode and not buffer.explicitly_destroy and buffer.num_sms == 20
    every = Buffer(
        ranks.group,
        num_nvl_bytes=0,
        num_rdma_bytes=4 << 20,
        low_latency_mode=True,
        num_qps_per_rank=4,
        allow_nvlink_for_low_latency_mode=True,
        allow_mnnvl=False,
        use_fabric=False,
        explicitly_destroy=True,
        enable_shrink=False,
    )
    assert every.low_latency_mode and every.explicitly_destroy and every.num_rdma_bytes == 4 << 20
    every.destroy()


def one_buffer_for_both_modes(ranks):
    case = low_latency.make_case(ranks)
    buffer = ranks.buffer(*sizes(ranks, case), low_latency_mode=True)
    for seed in range(3):
        normal_trip(buffer, ranks, seed)
        buffer.clean_low_latency_buffer(low_latency.MOST, case.hidden, case.num_experts)
        low_latency_trip(buffer, ranks, seed)


def local_memory(ranks):
    case = low_latency.make_case(ranks)
    nvl, rdma = sizes(ranks, case)
    buffer = ranks.buffer(nvl, rdma, low_latency_mode=True)
    rows = low_latency.send(buffer, case, ranks.rank, use_fp8=False)
    for use_rdma_buffer, size in ((False, nvl), (True, rdma)):
        everything = buffer.get_local_buffer_tensor(torch.uint8, use_rdma_buffer=use_rdma_buffer)
        assert everything.numel() == size
        everything.zero_()
        part = buffer.get_local_buffer_tensor(torch.float32, torch.Size([4, 8]), 256, use_rdma_buffer)
        part.fill_(1.0)
        assert part.shape == (4, 8) and part.data_ptr() == everything.data_ptr() + 256
        assert (
            buffer.get_local_buffer_tensor(torch.int64, offset=size - 64, use_rdma_buffer=use_rdma_buffer).numel() == 8
        )
        wrong = {"size": (size + 1,), "use_rdma_buffer": use_rdma_buffer}
        normal.refused(lambda w=wrong: buffer.get_local_buffer_tensor(torch.uint8, **w), "bytes")
        normal.refused(lambda: buffer.get_local_buffer_tensor(torch.float32, offset=2), "aligned")
    low_latency.check_arrived(case, ranks.rank, rows)
    low_latency.check_combined(
        case, ranks.rank, low_latency.combine(buffer, case, ranks.rank, low_latency.expert_rows(case, rows), rows)[0]
    )
    normal_trip(buffer, ranks)


def destroy(ranks):
    case = low_latency.make_case(ranks)
    kept = ranks.normal()
    normal.refused(kept.destroy, "explicitly_destroy")
    buffer = ranks.buffer(*sizes(ranks, case), low_latency_mode=True, explicitly_destroy=True)
    normal_trip(buffer, ranks)
    arrived = low_latency.send(buffer, case, ranks.rank, use_fp8=False)
    if ranks.rank == 0:  # no collective: the others come later
        buffer.destroy()
    ranks.barrier()
    buffer.destroy()
    buffer.destroy()
    own = case.all[ranks.rank]
    for use in (
        lambda: normal_trip(buffer, ranks),
        lambda: buffer.get_local_buffer_tensor(torch.uint8),
        lambda: buffer.low_latency_combine(arrived[0], own.topk_idx, own.topk_weights, arrived[2]),
    ):
        normal.refused(use, "destroyed")
    normal_trip(kept, ranks)


def dropped_without_destroy(ranks):
    """In any order and at any time, with handles that live longer; frameworks regrow buffers in this way."""
    case = normal.make_case(ranks)
    buffer = ranks.normal(explicitly_destroy=True)
    received = normal.send(buffer, case, ranks.rank)
    exchange = weakref.ref(buffer._normal.exchange)
    other = ranks.normal(hidden=1024)
    normal.send(other, case, ranks.rank)
    if ranks.rank % 2 == 0:
        buffer = None
        gc.collect()
    ranks.barrier()
    buffer = other
    gc.collect()
    normal_trip(buffer, ranks)
    normal.check_received(case, ranks.rank, received)
    received = None
    gc.collect()
    assert exchange() is None, "the memory goes with the last handle"


def by_communicator(ranks):
    class Communicator:
        """As much of mpi4py as is asked for."""

        def Get_rank(self):  # noqa: N802
            return ranks.rank

        def Get_size(self):  # noqa: N802
            return ranks.num_ranks

        def allgather(self, own):
            gathered = [None] * ranks.num_ranks
            dist.all_gather_object(gathered, own, group=ranks.group)
            return gathered

    buffer = Buffer(None, Config().get_nvl_buffer_size_hint(1024, ranks.num_ranks), comm=Communicator())
    buffer = ranks.on_device(buffer)
    assert buffer.group is None and (buffer.rank, buffer.group_size) == (ranks.rank, ranks.num_ranks)
    normal_trip(buffer, ranks)


def part_of_the_job(ranks):
    """A group of some of the ranks, and one of a single rank."""
    pair, single = dist.new_group([0, 2]), [dist.new_group([rank]) for rank in range(ranks.num_ranks)][ranks.rank]
    for group in (pair, single):
        if group is pair and ranks.rank == 1:
            continue
        part = type(ranks)(group.rank(), group.size(), group)
        case = low_latency.make_case(part)
        buffer = part.buffer(*sizes(part, case), low_latency_mode=True)
        normal_trip(buffer, part)
        low_latency_trip(buffer, part)


def arguments_that_differ(ranks):
    normal.refused(lambda: ranks.buffer((8 + ranks.rank) << 20), "same options")
    normal_trip(ranks.normal(), ranks)


def no_masks_without_shrink(ranks):
    normal.refused(lambda: ranks.buffer(8 << 20, enable_shrink=True), "low_latency_mode")
    assert isinstance(EventOverlap(EventHandle()).event, EventHandle)


CHECKS = {
    check.__name__: check
    for check in (
        attributes,
        one_buffer_for_both_modes,
        local_memory,
        destroy,
        dropped_without_destroy,
        by_communicator,
        part_of_the_job,
        arguments_that_differ,
        no_masks_without_shrink,
    )
}
