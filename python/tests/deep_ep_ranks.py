# SPDX-License-Identifier: Apache-2.0
"""Runs the checks of one of the deep_ep_checks_*.py with ranks as processes over gloo, and writes a line for each check and rank.

    TERN_DEEP_EP_DEVICE=cpu [TERN_RANKS_PER_NODE=N] python deep_ep_ranks.py MODULE NUM_RANKS RESULTS

torch is imported once, and the ranks are forked before it does anything. Where a check fails on one rank the others run into Tern's
deadline; all meet again before the next one.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import json
import os
import signal
import socket
import sys
import time
import traceback

DEADLINE_S = 120


class Ranks:
    """What a check gets: who it is, and Buffers of all ranks."""

    def __init__(self, rank, num_ranks, group):
        self.rank, self.num_ranks, self.group = rank, num_ranks, group

    def buffer(self, num_nvl_bytes=0, num_rdma_bytes=0, **options):
        import deep_ep

        return self.on_device(deep_ep.Buffer(self.group, num_nvl_bytes, num_rdma_bytes, **options))

    def on_device(self, buffer):
        """For the CPU tensors of the checks."""
        from deep_ep_device import DeviceBuffer

        return buffer if os.environ["TERN_DEEP_EP_DEVICE"] == "cpu" else DeviceBuffer(buffer)

    def own_stream(self):
        """Within it the current stream is a fresh one, on the device that is current now; also in another thread."""
        import torch

        on_cpu = os.environ["TERN_DEEP_EP_DEVICE"] == "cpu"
        return contextlib.nullcontext() if on_cpu else torch.cuda.stream(torch.cuda.Stream())

    def normal(self, hidden=512, **options):
        import deep_ep

        config = deep_ep.Config(num_max_rdma_chunked_recv_tokens=4)  # between nodes batches take several rounds
        sizes = config.get_nvl_buffer_size_hint, config.get_rdma_buffer_size_hint
        return self.buffer(*(size(2 * hidden, self.num_ranks) for size in sizes), **options)

    def low_latency(self, case, most, **options):
        import deep_ep

        size = deep_ep.Buffer.get_low_latency_rdma_size_hint(most, case.hidden, self.num_ranks, case.num_experts)
        return self.buffer(0, size, low_latency_mode=True, **options)

    def barrier(self):
        import torch.distributed as dist

        dist.barrier(self.group)


def run_rank(module, rank, num_ranks, port, path):
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if os.environ["TERN_DEEP_EP_DEVICE"] == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    minute = datetime.timedelta(seconds=60)
    store = dist.TCPStore("127.0.0.1", port, num_ranks, rank == 0, minute)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=minute)
    ranks = Ranks(rank, num_ranks, dist.group.WORLD)
    with open(f"{path}.{rank}", "w") as results:
        for name, check in module.CHECKS.items():
            if not module.KILLED:
                ranks.barrier()
            begin = time.monotonic()
            try:
                check(ranks)
                error = ""
            except BaseException:  # noqa: BLE001, reported
                error = traceback.format_exc()
            results.write(
                json.dumps({"check": name, "rank": rank, "error": error, "seconds": time.monotonic() - begin}) + "\n"
            )
            results.flush()
    if not module.KILLED:
        ranks.barrier()  # rank 0 has the store, which the others still need
    os._exit(0)  # not by way of gloo's threads, which may wait for ranks that were killed


def main():
    name, num_ranks, path = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    module = importlib.import_module(name)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(num_ranks):
        pid = os.fork()
        if pid == 0:
            run_rank(module, rank, num_ranks, port, path)
        children.append(pid)
    end = time.monotonic() + DEADLINE_S
    running = set(children)
    while running and time.monotonic() < end:
        for pid in list(running):
            if os.waitpid(pid, os.WNOHANG)[0]:
                running.discard(pid)
        time.sleep(0.02)
    for pid in running:
        os.kill(pid, signal.SIGKILL)
    return 1 if running else 0


if __name__ == "__main__":
    sys.exit(main())
