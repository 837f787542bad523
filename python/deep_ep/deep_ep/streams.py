# SPDX-License-Identifier: Apache-2.0
"""On which stream an operation runs, and who waits for it. What the module knows of CUDA streams is here, but for
their events: events.py.

An operation that the caller's stream waits for anyway runs on that stream. One that is to overlap with it, or to begin behind another
event, runs on the buffer's communication stream, and so do the small torch operations around it: their outputs come from that
stream's share of torch's allocator, and `record_stream` tells it who else uses them. CPU ranks have no streams.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass, field
from typing import Any, Callable, Iterator, Optional

import tern
import torch

from .events import EventHandle, EventOverlap

NORMAL_LANE = -1
LOCAL = None  # no lane: nothing is exchanged with other ranks


@dataclass(frozen=True)
class Order:
    """The arguments of that name, which all operations in normal mode take."""

    previous_event: Optional[EventOverlap] = None
    async_finish: bool = False
    allocate_on_comm_stream: bool = False

    @property
    def awaited(self) -> Optional[EventHandle]:
        return getattr(self.previous_event, "event", None)

    def check(self) -> None:
        if self.allocate_on_comm_stream and (self.awaited is None or not self.async_finish):
            raise tern.InvalidArgumentError(
                "allocate_on_comm_stream needs a previous_event that holds an event, and async_finish=True; "
                f"previous_event is {self.previous_event}, async_finish is {self.async_finish}"
            )


@dataclass
class Work:
    """One operation: which tensors it reads and makes, and, when it is under way, the event behind it."""

    inputs: list[Any] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    event: Optional[EventHandle] = None

    def overlap(self) -> EventOverlap:
        if self.event is None:
            return EventOverlap()
        return EventOverlap(self.event, tuple(t for t in (*self.inputs, *self.outputs) if t is not None))


class HostStreams:
    """Of CPU ranks: everything is done when the call returns."""

    def __init__(self) -> None:
        self.comm_stream: Any = torch.cpu.Stream()
        self.num_sms = 0

    @contextlib.contextmanager
    def run(self, order: Order, lane: Optional[int]) -> Iterator[Work]:
        order.check()
        work = Work()
        yield work
        if order.async_finish:
            work.event = EventHandle()

    def current(self, lane: Optional[int]) -> Any:
        return None

    def current_handle(self) -> int:
        return 0

    def on(self, stream: Any) -> Any:
        return contextlib.nullcontext()

    def follow(self, lane: Optional[int]) -> None:
        pass

    def enter(self, lane: int) -> int:
        return 0

    def is_capturing(self) -> bool:
        return False


class CudaStreams:
    """Of GPU ranks. Lanes: NORMAL_LANE, and those of low-latency mode."""

    def __init__(self, device: torch.device, num_lanes: int) -> None:
        self._device = device
        cuda: Any = torch.cuda
        # One for each lane, as the order of lanes may be another on each rank. Normal mode has the first.
        self._comm_streams: list[Any] = [cuda.Stream(device) for _ in range(num_lanes)]
        self.comm_stream: Any = self._comm_streams[0]
        self.num_sms: int = cuda.get_device_properties(device).multi_processor_count
        self._last: dict[Optional[int], Any] = {}  # by lane: the stream that its last operation was on
        # What torch.cuda asks too, without what is in between; an object of a stream takes microseconds.
        self.is_capturing: Callable[[], bool] = getattr(
            torch._C, "_cuda_isCurrentStreamCapturing", cuda.is_current_stream_capturing
        )
        raw_stream = getattr(
            torch._C, "_cuda_getCurrentRawStream", lambda index: cuda.current_stream(index).cuda_stream
        )
        self.current_handle: Callable[[], int] = functools.partial(raw_stream, device.index)
        self._current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", cuda.current_device)

    @contextlib.contextmanager
    def run(self, order: Order, lane: Optional[int]) -> Iterator[Work]:
        """What is done inside runs behind the order's event, or else behind what is on the caller's stream.

        Behind it the caller's stream waits, or with async_finish work.event is there. Append to work.inputs and
        work.outputs what the operation reads and what it hands out. lane: whose operations it follows; LOCAL: nobody's.
        """
        order.check()
        awaited = order.awaited
        work = Work()
        if awaited is None and not order.async_finish:
            self.follow(lane)
            yield work
            return
        caller, comm = torch.cuda.current_stream(self._device), self._comm_streams[max(lane or 0, 0)]
        if awaited is not None and awaited.event is not None:
            comm.wait_event(awaited.event)
        else:
            comm.wait_stream(caller)
        with torch.cuda.stream(comm):
            self.follow(lane)
            yield work
            if order.async_finish:
                work.event = EventHandle(comm)
        if order.async_finish:
            for tensor in work.inputs:
                if tensor is not None:
                    tensor.record_stream(comm)
        else:
            caller.wait_stream(comm)
        for tensor in work.outputs:
            if tensor is not None:
                tensor.record_stream(caller)

    def current(self, lane: Optional[int]) -> Any:
        """lane: its stream is the current one, as a rule."""
        last = self._last.get(lane)
        if last is not None and last.cuda_stream == self.current_handle():
            return last
        return torch.cuda.current_stream(self._device)

    def on(self, stream: Any) -> Any:
        is_current = stream.cuda_stream == self.current_handle() and self._current_device() == self._device.index
        return contextlib.nullcontext() if is_current else torch.cuda.stream(stream)

    def follow(self, lane: Optional[int]) -> None:
        """Operations of a lane must run in the order of their calls, so the current stream waits for the one that the
        last was on.

        Not while a graph is captured: what is captured is ordered by the graph itself, and must not wait for anything
            outside of it.
        """
        if lane is not LOCAL and not self.is_capturing():
            self.enter(lane)

    def enter(self, lane: int) -> int:
        """`follow` where no graph is captured. Returns the handle of the current stream."""
        handle, last = self.current_handle(), self._last.get(lane)
        if last is None or last.cuda_stream != handle:
            stream = self._last[lane] = torch.cuda.current_stream(self._device)
            if last is not None:
                stream.wait_stream(last)
        return handle
