# SPDX-License-Identifier: Apache-2.0
"""A deep_ep.Buffer on a GPU that takes and returns CPU tensors, so that the checks for CPU ranks serve GPU ranks too."""

from __future__ import annotations

import functools

import tern
import torch
from deep_ep import EventOverlap

METHODS = (
    "get_dispatch_layout",
    "dispatch",
    "combine",
    "low_latency_dispatch",
    "low_latency_combine",
)
# Arguments that are written to.
OUTPUTS = (
    "out",
    "cumulative_local_expert_recv_stats",
    "dispatch_wait_recv_cost_stats",
    "combine_wait_recv_cost_stats",
)


class DeviceBuffer:
    """Everything but METHODS is the Buffer's own: memory that it hands out stays on the GPU, and so do tensors in handles."""

    def __init__(self, buffer):
        self._buffer, self._device = buffer, torch.device("cuda", torch.cuda.current_device())

    def __getattr__(self, name):
        attribute = getattr(self._buffer, name)
        return functools.partial(_call, attribute, self._device) if name in METHODS else attribute


def _call(method, device, *args, **kwargs):
    """What comes back holds when the operation has run: behind the call, or behind its hook.

    The host waits for the stream of the call alone: on others, operations of other threads may be waiting for what this one
    does next, here or on another rank.
    """
    pairs = []  # (on the device, here)
    torch.cuda.set_device(device)  # a new thread begins with device 0
    stream = torch.cuda.current_stream()
    given = {name: _there(value, device) for name, value in kwargs.items()}
    pairs += [(given[name], kwargs[name]) for name in OUTPUTS if kwargs.get(name) is not None]
    results = [_here(value, pairs) for value in method(*(_there(value, device) for value in args), **given)]

    def arrive():
        for event in results:
            if isinstance(event, EventOverlap):
                event.current_stream_wait()
        stream.synchronize()
        require_health(method.__self__)
        for source, target in pairs:
            target.copy_(source)

    hook = results[-1]
    if not callable(hook):
        arrive()
        return tuple(results)

    def hook_and_arrive():
        hook()
        arrive()

    return (*results[:-1], hook_and_arrive)


def require_health(buffer):
    """Operations that a failure has ended leave their outputs as they were."""
    for mode in (buffer._normal, buffer._low_latency):
        if mode is not None:
            state = mode.exchange.state()
            assert state.health != tern.Health.FAILED, state.failure


def _there(value, device):
    if isinstance(value, torch.Tensor):
        return value.to(device)
    return tuple(_there(one, device) for one in value) if type(value) is tuple else value


def _here(value, pairs):
    if isinstance(value, torch.Tensor):
        for source, target in pairs:
            if value is source:
                return target
        pairs.append((value, value.to("cpu", copy=True)))
        return pairs[-1][1]
    return tuple(_here(one, pairs) for one in value) if type(value) is tuple else value
